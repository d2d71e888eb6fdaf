"""One action chunk: ours against open-pi-zero's (eager, compiled) and openpi's JAX code, in one interleaved run.

  python benchmarks/inference.py --open_pi_zero=CHECKOUT [--openpi=CHECKOUT --openpi_python=PYTHON] [--append_results]
  python benchmarks/inference.py --open_pi_zero=CHECKOUT --size=mid       # the published depth, an eighth as wide
  python benchmarks/inference.py --open_pi_zero=CHECKOUT --device=gpu --size=full --dtype=bfloat16 --tolerance=0.05
      # UNTRIED: nobody has run this on a GPU yet

Checkouts: github.com/allenzren/open-pi-zero (commit c3df7fb; needs torch, hydra-core, omegaconf and einops in this
environment) and github.com/Physical-Intelligence/openpi (commit 15a9616; runs in the environment of --openpi_python,
with its pins jax 0.5.3 and flax 0.10.2; torch may be missing there). One picture, batch 1, --flow_steps Euler steps.
`ours` against `eager` and `compile` is the open-pi-zero network, `ours_pi0` against `openpi` is pi0's; contestants of
one network get the same weights, observation and noise, and before the race their actions must agree within
--tolerance (int8 is not asked to: its distance is a figure), otherwise the exit code is 1 and nothing is timed.

Each contestant lives in a process of its own on the same cores; in every round each takes its turn while the others
wait, and a ratio is taken within a round. A turn is --repeats chunks, and as many with a single flow step: the
difference is the cost of a flow step, what is left of the single one is the prefix. On a GPU the contestants follow one
another, each alone with the memory. The last line of stdout is JSON.
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

from benchmarks import contestant, inference_sizes, loader_report  # noqa: E402

_OPEN_PI_ZERO = flags.DEFINE_string("open_pi_zero", "", "checkout of open-pi-zero; empty = without")
_OPENPI = flags.DEFINE_string("openpi", "", "checkout of openpi; empty = without")
_OPENPI_PYTHON = flags.DEFINE_string("openpi_python", sys.executable, "interpreter with openpi's dependencies")
_CONTESTANTS = flags.DEFINE_list("contestants", [], "who runs; default: all whose checkout is given")
_SIZE = flags.DEFINE_enum("size", "wide", list(inference_sizes.SIZES), "wide: the published widths, fewer layers")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each contestant", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 1, "chunks per turn", lower_bound=1)
_FLOW_STEPS = flags.DEFINE_integer("flow_steps", 10, "steps of the flow", lower_bound=2)
_THREADS = flags.DEFINE_integer("threads", 2, "cores of each contestant (CPU)", lower_bound=1)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "where")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of activations")
_SCAN = flags.DEFINE_bool("scan", False, "ours: scanned layers")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "largest distance of actions, whose noise has deviation 1")
_APPEND = flags.DEFINE_bool("append_results", False, "append the table to benchmarks/RESULTS.md")

VERSIONS = ("jax", "jaxlib", "flax", "torch")


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    names = _names()
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


def _names() -> list[str]:
    from qdepth_jax import errors

    for flag, path, inside in (
        ("open_pi_zero", _OPEN_PI_ZERO.value, "src/model/vla/pizero.py"),
        ("openpi", _OPENPI.value, "src/openpi/models/pi0.py"),
    ):
        if path and not (pathlib.Path(path) / inside).is_file():
            raise errors.UserError(f"--{flag}={path}: no {inside} there, is it a checkout?")
    able = ["ours", "int8"]
    able += ["eager", "compile"] if _OPEN_PI_ZERO.value else []
    able += ["ours_pi0", "openpi"] if _OPENPI.value else []
    names = list(_CONTESTANTS.value) or able
    if unknown := [name for name in names if name not in able]:
        raise errors.UserError(f"--contestants has {unknown}: use any of {able}; originals need their checkout")
    for name in names:
        if (needed := inference_sizes.REFERENCE[_network(name)]) not in names:
            raise errors.UserError(f"--contestants: {name} is compared with {needed}, which has to run too")
    return names


def _network(name: str) -> str:
    return inference_sizes.CONTESTANTS[name][1]


def contestant_of(order: inference_sizes.Order) -> contestant.Contestant:
    environment = {"JAX_PLATFORMS": "cuda,cpu"} if order.device == "gpu" else {}
    python = _OPENPI_PYTHON.value if order.contestant == "openpi" else ""
    return contestant.Contestant("inference_child", dataclasses.asdict(order), environment, python)


def race(names: list[str]) -> dict[str, Any]:
    """Builds, compares actions, times; the whole result."""
    from qdepth_jax import progress

    with tempfile.TemporaryDirectory() as folder:
        alone = _DEVICE.value == "gpu"
        bar = progress.Progress(len(names) * (1 + _ROUNDS.value), "inference", unit="turn")
        running, firsts, turns, failed = {}, {}, {name: [] for name in names}, {}

        def turn(name: str) -> None:
            many, one = (running[name].run(steps, _REPEATS.value) for steps in (_FLOW_STEPS.value, 1))
            if running[name].error:
                failed[name] = running[name].error
            else:
                turns[name].append(timing(many, one, _FLOW_STEPS.value, _REPEATS.value))
            bar.update()

        try:
            for order in _orders(names, folder):
                name = order.contestant
                running[name] = contestant_of(order)
                firsts[name] = running[name].run(_FLOW_STEPS.value, 1)  # everybody compiles here
                for steps in (1, _FLOW_STEPS.value, 1):  # and here; caches and pools warm
                    running[name].run(steps, 1)
                bar.update()
                if running[name].error:
                    failed[name] = running[name].error
                elif alone:
                    for _ in range(_ROUNDS.value):
                        turn(name)
                if alone:
                    running[name].close()
            able = [name for name in names if name not in failed]
            distances = distance({name: firsts[name]["actions"] for name in able})
            agreed = all(d <= _TOLERANCE.value for name, d in distances.items() if name != "int8")
            if agreed and not alone:
                for _, name in itertools.product(range(_ROUNDS.value), able):
                    turn(name)
        finally:
            for living in running.values():
                living.close()
            bar.close()
        able = [name for name in names if name not in failed and turns[name]]
        return {
            "size": _SIZE.value,
            "flow_steps": _FLOW_STEPS.value,
            "repeats": _REPEATS.value,
            "threads": _THREADS.value,
            "device": _DEVICE.value,
            "dtype": _DTYPE.value,
            "agree": agreed,
            "distance": distances,
            "tolerance": _TOLERANCE.value,
            "failed": failed,
            "contestants": {name: summary(running[name], firsts[name], turns[name]) for name in able},
            "ratios": {name: ratios(turns[_ours(name)], turns[name]) for name in able if _ours(name) in able},
        }


def _ours(name: str) -> str:
    return inference_sizes.REFERENCE[_network(name)]


def _orders(names: list[str], folder: str) -> list[inference_sizes.Order]:
    """In each network, who draws the weights comes first."""
    checkouts = {"open_pi_zero": _OPEN_PI_ZERO.value, "pi0": _OPENPI.value}
    orders = []
    for name in sorted(names, key=lambda name: name not in inference_sizes.ORIGINALS):
        network = _network(name)
        here = pathlib.Path(folder) / network
        here.mkdir(exist_ok=True)
        drawn = any(_network(order.contestant) == network and order.write_weights for order in orders)
        original = any(_network(other) == network for other in names if other in inference_sizes.ORIGINALS)
        orders.append(
            inference_sizes.Order(
                contestant=name,
                size=_SIZE.value,
                threads=_THREADS.value,
                device=_DEVICE.value,
                dtype=_DTYPE.value,
                folder=str(here),
                checkout=os.path.abspath(checkouts[network]) if original else "",
                write_weights=name in inference_sizes.ORIGINALS and not drawn,
                scan=_SCAN.value,
            )
        )
    return orders


def timing(many: dict[str, Any], one: dict[str, Any], steps: int, repeats: int) -> dict[str, float]:
    """Seconds of one chunk, of its prefix and of one flow step, from chunks of `steps` and of one step."""
    out = {"peak_mb": max(many["peak_mb"], one["peak_mb"])}
    for clock in ("wall_s", "cpu_s"):
        out[clock] = many[clock] / repeats
        out[f"step_{clock}"] = (many[clock] - one[clock]) / repeats / (steps - 1)
        out[f"prefix_{clock}"] = one[clock] / repeats - out[f"step_{clock}"]
    return out


def distance(actions: dict[str, list[float]]) -> dict[str, float]:
    """Largest distance of each contestant's actions from those of ours on the same network."""
    return {
        name: max(abs(a - b) for a, b in zip(values, actions[_ours(name)], strict=True))
        for name, values in actions.items()
        if _ours(name) in actions and name != _ours(name)
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Their time over ours within each round: above 1, ours is faster."""
    names = ("wall_s", "cpu_s", "prefix_cpu_s", "step_cpu_s")
    return {name: spread([b[name] / a[name] for a, b in zip(ours, theirs, strict=True)]) for name in names}


def summary(living: contestant.Contestant, first: dict[str, Any], turns: list[dict[str, float]]) -> dict[str, Any]:
    """Figures of one contestant; prefix_share: of the CPU seconds of a chunk on a CPU, of wall time on a GPU."""
    clock = "wall_s" if _DEVICE.value == "gpu" else "cpu_s"
    names = ("wall_s", "cpu_s", "prefix_wall_s", "prefix_cpu_s", "step_wall_s", "step_cpu_s")
    return {
        **living.start["facts"],
        **{name: spread([turn[name] for turn in turns]) for name in names},
        "prefix_share": spread([turn[f"prefix_{clock}"] / turn[clock] for turn in turns]),
        "build_and_first_s": living.start["build_s"] + first["wall_s"],
        "peak_mb": turns[-1]["peak_mb"],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    machine, versions = loader_report.machine(), loader_report.versions(VERSIONS)
    private = ("--open_pi_zero", "--openpi", "--openpi_python")
    shown = [f"{arg.partition('=')[0]}=..." if arg.startswith(private) else arg for arg in sys.argv[1:]]
    distances = ", ".join(f"{name} {value:.1e}" for name, value in result["distance"].items())
    lines = [
        f"## {datetime.date.today()} inference: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB",
        "",
        f"`python benchmarks/inference.py {' '.join(shown)}`".replace(" `", "`"),
        f"{machine['system']}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        f"Size {result['size']}, one picture, batch 1, {result['flow_steps']} flow steps, {result['dtype']}, "
        f"{result['threads']} of the cores each; median [min, max] over {_ROUNDS.value} rounds of {result['repeats']} "
        "chunks; x = their time / ours within a round, above 1 we are faster.",
        f"Largest distance of actions from ours: {distances or '-'} (allowed {result['tolerance']:.0e}, int8 apart).",
        "",
        "| contestant | weights MB | ms per chunk | CPU ms | x ours, wall | x ours, CPU | prefix CPU ms | flow step "
        "CPU ms | prefix share | x prefix | x flow step | first chunk s | peak MB |",
        "|---" * 13 + "|",
    ]
    for name, row in result["contestants"].items():
        ratio = {} if name == _ours(name) else result["ratios"].get(name, {})
        lines.append(
            f"| {name} | {row['weight_bytes'] / 1e6:.0f} | {_show(row['wall_s'], 1e3)} | {_show(row['cpu_s'], 1e3)} | "
            f"{_show(ratio.get('wall_s'))} | {_show(ratio.get('cpu_s'))} | {row['prefix_cpu_s']['median'] * 1e3:.0f} | "
            f"{row['step_cpu_s']['median'] * 1e3:.1f} | {row['prefix_share']['median']:.1%} | "
            f"{_show(ratio.get('prefix_cpu_s'))} | {_show(ratio.get('step_cpu_s'))} | {row['build_and_first_s']:.0f} | "
            f"{row['peak_mb']:.0f} |"
        )
    lines += ["", *(f"{name}: {', '.join(row['notes'])}." for name, row in result["contestants"].items()), ""]
    if not result["agree"]:
        lines += ["They do not compute the same: no race.", ""]
    return "\n".join(lines + [f"{name} FAILED: {error}\n" for name, error in result["failed"].items()])


def _show(value: dict[str, float] | None, factor: float = 1.0) -> str:
    if value is None:
        return "-"
    middle, low, high = (f"{value[name] * factor:.{2 if factor == 1.0 else 0}f}" for name in ("median", "min", "max"))
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
