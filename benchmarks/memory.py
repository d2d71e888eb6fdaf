"""Memory of the loader over several epochs: RSS at each epoch's end, growth, and the bound it is held to.

  python benchmarks/memory.py [--data=DIR] [--epochs=3] [--append_results]

The loader runs in a process of its own that imports no JAX (checked). Growth is peak RSS minus RSS after the imports;
what the index maps of its files counts as RSS although the kernel can drop it, so anonymous memory stands beside it.
The bound is (prefetch + 1) batches, plus the index that stays open. The last line of stdout is JSON; exit code 1 if the
growth reaches --limit_mb or the last epoch stands more than --drift_mb above the first.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import default_data, loader_cell, loader_report  # noqa: E402

_DATA = flags.DEFINE_string("data", "", "data set; default: that of benchmarks/loader.py (11,430 frames, two cameras)")
_SCRATCH = flags.DEFINE_string("scratch", str(ROOT / "runs" / "benchmark"), "folder for the data set")
_EPOCHS = flags.DEFINE_integer("epochs", 3, "passes over the data", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "frames per batch", lower_bound=1)
_PREFETCH = flags.DEFINE_integer("prefetch", 2, "batches prepared ahead", lower_bound=1)
_LIMIT = flags.DEFINE_float("limit_mb", 300, "growth of peak RSS over the imports must stay below")
_DRIFT = flags.DEFINE_float("drift_mb", 16, "RSS after the last epoch over that after the first must stay below")
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    result = run(_DATA.value or default_data.write(_SCRATCH.value), _EPOCHS.value, _BATCH_SIZE.value, _PREFETCH.value)
    text = table(result)
    print(text)
    if _APPEND.value:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    holds = result["growth_mb"] < _LIMIT.value and result["drift_mb"] < _DRIFT.value
    print(json.dumps(result | {"holds": holds}))
    return 0 if holds else 1


def run(data: str, epochs: int, batch_size: int, prefetch: int) -> dict:
    """Measures in a fresh process; returns its figures (MB are 2**20 bytes)."""
    asked = json.dumps([data, epochs, batch_size, prefetch])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, __file__, "--child", asked], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(data: str, epochs: int, batch_size: int, prefetch: int) -> dict:
    from benchmarks import loader_ours
    from qdepth_jax import progress

    if "jax" in sys.modules:
        raise AssertionError("the loader has imported JAX: it has to be usable without")
    imported = loader_cell.rss_mb()
    cell = loader_cell.Cell("ours", "decode", data, batch_size=batch_size, split="train")
    opened = loader_ours.open_loader(cell)
    built = loader_cell.rss_mb()
    steps, at_end, anonymous = opened.steps_per_epoch, [], []
    batch_mb = sum(value.nbytes for value in opened.batch(0).values()) / 2**20
    bar = progress.Progress(epochs * steps, "batches", unit="batch")
    highest = [0.0] * epochs
    for step, _batch in zip(range(epochs * steps), opened.iterate(0, prefetch)):
        epoch = step // steps
        if step % steps == steps // 2:
            # A slow step, once an epoch: everything that may be prepared ahead is, and counts.
            time.sleep(0.2 * prefetch)
        highest[epoch] = max(highest[epoch], loader_cell.rss_mb())
        if step % steps == steps - 1:
            at_end.append(loader_cell.rss_mb())
            anonymous.append(_anonymous_mb())
        bar.update()
    bar.close()
    peak = loader_cell.rss_peak_mb()
    return {
        "frames_per_epoch": opened.frames,
        "epochs": epochs,
        "batch_mb": batch_mb,
        "bound_mb": (prefetch + 1) * batch_mb,
        "import_mb": imported,
        "build_mb": built,
        "epoch_end_mb": at_end,
        "epoch_end_anonymous_mb": anonymous,
        "epoch_peak_mb": highest,
        "peak_mb": peak,
        "growth_mb": peak - imported,
        "drift_mb": at_end[-1] - at_end[0],
    }


def _anonymous_mb() -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


def table(result: dict) -> str:
    """Markdown."""
    machine = loader_report.machine()
    shown = " ".join(arg for arg in sys.argv[1:] if not arg.startswith(("--scratch", "--data")))
    rows = zip(result["epoch_end_mb"], result["epoch_end_anonymous_mb"], result["epoch_peak_mb"])
    lines = [
        f"## {datetime.date.today()} memory: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB",
        "",
        f"`python benchmarks/memory.py {shown}`".replace(" `", "`"),
        f"{machine['system']}; {result['frames_per_epoch']} frames of two cameras, batch {result['batch_mb']:.1f} MB.",
        "",
        "| after | RSS MB | of it anonymous | highest |",
        "|---|---|---|---|",
        f"| imports | {result['import_mb']:.0f} | | |",
        f"| opening | {result['build_mb']:.0f} | | |",
        *(f"| epoch {n} | {end:.0f} | {own:.0f} | {top:.0f} |" for n, (end, own, top) in enumerate(rows, 1)),
        "",
        f"Growth of the peak over the imports: {result['growth_mb']:.0f} MB, of which {result['bound_mb']:.0f} MB are "
        f"batches; last epoch over first: {result['drift_mb']:+.1f} MB.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_measure(*json.loads(sys.argv[2]))))
        sys.exit()
    from qdepth_jax import command

    command.run(main)
