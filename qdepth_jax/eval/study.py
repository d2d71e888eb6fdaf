"""Tables and plots of a study with variants and seeds, from the figures that tools/run_study.py keeps.

FOLDER/PART/VARIANT_SEED.json (cost of training), FOLDER/PART/VARIANT_SEED/{held_out,SUITE}.json, and the controls in
FOLDER/PART/CONTROL/SUITE.json. A figure that is missing leaves its cell empty; nothing is filled in.

Two intervals answer two questions. Wilson's, over all episodes of all seeds, says how well the success rate of these
very policies is known. Student's t over seeds, of the differences to the baseline with the same seed, says whether
training again would give the same order; with three seeds it is wide, and only it allows a claim about a variant.
"""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from qdepth_jax.eval import episodes

BASELINE = "baseline"
CONTROLS = ("mean_action", "untrained")
HEADER = (
    "variant", "seeds", "successes", "rate, %", "95 % (episodes)", "rate of each seed, %",
    "minus baseline, points (95 %, seeds)", "action L1", "depth RMSE, m", "depth AbsRel", "token accuracy",
    "parameters", "training CPU-s",
)  # fmt: skip


def write(folder: pathlib.Path, parts: Sequence[str], variants: Sequence[str]) -> None:
    """FOLDER/tables.md and FOLDER/success_PART.svg of what is there."""
    lines = []
    for part in parts:
        rows = collect(folder / part, variants)
        if rows:
            lines += [f"## {part}", "", *table(rows), ""]
            by_task = task_table(rows)
            lines += [*by_task, ""] if by_task else []
            plot(folder / f"success_{part}.svg", rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text("\n".join(lines))


def collect(folder: pathlib.Path, variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{variant or control: {"seeds": seed -> {"cost", "held_out", "suites": name -> result}}} of a part."""
    rows: dict[str, dict[str, Any]] = {}
    for variant in (*variants, *CONTROLS):
        seeds = {}
        pattern = variant if variant in CONTROLS else f"{variant}_[0-9]*"
        for run in sorted(path for path in folder.glob(pattern) if path.is_dir()):
            found = {path.stem: json.loads(path.read_text()) for path in sorted(run.glob("*.json"))}
            cost = run.with_name(run.name + ".json")
            seeds[run.name.rpartition("_")[2]] = {
                "cost": json.loads(cost.read_text())["cost"] if cost.exists() else {},
                "held_out": found.pop("held_out", {}),
                "suites": found,
            }
        if seeds:
            rows[variant] = {"seeds": seeds}
    return rows


def rates(row: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Seed -> (successes, episodes) over all suites; only seeds that have every suite that any seed has."""
    suites = {name for seed in row["seeds"].values() for name in seed["suites"]}
    out = {}
    for name, seed in row["seeds"].items():
        if suites and suites <= set(seed["suites"]):
            found = [rate for suite in seed["suites"].values() for rate in suite["suites"].values()]
            out[name] = (sum(r["successes"] for r in found), sum(r["episodes"] for r in found))
    return out


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown lines, one row for each variant and control."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    baseline = rates(rows[BASELINE]) if BASELINE in rows else {}
    for name, row in rows.items():
        found = rates(row)
        k, n = sum(a for a, _ in found.values()), sum(b for _, b in found.values())
        low, high = episodes.wilson(k, n)
        held = [seed["held_out"] for seed in row["seeds"].values() if seed["held_out"]]
        depth = [h["depth"]["policy"] for h in held if "depth" in h]
        cells = [
            name,
            str(len(row["seeds"])),
            f"{k} of {n}" if n else "",
            f"{100 * k / n:.1f}" if n else "",
            f"{100 * low:.1f} to {100 * high:.1f}" if n else "",
            ", ".join(f"{100 * a / b:.1f}" for a, b in found.values() if b),
            "" if name in (BASELINE, *CONTROLS) else difference(found, baseline),
            mean([h["actions"]["policy"]["l1"] for h in held], "{:.4f}"),
            mean([d["rmse"] for d in depth], "{:.4f}"),
            mean([d["abs_rel"] for d in depth], "{:.4f}"),
            mean([h["depth_tokens"]["accuracy"] for h in held if "depth_tokens" in h], "{:.3f}"),
            mean([h["parameters"] for h in held], "{:,.0f}"),
            mean([s["cost"]["cpu_seconds"] for s in row["seeds"].values() if s["cost"]], "{:.0f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    references = [s["held_out"] for row in rows.values() for s in row["seeds"].values() if s["held_out"]]
    actions = [h["actions"] for h in references][:1]
    depth = [h["depth"] for h in references if "tokenizer" in h.get("depth", {})][:1]
    if actions:
        chosen, repeated = actions[0]["mean_action"]["l1"], actions[0]["repeat_last_action"]["l1"]
        lines += [
            "",
            f"Held out, without a policy: action L1 {chosen:.4f} (mean action), {repeated:.4f} (the one before).",
        ]
    if depth:
        flat, own = depth[0]["mean_map"]["rmse"], depth[0]["tokenizer"]["rmse"]
        lines.append(f"Depth RMSE {flat:.4f} m (mean map of training frames), {own:.4f} m (true tokens, decoded).")
    return lines


def difference(found: dict[str, tuple[int, int]], baseline: dict[str, tuple[int, int]]) -> str:
    """Mean over seeds of the difference to the baseline's run with the same seed, in points, and its t interval."""
    pairs = [
        100 * (found[seed][0] / found[seed][1] - baseline[seed][0] / baseline[seed][1])
        for seed in found
        if seed in baseline and found[seed][1] and baseline[seed][1]
    ]
    if not pairs:
        return ""
    middle = statistics.mean(pairs)
    if len(pairs) < 2:
        return f"{middle:+.1f} (one seed)"
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"


def mean(values: Sequence[float], form: str) -> str:
    """Mean over seeds and, of several, (lowest to highest); '' of none."""
    if not values:
        return ""
    text = form.format(statistics.mean(values))
    return text + (f" ({form.format(min(values))} to {form.format(max(values))})" if len(set(values)) > 1 else "")


def task_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: successes of all seeds by task, one column for each variant and control."""
    tasks: dict[str, dict[str, list[int]]] = {}
    for name, row in rows.items():
        for seed in row["seeds"].values():
            for suite in seed["suites"].values():
                for key, found in suite["tasks"].items():
                    cell = tasks.setdefault(f"{key} {found['task']}", {}).setdefault(name, [0, 0])
                    cell[0], cell[1] = cell[0] + found["successes"], cell[1] + found["episodes"]
    if not tasks:
        return []
    lines = ["| task | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for task, cells in tasks.items():
        shown = ["{} / {}".format(*cells[name]) if name in cells else "" for name in rows]
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    return lines


def plot(path: pathlib.Path, rows: dict[str, dict[str, Any]]) -> None:
    """Success rates with Wilson's interval over all seeds, and a dot for each seed."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # equal figures give equal files
    import matplotlib.pyplot as plt

    shown = {name: found for name, row in rows.items() if (found := rates(row))}
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(shown) + 1))
    for place, found in enumerate(shown.values()):
        k, n = sum(a for a, _ in found.values()), sum(b for _, b in found.values())
        low, high = episodes.wilson(k, n)
        axes.plot([100 * low, 100 * high], [place, place], color="tab:blue", linewidth=2)
        axes.plot([100 * k / n], [place], "|", color="tab:blue", markersize=14)
        axes.plot([100 * a / b for a, b in found.values()], [place] * len(found), "o", color="tab:orange", markersize=4)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set_xlabel("closed-loop success, % (bar: 95 % over episodes; dots: seeds)")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
