"""Results of closed-loop episodes: one record each, a log that survives interruptions, rates with intervals."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Episode:
    """One result.

    Attributes:
      start: number of the start. steps: executed. plans: how often the policy was asked.
      crash: "" or what happened to the simulator: such an episode is neither a success nor a failure.
      video: file name under FOLDER/videos, "" = none.
      seconds: wall clock; not compared between runs.
    """

    suite: str
    task_id: int
    task: str
    instruction: str
    start: int
    success: bool
    steps: int
    plans: int
    crash: str = ""
    video: str = ""
    seconds: float = dataclasses.field(default=0.0, compare=False)


def summary(episodes: Iterable[Episode]) -> dict:
    """{"suites": name -> rate, "tasks": "suite/task_id" -> rate}; a rate is {"successes", "episodes", "success_rate",
    "interval_95": Wilson's, "mean_steps", "mean_steps_of_successes", "crashes"}. Crashes stand apart, in no rate."""
    raise NotImplementedError
