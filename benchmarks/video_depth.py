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
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import loader_report, video_depth_order  # noqa: E402

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

VERSIONS = ("jax", "jaxlib", "flax")


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
    text = table(result)
    print(text)
    if _APPEND.value and result["agree"]:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    print(json.dumps(result))
    return 0 if result["agree"] else 1


def parse_size(text: str) -> tuple[str, int, int, int]:
    """`vits:32x140x182` -> (encoder, frames, height, width)."""
    from qdepth_jax import errors

    found = re.fullmatch(r"(vit[sbl]):(\d+)x(\d+)x(\d+)", text)
    if not found:
        raise errors.UserError(f"--size={text}: write ENCODER:FRAMESxHEIGHTxWIDTH, for example vits:32x140x182")
    frames, height, width = (int(found.group(n)) for n in (2, 3, 4))
    if not 1 <= frames <= 32 or not height or height % 14 or not width or width % 14:
        raise errors.UserError(f"--size={text}: 1 to 32 frames, height and width multiples of 14")
    return found.group(1), frames, height, width


class Contestant:
    """A living process."""

    def __init__(self, order: video_depth_order.Order, python: str):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= {"JAX_PLATFORMS": "cuda,cpu" if order.device == "gpu" else "cpu"}
        # Both hold the memory of one GPU: ours takes what it needs instead of three quarters.
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.name = order.contestant
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.video_depth_child", json.dumps(dataclasses.asdict(order))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.start = self._answer()

    def run(self, passes: int) -> dict[str, Any]:
        """Runs forward passes.

        Raises:
          UserError: the contestant failed; what it said.
        """
        print(passes, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        from qdepth_jax import errors

        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}
        if "error" in answer:
            raise errors.UserError(f"{self.name} failed: {answer['error']} (its own output is above)")
        return answer


def race(names: list[str]) -> dict[str, Any]:
    """Builds, compares the depths, times; the whole result. The first of `names` draws the weights."""
    from qdepth_jax import progress

    encoder, frames, height, width = parse_size(_SIZE.value)
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
                running[name] = Contestant(order, sys.executable if name == "ours" else _PYTHON.value)
                firsts[name] = running[name].run(1)
                running[name].run(1)  # caches and pools warm
                bar.update()
            agreement = agree(order, names)
            agreed = agreement["relative"] <= _TOLERANCE.value
            for number in range(_ROUNDS.value if agreed else 0):
                for name in names if number % 2 else names[::-1]:
                    turns[name].append(running[name].run(_PASSES.value))
                    bar.update()
        finally:
            for contestant in running.values():
                contestant.close()
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
        flops, count = running["ours"].start["facts"]["flops_per_frame"], frames * _PASSES.value
        result["contestants"] = {
            name: summary(running[name].start, firsts[name], turns[name], count, flops) for name in names
        }
        if "original" in names:
            result["ratio"] = ratios(turns["ours"], turns["original"])
    return result


def agree(order: video_depth_order.Order, names: list[str]) -> dict[str, float]:
    """The largest difference of two depths over the largest depth, and what else says that they mean something."""
    import numpy as np

    depths = [np.load(order.depth_file(name)).astype(np.float64) for name in names]
    largest = float(np.abs(depths[0]).max())
    difference = max(float(np.abs(depth - depths[0]).max()) for depth in depths)
    return {
        "relative": difference / largest if largest else float("inf"),
        "tolerance": _TOLERANCE.value,
        "largest_depth": largest,
        "deviation_of_depth": float(depths[0].std()),
        "share_of_zeros": float((depths[0] == 0).mean()),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Their time over ours within each round: above 1, ours is faster."""
    return {
        name: spread([b[name] / a[name] for a, b in zip(ours, theirs, strict=True)]) for name in ("wall_s", "cpu_s")
    }


def summary(
    start: dict[str, Any], first: dict[str, Any], turns: list[dict[str, Any]], frames: int, flops_per_frame: float
) -> dict[str, Any]:
    """Figures of one contestant; `frames` of one turn. One network: our formula counts for both."""
    facts = start["facts"]
    rate = spread([frames / turn["wall_s"] for turn in turns])
    out = {
        "parameters": facts["parameters"],
        "notes": facts["notes"],
        "frames_per_s": rate,
        "window_s": spread([turn["wall_s"] / _PASSES.value for turn in turns]),
        "window_cpu_s": spread([turn["cpu_s"] / _PASSES.value for turn in turns]),
        "build_and_first_pass_s": start["build_s"] + first["wall_s"],
        "peak_mb": turns[-1]["peak_mb"],
        "device_kind": facts["device_kind"],
        "gflops_per_s": rate["median"] * flops_per_frame / 1e9,
    }
    if _DEVICE.value == "gpu":
        from qdepth_jax import chips

        peak = chips.peak_flops(facts["device_kind"])
        out["share_of_peak"] = rate["median"] * flops_per_frame / peak if peak else None
    return out


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    machine, versions = loader_report.machine(), loader_report.versions(VERSIONS)
    shown = [re.sub(r"^(--(?:video_depth_anything|python))=.*", r"\1=PATH", arg) for arg in sys.argv[1:]]
    agreement = result["agreement"]
    lines = [
        f"## {datetime.date.today()} Video-Depth-Anything, forward: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB",
        "",
        f"`python benchmarks/video_depth.py {' '.join(shown)}`".replace(" `", "`"),
        f"{machine['system']}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        f"{result['size']}, {result['dtype']}, {result['threads']} of the cores each, "
        f"{result['gflop_per_frame']:.1f} GFLOP a frame; median [min, max] over {result['rounds']} rounds of "
        f"{result['passes_per_turn']} windows; x = original's time / ours within a round, above 1 we are faster.",
        f"Largest difference of depth over the largest depth {agreement['relative']:.1e}, allowed "
        f"{agreement['tolerance']:.0e} (depth deviates by {agreement['deviation_of_depth']:.2g}, is at most "
        f"{agreement['largest_depth']:.2g}, 0 in {agreement['share_of_zeros']:.0%} of the pixels).",
        "",
    ]
    if not result["agree"]:
        return "\n".join([*lines, "They do not compute the same: no race.", ""])
    ratio = result.get("ratio", {})
    last = "share of peak" if result["device"] == "gpu" else "GFLOP/s"
    lines += [
        f"| contestant | parameters | frames/s | s/window | CPU s/window | x ours, wall | x ours, CPU | {last} | "
        "first pass s | peak MB |",
        "|---" * 10 + "|",
    ]
    for name, row in result["contestants"].items():
        wall, cpu = (_show(ratio.get(key)) if name == "original" else "-" for key in ("wall_s", "cpu_s"))
        lines.append(
            f"| {name} | {row['parameters']:,} | {_show(row['frames_per_s'])} | {_show(row['window_s'])} | "
            f"{_show(row['window_cpu_s'])} | {wall} | {cpu} | {_use(row)} | {row['build_and_first_pass_s']:.0f} | "
            f"{row['peak_mb']:.0f} |"
        )
    return "\n".join(
        [*lines, "", *(f"{k}: {', '.join(row['notes'])}." for k, row in result["contestants"].items()), ""]
    )


def _use(row: dict[str, Any]) -> str:
    if "share_of_peak" in row:
        return "unknown chip" if row["share_of_peak"] is None else f"{row['share_of_peak']:.3f}"
    return f"{row['gflops_per_s']:.1f}"


def _show(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
