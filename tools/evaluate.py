"""Closed-loop episodes of a trained policy in LIBERO: success rate with its 95 % interval, and videos.

  python tools/evaluate.py --checkpoint=WORKDIR --suite=libero_object [--tasks=1,2] [--episodes=5] [--output=DIR]

Protocol of the published evaluations: the benchmark's own start states, ten idle steps, the suite's step cap. Needs the
`sim` extra. The last line of stdout is JSON.
"""

import dataclasses
import json
import pathlib

from absl import flags

from qdepth_jax import command

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a trained policy", required=True)
_SUITE = flags.DEFINE_string("suite", "libero_object", "LIBERO suite or LIBERO-PRO variant")
_TASKS = flags.DEFINE_list("tasks", [], "task numbers; default: all of the suite")
_EPISODES = flags.DEFINE_integer("episodes", 5, "episodes per task, at most 50")
_EXECUTE = flags.DEFINE_integer("execute", 8, "actions executed of each chunk before planning again")
_IMAGE = flags.DEFINE_integer("image_size", 128, "side of the rendered images; that of the training data")
_MAX_STEPS = flags.DEFINE_integer("max_steps", 0, "step cap; 0 = the suite's official one")
_SEED = flags.DEFINE_integer("seed", 0, "of the flow noise")
_OUTPUT = flags.DEFINE_string("output", None, "folder for result.json and videos; default WORKDIR/evaluation/SUITE")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors
    from qdepth_jax.eval import robot
    from qdepth_jax.sim import libero, rollout

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    policy = robot.libero_policy(_CHECKPOINT.value, _SUITE.value, _SEED.value)
    tasks = libero.list_tasks(_SUITE.value)
    if _TASKS.value:
        unknown = [t for t in _TASKS.value if not t.isdigit() or int(t) >= len(tasks)]
        if unknown:
            raise errors.UserError(f"tasks {unknown} do not exist: {_SUITE.value} has 0..{len(tasks) - 1}")
        tasks = [tasks[int(t)] for t in _TASKS.value]
    output = pathlib.Path(_OUTPUT.value or pathlib.Path(_CHECKPOINT.value) / "evaluation" / _SUITE.value)
    output.mkdir(parents=True, exist_ok=True)
    episodes = rollout.run_tasks(
        policy, tasks, _EPISODES.value, _EXECUTE.value, image_size=_IMAGE.value, max_steps=_MAX_STEPS.value or None,
        video_dir=output / "videos",
    )  # fmt: skip
    summary = {"suite": _SUITE.value, "checkpoint": _CHECKPOINT.value, **rollout.summary(episodes)}
    everything = summary | {"results": [dataclasses.asdict(e) for e in episodes]}
    (output / "result.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    command.run(main)
