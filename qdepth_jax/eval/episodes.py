"""Results of closed-loop episodes: one record each, a log that survives interruptions, rates with intervals."""

import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qdepth_jax import config, errors

LOG, RESULT, TABLE, VIDEOS = "episodes.jsonl", "result.json", "result.md", "videos"
Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Episode:
    """One result.

    Attributes:
      start: number of the start. steps: executed. plans: how often the policy was asked.
      crash: "" or what happened to the simulator: such an episode is neither a success nor a failure.
      video: file name under FOLDER/videos, "" = none.
      seconds: wall clock; differs from run to run, so it is in the log alone.
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

    @property
    def key(self) -> Key:
        return self.suite, self.task_id, self.start


class EpisodeLog:
    """FOLDER/episodes.jsonl: whose episodes these are, then one line for each as it finishes.

    Attributes:
      finished: key -> episode. dropped: characters of a line that was cut off when an earlier run was killed.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict[str, Any]):
        """Opens or begins a log; nobody else may have it open.

        Raises:
          UserError: it is another policy's or was made with other options, it is damaged, in use, or cannot be made.
        """
        self._path = pathlib.Path(folder) / LOG
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+b")  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise errors.UserError(f"{self._path} cannot be written ({error}): choose another --output") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise errors.UserError(f"another evaluation writes to {self._path}: wait for it, or stop it") from error
        try:
            self._read(identity)
        except BaseException:
            self._file.close()
            raise

    def _read(self, identity: dict[str, Any]) -> None:
        self.finished: dict[Key, Episode] = {}
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.dropped = len(content) - len(whole)
        if self.dropped:
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._append({"identity": identity})
            return
        for number, line in enumerate(lines, 1):
            try:
                if number == 1:
                    found = json.loads(line)["identity"]
                else:
                    self._keep(Episode(**json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                fix = "delete that line, and its episode runs again" if number > 1 else "choose another --output"
                raise errors.UserError(f"line {number} of {self._path} is damaged ({error}): {fix}") from error
        asked = json.loads(json.dumps(identity))
        if found != asked:
            raise errors.UserError(
                f"{self._path} holds episodes of another evaluation: {'; '.join(config.differences(found, asked))}. "
                "Choose another --output, or delete that folder"
            )

    def _keep(self, episode: Episode) -> None:
        self.finished[episode.key] = episode

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, episode: Episode) -> None:
        """On disk when this returns."""
        self._append(dataclasses.asdict(episode))
        self._keep(episode)

    def close(self) -> None:
        self._file.close()


def summary(episodes: Iterable[Episode]) -> dict[str, Any]:
    """{"suites": name -> rate, "tasks": "suite/task_id" -> rate}.

    A rate is {"successes", "episodes", "success_rate", "interval_95": Wilson's, "mean_steps",
    "mean_steps_of_successes", "crashes"}; crashes stand apart and are in no rate, rates of nothing are None.
    """
    suites: dict[str, list[Episode]] = {}
    tasks: dict[str, list[Episode]] = {}
    for episode in episodes:
        suites.setdefault(episode.suite, []).append(episode)
        tasks.setdefault(f"{episode.suite}/{episode.task_id}", []).append(episode)
    return {
        "suites": {name: rate(found) for name, found in suites.items()},
        "tasks": {name: {"task": found[0].task} | rate(found) for name, found in tasks.items()},
    }


def rate(episodes: Sequence[Episode]) -> dict[str, Any]:
    """See `summary`."""
    finished = [episode for episode in episodes if not episode.crash]
    n, k = len(finished), sum(episode.success for episode in finished)
    return {
        "successes": k,
        "episodes": n,
        "success_rate": round(k / n, 4) if n else None,
        "interval_95": [round(bound, 4) for bound in wilson(k, n)],
        "mean_steps": round(float(np.mean([e.steps for e in finished])), 1) if n else None,
        "mean_steps_of_successes": round(float(np.mean([e.steps for e in finished if e.success])), 1) if k else None,
        "crashes": len(episodes) - n,
    }


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def write_results(folder: str | os.PathLike, header: dict[str, Any], episodes: Sequence[Episode]) -> dict[str, Any]:
    """FOLDER/result.json and result.md, each whole or not at all. Returns header and summary.

    Equal episodes give equal files: nothing in them depends on time or on the order of finishing.
    """
    found = header | summary(episodes)
    records = [{k: v for k, v in dataclasses.asdict(episode).items() if k != "seconds"} for episode in episodes]
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)
    text = json.dumps(found, indent=1)[:-2] + ',\n "results": [\n' + lines + "\n]}\n"
    for name, content in ((RESULT, text), (TABLE, table(header, episodes))):
        partial = folder / f"{name}.partial"
        partial.write_text(content)
        partial.replace(folder / name)
    return found


def table(header: dict[str, Any], episodes: Sequence[Episode]) -> str:
    """Markdown: one row per task, one per suite."""
    found = summary(episodes)
    out = [
        "| task | successes | episodes | rate | 95 % interval | mean steps | crashes |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite, whole in found["suites"].items():
        for name, row in found["tasks"].items():
            if name.rpartition("/")[0] == suite:
                out.append(_row(f"{name.rpartition('/')[2]} {row['task']}", row))
        out.append(_row(f"**{suite}**", whole))
    out += ["", "The interval is Wilson's; crashes of the simulator are in no rate.", "", "```json"]
    return "\n".join([*out, json.dumps(header, indent=1), "```", ""])


def _row(name: str, row: dict[str, Any]) -> str:
    low, high = (f"{100 * bound:.1f}" for bound in row["interval_95"])
    shown = "" if row["success_rate"] is None else f"{100 * row['success_rate']:.1f} %"
    steps = "" if row["mean_steps"] is None else row["mean_steps"]
    cells = [name, row["successes"], row["episodes"], shown, f"{low} to {high}", steps, row["crashes"]]
    return "| " + " | ".join(map(str, cells)) + " |"
