"""Recorded actions of demonstrations, replayed through closed-loop evaluation: the proof that conventions are right."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Sequence

from qdepth_jax import errors
from qdepth_jax.eval import closed_loop, policies
from qdepth_jax.sim import demos, simulator


def replay(
    directory: str | os.PathLike, per_split: int | None = None
) -> tuple[policies.Policy, list[closed_loop.Job], list[demos.Recording]]:
    """The episodes of a demonstration data set as a policy, its starts, and the recordings in the same order.

    Start k is the k-th episode of the data set, whichever are chosen: its placement, and its simulator state where one
    restores the start.

    Args:
      directory: of one version of a data set that tools/collect_demos.py wrote.
      per_split: at most so many episodes of each split, None = all.

    Raises:
      UserError: no such data set, or of a simulator that is not installed.
    """
    splits = demos.read_recordings(directory)
    if not any(splits.values()):
        raise errors.UserError(f"{directory} holds no episodes")
    # Numbers and digest are of all, so that a replay of more of them continues one of fewer.
    numbers = itertools.count()
    numbered = [[(next(numbers), recording) for recording in split] for split in splits.values()]
    chosen = [pair for split in numbered for pair in split[:per_split]]
    recordings = list(itertools.chain(*splits.values()))
    digest = hashlib.sha256(b"".join(r.action.tobytes() + r.initial_state.tobytes() for r in recordings))
    longest = max(len(recording.action) for recording in recordings)
    suites = {suite: simulator.list_tasks(suite) for suite in sorted({r.suite for _, r in chosen})}
    jobs, actions = [], {}
    for number, recording in chosen:
        task = next((t for t in suites[recording.suite] if t.task_id == recording.task_id), None)
        if task is None:
            raise errors.UserError(f"{recording.file_path}: {recording.suite} has no task {recording.task_id}")
        # Demonstrations may be longer than the suite's cap (collect_demos --max_steps); they end by themselves.
        task = dataclasses.replace(task, step_cap=max(task.step_cap, longest))
        jobs.append((task, simulator.Start(number, recording.seed, tuple(recording.initial_state.tolist()))))
        actions[task.suite, task.task_id, number] = recording.action
    robots = {simulator.robot_of(task).name for task, _ in jobs}
    policy = policies.replay(actions, {"recordings": digest.hexdigest()[:16]}, robots.pop())
    return policy, jobs, [recording for _, recording in chosen]


def same_flags(episodes: Sequence[closed_loop.Episode], recordings: Sequence[demos.Recording]) -> dict:
    """How many replays end with the recorded flag: {"replayed", "same_flag", "share", "other_flag", "other_step"}.

    other_flag, other_step: recordings whose success came out otherwise, or at another step; crashes are in no number.
    """
    whole = [(e, r) for e, r in zip(episodes, recordings, strict=True) if not e.crash]
    other = [r.file_path for e, r in whole if e.success != r.success]
    moved = [r.file_path for e, r in whole if e.success == r.success and e.steps != len(r.action)]
    same = len(whole) - len(other)
    return {
        "replayed": len(whole),
        "same_flag": same,
        "share": round(same / len(whole), 4) if whole else None,
        "other_flag": other,
        "other_step": moved,
    }
