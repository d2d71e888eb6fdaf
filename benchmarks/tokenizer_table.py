"""Quantisers of the depth tokenizer side by side: every kind at the same budget, several seeds, on held-out episodes.

  python benchmarks/tokenizer_table.py --output=runs/tokenizer_table [--kinds=ema,l2,plain,fsq] [--seeds=0,1,2]
                                       [--steps=N] [-- --config.model.blocks=2 ...]

Trains experiments/tokenizer.py:sample (the shipped LIBERO data with the simulator's own depth) once per kind and seed,
one after the other, each in a process of its own by the ordinary command, and measures every run on all held-out
episodes. What stands after `--` goes to every run. A run with a RESULT.json in its folder is not repeated, a killed one
goes on from its checkpoint: start the command again. Writes OUTPUT/table.md and OUTPUT/table.json after each run; the
last line of stdout is JSON.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's qdepth_jax before an installed one

from qdepth_jax import command, files  # noqa: E402

_OUTPUT = flags.DEFINE_string("output", None, "folder of the runs", required=True)
_KINDS = flags.DEFINE_list("kinds", ["ema", "l2", "fsq", "plain"], "quantisers")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of the runs")
_STEPS = flags.DEFINE_integer("steps", 0, "of each run; 0 = the experiment's own", lower_bound=0)
_DO = flags.DEFINE_enum(
    "do", "train", ["train", "measure", "table"], "train and measure what is missing; measure what is trained again; "
    "write the table of what is there",
)  # fmt: skip

SOFTNESS = (0.003, 0.01, 0.03, 0.1, 0.3)
COLUMNS = (
    ("codes", "codes used of 256", "{:.0f}"),
    ("perplexity", "perplexity", "{:.0f}"),
    ("rmse", "RMSE, m", "{:.4f}"),
    ("abs_rel", "AbsRel", "{:.4f}"),
    ("delta_1", "delta 1", "{:.4f}"),
    ("over_rmse", "floor / RMSE", "{:.2f}"),
    ("over_abs_rel", "floor / AbsRel", "{:.2f}"),
    ("start", "start of cross-entropy / ln K", "{:.3f}"),
    ("soft_rmse", "RMSE, best soft tokens", "{:.4f}"),
)


def main(argv: list[str]) -> int:
    output = pathlib.Path(_OUTPUT.value).absolute()
    output.mkdir(parents=True, exist_ok=True)
    # Seeds outside, so that a table cut short has all kinds.
    wanted = [(kind, int(seed)) for seed in _SEEDS.value for kind in _KINDS.value]
    for kind, seed in wanted:
        workdir = output / f"{kind}_{seed}"
        trained = (workdir / "train_cost.json").exists()
        measured = (workdir / "RESULT.json").exists() and _DO.value != "measure"
        if measured or _DO.value == "table" or (_DO.value == "measure" and not trained):
            continue
        if not trained:
            _train(workdir, kind, seed, argv[1:])
        cost = json.loads((workdir / "train_cost.json").read_text())
        result = {"kind": kind, "seed": seed} | cost | measure(str(workdir))
        files.write_whole(workdir / "RESULT.json", json.dumps(result, indent=1))
        print(_line(result), file=sys.stderr, flush=True)
        _write_tables(output)
    _write_tables(output)
    print(json.dumps({"runs": len(_results(output)), "table": str(output / "table.md")}))
    return 0


def _train(workdir: pathlib.Path, kind: str, seed: int, more: list[str]) -> None:
    line = [
        sys.executable, "-m", "qdepth_jax.train", "--config=experiments/tokenizer.py:sample", f"--workdir={workdir}",
        f"--config.model.quantiser={kind}", f"--config.seed={seed}", *more,
    ]  # fmt: skip
    if _STEPS.value:
        line.append(f"--config.train.total_steps={_STEPS.value}")
    workdir.mkdir(exist_ok=True)
    cpu, wall = _cpu(), time.monotonic()
    with open(workdir / "train.log", "a", encoding="utf-8") as log:
        subprocess.run(line, cwd=ROOT, stdout=log, stderr=log, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    spent = {"cpu_seconds": _cpu() - cpu, "wall_seconds": time.monotonic() - wall, "command": line[1:]}
    files.write_whole(workdir / "train_cost.json", json.dumps(spent))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(workdir: str) -> dict[str, Any]:
    """Figures of a trained tokenizer over the held-out episodes, with hard and with soft tokens.

    Returns:
      {"step", "identity", "held_out": depth_metrics.figures of all episodes, "by_data_set": name -> the same,
      "soft": softness -> {"rmse", "abs_rel"}, "start": untrained cross-entropy / ln K}.
    """
    import numpy as np

    from qdepth_jax import earlier_stages
    from qdepth_jax.data import definitions, episode_reader, index
    from qdepth_jax.eval import depth_metrics
    from qdepth_jax.models import tokenizer

    config, variables, meta = earlier_stages.load_tokenizer(workdir)
    maps: dict[str, list[Any]] = {}
    for name, row in meta["config"]["datasets"].items():
        opened, definition = index.open_index(row["path"], meta["config"]["data"]["index_dir"]), definitions.find(name)
        reader = episode_reader.EpisodeReader(opened.splits["val"])
        feature, metres = definitions.depth_of(definition, opened.dataset)
        maps[name] = [
            reader.depth_of(feature, metres, None, episode, reader.good_steps(episode))
            for episode in range(len(opened.splits["val"].episodes))
        ]
        reader.close()
    found, soft, used = {}, {}, None
    for softness in (0.0, *SOFTNESS):
        run = tokenizer.compiled_roundtrip(config, softness)
        sums = {name: [_sums(run, config, variables, *m) for m in episodes] for name, episodes in maps.items()}
        everything = [one for rows in sums.values() for one in rows]
        figures = depth_metrics.figures(everything)
        if softness:
            soft[str(softness)] = {"rmse": figures["rmse"], "abs_rel": figures["abs_rel"]}
            continue
        found = {
            "held_out": figures,
            "by_data_set": {name: depth_metrics.figures(rows) for name, rows in sums.items()},
        }
        used = depth_metrics.total(everything)["codes"]
    codes = np.asarray(tokenizer.codes_of(config, variables["params"], variables["state"]))
    return found | {
        "step": meta["step"],
        "identity": tokenizer.identity(config, variables["params"], variables["state"]),
        "soft": soft,
        "start": start(codes, used, config.grid),
    }


def _sums(run, config, variables, raw, scale: float, offset: float, batch: int = 16) -> dict[str, Any]:
    import numpy as np

    from qdepth_jax import depth
    from qdepth_jax.data import sidecar
    from qdepth_jax.eval import depth_metrics

    parts, full = [], np.ones((batch,), np.float32)
    for at in range(0, len(raw), batch):
        part = raw[at : at + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])  # cut off again below
        out = run(variables, padded, full * np.float32(scale), full * np.float32(offset))
        codes, x_hat, x, valid = (np.asarray(a)[: len(part)] for a in out)
        value, truth = (np.asarray(depth.denormalise(a, config.range)) for a in (x_hat, x))
        kept = sidecar.token_validity(valid, config.grid)
        parts.append(depth_metrics.episode_sums(value, truth, valid, config.grid, codes, kept, config.num_codes))
    return depth_metrics.total(parts)


def start(codes: Any, used: Any, grid: int) -> float:
    """Depth cross-entropy of an untrained policy's decoder over ln K, where codes are as frequent as in the data."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qdepth_jax.models import depth_expert

    head = depth_expert.DepthConfig(grid=grid, codes=len(codes), code_dim=codes.shape[1])
    stream = jax.random.normal(jax.random.key(0), (2, grid * grid, 128))  # normed, as the mixture's last norm leaves it
    x, _ = depth_expert.DepthDecoder(head).init_with_output(jax.random.key(1), stream)
    log_p = jax.nn.log_softmax(depth_expert.code_logits(x, jnp.asarray(codes), head.temperature), axis=-1)
    share = np.asarray(used) / np.sum(used)
    return float(-np.sum(share * np.asarray(jnp.mean(log_p, axis=(0, 1)))) / np.log(len(codes)))


