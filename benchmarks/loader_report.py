"""Figures of the loader benchmark: medians, quartiles, ratios within pairs, and how they are printed."""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FIGURES = ("cpu_ms_per_frame", "frames_per_s", "rss_peak_mb", "rss_growth_mb", "first_batch_s", "build_s", "import_s")
LABELS = {
    "decode": "decode only, stored size",
    "resize": "decode + Lanczos-3 on the host",
    "augment": "decode + Lanczos-3 + octo's augmentation",
}
# The rows in which our host does less, because the accelerator does it: never to be read as equal work.
SENT_RAW = "ours, sent raw (the device resizes and augments: LESS WORK ON THE CPU)"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (inclusive: exact for few values)."""
    values = sorted(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def pair_ratios(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """Ratio within each repeat that has both, so that slow moments of the machine cancel."""
    return [above[turn] / below[turn] for turn in sorted(above.keys() & below.keys())]


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per (mode, contender, buffer), and one per mode > decode for ours sent raw.

    rows: results of loader_cell.measure with "repeat". CPU ratios are contender / ours of the same mode and repeat.
    """
    cells: dict[tuple[str, str, int], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        if cell["mode"] in LABELS:
            key = (cell["mode"], cell["contender"], cell["buffer"])
            cells.setdefault(key, {})[row["repeat"]] = row
    decode = next((turns for key, turns in cells.items() if key[:2] == ("decode", "ours")), {})
    out = []
    for (mode, contender, buffer), turns in cells.items():
        out.append(_line(mode, contender, buffer, turns, cells, decode))
    for mode in ("resize", "augment"):
        if decode and any(key[0] == mode for key in cells):
            out.append(_line(mode, SENT_RAW, 0, decode, {}, {}))
    order = list(LABELS)
    return sorted(out, key=lambda line: order.index(line["mode"]))


def _line(mode, contender, buffer, turns, cells, decode) -> dict[str, Any]:
    line: dict[str, Any] = {"mode": mode, "contender": contender, "buffer": buffer}
    line |= {name: spread([row[name] for row in turns.values()]) for name in FIGURES}
    line["rss_slope_mb_per_1k_batches"] = spread([row["rss_slope_mb_per_1k_batches"] for row in turns.values()])
    ours = next((found for key, found in cells.items() if key[:2] == (mode, "ours")), {})
    for name, base in (("ratio", ours), ("ratio_to_raw", decode)):
        for figure in ("cpu_ms_per_frame", "rss_peak_mb", "rss_growth_mb"):
            ratios = pair_ratios(
                {turn: row[figure] for turn, row in turns.items()},
                {turn: max(row[figure], 1e-9) for turn, row in base.items()},
            )
            if ratios and contender != "ours":
                line[f"{figure}_{name}"] = spread(ratios)
    return line


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; medians with [quartiles]; x = contender / ours in the same repeat."""
    head = (
        "| mode | contender | CPU-ms/frame | x ours, equal work | x ours sent raw | frames/s | peak RSS MB (x) | "
        "RSS over imports MB (x) | first batch s | build s |"
    )
    out = [head, "|---" * 10 + "|"]
    for line in lines:
        raw = line.get("cpu_ms_per_frame_ratio_to_raw") if line["mode"] != "decode" else None
        columns = [
            LABELS[line["mode"]],
            line["contender"] + (f", buffer {line['buffer']}" if _buffered(line["contender"]) else ""),
            _show(line["cpu_ms_per_frame"], 2),
            _show(line.get("cpu_ms_per_frame_ratio"), 2),
            _show(raw, 2),
            _show(line["frames_per_s"], 0),
            f"{line['rss_peak_mb']['median']:.0f}{_times(line.get('rss_peak_mb_ratio'))}",
            f"{line['rss_growth_mb']['median']:.0f}{_times(line.get('rss_growth_mb_ratio'))}",
            f"{line['first_batch_s']['median']:.2f}",
            f"{line['build_s']['median']:.2f}",
        ]
        out.append("| " + " | ".join(columns) + " |")
    return "\n".join(out)


def _buffered(contender: str) -> bool:
    return contender in ("octo", "tfdata", "arrayrecord_episodes")


def _show(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.{digits}f} [{value['q1']:.{digits}f}, {value['q3']:.{digits}f}]"


def _times(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f" ({value['median']:.1f}x)"


def gate_table(gates: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of loader_gates.check; "-" = the contender offers no such thing."""
    names = ("same_seed_equal", "epoch_is_permutation", "epoch_distinct", "episodes_per_batch", "resume_exact",
             "state_bytes", "hosts_equal")  # fmt: skip
    titles = ("same seed, same batches", "epoch is a permutation", "distinct frames in an epoch's worth",
              "episodes in a batch", "exact resume", "state bytes", "same global batch from 1, 2, 4 hosts")  # fmt: skip
    words = {True: "yes", False: "no", None: "-"}
    out = ["| contender | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for gate in gates:
        shown = [words[gate[n]] if gate[n] is None or isinstance(gate[n], bool) else f"{gate[n]:g}" for n in names]
        out.append(f"| {gate['cell']['contender']} | " + " | ".join(shown) + " |")
    return "\n".join(out)


def prepare_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the one-time work."""
    out = ["| contender | one-time work | CPU s | wall s | peak RSS MB |", "|---" * 5 + "|"]
    what = {"ours": "index (checksums) + statistics"}
    for row in rows:
        name = row["cell"]["contender"]
        out.append(
            f"| {name} | {what.get(name, 'statistics')} | {row['prepare_cpu_s']:.2f} | {row['prepare_s']:.2f} | "
            f"{row['rss_peak_mb']:.0f} |"
        )
    return "\n".join(out)


def machine() -> dict[str, Any]:
    """Cores, CPU model, memory: what a figure depends on; no names of hosts."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "memory_gb": round(memory),
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions; what is not installed is not listed."""
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
