"""Closed-loop evaluation: episodes in worker processes, planned for in batches by one policy in this process.

    tasks = simulator.list_tasks("libero_object")
    policy = policies.trained(planner.load(workdir, "libero_object"), libero_tasks.ROBOT, batch=4)
    episodes = closed_loop.evaluate(policy, tasks, range(20), closed_loop.Options(processes=2, image_size=128))
    print(episodes_lib.summary(episodes))

Worker processes are spawned: a script that calls this needs `if __name__ == "__main__"`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from qdepth_jax.eval import episodes as episodes_lib
from qdepth_jax.eval import policies
from qdepth_jax.sim import simulator


@dataclasses.dataclass(frozen=True)
class Options:
    """How episodes are run.

    Attributes:
      execute: actions executed of each chunk before the policy plans again.
      processes: worker processes, one environment each (about 1.5 GB of memory with LIBERO). Results do not depend on
        it. 0 = one environment in this process.
      image_size, supersample: of rendered pictures (pixels, square; RGB samples per pixel and axis): those of the
        training data. The published protocol renders 256.
      max_steps: cap of an episode; 0 = the official one of its task.
      videos, failure_videos: so many videos per task of the first starts, and of the first failures.
      patience_s: a worker that says nothing for so long is stopped, and its episode counted as a crash.
      retry_crashes: run episodes again that crashed in the run that is continued.
    """

    execute: int = 8
    processes: int = 2
    image_size: int = 256
    supersample: int = 2
    max_steps: int = 0
    videos: int = 0
    failure_videos: int = 0
    patience_s: float = 600.0
    retry_crashes: bool = False


def evaluate(
    policy: policies.Policy,
    tasks: Sequence[simulator.Task],
    starts: Sequence[int] = range(50),
    options: Options = Options(),
    folder: str | pathlib.Path | None = None,
) -> list[episodes_lib.Episode]:
    """Runs every start of every task and returns the episodes in that order.

    Args:
      starts: numbers of the benchmark's own starts.
      folder: finished episodes are appended to FOLDER/episodes.jsonl, and a second call with the same policy and
        options runs only what is missing; videos go to FOLDER/videos. None = nothing is kept.

    Raises:
      UserError: a start that a task does not have; the folder holds episodes of another policy or of other options;
        the simulator cannot run here.
    """
    jobs = [(task, simulator.Start(number)) for task in tasks for number in starts]
    return run(policy, jobs, options, folder)


def run(
    policy: policies.Policy,
    jobs: Sequence[tuple[simulator.Task, simulator.Start]],
    options: Options = Options(),
    folder: str | pathlib.Path | None = None,
) -> list[episodes_lib.Episode]:
    """As `evaluate`, for any list of tasks and starts."""
    raise NotImplementedError