# ---- the table ----


def _write_tables(output: pathlib.Path) -> None:
    results = _results(output)
    files.write_whole(output / "table.md", table(results))
    rows = [{"kind": r["kind"], "seed": r["seed"], "step": r["step"], **_row(r)} | {
        "interval_95": r["held_out"]["interval_95"], "floor": r["held_out"]["constant_per_token"], "soft": r["soft"],
        "by_data_set": {name: f["floor_over_tokens"] for name, f in r["by_data_set"].items()},
        "cpu_seconds": r["cpu_seconds"], "command": [part for part in r["command"] if not part.startswith("--workdir")],
    } for r in results]  # fmt: skip
    files.write_whole(output / "table.json", json.dumps(rows, indent=1) + "\n")


def _results(output: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("*/RESULT.json"))]


def _row(result: dict[str, Any]) -> dict[str, float]:
    held = result["held_out"]
    return {
        "codes": held["codes_used"],
        "over_rmse": held["floor_over_tokens"]["rmse"],
        "over_abs_rel": held["floor_over_tokens"]["abs_rel"],
        "start": result["start"],
        "soft_rmse": min(s["rmse"] for s in result["soft"].values()),
        **{name: held[name] for name in ("perplexity", "rmse", "abs_rel", "delta_1")},
    }


def _line(result: dict[str, Any]) -> str:
    row = _row(result)
    figures = ", ".join(f"{title} {form.format(row[name])}" for name, title, form in COLUMNS)
    return f"{result['kind']} seed {result['seed']}: {figures}; {result['cpu_seconds']:.0f} CPU-s"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: for each kind the mean over seeds and (lowest to highest)."""
    lines = ["| kind | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + " | CPU-s of a run |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for kind in dict.fromkeys(r["kind"] for r in results):
        rows = [_row(r) for r in results if r["kind"] == kind]
        cells = []
        for name, _, form in COLUMNS:
            values = [row[name] for row in rows]
            text = form.format(statistics.mean(values))
            cells.append(text + (f" ({form.format(min(values))} to {form.format(max(values))})" if values[1:] else ""))
        cost = statistics.mean(r["cpu_seconds"] for r in results if r["kind"] == kind)
        lines.append(f"| `{kind}` | {len(rows)} | " + " | ".join(cells) + f" | {cost:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main)
