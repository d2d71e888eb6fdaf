"""Forward pass of Video-Depth-Anything: ours against the PyTorch original, in one interleaved run.

  python benchmarks/video_depth.py --video_depth_anything=CHECKOUT [--python=TORCH_VENV/bin/python] [--append_results]
  python benchmarks/video_depth.py --video_depth_anything=CHECKOUT --size=vits:32x280x280
  python benchmarks/video_depth.py --device=gpu --dtype=bfloat16 --size=vitl:32x518x518      # UNTRIED on a GPU so far

CHECKOUT is github.com/DepthAnything/Video-Depth-Anything (commit 4f5ae23); --python names an interpreter that has what
it imports: torch, torchvision, einops, easydict, opencv, tqdm. Same network, random weights (the original's, through
our importer) and frames. Both live in processes of their own on the same cores; in every round each takes its turn
while the other waits, and a ratio is taken within a round. Before the race the depths must agree within --tolerance,
otherwise the exit code is 1 and nothing is timed. Resizing of frames and the joining of windows are not part of it.

On a machine with other work take the ratio of CPU times. The last line of stdout is JSON.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import contestant, video_depth_order, video_depth_report  # noqa: E402

_CHECKOUT = flags.DEFINE_string("video_depth_anything", "", "checkout of Video-Depth-Anything; empty = ours alone")
_PYTHON = flags.DEFINE_string("python", sys.executable, "interpreter of the original")
_SIZE = flags.DEFINE_string("size", "vits:32x140x182", "ENCODER:FRAMESxHEIGHTxWIDTH")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each contestant", lower_bound=1)
_PASSES = flags.DEFINE_integer("passes", 1, "forward passes per turn", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "cores of each contestant (CPU)", lower_bound=1)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "where")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of activations")
_SCAN = flags.DEFINE_bool("scan", True, "ours: scanned layers of the trunk")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "largest difference of depth over the largest depth")
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    if _CHECKOUT.value and not (pathlib.Path(_CHECKOUT.value) / "video_depth_anything/video_depth.py").is_file():
        raise errors.UserError(
            f"--video_depth_anything={_CHECKOUT.value}: no video_depth_anything/video_depth.py there, is it a checkout?"
        )
    if _DEVICE.value == "cpu" and _THREADS.value > len(os.sched_getaffinity(0)):
        raise errors.UserError(f"--threads={_THREADS.value}: this machine has {len(os.sched_getaffinity(0))} cores")
    result = race(["original", "ours"] if _CHECKOUT.value else ["ours"])
    text = video_depth_report.table(result, sys.argv[1:])
    print(text)
    if _APPEND.value and result["agree"]:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    print(json.dumps(result))
    return 0 if result["agree"] else 1


def contestant_of(order: video_depth_order.Order, python: str) -> contestant.Contestant:
    # Both hold the memory of one GPU: ours takes what it needs instead of three quarters.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {"JAX_PLATFORMS": "cuda,cpu" if order.device == "gpu" else "cpu"}
    return contestant.Contestant("video_depth_child", dataclasses.asdict(order), environment, python)


def answer_of(running: contestant.Contestant, name: str, passes: int) -> dict[str, Any]:
    """Runs forward passes.

    Raises:
      UserError: the contestant failed; what it said.
    """
    from qdepth_jax import errors

    answer = running.run(passes)
    if running.error:
        raise errors.UserError(f"{name} failed: {running.error} (its own output is above)")
    return answer


def race(names: list[str]) -> dict[str, Any]:
    """Builds, compares the depths, times; the whole result. The first of `names` draws the weights."""
    import numpy as np

    from qdepth_jax import progress

    encoder, frames, height, width = video_depth_order.parse_size(_SIZE.value)
    running, firsts, turns = {}, {}, {name: [] for name in names}
    bar = progress.Progress(len(names) * (1 + _ROUNDS.value), "video depth", unit="turn")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                order = video_depth_order.Order(
                    contestant=name,
                    encoder=encoder,
                    frames=frames,
                    height=height,
                    width=width,
                    threads=_THREADS.value,
                    device=_DEVICE.value,
                    dtype=_DTYPE.value,
                    checkout=os.path.abspath(_CHECKOUT.value) if _CHECKOUT.value else "",
                    folder=folder,
                    scan=_SCAN.value,
                )
                running[name] = contestant_of(order, sys.executable if name == "ours" else _PYTHON.value)
                firsts[name] = answer_of(running[name], name, 1)
                answer_of(running[name], name, 1)  # caches and pools warm
                bar.update()
            depths = [np.load(order.depth_file(name)) for name in names]
            agreement = video_depth_report.agree(depths) | {"tolerance": _TOLERANCE.value}
            agreed = agreement["relative"] <= _TOLERANCE.value
            for number in range(_ROUNDS.value if agreed else 0):
                for name in names if number % 2 else names[::-1]:
                    turns[name].append(answer_of(running[name], name, _PASSES.value))
                    bar.update()
        finally:
            for living in running.values():
                living.close()
            bar.close()
    result = {
        "size": _SIZE.value,
        "threads": _THREADS.value,
        "device": _DEVICE.value,
        "dtype": _DTYPE.value,
        "rounds": _ROUNDS.value,
        "passes_per_turn": _PASSES.value,
        "agree": agreed,
        "agreement": agreement,
        "gflop_per_frame": running["ours"].start["facts"]["flops_per_frame"] / 1e9,
        "contestants": {},
    }
    if agreed:
        flops, count = running["ours"].start["facts"]["flops_per_frame"], (frames, _PASSES.value)
        result["contestants"] = {
            name: video_depth_report.summary(running[name].start, firsts[name], turns[name], count, flops)
            for name in names
        }
        if "original" in names:
            result["ratio"] = video_depth_report.ratios(turns["ours"], turns["original"])
    return result


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
