"""Statistics of a data set from columns, against a pass that decodes its images: CPU time, same data, same process.

  python benchmarks/column_statistics.py DATASET_DIR [--repeats=5] [--tfds]

Cells, each in a fresh process, interleaved:
  columns   scan of all shards (checksums verified), index written, statistics of actions, states and every float column
  decode    the same, and every image is decoded (libjpeg-turbo through simplejpeg, Pillow for PNG)
  tfds      what loaders without an index do: TFDS reads and decodes every episode, statistics of action and state
            (only with --tfds, which needs the `convert` extra)

One process, no worker, in every cell. Counted is CPU time (user and system, all threads) from the first byte read to
the last statistic, without imports; `cpu_s_with_imports` has them. The last line of stdout is JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import flags

_REPEATS = flags.DEFINE_integer("repeats", 5, "processes per cell", lower_bound=1)
_TFDS = flags.DEFINE_bool("tfds", False, "measure a pass through TFDS too")
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
    print(json.dumps(summary(argv[1], runs)))
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


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
