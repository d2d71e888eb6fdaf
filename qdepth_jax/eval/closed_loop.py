"""Closed-loop evaluation: episodes in worker processes, planned for in batches by one policy in this process.

    tasks = simulator.list_tasks("libero_object")
    policy = policies.trained(planner.load(workdir, "libero_object"), libero_tasks.ROBOT, batch=4)
    found = closed_loop.evaluate(policy, tasks, range(20), closed_loop.Options(processes=2, image_size=128))
    print(episodes.summary(found))

Worker processes are spawned: a script that calls this needs `if __name__ == "__main__"`.
"""

import collections
import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from qdepth_jax import errors, progress
from qdepth_jax.eval import episodes as episodes_lib
from qdepth_jax.eval import policies, rollout_video, workers
from qdepth_jax.sim import rollout, simulator

Episode = episodes_lib.Episode
Job = tuple[simulator.Task, simulator.Start]
CRASHES_IN_A_ROW = 10  # so many say that the simulator does not work here at all


@dataclasses.dataclass(frozen=True)
class Options:
    """How episodes are run.

    Attributes:
      execute: actions executed of each chunk before the policy plans again.
      processes: worker processes, one environment each (about 1.8 GB of memory with LIBERO). Results do not depend on
        it. 0 = one environment in this process.
      image_size, supersample: of rendered pictures (pixels, square; RGB samples per pixel and axis): those of the
        training data. The published protocol renders 256.
      max_steps: cap of an episode; 0 = the official one of its task.
      videos, failure_videos: so many videos per task: of the first starts, and of the first failures.
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
) -> list[Episode]:
    """Runs every start of every task and returns the episodes in that order.

    Args:
      starts: numbers of the benchmark's own starts.
      folder: finished episodes are appended to FOLDER/episodes.jsonl, and a second call with the same policy and
        options runs only what is missing; videos go to FOLDER/videos. None = nothing is kept.

    Raises:
      UserError: a start that a task does not have; the folder holds episodes of another policy or of other options;
        the simulator cannot run here.
      ValueError: the policy's actions have another shape than the robot's, or are not finite.
    """
    return run(policy, [(task, simulator.Start(number)) for task in tasks for number in starts], options, folder)


def run(
    policy: policies.Policy,
    jobs: Sequence[Job],
    options: Options = Options(),
    folder: str | pathlib.Path | None = None,
) -> list[Episode]:
    """As `evaluate`, for any list of tasks and starts; their (suite, task, start number) are all different."""
    check(policy, jobs, options, folder)
    with contextlib.ExitStack() as stack:
        log = None
        if folder is not None:
            log = open_log(folder, policy, jobs, options)
            stack.callback(log.close)
            if log.dropped:
                _say(f"{folder}: a line that an earlier run had not finished writing was dropped")
        finished = dict(log.finished) if log else {}
        if options.retry_crashes:
            finished = {key: episode for key, episode in finished.items() if not episode.crash}
        missing = [job for job in jobs if _key(*job) not in finished]
        if len(missing) < len(jobs):
            _say(f"{len(jobs) - len(missing)} of {len(jobs)} episodes are finished already")
        if missing:
            loop = _Loop(policy, jobs, options, finished, log, pathlib.Path(folder) if folder is not None else None)
            stack.callback(loop.close)
            loop.run(missing)
    out = [finished[_key(*job)] for job in jobs]
    kept = _kept_videos(jobs, options, finished)
    named = {key: _video_name(finished[key]) for key in kept}
    return [
        dataclasses.replace(episode, video=named[episode.key])
        if episode.key in named and (pathlib.Path(folder) / episodes_lib.VIDEOS / named[episode.key]).exists()
        else episode
        for episode in out
    ]


def open_log(
    folder: str | pathlib.Path, policy: policies.Policy, jobs: Sequence[Job], options: Options
) -> episodes_lib.EpisodeLog:
    """The log of FOLDER, to be closed. Raises UserError where its episodes are of another evaluation or suite."""
    log = episodes_lib.EpisodeLog(folder, identity(policy, jobs, options))
    asked = {task.suite for task, _ in jobs}
    if others := sorted({suite for suite, *_ in log.finished} - asked):
        log.close()
        raise errors.UserError(
            f"{folder} holds episodes of {', '.join(others)}, none of which is asked for now: result.json would lose "
            f"them to {', '.join(sorted(asked))}. Choose another --output"
        )
    return log


def identity(policy: policies.Policy, jobs: Sequence[Job], options: Options) -> dict[str, Any]:
    """What must be equal for episodes to be of one evaluation. Tasks and starts may be added, so they are not in it."""
    adapters = sorted({task.adapter for task, _ in jobs})
    return {
        "policy": policy.identity,
        "execute": options.execute,
        "image_size": options.image_size,
        "supersample": options.supersample,
        "max_steps": options.max_steps,
        "simulator": {k: v for name in adapters for k, v in simulator.adapter(name).versions().items()},
    }


def check(policy: policies.Policy, jobs: Sequence[Job], options: Options, folder: Any) -> None:
    """Raises UserError for everything that can be known to be wrong before an environment is built."""
    if not jobs:
        raise errors.UserError("no episodes: give at least one task and one start")
    if options.execute < 1 or options.processes < 0 or min(options.image_size, options.supersample) < 1:
        raise errors.UserError(f"execute, image_size and supersample are at least 1, processes at least 0: {options}")
    if policy.horizon and policy.horizon < options.execute:
        raise errors.UserError(
            f"{options.execute} actions of each chunk are to be executed, this policy plans {policy.horizon}: "
            f"use at most --execute={policy.horizon}"
        )
    if (options.videos or options.failure_videos) and folder is None:
        raise errors.UserError("videos need a folder to be written to")
    if options.videos or options.failure_videos:
        rollout_video.check_install()
    seen = collections.Counter(_key(*job) for job in jobs)
    if twice := [key for key, count in seen.items() if count > 1]:
        raise errors.UserError(f"episodes asked for twice: {twice[:3]}")
    for task, start in jobs:
        if start.seed is None and not 0 <= start.number < task.starts:
            raise errors.UserError(
                f"{task.suite} {task.name} has {task.starts} starts, the last is {task.starts - 1}, asked for is "
                f"{start.number}: ask for at most {task.starts} episodes per task"
            )
        if task.most_steps and options.max_steps > task.most_steps:
            raise errors.UserError(
                f"--max_steps={options.max_steps}: an episode of {task.suite} {task.name} ends after {task.most_steps} "
                f"steps in the simulator: use at most --max_steps={task.most_steps}"
            )
        robot = simulator.robot_of(task)
        if policy.robot not in (None, robot.name):
            raise errors.UserError(f"a policy for {policy.robot} cannot drive {robot.name} ({task.suite})")


def _key(task: simulator.Task, start: simulator.Start) -> episodes_lib.Key:
    return task.suite, task.task_id, start.number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class _Run:
    """An episode under way. query: set while it waits for actions. seen: for its video, of every plan."""

    job: Job
    began: float
    plans: int = 0
    steps: int = 0
    query: policies.Query | None = None
    seen: list[tuple[policies.Query, rollout.Seen]] = dataclasses.field(default_factory=list)


class _Loop:
    """Hands out episodes, gathers who waits for actions, plans for them together."""

    def __init__(self, policy, jobs, options, finished, log, folder):
        self._policy, self._jobs, self._options, self._log, self._folder = policy, jobs, options, log, folder
        self._finished: dict[episodes_lib.Key, Episode] = finished
        self._first = _first(jobs, options.videos)
        self._record_all = options.failure_videos > 0
        self._workers: dict[workers.Worker, _Run | None] = {}
        self._present: dict[workers.Worker, simulator.Task] = {}  # whose environment a worker has
        self._crashes = 0

    def close(self) -> None:
        for worker in self._workers:
            worker.stop(patience=2.0)
        self._workers.clear()

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs; self._finished has their episodes afterwards."""
        self._queues: dict[simulator.Task, collections.deque[Job]] = {}
        for job in jobs:
            self._queues.setdefault(job[0], collections.deque()).append(job)
        setting = workers.Setting(self._options.image_size, self._options.supersample)
        for _ in range(min(max(self._options.processes, 1), len(jobs))):
            self._workers[workers.Worker(setting, self._options.processes > 0)] = None
        self._bar = progress.Progress(len(self._jobs), "episodes", len(self._jobs) - len(jobs), "episode")
        try:
            while any(self._queues.values()) or any(self._workers.values()):
                self._hand_out()
                running = [run for run in self._workers.values() if run is not None]
                waiting = [worker for worker, run in self._workers.items() if run is not None and run.query]
                # Workers that build or reset an environment are not waited for: that takes seconds.
                stepping = any(run.plans and not run.query for run in running)
                if waiting and (len(waiting) >= self._policy.batch or not stepping):
                    # In the order in which they asked, so that nobody waits for ever.
                    self._plan(sorted(waiting, key=lambda worker: worker.heard)[: self._policy.batch])
                    continue
                heard = workers.listen(list(self._workers), 1.0)
                for worker in heard:
                    self._hear(worker, worker.receive())
                for worker, run in list(self._workers.items()):
                    if run and not run.query and worker.silence > self._options.patience_s:
                        self._replace(worker, f"said nothing for {self._options.patience_s:.0f} s", patience=0.0)
        finally:
            self._bar.close()

    def _hand_out(self) -> None:
        """Gives every idle worker an episode, of the task whose environment it has if one is left."""
        for worker, run in self._workers.items():
            left = {task: queue for task, queue in self._queues.items() if queue}
            if run is not None or not worker.ready or not left:
                continue
            present = self._present.get(worker)
            if present not in left:
                # Building an environment takes as long as an episode: a task of its own for each worker.
                taken = collections.Counter(self._present[w] for w in self._workers if w in self._present)
                present = min(left, key=lambda task: (taken[task], -len(left[task])))
            job = left[present].popleft()
            task, start = job
            options, key = self._options, _key(*job)
            recording = self._record_all or key in self._first
            views = list(self._policy.views)
            if recording:
                views += [view for view in self._shown(task) if view not in views]
            cap = options.max_steps or task.step_cap
            ask = workers.Ask(options.execute, cap, tuple(views), self._policy.inside, task.to_the_end, recording)
            self._present[worker] = task
            self._workers[worker] = _Run(job, time.monotonic())
            worker.send(("run", task, start, ask))

    def _shown(self, task: simulator.Task) -> tuple[str, ...]:
        """Pictures that a video needs."""
        main = simulator.robot_of(task).views[0]
        return (main,) if self._policy.depth else (main, "depth")

    def _plan(self, waiting: Sequence[workers.Worker]) -> None:
        runs = [self._workers[worker] for worker in waiting]
        chunks = self._policy.plan([run.query for run in runs])
        for worker, run, chunk in zip(waiting, runs, chunks, strict=True):
            robot = simulator.robot_of(run.job[0])
            chunk = workers.checked_chunk(chunk, robot.action_dim)
            run.query = None
            worker.send(("actions", chunk))

    def _hear(self, worker: workers.Worker, message: tuple | None) -> None:
        run = self._workers[worker]
        if message is None:
            self._replace(worker, "died")
        elif message[0] == "ready":
            worker.ready = True
        elif message[0] == "impossible":
            raise errors.UserError(message[1])
        elif message[0] == "broken":
            raise RuntimeError(f"{run.job[0].suite} {run.job[0].name}, start {run.job[1].number}:\n{message[1]}")
        elif message[0] == "crash":
            self._present.pop(worker, None)
            self._end(worker, Episode(*_names(run.job), False, run.steps, run.plans, message[1]))
        elif message[0] == "seen":
            self._see(run, message[1])
        else:
            _, outcome, last = message
            if last is not None:
                run.seen.append((self._query(run, last), last))
            self._end(worker, Episode(*_names(run.job), *outcome))

    def _see(self, run: _Run, seen: rollout.Seen) -> None:
        query = self._query(run, seen)
        run.plans, run.steps = run.plans + 1, seen.step
        if self._record_all or _key(*run.job) in self._first:
            run.seen.append((query, seen))
        if not self._policy.inside:
            run.query = query

    def _query(self, run: _Run, seen: rollout.Seen) -> policies.Query:
        pictures = {view: seen.pictures[view] for view in self._policy.views}
        return policies.Query(
            run.job[0],
            run.job[1].number,
            run.plans,
            seen.step,
            seen.wanted,
            seen.instruction,
            pictures,
            seen.state,
        )

    def _replace(self, worker: workers.Worker, what: str, patience: float = 5.0) -> None:
        """A new worker for one that is dead or stuck; the episode it had is a crash."""
        ended = worker.stop(patience)
        run = self._workers[worker]
        if not worker.ready:
            del self._workers[worker]
            raise errors.UserError(
                f"a simulator process {what} before it had begun ({ended}): out of memory? Each needs about 1.8 GB "
                "with LIBERO; use fewer --processes. What it said is above"
            )
        _say(f"a simulator process {what} ({ended}): another takes its place")
        if run is not None:
            crash = f"the simulator process {what} ({ended})"
            self._end(worker, Episode(*_names(run.job), False, run.steps, run.plans, crash))
        del self._workers[worker]
        self._present.pop(worker, None)
        setting = workers.Setting(self._options.image_size, self._options.supersample)
        self._workers[workers.Worker(setting, self._options.processes > 0)] = None

    def _end(self, worker: workers.Worker, episode: Episode) -> None:
        run = self._workers[worker]
        episode = dataclasses.replace(episode, seconds=round(time.monotonic() - run.began, 2))
        # The video first: an episode in the log is complete.
        self._finished[episode.key] = episode
        if run.seen and not episode.crash:
            self._video(run, episode)
        if self._log:
            self._log.add(episode)
        self._workers[worker] = None
        outcome = "crash" if episode.crash else "success" if episode.success else "failure"
        name = f"{episode.suite} {episode.task_id} start {episode.start}: {outcome} in {episode.steps} steps"
        if episode.crash:
            _say(f"{name}: {episode.crash}")
        asked = filter(None, (self._finished.get(_key(*job)) for job in self._jobs))  # the log may hold more
        counts = collections.Counter("crash" if e.crash else e.success for e in asked)
        self._bar.update(1, f"{counts[True]} successes, {counts[False]} failures, {counts['crash']} crashes")
        self._crashes = self._crashes + 1 if episode.crash else 0
        if self._crashes >= CRASHES_IN_A_ROW:
            raise errors.UserError(
                f"the last {self._crashes} episodes all crashed, the last one with: {episode.crash}. When that is "
                "mended, --retry_crashes runs them again"
            )

    def _video(self, run: _Run, episode: Episode) -> None:
        kept = _kept_videos(self._jobs, self._options, self._finished)
        folder = self._folder / episodes_lib.VIDEOS
        # A failure of an earlier start pushes out that of a later one. Episodes that nobody asks for now keep theirs.
        for other in (self._finished.get(_key(*job)) for job in self._jobs):
            if other and other.key[:2] == episode.key[:2] and other.key not in kept and not other.success:
                (folder / _video_name(other)).unlink(missing_ok=True)
        if episode.key not in kept:
            return
        robot = simulator.robot_of(run.job[0])
        queries, seen = [query for query, _ in run.seen], [seen for _, seen in run.seen]
        if self._policy.depth:
            size = self._policy.batch
            chunks = [self._policy.depth(queries[i : i + size]) for i in range(0, len(queries), size)]
            depths, label = [depth for chunk in chunks for depth in chunk], self._policy.depth_label
        else:
            depths, label = [s.pictures["depth"] for s in seen], "simulator's depth, m"
        frames = [
            rollout_video.Frame(s.pictures[robot.views[0]], depth, s.commands, s.openings)
            for s, depth in zip(seen, depths)
        ]
        rollout_video.write(folder / _video_name(episode), frames, label, robot.rate_hz / self._options.execute)


def _names(job: Job) -> tuple[str, int, str, str, int]:
    task, start = job
    return task.suite, task.task_id, task.name, task.instruction, start.number


def _first(jobs: Sequence[Job], count: int) -> set[episodes_lib.Key]:
    """The first `count` starts of every task."""
    found: dict[simulator.Task, list[episodes_lib.Key]] = {}
    for job in jobs:
        found.setdefault(job[0], []).append(_key(*job))
    return {key for keys in found.values() for key in sorted(keys)[:count]}


def _kept_videos(jobs: Sequence[Job], options: Options, finished: dict) -> set[episodes_lib.Key]:
    """Of the finished episodes, those whose videos are kept: by their starts, not by when they finished."""
    failed = [job for job in jobs if (e := finished.get(_key(*job))) and not e.success and not e.crash]
    kept = _first(jobs, options.videos) | _first(failed, options.failure_videos)
    return {key for key in kept if key in finished}


def _video_name(episode: Episode) -> str:
    outcome = "crash" if episode.crash else "success" if episode.success else "failure"
    return f"{episode.suite}_task{episode.task_id:03d}_start{episode.start:03d}_{outcome}.mp4"
