"""What closed-loop evaluation asks of a simulator. One adapter module per simulator answers (libero_tasks.py, ...).

An adapter module has

  robot(suite) -> Robot            what a policy for its tasks must have
  list_tasks(suite) -> list[Task]
  make_env(task, image_size, supersample) -> Env
  versions() -> dict[str, str]     of the packages that decide what an episode looks like

and a row in ADAPTERS. A task carries the name of its adapter, so that a worker process imports the one it needs.
"""

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from qdepth_jax import errors

# (pattern of suite names, adapter module)
ADAPTERS = (
    (r"libero_(spatial|object|goal|10|90)_plus_.*", "qdepth_jax.sim.libero_plus_tasks"),
    (r"libero_(spatial|object|goal|10|90)(_.*)?", "qdepth_jax.sim.libero_tasks"),
    (r"metaworld(_.*)?", "qdepth_jax.sim.metaworld_tasks"),
    (r"simpler_.*", "qdepth_jax.sim.simpler_tasks"),
)


class SimulatorFailure(RuntimeError):
    """The simulator could not go on (diverged, or found no valid placement): neither a success nor a failure."""


@contextlib.contextmanager
def physics(data: Any) -> Iterator[None]:
    """Around a step of MuJoCo on its MjData.

    Raises:
      SimulatorFailure: MuJoCo gave up, or the state has diverged, which it answers with a warning and a silent return
        to the start pose.
    """
    from mujoco import FatalError, mjtWarning

    try:
        yield
    except (FatalError, ArithmeticError) as error:
        raise SimulatorFailure(f"{type(error).__name__}: {error}") from error
    for kind in (mjtWarning.mjWARN_BADQPOS, mjtWarning.mjWARN_BADQVEL, mjtWarning.mjWARN_BADQACC):
        if data.warning[int(kind)].number:
            raise SimulatorFailure(f"the physics diverged ({kind.name}) at time {data.time:.2f} s")


@dataclasses.dataclass(frozen=True)
class Robot:
    """What a policy must have to drive the tasks of an adapter.

    Attributes:
      views: cameras there are; a policy may use some of them. The first is the main view, the one with depth.
      state_dim, action_dim: numbers of a state and of an action.
      rate_hz: control steps per second.
      to_simulator: standardised actions f32 [Z, A] (data/recipes.py) -> those that `Env.step` takes, f32 [Z, A].
    """

    name: str
    views: tuple[str, ...]
    state_dim: int
    action_dim: int
    rate_hz: float
    to_simulator: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a suite, as small as its name: it travels to worker processes.

    Attributes:
      step_cap: official number of steps of an episode.
      starts: how many numbered starts there are: the benchmark's own, never used for demonstrations.
      adapter: module that makes its environment.
      to_the_end: an episode runs to its cap, and success is the flag at the last step; else the first success ends it.
      most_steps: the simulator takes no more in an episode; 0 = as many as are wanted.
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    step_cap: int
    starts: int
    adapter: str
    to_the_end: bool = False
    most_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Start:
    """Where an episode begins: the benchmark's own start `number`, or a placement drawn with `seed` instead.

    `state` with `seed`: a recorded simulator state (demos.Recording), with the fixtures of that seed.
    """

    number: int
    seed: int | None = None
    state: tuple[float, ...] | None = None


class Env(Protocol):
    """The environment of one task. Every method may raise SimulatorFailure."""

    def reset(self, start: Start) -> None:
        """A new episode, settled. The same start gives the same episode, whatever came before."""

    def instruction(self) -> str:
        """What the robot is told now; that of the task, unless the task has several parts."""

    def state(self) -> np.ndarray:
        """f32 [state_dim]"""

    def opening(self) -> float:
        """Of the gripper, as measured; any unit."""

    def pictures(self, views: Sequence[str]) -> dict[str, np.ndarray]:
        """Renders: view -> u8 [H, W, 3], and "depth" f32 [H, W] (m) of the main view if that is asked for."""

    def convert(self, chunk: np.ndarray) -> np.ndarray:
        """A policy's whole chunk f32 [k, action_dim] as it will be executed, for rules that have a memory."""

    def step(self, action: np.ndarray) -> bool:
        """One control step with f32 [action_dim]; the benchmark's own success flag."""

    def expert(self) -> Callable[[], np.ndarray | None]:
        """The scripted expert from the present state: each call f32 [action_dim], None = it gave up."""

    def close(self) -> None: ...


def adapter(name: str) -> Any:
    """The module `Task.adapter` names."""
    return importlib.import_module(name)


def robot_of(task: Task) -> Robot:
    """What a policy for this task must have."""
    return adapter(task.adapter).robot(task.suite)


def adapter_of(suite: str) -> Any:
    """The adapter of a suite.

    Raises:
      UserError: there is none.
    """
    for pattern, module in ADAPTERS:
        if re.fullmatch(pattern, suite):
            return adapter(module)
    raise errors.UserError(
        f"unknown suite {suite!r}: libero_spatial, libero_object, libero_goal, libero_10, libero_90, their LIBERO-PRO "
        "variants (_lan, _object, _swap, _task) and LIBERO-Plus categories (_plus_language, _plus_camera, "
        "_plus_layout); metaworld_mt50, metaworld_mt10; simpler_widowx, simpler_google_robot"
    )


def list_tasks(suite: str, wanted: Sequence[str] = ()) -> list[Task]:
    """Tasks of a suite, all or the wanted ones (numbers or names), in the benchmark's order.

    Raises:
      UserError: unknown suite or task, or the simulator or its assets are missing.
    """
    tasks = adapter_of(suite).list_tasks(suite)
    found = [task for task in tasks if not wanted or str(task.task_id) in wanted or task.name in wanted]
    known = {str(task.task_id) for task in found} | {task.name for task in found}
    if unknown := [item for item in wanted if item not in known]:
        listed = ", ".join(f"{task.task_id} {task.name}" for task in tasks)
        raise errors.UserError(f"suite {suite!r} has no task {', '.join(map(repr, unknown))}; it has: {listed}")
    if len(found) < len(wanted):
        raise errors.UserError(f"a task of {suite!r} is named twice in {', '.join(wanted)}")
    return found
