"""One training step: ours against open-pi-zero's, eager and compiled, in one interleaved run.

  python benchmarks/train_step.py --open_pi_zero=CHECKOUT [--rounds=9] [--append_results]
  python benchmarks/train_step.py --open_pi_zero=CHECKOUT --device=gpu --size=full --dtype=bfloat16 --batch=16 \
      --scan --remat=dots --tolerance=0.05     # UNTRIED: nobody has run this on a GPU yet

CHECKOUT is github.com/allenzren/open-pi-zero (commit c3df7fb); its model needs torch, hydra-core, omegaconf and einops
in this environment. Same network (the baseline, no depth expert), weights, batch, noise and trained parameters;
forward, backward, clipping, AdamW, all in float32 on a CPU. Each contestant lives in a process of its own on the same
cores; in every round each takes its turn while the others wait, and a ratio is taken within a round. Before the race
the first step's loss and gradient norm must agree within --tolerance, otherwise the exit code is 1 and nothing is
timed.

On a GPU the contestants follow one another, each alone with the memory; rounds are paired by number. There the original
trains bfloat16 weights without a float32 copy, as its trainer does; ours keeps float32 weights and moments.

On a machine with other work take --threads=1 and the ratio of CPU times: threads of torch that wait for one whose core
is taken spin, which counts as CPU time. The last line of stdout is JSON.
"""

import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import contestant, loader_report, train_step_sizes  # noqa: E402

_CHECKOUT = flags.DEFINE_string("open_pi_zero", "", "checkout of open-pi-zero; empty = ours alone")
_SIZE = flags.DEFINE_enum(
    "size", "mid", list(train_step_sizes.SIZES), "mid: 42 M parameters; full: the published 3.2 B"
)
_CONTESTANTS = flags.DEFINE_list("contestants", ["ours", "eager", "compile"], "who runs")
_BATCH = flags.DEFINE_integer("batch", 4, "examples per step", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "turns of each contestant", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 2, "steps per turn", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "cores of each contestant (CPU)", lower_bound=1)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "where")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of activations")
_SCAN = flags.DEFINE_bool("scan", False, "ours: scanned layers (the choice for full-size models)")
_REMAT = flags.DEFINE_string("remat", "none", "ours: rematerialisation policy")
_FUSED = flags.DEFINE_bool("fused", True, "torch: the fused AdamW, which is its fastest")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "relative, of the first step's loss and gradient norm")
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")

