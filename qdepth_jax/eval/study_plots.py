"""Pictures of a study (study_runs.py): success with intervals, and the held-out loss while training."""

import pathlib
import statistics

from qdepth_jax.eval import episodes, study_runs


def success(path: pathlib.Path, rows: study_runs.Rows) -> None:
    """Success rates with Wilson's interval over all seeds, and a dot for each seed."""
    plt = _pyplot()
    shown = {name: found for name, row in rows.items() if (found := study_runs.judged(row))}
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(shown) + 1))
    for place, found in enumerate(shown.values()):
        k, n = study_runs.rate(list(found.values()))
        low, high = episodes.wilson(k, n)
        axes.plot([100 * low, 100 * high], [place, place], color="tab:blue", linewidth=2)
        axes.plot([100 * k / n], [place], "|", color="tab:blue", markersize=14)
        dots = [100 * a / b for a, b in (study_runs.rate([outcomes]) for outcomes in found.values())]
        axes.plot(dots, [place] * len(dots), "o", color="tab:orange", markersize=4)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set_xlabel("closed-loop success, % (bar: 95 % over episodes; dots: seeds)")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    _save(figure, path)


def losses(path: pathlib.Path, rows: study_runs.Rows) -> None:
    """Flow loss on held-out frames over training steps, the mean of the seeds; nothing where none was kept."""
    curves = {}
    for name, row in rows.items():
        if name in study_runs.SINGLE:  # the common start: another length
            continue
        by_step: dict[int, list[float]] = {}
        for run in row.values():
            for line in run.training.get("metrics", []):
                if "val/flow_loss" in line:
                    by_step.setdefault(line["step"], []).append(line["val/flow_loss"])
        if by_step:
            curves[name] = {step: statistics.mean(values) for step, values in sorted(by_step.items())}
    if not curves:
        return
    figure, axes = _pyplot().subplots(figsize=(7, 3.5))
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), "o-", markersize=3, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out flow loss")
    axes.legend(fontsize=8)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # equal figures give equal files
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)
