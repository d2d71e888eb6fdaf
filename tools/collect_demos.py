"""Collects demonstrations from a simulator into an RLDS data set.

  python tools/collect_demos.py --suite=libero_object --tasks=0,1,2,3 --episodes=3 --val_episodes=1 --output_dir=data
  python tools/collect_demos.py --suite=metaworld --tasks=reach-v3,door-open-v3 --episodes=10 --output_dir=demos

Suites: libero_spatial, libero_object, libero_goal, libero_10, libero_90, their LIBERO-PRO variants (a scripted expert
acts; tasks whose goal it cannot serve are reported), and metaworld (its own scripted policies act). Placements are
random by seed and never the benchmark's evaluation states. Failed attempts and those over the step cap are counted,
not kept. Interrupt and run again: finished attempts are kept in the work folder. The last line of stdout is JSON.

A data set that is there grows: more tasks, more val episodes, and more train episodes while there are none in val
(episodes of val come after those of train). Whatever would take published episodes away or move them between train and
val is refused, as is a second start on the same work folder.
"""

import functools
import json
import sys
from pathlib import Path

from absl import flags

from qdepth_jax import command

_SUITE = flags.DEFINE_string("suite", None, "libero_spatial, libero_object, ..., or metaworld", required=True)
_TASKS = flags.DEFINE_list("tasks", ["all"], "task numbers or names, or 'all'")
_EPISODES = flags.DEFINE_integer("episodes", 50, "successful episodes per task in split train", lower_bound=1)
_VAL = flags.DEFINE_integer("val_episodes", 0, "successful episodes per task in split val", lower_bound=0)
_MAX_ATTEMPTS = flags.DEFINE_integer(
    "max_attempts", None, "attempts per task; default: 3 times the episodes, plus 10", lower_bound=1
)
_MAX_STEPS = flags.DEFINE_integer(
    "max_steps", None, "longest episode to keep; default: the suite's official step cap", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output_dir", None, "the data set goes to OUTPUT_DIR/NAME/VERSION", required=True)
_NAME = flags.DEFINE_string("name", None, "name of the data set; default: the suite")
_VERSION = flags.DEFINE_string("version", "1.0.0", "version of the data set")
_WORK = flags.DEFINE_string(
    "work_dir", None, "finished attempts; default: OUTPUT_DIR/.work/NAME (safe to delete after)"
)
_PROCESSES = flags.DEFINE_integer("processes", 1, "parallel simulators (about 1.8 GB of memory each)", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 1000, "seed of the first attempt of every task; of Meta-World 500 or more", lower_bound=0
)
_SIZE = flags.DEFINE_integer("image_size", 256, "pixels, square", lower_bound=16)
_QUALITY = flags.DEFINE_integer("jpeg_quality", 95, "JPEG quality", lower_bound=1, upper_bound=100)
_SUPERSAMPLE = flags.DEFINE_integer("supersample", 2, "RGB samples per pixel and axis", lower_bound=1)
_PER_SHARD = flags.DEFINE_integer("episodes_per_shard", 32, "episodes per TFRecord shard", lower_bound=1)


def main(argv: list[str]) -> None:
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: everything is a --flag=value")
    print(json.dumps(run()))


def run() -> dict:
    """Checks the flags, collects and assembles; returns the summary."""
    from qdepth_jax import errors, workdirs
    from qdepth_jax.sim import collection, demos, metaworld, metaworld_tasks

    if _SUITE.value == collection.METAWORLD and _SEED.value < metaworld_tasks.STARTS:
        raise errors.UserError(
            f"--seed={_SEED.value}: Meta-World's seeds 0 to {metaworld_tasks.STARTS - 1} are the starts of its "
            f"evaluation, on which nothing may be trained: use --seed={metaworld_tasks.STARTS} or more"
        )
    if _SUITE.value == collection.METAWORLD and (_MAX_STEPS.value or 0) > metaworld.STEP_CAP:
        raise errors.UserError(
            f"--max_steps={_MAX_STEPS.value}: an episode of Meta-World ends after {metaworld.STEP_CAP} steps in the "
            f"simulator: use at most --max_steps={metaworld.STEP_CAP}"
        )
    if not _OUTPUT.value or workdirs.is_remote(_OUTPUT.value):
        raise errors.UserError(f"--output_dir={_OUTPUT.value}: demonstrations are written to a folder of a local disk")
    names = task_names(_SUITE.value)
    name = _NAME.value or _SUITE.value
    directory = Path(_OUTPUT.value) / name / _VERSION.value
    work = Path(_WORK.value) if _WORK.value else Path(_OUTPUT.value) / ".work" / name
    collection.check_target(work, directory)
    wanted = _EPISODES.value + _VAL.value
    plan = collection.Plan(
        suite=_SUITE.value,
        tasks=tuple(choose(_TASKS.value, names)),
        episodes=_EPISODES.value,
        val_episodes=_VAL.value,
        max_attempts=_MAX_ATTEMPTS.value or 3 * wanted + 10,
        seed=_SEED.value,
        max_steps=_MAX_STEPS.value,
        encoding=demos.Encoding(_SIZE.value, _QUALITY.value, _SUPERSAMPLE.value),
        made_by=made_by(_SUITE.value),
    )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(f"{work} cannot be made ({error}): choose another --output_dir or --work_dir") from error
    with workdirs.only_one(work, functools.partial(print, file=sys.stderr), "--work_dir"):
        return make(plan, names, work, directory)


def make(plan, names: list[str], work: Path, directory: Path) -> dict:
    """Collects and assembles; returns the summary."""
    from qdepth_jax import errors
    from qdepth_jax.sim import collection

    collection.check_growth(plan, directory)
    attempts, impossible = collection.collect(plan, work, _PROCESSES.value)
    tasks = collection.report(plan, attempts, impossible, names)
    if not any(task["kept"] for task in tasks.values()):
        raise errors.UserError(f"no successful episode of {_SUITE.value} tasks {list(plan.tasks)}: nothing to write")
    done = {task: tried for task, tried in attempts.items() if task in tasks}
    splits = collection.assemble(plan, done, work, directory, _PER_SHARD.value, _VERSION.value)
    return {
        "dataset": str(directory),
        "episodes": {s.name: sum(s.shard_lengths) for s in splits.values()},
        "bytes": sum(s.num_bytes for s in splits.values()),
        "frames": sum(a.steps for tried in done.values() for a in collection.accepted(tried)),
        "expert_success": {t["name"]: f"{t['success']}/{t['attempts']}" for t in tasks.values()},
        "short": [t["name"] for t in tasks.values() if t["kept"] < plan.wanted],
        "not_collected": {names[task]: reason for task, reason in impossible.items()},
        "work_dir": str(work),
    }


def task_names(suite: str) -> list[str]:
    if suite == "metaworld":
        from qdepth_jax.sim import metaworld

        metaworld.check_install()
        return metaworld.list_tasks()
    from qdepth_jax.sim import libero

    return [task.name for task in libero.list_tasks(suite)]


def made_by(suite: str) -> dict[str, str]:
    """Versions of everything that decides how an attempt ends; Meta-World brings its experts."""
    from qdepth_jax.sim import demos, libero_tasks, metaworld_tasks

    if suite == "metaworld":
        return metaworld_tasks.versions()
    return libero_tasks.versions() | {"expert": demos.expert_digest()}


def choose(asked: list[str], names: list[str]) -> list[int]:
    """Task numbers or names to task numbers."""
    from qdepth_jax import errors

    if asked == ["all"]:
        return list(range(len(names)))
    chosen = []
    for item in asked:
        number = int(item) if item.isdecimal() else names.index(item) if item in names else -1
        if not 0 <= number < len(names):
            listed = ", ".join(f"{k} {name}" for k, name in enumerate(names))
            raise errors.UserError(f"no task {item!r} in this suite; tasks: {listed}")
        if number not in chosen:
            chosen.append(number)
    return chosen


if __name__ == "__main__":
    command.run(main)
