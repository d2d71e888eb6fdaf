"""Where our train step spends its time on a CPU: forward, backward, the rest, and XLA's operations by kind.

  python benchmarks/train_step_profile.py [--layers=4 --vision_layers=3] [--top=15]

The network is the `mid` size of benchmarks/train_step.py with fewer layers, so that it compiles in a minute. One core,
so that CPU time means work; the operations are those of a profiler trace. The last line of stdout is JSON.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import train_step_sizes  # noqa: E402

_LAYERS = flags.DEFINE_integer("layers", 4, "of the mixture", lower_bound=1)
_VISION_LAYERS = flags.DEFINE_integer("vision_layers", 3, "of the vision tower", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 4, "examples per step", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed repetitions, of which the median counts", lower_bound=1)
_TOP = flags.DEFINE_integer("top", 15, "kinds of operation in the table", lower_bound=1)


def main(argv: list[str]) -> int:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before JAX starts its threads
    os.environ["JAX_PLATFORMS"] = "cpu"
    parts, kinds = profile()
    print("| part | CPU ms per step |\n|---|---|")
    print("\n".join(f"| {name} | {ms:.0f} |" for name, ms in parts.items()))
    total = sum(kinds.values())
    print("\n| operations | share of their time |\n|---|---|")
    print("\n".join(f"| {name} | {ms / total:.1%} |" for name, ms in kinds.most_common(_TOP.value)))
    print(json.dumps({"cpu_ms": parts, "kinds": {name: ms / total for name, ms in kinds.most_common(_TOP.value)}}))
    return 0


def profile() -> tuple[dict[str, float], collections.Counter]:
    """-> CPU ms per step of forward, backward and the rest; ms of each kind of operation in the whole step."""
    import jax

    from benchmarks import train_step_ours

    small = dataclasses.replace(train_step_sizes.SIZES["mid"], layers=_LAYERS.value, vision_layers=_VISION_LAYERS.value)
    train_step_sizes.SIZES["profile"] = small
    order = train_step_sizes.Order("ours", "profile", _BATCH.value, 1, "cpu", "float32", folder="")
    step, state, batch, objective, _ = train_step_ours.parts(order)
    key = jax.random.key(0)

    def loss(params):
        return objective.loss(params, {}, batch, key, 0).loss

    forward = jax.jit(loss).lower(state.params).compile()
    gradient = jax.jit(jax.value_and_grad(loss)).lower(state.params).compile()
    whole = jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()
    times = [_cpu_ms(lambda: forward(state.params)), _cpu_ms(lambda: gradient(state.params))]
    held = [state]

    def run():
        held[0], metrics = whole(held[0], batch, key)
        return metrics

    times.append(_cpu_ms(run))
    names = ("forward", "backward", "clipping, update, metrics")
    parts = {name: after - before for name, after, before in zip(names, times, [0.0, *times])}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(run())
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return parts, _by_kind(jax.profiler.ProfileData.from_file(str(trace)), whole.as_text())


def _cpu_ms(run: Callable[[], object]) -> float:
    import jax

    times = []
    for _ in range(_REPEATS.value + 1):  # the first warms up
        start = time.process_time()
        jax.block_until_ready(run())
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times[1:])


def _by_kind(data, text: str) -> collections.Counter:
    """Time of each event with an HLO name, under the JAX name it was traced from: the last two words of its path."""
    names = {}
    for line in text.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if found and (origin := re.search(r'op_name="([^"]+)"', line)):
            way = "backward" if "transpose(" in origin[1] else "forward" if "jvp(" in origin[1] else "update"
            names[found[1]] = f"{way}: {'/'.join(origin[1].split('/')[-2:])}"
    kinds = collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    kinds[names.get(operation, re.sub(r"[.\d]+$", "", operation))] += event.duration_ns / 1e6
    return kinds


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
