"""Tables of a study with variants and seeds, from the figures that tools/run_study.py keeps.

study_runs.py reads them. A figure that is missing leaves its cell empty.

Three statements answer different questions. Wilson's interval, over all episodes of all seeds, says how well the
success rate of these very policies is known (their starts are the same for every seed, so it is a little too narrow
for starts at large). A sign test over starts that one of two variants solved more often than the other says whether
these very policies differ. Student's t over seeds, of the differences to the baseline with the same seed, says whether
training again would give the same order; with three seeds it is wide, and only it allows a claim about a variant.
Policies are only paired where they were made from the same data and the same start (study_jobs.made_from).
"""

import collections
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from qdepth_jax import files
from qdepth_jax.eval import episodes, study_jobs, study_plots, study_runs
from qdepth_jax.eval.study_runs import Outcomes, Rows

TOKENS = ("tokenizer", "tokens")  # jobs whose cost every variant with depth tokens shares


def write(folder: pathlib.Path, parts: Mapping[str, Sequence[str]], variants: Mapping[str, bool]) -> None:
    """FOLDER/tables.md, FOLDER/success_PART.svg and FOLDER/loss_PART.svg of what is there.

    Args:
      parts: name -> its suites.
      variants: name -> whether it needs depth tokens.
    """
    lines = []
    for part, suites in parts.items():
        rows = study_runs.collect(folder / part, suites, variants)
        if not rows:
            continue
        lines += [f"## {part}", "", *success_table(rows, suites), ""]
        lines += (
            [*held_out_table(rows), ""] if any(run.held_out for row in rows.values() for run in row.values()) else []
        )
        lines += [*cost_table(rows, variants, shared_cost(folder / part))]
        starts = rows.get(study_runs.START, {}).values()
        if start := [run.training["cost"] for run in starts if run.training.get("cost")]:
            lines += ["", f"The common start of all of them cost {start[0]['cpu_seconds']:.0f} CPU-s, once."]
        lines += ["", *task_table(rows), ""]
        study_plots.success(folder / f"success_{part}.svg", rows)
        study_plots.losses(folder / f"loss_{part}.svg", rows)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(folder / "tables.md", "\n".join(lines))


def success_table(rows: Rows, suites: Sequence[str]) -> list[str]:
    """Markdown: closed loop, one row for each variant and control."""
    header = ["variant", "seeds", "successes", "rate, %", "95 % (episodes)"]
    by_suite = list(suites) if len(suites) > 1 else []
    header += [f"{suite}, %" for suite in by_suite]
    header += ["each seed, %", "minus baseline, points (95 %, seeds)", "won : lost against baseline (p)"]
    lines = _begin(header)
    baseline = study_runs.judged(rows.get(study_runs.BASELINE, {}))
    intervals, all_pairs = 0, []
    for name, row in rows.items():
        found = study_runs.judged(row)
        k, n = study_runs.rate(list(found.values()))
        low, high = (100 * x for x in episodes.wilson(k, n))
        crashes = sum(len(run.crashed) for run in row.values())
        left = len(row) - len(found)
        cells = [
            name,
            f"{len(found)}" + (f" ({left} more unfinished)" if left else ""),
            (f"{k} of {n}" if n else "") + (f", {crashes} crashes" if crashes else ""),
            f"{100 * k / n:.1f}" if n else "",
            f"{low:.1f} to {high:.1f}" if n else "",
        ]
        cells += [_percent(*study_runs.rate(list(found.values()), suite)) for suite in by_suite]
        cells.append(", ".join(_percent(*study_runs.rate([outcomes])) for outcomes in found.values()))
        if name in (study_runs.BASELINE, *study_runs.SINGLE):
            cells += ["", ""]
        else:
            both = {seed: (row[seed], rows[study_runs.BASELINE][seed]) for seed in found if seed in baseline}
            others = [seed for seed, pair in both.items() if not study_runs.made_alike(*pair)]
            both = [pair for seed, pair in both.items() if seed not in others]
            left = sum(len(ours.crashed | theirs.crashed) for ours, theirs in both)
            pairs = [pair for ours, theirs in both if all(pair := study_runs.both_finished(ours, theirs))]
            said, is_interval = difference(pairs)
            intervals += is_interval
            all_pairs += pairs
            said += f", {left} crashed left out" if left else ""
            said += (
                f", seed {', '.join(others)} left out: made from other data or another start than its baseline"
                if others
                else ""
            )
            cells += [said, won_and_lost(pairs)]
        lines.append("| " + " | ".join(cells) + " |")
    if intervals > 1:
        lines += [
            "",
            f"{intervals} intervals compare a variant with the baseline: if none differed, one of them or more would "
            f"miss zero with a chance of up to {100 * (1 - 0.95**intervals):.0f} %.",
        ]
    origins: dict[str, list[str]] = {}
    for seed, run in rows.get(study_runs.BASELINE, {}).items():
        known = run.training.get("made_from")
        origin = json.dumps([known["data"], known["start"]]) if known else ""
        origins.setdefault(origin, []).append(seed)
    if len(origins) > 1:
        listed = " | ".join(", ".join(seeds) + ("" if key else " (not recorded)") for key, seeds in origins.items())
        lines += ["", f"Seeds made from the same demonstrations and start: {listed}."]
    return lines + resolution(all_pairs, max((len(study_runs.judged(row)) for row in rows.values()), default=0))


