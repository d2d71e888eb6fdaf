"""Closed-loop success rates in a simulator, with 95 % intervals and videos.

  python tools/evaluate.py --checkpoint=WORKDIR --suite=libero_object [--tasks=1,2] [--episodes=50] [--processes=4]
  python tools/evaluate.py --policy=expert --suite=libero_spatial,metaworld_mt10 --episodes=20 --output=DIR
  python tools/evaluate.py --policy=replay --data=data/libero_object/1.0.0 --output=DIR

Suites: libero_spatial, libero_object, libero_goal, libero_10, libero_90, their LIBERO-PRO variants (_lan, _object,
_swap, _task) and LIBERO-Plus categories (_plus_language, _plus_camera, _plus_layout); metaworld_mt50, metaworld_mt10;
simpler_widowx, simpler_google_robot. Policies:

  trained      the checkpoint                  untrained    its architecture with fresh random weights
  mean_action  the mean of its training actions, at every step
  expert       scripted, with privileged state       replay   recorded actions from their recorded starts

Protocol of the published evaluations: the benchmark's own start states, ten idle steps, the suite's step cap. Finished
episodes are kept in OUTPUT/episodes.jsonl: the same command, given again, runs what is missing. Writes result.json,
result.md and videos. Needs the `sim` extra; docs/evaluation.md says more. The last line of stdout is JSON.
"""

import json
import pathlib
import sys
import time

from absl import flags

from qdepth_jax import command

