"""Figures of benchmarks/video_depth.py and how they are printed."""

import datetime
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import loader_report

VERSIONS = ("jax", "jaxlib", "flax")


def agree(depths: Sequence[np.ndarray]) -> dict[str, float]:
    """The largest distance from the first depth over its largest value, and what says that the depth is no constant."""
    first = depths[0].astype(np.float64)
    largest = float(np.abs(first).max())
    difference = max(float(np.abs(depth - first).max()) for depth in depths)
    return {
        "relative": difference / largest if largest else float("inf"),
        "largest_depth": largest,
        "deviation_of_depth": float(first.std()),
        "share_of_zeros": float((first == 0).mean()),
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
    start: dict[str, Any],
    first: dict[str, Any],
    turns: list[dict[str, Any]],
    count: tuple[int, int],
    flops_per_frame: float,
) -> dict[str, Any]:
    """Figures of one contestant; `count`: frames of a window, windows of a turn. One network: one count of FLOPs."""
    facts, (frames, passes) = start["facts"], count
    rate = spread([frames * passes / turn["wall_s"] for turn in turns])
    out = {
        "parameters": facts["parameters"],
        "notes": facts["notes"],
        "frames_per_s": rate,
        "window_s": spread([turn["wall_s"] / passes for turn in turns]),
        "window_cpu_s": spread([turn["cpu_s"] / passes for turn in turns]),
        "build_and_first_pass_s": start["build_s"] + first["wall_s"],
        "peak_mb": turns[-1]["peak_mb"],
        "device_kind": facts["device_kind"],
        "gflops_per_s": rate["median"] * flops_per_frame / 1e9,
    }
    if facts["device_kind"] != "cpu":
        from qdepth_jax import chips

        peak = chips.peak_flops(facts["device_kind"])
        out["share_of_peak"] = rate["median"] * flops_per_frame / peak if peak else None
    return out


def table(result: dict[str, Any], arguments: Sequence[str]) -> str:
    """Markdown."""
    machine, versions = loader_report.machine(), loader_report.versions(VERSIONS)
    shown = [re.sub(r"^(--(?:video_depth_anything|python))=.*", r"\1=PATH", arg) for arg in arguments]
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