def resolution(pairs: Sequence[tuple[Outcomes, Outcomes]], seeds: int) -> list[str]:
    """Markdown: what the number of episodes alone does to the differences; pairs of (variant, baseline)."""
    pairs = [(ours, theirs) for ours, theirs in pairs if ours.keys() == theirs.keys()]
    if not pairs or seeds < 2:
        return []
    n = statistics.mean(len(ours) for ours, _ in pairs)
    unlike = statistics.mean(sum(ours[key] != theirs[key] for key in ours) for ours, theirs in pairs)
    # Each unlike episode adds +1 or -1, by chance if the policies are equally good: variance `unlike` in all.
    spread = 100 * unlike**0.5 / n
    widths = [f"{float(stats.t.ppf(0.975, k - 1)) * spread / k**0.5:.1f} with {k}" for k in sorted({seeds, 5, 10, 20})]
    return [
        "",
        f"{unlike:.1f} of {n:.0f} episodes of a pair end differently. That alone, without any luck of the training, "
        f"gives the difference of one pair a standard deviation of {spread:.1f} points. Intervals over seeds to expect "
        f"from it, plus or minus: {', '.join(widths)} seeds.",
    ]


def difference(pairs: Sequence[tuple[Outcomes, Outcomes]]) -> tuple[str, bool]:
    """Mean over seeds of the difference of rates in points, and its t interval; pairs of (variant, baseline).

    Returns:
      the text, and whether it has an interval.
    """
    if any(set(ours) != set(theirs) for ours, theirs in pairs):
        return "other episodes", False
    points = [100 * (_share(ours) - _share(theirs)) for ours, theirs in pairs]
    if not points:
        return "", False
    middle = statistics.mean(points)
    if len(points) < 2:
        return f"{middle:+.1f} (one seed)", False
    spread = statistics.stdev(points)
    if spread < 1e-9:
        return f"{middle:+.1f} (equal for every seed: no interval)", False
    half = float(stats.t.ppf(0.975, len(points) - 1)) * spread / len(points) ** 0.5
    return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})", True


def won_and_lost(pairs: Sequence[tuple[Outcomes, Outcomes]]) -> str:
    """Episodes that only one of the two solved, and the p of an exact test of their signs.

    Every seed runs the same starts, so what happens at one start with several seeds is not independent: the seeds of a
    start are added up, and p is the share of all ways to give these sums signs whose total is as far from zero.
    """
    if not pairs or any(set(ours) != set(theirs) for ours, theirs in pairs):
        return ""
    won = sum(ours[key] and not theirs[key] for ours, theirs in pairs for key in ours)
    lost = sum(theirs[key] and not ours[key] for ours, theirs in pairs for key in ours)
    of_start: collections.Counter[tuple[str, int]] = collections.Counter()
    for ours, theirs in pairs:
        of_start.update({key: ours[key] - theirs[key] for key in ours})
    return f"{won} : {lost} ({flipped_signs(of_start.values()):.3f})"


def flipped_signs(sums: Iterable[int]) -> float:
    """Two-sided p of the total of `sums` if each had either sign with chance 1/2; for sums of +-1 the sign test."""
    sums = list(sums)
    chance = np.ones(1)  # of a total, from the lowest possible on in steps of 2
    for size in (abs(value) for value in sums if value):
        chance = (np.r_[chance, np.zeros(size)] + np.r_[np.zeros(size), chance]) / 2
    totals = 2 * np.arange(len(chance)) - (len(chance) - 1)
    return float(chance[np.abs(totals) >= abs(sum(sums))].sum())