POLICIES = ("trained", "untrained", "mean_action", "expert", "replay")
_OF_NETWORKS = ("batch", "seed", "flow_steps", "solver", "weights")
# Flags that mean nothing to a policy: given with it, they are refused.
UNUSED = {
    "trained": ("data", "weights_seed"),
    "untrained": ("data",),
    "mean_action": ("data", "weights_seed", *_OF_NETWORKS),
    "expert": ("data", "checkpoint", "dataset", "weights_seed", *_OF_NETWORKS),
    "replay": ("checkpoint", "dataset", "weights_seed", *_OF_NETWORKS, "suite", "tasks", "first_start"),
}
_POLICY = flags.DEFINE_string("policy", "trained", ", ".join(POLICIES))
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "workdir of a run or an export; for all but expert and replay")
_SUITE = flags.DEFINE_list("suite", [], "one or more suites")
_TASKS = flags.DEFINE_list("tasks", [], "task numbers or names; default: all of the suite")
_EPISODES = flags.DEFINE_integer("episodes", 50, "starts per task; of a replay: episodes per split", lower_bound=1)
_FIRST = flags.DEFINE_integer("first_start", 0, "number of the first start", lower_bound=0)
_DATA = flags.DEFINE_string("data", "", "replay: version directory of a demonstration data set")
_DATASET = flags.DEFINE_string("dataset", "", "whose statistics are used; default: those of the suite")
_EXECUTE = flags.DEFINE_integer("execute", 8, "actions executed of each chunk before planning again", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 2, "simulators, about 1.8 GB of memory each", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", 4, "rows of the compiled program, whatever the processes", lower_bound=1)
_IMAGE = flags.DEFINE_integer("image_size", 256, "side of the rendered pictures: that of the training data's")
_SUPERSAMPLE = flags.DEFINE_integer("supersample", 2, "RGB samples per pixel and axis", lower_bound=1)
_MAX_STEPS = flags.DEFINE_integer("max_steps", 0, "step cap; 0 = the suite's official one", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "of the flow noise")
_STEPS = flags.DEFINE_integer("flow_steps", 0, "from noise to actions; 0 = as the policy's config says", lower_bound=0)
_SOLVER = flags.DEFINE_string("solver", "euler", "of the flow: euler, midpoint or heun (twice the work in a step)")
_WEIGHTS = flags.DEFINE_string("weights", "float", "float or int8; docs/inference.md")
_WEIGHTS_SEED = flags.DEFINE_integer("weights_seed", 0, "untrained: of the random weights")
_VIDEOS = flags.DEFINE_integer("videos", 1, "videos per task, of its first starts", lower_bound=0)
_FAILURES = flags.DEFINE_integer("failure_videos", 2, "videos per task, of its first failures", lower_bound=0)
_RETRY = flags.DEFINE_bool("retry_crashes", False, "run episodes again in which the simulator had crashed")
_OUTPUT = flags.DEFINE_string("output", "", "default: CHECKPOINT/evaluation/SUITE, or evaluation/SUITE")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors
    from qdepth_jax.eval import closed_loop, episodes
    from qdepth_jax.sim import simulator

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    _check_flags()
    options = closed_loop.Options(
        execute=_EXECUTE.value,
        processes=_PROCESSES.value,
        image_size=_IMAGE.value,
        supersample=_SUPERSAMPLE.value,
        max_steps=_MAX_STEPS.value,
        videos=_VIDEOS.value,
        failure_videos=_FAILURES.value,
        retry_crashes=_RETRY.value,
    )
    began = time.monotonic()
    if _POLICY.value == "replay":
        return _replay(options)
    # Whatever is wrong is said before anything runs.
    tasks = {suite: simulator.list_tasks(suite, _TASKS.value) for suite in _SUITE.value}
    loaded = _load() if _POLICY.value != "expert" else None
    plans = [_prepared(suite, tasks[suite], loaded, options) for suite in tasks]
    # The last suite's log too: that it is another policy's must not come out after hours.
    for suite, policy, jobs, _ in plans:
        closed_loop.open_log(_folder(suite), policy, jobs, options).close()
    found = []
    for suite, policy, jobs, header in plans:
        results = closed_loop.run(policy, jobs, options, _folder(suite))
        episodes.write_results(_folder(suite), header, results)
        found += results
    if len(plans) > 1:
        episodes.write_results(_folder(""), {"protocol": [header for *_, header in plans]}, found)
    line = {"policy": _POLICY.value, **episodes.summary(found), "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(line | {"output": str(_folder(_SUITE.value[0] if len(plans) == 1 else ""))}))
    return 0


def _check_flags() -> None:
    from qdepth_jax import errors, workdirs

    kind = _POLICY.value
    if kind not in POLICIES:
        raise errors.UserError(f"--policy={kind}: use one of {', '.join(POLICIES)}")
    needed = {"replay": ("data",), "expert": ("suite",)}.get(kind, ("suite", "checkpoint"))
    given = {"data": _DATA.value, "suite": _SUITE.value, "checkpoint": _CHECKPOINT.value}
    if missing := [f"--{name}" for name in needed if not given[name]]:
        raise errors.UserError(f"--policy={kind} needs {' and '.join(missing)}")
    if useless := [f"--{name}" for name in UNUSED[kind] if flags.FLAGS[name].present]:
        raise errors.UserError(f"--policy={kind} does not use {' and '.join(useless)}")
    if len(set(_SUITE.value)) < len(_SUITE.value):
        raise errors.UserError(f"--suite={','.join(_SUITE.value)} names a suite twice")
    if workdirs.is_remote(_OUTPUT.value or _CHECKPOINT.value):
        raise errors.UserError(
            f"results are written to a local disk, not to {_OUTPUT.value or _CHECKPOINT.value}: give --output=FOLDER"
        )


def _load():
    """The policy, loaded once for all suites."""
    from qdepth_jax import errors, planner
    from qdepth_jax.eval import policies
    from qdepth_jax.models import inference

    how = inference.Inference(_STEPS.value, _SOLVER.value, _WEIGHTS.value)
    loaded = planner.load(_CHECKPOINT.value, _DATASET.value or _SUITE.value[0], options=how)
    if _POLICY.value != "mean_action" and (_VIDEOS.value or _FAILURES.value):
        try:
            loaded = planner.with_decoder(loaded, _CHECKPOINT.value)
        except errors.UserError as error:
            print(f"videos will show the simulator's depth: {error}", file=sys.stderr)
    if _POLICY.value == "untrained":
        return policies.untrained_weights(loaded, _WEIGHTS_SEED.value, how.weights)
    return loaded


def _prepared(suite: str, tasks, loaded, options):
    """(suite, policy, jobs, header of the results), checked as far as possible."""
    from qdepth_jax.eval import closed_loop
    from qdepth_jax.sim import simulator

    starts = range(_FIRST.value, _FIRST.value + _EPISODES.value)
    jobs = [(task, simulator.Start(number)) for task in tasks for number in starts]
    policy = _policy(suite, simulator.robot_of(tasks[0]), loaded)
    closed_loop.check(policy, jobs, options, _folder(suite))
    header = {
        "suite": suite,
        "checkpoint": _CHECKPOINT.value,
        "tasks": [task.name for task in tasks],
        "starts": [starts[0], starts[-1]],
        "step_cap": options.max_steps or tasks[0].step_cap,
        **closed_loop.identity(policy, jobs, options),
    }
    return suite, policy, jobs, header


def _policy(suite: str, robot, loaded):
    from qdepth_jax import planner
    from qdepth_jax.eval import policies

    if _POLICY.value == "expert":
        return policies.expert()
    loaded = planner.of_dataset(loaded, _DATASET.value or suite)
    if _POLICY.value == "mean_action":
        return policies.mean_action(loaded, robot)
    other = {view: size for view, size in (loaded.found.pictures or {}).items() if size != [_IMAGE.value] * 2}
    if other:
        seen = ", ".join(f"{height}x{width} ({view})" for view, (height, width) in other.items())
        print(
            f"{suite}: pictures are rendered at --image_size={_IMAGE.value}, but the policy was trained on {seen}",
            file=sys.stderr,
        )
    weights_seed = _WEIGHTS_SEED.value if _POLICY.value == "untrained" else None
    return policies.trained(loaded, robot, _BATCH.value, _SEED.value, weights_seed)


def _replay(options) -> int:
    """Exit code 1 if a replay ends otherwise than its recording."""
    from qdepth_jax.eval import closed_loop, episodes, replays

    policy, jobs, recordings = replays.replay(_DATA.value, _EPISODES.value)
    folder = _folder(f"{jobs[0][0].suite}_replay")
    results = closed_loop.run(policy, jobs, options, folder)
    flags_found = replays.same_flags(results, recordings)
    header = {"data": _DATA.value, **flags_found, **closed_loop.identity(policy, jobs, options)}
    episodes.write_results(folder, header, results)
    crashes = sum(bool(episode.crash) for episode in results)
    print(json.dumps({"policy": "replay", **flags_found, "crashes": crashes, "output": str(folder)}))
    return 1 if flags_found["other_flag"] or not flags_found["replayed"] else 0


def _folder(suite: str) -> pathlib.Path:
    """Of the results of one suite, or of all ("")."""
    if _OUTPUT.value:
        return pathlib.Path(_OUTPUT.value).expanduser() / (suite if len(_SUITE.value) > 1 else "")
    name = suite if _POLICY.value in ("trained", "replay") else "_".join(filter(None, (suite, _POLICY.value)))
    return pathlib.Path(_CHECKPOINT.value).expanduser() / "evaluation" / name


if __name__ == "__main__":
    command.run(main)
