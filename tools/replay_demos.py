"""Replays the recorded actions of a LIBERO demonstration data set in the simulator and counts the successes.

  python tools/replay_demos.py data/libero_object/1.0.0 --episodes=4

Each episode restores its own start (seed and simulator state in its metadata), settles, executes the stored actions and
asks the benchmark for success. The last line of stdout is JSON; exit code 1 if any replay failed.
"""

import json
import sys

from absl import app, flags

_EPISODES = flags.DEFINE_integer("episodes", None, "at most this many episodes per split; default: all", lower_bound=1)


def main(argv: list[str]) -> None:
    from qdepth_jax import errors

    try:
        if len(argv) != 2:
            raise errors.UserError(f"give one version directory, e.g. data/libero_object/1.0.0; got {argv[1:]}")
        summary = run(argv[1])
    except errors.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(summary))
    sys.exit(0 if not summary["failed"] else 1)


def run(directory: str) -> dict:
    from qdepth_jax.sim import demos, libero

    recordings = demos.read_recordings(directory, _EPISODES.value)
    environments: dict[tuple[str, int], libero.LiberoEnv] = {}
    failed, early = [], []
    for recording in sorted(recordings, key=lambda r: (r.suite, r.task_id)):
        key = (recording.suite, recording.task_id)
        if key not in environments:
            for env in environments.values():
                env.close()
            environments = {key: libero.LiberoEnv(libero.list_tasks(recording.suite)[recording.task_id])}
        success, taken = demos.replay_libero(
            environments[key], recording.seed, recording.initial_state, recording.action
        )
        count = len(recording.action)
        print(f"{recording.file_path}: {'success' if success else 'FAILED'} after {taken} of {count} steps", flush=True)
        if not success:
            failed.append(recording.file_path)
        elif taken < count:
            early.append(recording.file_path)
    for env in environments.values():
        env.close()
    return {"replayed": len(recordings), "failed": failed, "before_the_last_step": early}


if __name__ == "__main__":
    app.run(main)
