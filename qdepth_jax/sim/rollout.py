"""Closed-loop episodes in LIBERO: any policy that maps an observation to a chunk of actions.

Protocol of the published evaluations: the benchmark's fixed start states, ten idle steps, the suite's step cap, success
by the benchmark's own check. Physics runs without cameras; a frame is drawn only when the policy plans, once per
executed part of a chunk. An episode that the simulator could not finish is a crash, counted apart from failures and
successes.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tqdm

from qdepth_jax import errors
from qdepth_jax.sim import libero

# observation: image u8 [H, W, 3], wrist_image u8 [H, W, 3], depth f32 [H, W] (m), state f32 [8], joint_state f32 [7],
# instruction str. Returns unnormalised actions f32 [Z, 7], gripper -1 open / +1 close.
Policy = Callable[[dict], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Episode:
    """One result. start: index of the evaluation state, or the seed. crash: '' or what the simulator said."""

    suite: str
    task_id: int
    instruction: str
    start: int
    success: bool
    steps: int
    plans: int
    seconds: float
    crash: str = ""
    video: str = ""


def run_tasks(
    policy: Policy,
    tasks: Sequence[libero.LiberoTask],
    episodes: int,
    execute: int,
    *,
    random_starts: int | None = None,
    image_size: int = 256,
    supersample: int = 2,
    max_steps: int | None = None,
    video_dir: Path | None = None,
    videos_per_task: int = 1,
) -> list[Episode]:
    """Runs `episodes` episodes of every task.

    Args:
      execute: actions executed of every chunk before the policy plans again.
      random_starts: None = the benchmark's evaluation states 0, 1, ...; else placements drawn with seeds from here on.
      image_size, supersample: those of the data the policy was trained on.
      max_steps: default: the official cap of the suite.
      video_dir: mp4 files (RGB beside depth) of the first videos_per_task episodes of each task go here.

    Raises:
      UserError: more episodes than evaluation states.
      ValueError: the policy's chunk is no [Z >= execute, 7] of finite numbers.
    """
    results = []
    with tqdm.tqdm(total=episodes * len(tasks), unit="episode", disable=not sys.stderr.isatty()) as bar:
        for task in tasks:
            states = None if random_starts is not None else libero.evaluation_states(task)
            if states is not None and episodes > len(states):
                raise errors.UserError(
                    f"{task.name} has {len(states)} evaluation states, {episodes} episodes asked: "
                    "ask for fewer, or use random starts"
                )
            env = libero.LiberoEnv(task, image_size, supersample)
            for k in range(episodes):
                seed, state = (0, states[k]) if states is not None else (random_starts + k, None)
                video = None
                if video_dir is not None and k < videos_per_task:
                    video = Path(video_dir) / f"{task.suite}_task{task.task_id:02d}_episode{k:02d}.mp4"
                episode = run_episode(policy, env, seed, state, execute, max_steps, video)
                results.append(dataclasses.replace(episode, start=k if state is not None else seed))
                bar.update()
                if bar.disable:
                    outcome = "crash" if episode.crash else "success" if episode.success else "failure"
                    print(
                        f"{task.suite} {task.task_id} episode {k}: {outcome} in {episode.steps} steps", file=sys.stderr
                    )
            env.close()
    return results


def run_episode(
    policy: Policy,
    env: libero.LiberoEnv,
    seed: int,
    initial_state: np.ndarray | None,
    execute: int,
    max_steps: int | None = None,
    video: Path | None = None,
) -> Episode:
    """One closed-loop episode; see run_tasks."""
    cap = max_steps or libero.step_cap(env.task.suite)
    began, steps, plans, success, crash = time.monotonic(), 0, 0, False, ""
    with VideoWriter(video, 20 / execute) if video else contextlib.nullcontext() as writer:
        try:
            env.reset(seed, initial_state)
            while steps < cap and not success:
                seen = {**env.render(), **env.proprio(), "instruction": env.task.instruction}
                if writer:
                    writer.add(seen["image"], seen["depth"])
                chunk = checked_chunk(policy(seen), execute)
                plans += 1
                for action in chunk[: min(execute, cap - steps)]:
                    success = env.step(action)
                    steps += 1
                    if success:
                        break
            if writer:
                seen = env.render(("image",))
                writer.add(seen["image"], seen["depth"])
        except libero.SimulatorFailure as error:
            crash = str(error)
    return Episode(
        suite=env.task.suite,
        task_id=env.task.task_id,
        instruction=env.task.instruction,
        start=seed,
        success=success,
        steps=steps,
        plans=plans,
        seconds=round(time.monotonic() - began, 2),
        crash=crash,
        video=str(video) if video else "",
    )


def checked_chunk(chunk: np.ndarray, execute: int) -> np.ndarray:
    """The policy's answer as f32 [Z, 7]; a wrong one is the policy's error, not a failed episode."""
    chunk = np.asarray(chunk, np.float32)
    if chunk.ndim != 2 or chunk.shape[1] != libero.ACTION_DIM or len(chunk) < execute:
        raise ValueError(f"policy returned actions {chunk.shape}, needed [at least {execute}, {libero.ACTION_DIM}]")
    if not np.isfinite(chunk).all():
        raise ValueError("policy returned actions that are not finite")
    return chunk


def summary(results: Iterable[Episode]) -> dict:
    """Success rate with its 95 % Wilson interval, over all and by task; crashes stand apart and are in no rate."""
    results = list(results)
    by_task: dict[str, list[Episode]] = {}
    for episode in results:
        by_task.setdefault(f"{episode.suite}/{episode.task_id}", []).append(episode)
    return {**_rate(results), "tasks": {name: _rate(episodes) for name, episodes in by_task.items()}}


def _rate(results: list[Episode]) -> dict:
    finished = [episode for episode in results if not episode.crash]
    n, k = len(finished), sum(episode.success for episode in finished)
    low, high = wilson(k, n)
    return {
        "episodes": n,
        "successes": k,
        "success_rate": round(k / n, 4) if n else None,
        "interval_95": [round(low, 4), round(high, 4)],
        "crashes": len(results) - n,
        "mean_steps_of_successes": round(float(np.mean([e.steps for e in finished if e.success])), 1) if k else None,
    }


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


class VideoWriter:
    """mp4 of RGB beside depth (near bright, far dark, 0.5 to 3 m). The file appears when it is complete."""

    def __init__(self, path: Path, frames_per_second: float):
        self._path, self._partial = Path(path), Path(path).with_suffix(".partial.mp4")
        try:
            import imageio
            import imageio_ffmpeg  # noqa: F401
        except ImportError as error:
            raise errors.UserError(f"videos need {error.name!r}: pip install -e '.[sim]'") from error
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = imageio.get_writer(self._partial, fps=frames_per_second, macro_block_size=2, quality=8)

    def __enter__(self) -> "VideoWriter":
        return self

    def add(self, image: np.ndarray, depth: np.ndarray) -> None:
        """image u8 [H, W, 3], depth f32 [H, W] in metres."""
        grey = np.clip((3.0 - depth) / 2.5, 0, 1) * 255
        frame = np.concatenate([image, np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)], axis=1)
        self._writer.append_data(frame)

    def __exit__(self, kind, error, trace) -> None:
        self._writer.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)