def held_out_table(rows: Rows) -> list[str]:
    """Markdown: action error and depth on held-out frames, means over seeds, with what needs no policy beneath."""
    header = ["variant", "action L1", "depth of frame", "depth RMSE, m", "depth AbsRel", "token accuracy"]
    lines = _begin(header)
    actions, references = {}, {}
    for name, row in rows.items():
        held = [run.held_out for run in row.values() if run.held_out]
        if not held:
            continue
        depth = [h["depth"]["policy"] for h in held if "depth" in h]
        ahead = held[0].get("depth_offset", 0)
        cells = [
            name,
            mean([h["actions"]["policy"]["l1"] for h in held], "{:.4f}"),
            (f"t+{ahead}" if ahead else "t") if depth else "",
            mean([d["rmse"] for d in depth], "{:.4f}"),
            mean([d["abs_rel"] for d in depth], "{:.4f}"),
            mean([h["depth_tokens"]["accuracy"] for h in held if "depth_tokens" in h], "{:.3f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        actions = actions or held[0]["actions"]
        for h in held:
            if "tokenizer" in h.get("depth", {}):
                frequent = h["depth_tokens"]["most_frequent_per_position_accuracy"]
                references.setdefault(ahead, (h["depth"], frequent))
    if actions:
        chosen, repeated = actions["mean_action"]["l1"], actions["repeat_last_action"]["l1"]
        lines += ["", f"Without a policy: action L1 {chosen:.4f} (mean action), {repeated:.4f} (the one before)."]
    for ahead, (depth, frequent) in sorted(references.items()):
        frame = f"t+{ahead}" if ahead else "t"
        lines.append(
            f"Depth of frame {frame}: RMSE {depth['mean_map']['rmse']:.4f} m (mean map of training frames), "
            f"{depth['tokenizer']['rmse']:.4f} m (true codes, decoded); accuracy {frequent:.3f} (most frequent code of "
            "each position)."
        )
    return lines


def shared_cost(folder: pathlib.Path) -> float | None:
    """CPU seconds of the depth tokenizer and its tokens; None where one of them is unknown."""
    paths = [path for name in TOKENS if (path := folder / f"{name}.json").exists()]
    costs = [study_jobs.read(path, "cost")["cost"] for path in paths]
    return sum(c["cpu_seconds"] for c in costs) if len(costs) == len(TOKENS) and all(costs) else None


def cost_table(rows: Rows, variants: Mapping[str, bool], tokens: float | None) -> list[str]:
    """Markdown: size, and CPU seconds of training alone and with what depth tokens cost."""
    lines = _begin(["variant", "parameters", "training CPU-s", "with its share of the depth tokens"])
    trained = {name: row for name, row in rows.items() if name in variants}
    with_tokens = sum(len(row) for name, row in trained.items() if variants[name])
    for name, row in trained.items():
        spent = [run.training["cost"]["cpu_seconds"] for run in row.values() if run.training.get("cost")]
        share = tokens / with_tokens if variants[name] and tokens is not None else None
        total = mean([s + share for s in spent], "{:.0f}") if share is not None else ""
        parameters = mean([run.held_out["parameters"] for run in row.values() if run.held_out], "{:,.0f}")
        lines.append(f"| {name} | {parameters} | {mean(spent, '{:.0f}')} | {total if variants[name] else 'none'} |")
    if tokens is not None:
        lines += ["", f"Depth tokens cost {tokens:.0f} CPU-s, once for {with_tokens} policies."]
    return lines


def task_table(rows: Rows) -> list[str]:
    """Markdown: successes of all judged seeds by task, one column for each variant and control."""
    names, cells = {}, {}
    for name, row in rows.items():
        for run in row.values():
            for suite in run.suites.values():
                names |= {key: f"{key} {found['task']}" for key, found in suite["tasks"].items()}
            for (task, _), flag in (run.outcomes or {}).items():
                cell = cells.setdefault(task, {}).setdefault(name, [0, 0])
                cell[0], cell[1] = cell[0] + flag, cell[1] + 1
    lines = _begin(["task", *rows])
    for task, found in cells.items():
        shown = ["{} / {}".format(*found[name]) if name in found else "" for name in rows]
        lines.append(f"| {names[task]} | " + " | ".join(shown) + " |")
    return lines


def mean(values: Sequence[float], form: str) -> str:
    """Mean over seeds and, of several, (lowest to highest); '' of none."""
    if not values:
        return ""
    text = form.format(statistics.mean(values))
    return text + (f" ({form.format(min(values))} to {form.format(max(values))})" if len(set(values)) > 1 else "")


def _begin(header: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]


def _share(outcomes: Outcomes) -> float:
    return sum(outcomes.values()) / len(outcomes)


def _percent(successes: int, count: int) -> str:
    return f"{100 * successes / count:.1f}" if count else ""
