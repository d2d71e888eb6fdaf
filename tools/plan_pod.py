"""Plans a run on chips one does not have: memory, collectives, speed limit, and the best layout, before renting.

  python tools/plan_pod.py --config=experiments/bridge.py --topology=v5e:4x4 --batch=1024
  python tools/plan_pod.py --config=experiments/bridge.py --topology=v5p-64 --config.train.micro_batches=2
  python tools/plan_pod.py --config=experiments/bridge.py --topology=2xv5e-256 --config.mesh.replica=4
  python tools/plan_pod.py --config=experiments/bridge.py --topology=v5e-16 --search

Compiles the loop's own train step for the named TPU slices with libtpu (extra `plan`; no TPU is needed; minutes at
full size). No data, tokenizer or text model is opened. Without libtpu, for GPUs, or with --nocompile, everything is
estimated by formula, and said so. The last line of stdout is JSON.
"""

import functools
import json
import sys
import time

from absl import flags

from qdepth_jax import command

_CONFIG = command.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5e-256, v5p-64, 2xv5e-256, h100-64, ...", required=True)
_BATCH = flags.DEFINE_integer("batch", 0, "global batch in examples; 0 = the experiment's")
_COMPILE = flags.DEFINE_boolean("compile", True, "compile the step; --nocompile estimates by formula in seconds")
_CACHE = flags.DEFINE_string("cache", "", "folder that keeps compiled results: the same program is compiled once")
_SEARCH = flags.DEFINE_boolean("search", False, "look for the best (mesh, micro-batches, remat) first")
_COMPILES = flags.DEFINE_integer("search_compiles", 2, "how many of the best candidates --search compiles")
_HLO = flags.DEFINE_string("hlo", "", "also write the compiled program's text to this file")
flags.mark_flag_as_required("config")
flags.declare_key_flag("config")  # so that --help shows it


def main(argv: list[str]) -> None:
    from qdepth_jax.plan import topology

    topology.prepare_environment()
    from qdepth_jax import errors
    from qdepth_jax.plan import report, search

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: flags are --config, --topology, --batch, ...")
    config, where = _CONFIG.value, topology.parse(_TOPOLOGY.value)
    if _BATCH.value:
        config.train.batch_size = _BATCH.value
    compiles = _COMPILE.value and can_compile(where, topology)
    make = functools.partial(searched, search=search, report=report) if _SEARCH.value else planned
    result = make(config, where, compiles)
    if _HLO.value and result.get("text"):
        with open(_HLO.value, "w") as file:
            file.write(result["text"])
    result.pop("text", None)
    print(report.text(result))
    print(json.dumps(result))


def can_compile(where, topology) -> bool:
    """Whether the step can be compiled; says loudly what is missing if not."""
    missing = topology.compiler_missing()
    if where.chip.kind != "tpu":
        missing = f"{where.chip.name} is a GPU: its compiler needs one"
    if missing:
        say(f"NOT COMPILED: {missing}. Memory, collectives and HBM traffic below are estimates by formula.")
    return not missing


def planned(config, where, compiles: bool):
    """The plan of one config as JSON types."""
    from qdepth_jax.plan import pod

    start = time.monotonic()
    progress = lambda message: say(f"[{time.monotonic() - start:6.1f} s] {message}")  # noqa: E731
    return pod.plan(config, where, compiles, cache=_CACHE.value, progress=progress)


def searched(config, where, compiles: bool, search, report):
    """Tries layouts by formula, compiles the best, prints the table; the plan of the winner."""
    rows = search.candidates(config, where)
    best, tried = None, 0
    for row in rows:
        if row["best"] == 0:
            continue
        if not compiles or tried >= max(1, _COMPILES.value):
            if best is None and not compiles:
                best = planned(search.with_layout(config, row), where, False)
                row["verdict"] += "; chosen"
            break
        tried += 1
        say(f"compiling candidate {tried}: {search.describe(row)}")
        result = planned(search.with_layout(config, row), where, True)
        search.take_compiled(row, result)
        if result["memory"]["fits"] and (best is None or row["best"] < best["roofline"][0]["best"]):
            best = result
    print(report.candidates(rows[:40]))
    if len(rows) > 40:
        print(f"  and {len(rows) - 40} more, all in the JSON")
    print()
    from qdepth_jax import errors

    if best is None:
        raise errors.UserError(
            f"no layout of {tried or len(rows)} tried fits {where.name}: raise --search_compiles, use more chips or a "
            "smaller model"
        )
    return best | {"candidates": rows}


def say(message: str) -> None:
    """A line to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(main)
