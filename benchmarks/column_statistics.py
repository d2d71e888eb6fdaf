"""Statistics of a data set from columns, against a pass that decodes its images: CPU time, same data, same process.

  python benchmarks/column_statistics.py DATASET_DIR [--repeats=5] [--tfds] [--append_results]

Cells, each in a fresh process, interleaved:
  columns   scan of all shards (checksums verified), index written, statistics of actions, states and every float column
  decode    the same, and every image is decoded (libjpeg-turbo through simplejpeg, Pillow for PNG)
  tfds      what loaders without an index do: TFDS reads and decodes every episode, statistics of action and state
            (only with --tfds, which needs the `convert` extra)

One process, no worker, in every cell. Counted is CPU time (user and system, all threads) from the first byte read to
the last statistic, without imports; `cpu_s_with_imports` has them. The last line of stdout is JSON.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import loader_report  # noqa: E402

_REPEATS = flags.DEFINE_integer("repeats", 5, "processes per cell", lower_bound=1)
_TFDS = flags.DEFINE_bool("tfds", False, "measure a pass through TFDS too")
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")
_CELL = flags.DEFINE_enum("cell", None, ["columns", "decode", "tfds"], "measure this one, here (used internally)")


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) != 2:
        raise errors.UserError(f"usage: column_statistics.py DATASET_DIR (got {argv[1:]})")
    if _CELL.value:
        print(json.dumps(measure(_CELL.value, argv[1])))
        return 0
    cells = ["columns", "decode", *(["tfds"] if _TFDS.value else [])]
    runs: dict[str, list[dict]] = {cell: [] for cell in cells}
    for _ in range(_REPEATS.value):
        for cell in cells:
            command = [sys.executable, os.path.abspath(__file__), argv[1], f"--cell={cell}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            runs[cell].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{cell}: {runs[cell][-1]}", file=sys.stderr)
    result = summary(argv[1], runs)
    text = table(result)
    print(text)
    if _APPEND.value:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    print(json.dumps(result))
    return 0


def measure(cell: str, directory: str) -> dict:
    """One pass; returns frames, images and CPU seconds."""
    if cell == "tfds":
        import tensorflow_datasets as tfds

        imported = time.process_time()
        counts = _tfds(tfds, directory)
    else:
        from qdepth_jax.data import frame_reader, index, shard_scan  # noqa: F401 - decoders are imported in both cells

        imported = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            checks = shard_scan.Checks(images=cell == "decode")
            counts = _columns(index.open_index(directory, folder, workers=1, checks=checks))
    cpu = time.process_time()
    return {**counts, "cpu_s": round(cpu - imported, 4), "cpu_s_with_imports": round(cpu, 4)}


def _columns(opened) -> dict:
    """Statistics of every float column; returns what was counted."""
    from qdepth_jax.data import normalise, shard_scan

    frames = images = 0
    for split in opened.splits.values():
        frames += split.frames
        for feature in opened.dataset.features.values():
            if feature.kind == "image":
                images += len(split.spans(feature.name))
            elif feature.per_step and shard_scan.storage(feature) == "column":
                column = split.column(feature.name)
                if column.dtype.kind == "f" and column.ndim > 1:
                    normalise.compute(column.reshape(len(column), -1))
    return {"frames": frames, "images": images}


def _tfds(tfds, directory: str) -> dict:
    import numpy as np

    from qdepth_jax.data import normalise

    builder = tfds.builder_from_directory(directory)
    frames = images = 0
    for split in builder.info.splits:
        actions, states = [], []
        for episode in builder.as_dataset(split):
            for step in episode["steps"]:
                frames += 1
                actions.append(step["action"].numpy())
                states.append(step["observation"]["state"].numpy())
                images += sum(value.dtype == np.uint8 and value.ndim == 3 for value in step["observation"].values())
        normalise.compute(np.stack(actions))
        normalise.compute(np.stack(states))
    return {"frames": frames, "images": images}


def summary(directory: str, runs: dict[str, list[dict]]) -> dict:
    """Medians, spread and ratios of the runs."""
    import numpy as np

    base = np.array([run["cpu_s"] for run in runs["columns"]])
    frames = runs["columns"][0]["frames"]
    out = {
        "benchmark": "statistics",
        "data": os.path.basename(os.path.dirname(os.path.abspath(directory))),
        "frames": frames,
        "images": runs["columns"][0]["images"],
        "repeats": len(base),
        "load_average": round(os.getloadavg()[0], 2),
        "cells": {},
    }
    for cell, found in runs.items():
        cpu = np.array([run["cpu_s"] for run in found])
        whole = np.array([run["cpu_s_with_imports"] for run in found])
        ratios = cpu / base
        out["cells"][cell] = {
            "cpu_s": round(float(np.median(cpu)), 4),
            "us_per_frame": round(float(np.median(cpu)) / frames * 1e6, 1),
            "quartiles_s": [round(float(q), 4) for q in np.quantile(cpu, (0.25, 0.75))],
            "cpu_s_with_imports": round(float(np.median(whole)), 4),
            "ratio": round(float(np.median(ratios)), 1),
            "ratio_range": [round(float(ratios.min()), 1), round(float(ratios.max()), 1)],
        }
    return out


def table(result: dict) -> str:
    """Markdown."""
    machine = loader_report.machine()
    packages = loader_report.versions(
        (
            "numpy",
            "simplejpeg",
            "pillow",
            "google-crc32c",
            *(["tensorflow-datasets"] if "tfds" in result["cells"] else []),
        )
    )
    shown = " ".join(arg for arg in sys.argv[1:] if arg.startswith("--"))
    lines = [
        f"## {datetime.date.today()} column statistics: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB",
        "",
        f"`python benchmarks/column_statistics.py DATASET_DIR {shown}`".replace(" `", "`"),
        f"{machine['system']}; " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".",
        f"{result['data']}, {result['frames']} frames, {result['images']} images; {result['repeats']} repeats in "
        f"turns, one process each; median [quartiles]; load average {result['load_average']:.1f}.",
        "",
        "| pass | CPU s | CPU us per frame | with imports, CPU s | x columns (range) |",
        "|---" * 5 + "|",
    ]
    for cell, found in result["cells"].items():
        low, high = found["quartiles_s"]
        least, most = found["ratio_range"]
        lines.append(
            f"| {cell} | {found['cpu_s']:.3f} [{low:.3f}, {high:.3f}] | {found['us_per_frame']:.1f} | "
            f"{found['cpu_s_with_imports']:.2f} | {found['ratio']:.1f} ({least:.1f} to {most:.1f}) |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