VERSIONS = ("jax", "jaxlib", "flax", "optax", "torch")


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    names = list(_CONTESTANTS.value) if _CHECKOUT.value else ["ours"]
    if set(names) - {"ours", "eager", "compile"} or "ours" not in names:
        raise errors.UserError(f"--contestants={','.join(names)}: use 'ours', and any of 'eager' and 'compile'")
    if _CHECKOUT.value and not (pathlib.Path(_CHECKOUT.value) / "src/model/vla/pizero.py").is_file():
        raise errors.UserError(f"--open_pi_zero={_CHECKOUT.value}: no src/model/vla/pizero.py there, is it a checkout?")
    if _THREADS.value > len(os.sched_getaffinity(0)):
        raise errors.UserError(f"--threads={_THREADS.value}: this machine has {len(os.sched_getaffinity(0))} cores")
    result = race(names)
    text = table(result)
    print(text)
    if _APPEND.value and result["agree"]:
        with open(ROOT / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
    print(json.dumps(result))
    return 0 if result["agree"] and not result["failed"] else 1


def contestant_of(order: train_step_sizes.Order) -> contestant.Contestant:
    environment = {}
    if order.device == "gpu":
        # The state in float32 with what loading it takes: JAX's own limit is three quarters of the memory.
        environment = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    return contestant.Contestant("train_step_child", dataclasses.asdict(order), environment)


def race(names: list[str]) -> dict[str, Any]:
    """Builds, compares the first steps, times; the whole result."""
    from qdepth_jax import progress

    with tempfile.TemporaryDirectory() as folder:
        first = next((name for name in names if name != "ours"), None)
        order = sorted(names, key=lambda name: name != first)  # who draws the weights comes first
        alone = _DEVICE.value == "gpu"
        bar = progress.Progress(len(names) * (1 + _ROUNDS.value), "train step", unit="turn")
        running, firsts, turns, failed = {}, {}, {name: [] for name in names}, {}

        def turn(name: str) -> None:
            answer = running[name].run(_STEPS.value)
            if running[name].error:
                failed[name] = running[name].error
            else:
                turns[name].append(answer)
            bar.update()

        try:
            for name in order:
                running[name] = contestant_of(_order(name, folder, name == first))
                firsts[name] = running[name].run(1)  # torch compiles here
                running[name].run(1)  # caches and pools warm
                bar.update()
                if running[name].error:
                    failed[name] = running[name].error
                elif alone:
                    for _ in range(_ROUNDS.value):
                        turn(name)
                if alone:
                    running[name].close()
            able = [name for name in names if name not in failed]
            agreement = agree({name: firsts[name]["rows"][0] for name in able})
            agreed = agreement["relative"] <= _TOLERANCE.value
            if agreed and not alone:
                for _, name in itertools.product(range(_ROUNDS.value), able):
                    turn(name)
        finally:
            for living in running.values():
                living.close()
            bar.close()
        able = [name for name in names if name not in failed and turns[name]]
        # One network: our formula counts for all.
        model_flops = running["ours"].start["facts"]["flops_per_sample"] if "ours" in able else 0.0
        return {
            "size": _SIZE.value,
            "batch": _BATCH.value,
            "threads": _THREADS.value,
            "device": _DEVICE.value,
            "dtype": _DTYPE.value,
            "steps_per_turn": _STEPS.value,
            "agree": agreed,
            "agreement": agreement,
            "failed": failed,
            "contestants": {name: summary(running[name], firsts[name], turns[name], model_flops) for name in able},
            "ratios": {name: ratios(turns["ours"], turns[name]) for name in able if name != "ours" and "ours" in able},
        }


def _order(name: str, folder: str, first: bool) -> train_step_sizes.Order:
    return train_step_sizes.Order(
        contestant=name,
        size=_SIZE.value,
        batch=_BATCH.value,
        threads=_THREADS.value,
        device=_DEVICE.value,
        dtype=_DTYPE.value,
        folder=folder,
        open_pi_zero=os.path.abspath(_CHECKOUT.value) if _CHECKOUT.value else "",
        write_weights=first,
        scan=_SCAN.value,
        remat=_REMAT.value,
        fused=_FUSED.value,
    )


def agree(firsts: dict[str, list[float]]) -> dict[str, Any]:
    """First (loss, gradient norm) of each contestant, and the largest relative distance from the first listed."""
    (reference, *_), worst = firsts.values(), 0.0
    for pair in firsts.values():
        worst = max([worst] + [abs(a - b) / abs(b) for a, b in zip(pair, reference)])
    return {"loss_and_gradient_norm": firsts, "relative": worst, "tolerance": _TOLERANCE.value}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Their time over ours within each round: above 1, ours is faster."""
    return {
        name: spread([b[name] / a[name] for a, b in zip(ours, theirs, strict=True)]) for name in ("wall_s", "cpu_s")
    }


def summary(
    living: contestant.Contestant, first: dict[str, Any], turns: list[dict[str, Any]], model_flops: float
) -> dict[str, Any]:
    """Figures of one contestant; `model_flops` of one sample, 0 where unknown."""
    facts, examples = living.start["facts"], _BATCH.value * _STEPS.value
    rate = spread([examples / turn["wall_s"] for turn in turns])
    out = {
        "parameters": facts["parameters"],
        "trained": facts["trained"],
        "notes": facts["notes"],
        "samples_per_s": rate,
        "step_s": spread([turn["wall_s"] / _STEPS.value for turn in turns]),
        "step_cpu_s": spread([turn["cpu_s"] / _STEPS.value for turn in turns]),
        "build_and_first_step_s": living.start["build_s"] + first["wall_s"],
        "peak_mb": turns[-1]["peak_mb"],
        "device_kind": facts["device_kind"],
        "model_gflops_per_s": rate["median"] * model_flops / 1e9,
    }
    if _DEVICE.value == "gpu":
        from qdepth_jax import chips

        peak = chips.peak_flops(facts["device_kind"])
        out["mfu"] = rate["median"] * model_flops / peak if peak else None
    return out


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    machine, versions = loader_report.machine(), loader_report.versions(VERSIONS)
    shown = [arg if not arg.startswith("--open_pi_zero") else "--open_pi_zero=DIR" for arg in sys.argv[1:]]
    values = [f"{name} {loss:.6f} / {norm:.6f}" for name, (loss, norm) in _firsts(result).items()]
    lines = [
        f"## {datetime.date.today()} train step: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB",
        "",
        f"`python benchmarks/train_step.py {' '.join(shown)}`".replace(" `", "`"),
        f"{machine['system']}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        f"Size {result['size']}, batch {result['batch']}, {result['dtype']}, {result['threads']} of the cores each; "
        f"median [min, max] over {_ROUNDS.value} rounds of {result['steps_per_turn']} steps; x = their time / ours "
        "within a round, above 1 we are faster.",
        f"First step, loss / gradient norm: {'; '.join(values)} (largest relative difference "
        f"{result['agreement']['relative']:.1e}, allowed {result['agreement']['tolerance']:.0e}).",
        "",
        "| contestant | parameters (trained) | samples/s | s/step | CPU s/step | x ours, wall | x ours, CPU | "
        f"{'MFU' if result['device'] == 'gpu' else 'model GFLOP/s'} | first step s | peak MB |",
        "|---" * 10 + "|",
    ]
    for name, row in result["contestants"].items():
        ratio = result["ratios"].get(name, {})
        lines.append(
            f"| {name} | {row['parameters']:,} ({row['trained']:,}) | {_show(row['samples_per_s'])} | "
            f"{_show(row['step_s'])} | {_show(row['step_cpu_s'])} | {_show(ratio.get('wall_s'))} | "
            f"{_show(ratio.get('cpu_s'))} | {_use(row)} | {row['build_and_first_step_s']:.0f} | {row['peak_mb']:.0f} |"
        )
    lines += ["", *(f"{name}: {', '.join(row['notes'])}." for name, row in result["contestants"].items()), ""]
    if not result["agree"]:
        lines += ["They do not compute the same: no race.", ""]
    return "\n".join(lines + [f"{name} FAILED: {error}\n" for name, error in result["failed"].items()])


def _firsts(result: dict[str, Any]) -> dict[str, list[float]]:
    return result["agreement"]["loss_and_gradient_norm"]


def _use(row: dict[str, Any]) -> str:
    if "mfu" in row:
        return "unknown chip" if row["mfu"] is None else f"{row['mfu']:.3f}"
    return f"{row['model_gflops_per_s']:.1f}"


def _show(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
