"""Meta-World v3 for closed-loop evaluation: an adapter as simulator.py describes it.

Suites: metaworld_mt50 (or metaworld), all tasks, and metaworld_mt10, the ten of Meta-World's own MT10. Success is the
package's flag at any step of at most 500. Start k is what seed k draws; demonstrations use seeds from 1000 on
(tools/collect_demos.py, which refuses those of the starts).
"""

import importlib.metadata
from collections.abc import Callable, Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import actions, metaworld, metaworld_instructions, simulator

ROBOT = simulator.Robot("metaworld", ("main",), 4, metaworld.ACTION_DIM, 80.0, actions.to_metaworld)
STARTS = 500  # seeds 0 to 499
# Meta-World's MT10 (metaworld/env_dict.py, version 3).
MT10 = ("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
        "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3")  # fmt: skip


def list_tasks(suite: str) -> list[simulator.Task]:
    """Tasks keep their numbers of the alphabetical list of all 50."""
    names = metaworld.list_tasks()
    members = {"metaworld": names, "metaworld_mt50": names, "metaworld_mt10": MT10}
    if suite not in members:
        raise errors.UserError(f"unknown Meta-World suite {suite!r}: use {', '.join(members)} (and --tasks)")
    metaworld.check_install()
    return [
        simulator.Task(
            suite=suite,
            task_id=number,
            name=name,
            instruction=metaworld_instructions.INSTRUCTIONS[name],
            step_cap=metaworld.STEP_CAP,
            starts=STARTS,
            adapter=__name__,
            most_steps=metaworld.STEP_CAP,
        )
        for number, name in enumerate(names)
        if name in members[suite]
    ]


def make_env(task: simulator.Task, image_size: int, supersample: int) -> "Env":
    try:
        return Env(task, image_size, supersample)
    except (OSError, ValueError) as error:  # MuJoCo raises ValueError for files that it cannot open
        if isinstance(error, errors.UserError):
            raise
        raise errors.UserError(
            f"the scene of Meta-World's {task.name} cannot be built: {error}. If an asset is missing: "
            "pip install --force-reinstall metaworld==3.1.1"
        ) from error


def robot(suite: str) -> simulator.Robot:
    return ROBOT


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("metaworld", "mujoco")}


class Env:
    """simulator.Env of one Meta-World task."""

    def __init__(self, task: simulator.Task, image_size: int, supersample: int):
        self._env = metaworld.MetaWorldEnv(task.task_id, image_size, supersample)

    def reset(self, start: simulator.Start) -> None:
        # A recorded start is its seed: the goal is not part of a simulator state.
        self._env.reset(start.number if start.seed is None else start.seed)

    def instruction(self) -> str:
        return self._env.instruction

    def state(self) -> np.ndarray:
        return self._env.proprio()

    def opening(self) -> float:
        return float(self._env.proprio()[3])

    def pictures(self, views: Sequence[str]) -> dict[str, np.ndarray]:
        seen = self._env.render(depth="depth" in views) if views else {}
        return {view: seen[{"main": "image"}.get(view, view)] for view in views}

    def convert(self, chunk: np.ndarray) -> np.ndarray:
        return chunk

    def step(self, action: np.ndarray) -> bool:
        return self._env.step(action)

    def expert(self) -> Callable[[], np.ndarray | None]:
        return self._env.expert_action

    def close(self) -> None:
        self._env.close()
