"""SIMPLER (WidowX and Google robot) for closed-loop evaluation: an adapter as simulator.py describes it.

Protocol and conventions are open-pi-zero's (sim/simpler.py): the instruction is read anew for every chunk, an episode
runs to its end and success is the flag at its last step, episode ids count up, pictures are resized to 224 by OpenCV's
Lanczos kernel without antialiasing. WidowX executes 4 of 4 actions, the Google robot 2 of 4; so
--image_size=224 --execute=4 (or 2), and --dataset, the name of the data set that the policy was trained on.

Needs the SimplerEnv fork with `agent.eef_pos` (github.com/allenzren/SimplerEnv), which is on no package index. Suites:
simpler_widowx, simpler_google_robot.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import simpler, simulator

ROBOTS = {
    "simpler_widowx": simulator.Robot("widowx", ("main",), 7, 7, 5.0, lambda chunk: chunk),
    "simpler_google_robot": simulator.Robot("google_robot", ("main",), 8, 7, 3.0, lambda chunk: chunk),
}
CAMERAS = {"simpler_widowx": "3rd_view_camera", "simpler_google_robot": "overhead_camera"}


class Row(NamedTuple):
    """instruction: as far as it is fixed. cap: of ManiSkill2's registration. episodes: of the published evaluation."""

    suite: str
    instruction: str
    cap: int
    episodes: int


TASKS = {
    "widowx_carrot_on_plate": Row("simpler_widowx", "put carrot on plate", 60, 240),
    "widowx_put_eggplant_in_basket": Row("simpler_widowx", "put eggplant into yellow basket", 120, 240),
    "widowx_spoon_on_towel": Row("simpler_widowx", "put the spoon on the towel", 60, 240),
    "widowx_stack_cube": Row("simpler_widowx", "stack the green block on the yellow block", 60, 240),
    "google_robot_pick_horizontal_coke_can": Row("simpler_google_robot", "pick coke can", 80, 1000),
    "google_robot_pick_vertical_coke_can": Row("simpler_google_robot", "pick coke can", 80, 1000),
    "google_robot_pick_standing_coke_can": Row("simpler_google_robot", "pick coke can", 80, 1000),
    "google_robot_move_near": Row("simpler_google_robot", "move A near B", 80, 2400),
    "google_robot_open_drawer": Row("simpler_google_robot", "open NAME drawer", 113, 1080),
    "google_robot_close_drawer": Row("simpler_google_robot", "close NAME drawer", 113, 1080),
    "google_robot_place_apple_in_closed_top_drawer": Row("simpler_google_robot", "open top drawer", 200, 1080),
}


def robot(suite: str) -> simulator.Robot:
    return ROBOTS[suite]


def list_tasks(suite: str) -> list[simulator.Task]:
    if suite not in ROBOTS:
        raise errors.UserError(f"unknown SIMPLER suite {suite!r}: use {' or '.join(ROBOTS)}")
    _import_simpler()
    return [
        simulator.Task(suite, number, name, row.instruction, row.cap, row.episodes, __name__, to_the_end=True)
        for number, (name, row) in enumerate((n, r) for n, r in TASKS.items() if r.suite == suite)
    ]


def make_env(task: simulator.Task, image_size: int, supersample: int) -> "Env":
    made = _import_simpler().make(task.name)
    cap = getattr(made.spec, "max_episode_steps", None)
    if cap != task.step_cap:
        raise errors.UserError(
            f"{task.name} ends after {cap} steps here, after {task.step_cap} in the published numbers"
        )
    return Env(made, task, image_size)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("simpler_env", "mani_skill2_real2sim")}


def _import_simpler() -> Any:
    try:
        import simpler_env
    except ImportError as error:
        raise errors.UserError(
            f"SIMPLER cannot be imported ({error}): it is on no package index; install the fork with agent.eef_pos, "
            "github.com/allenzren/SimplerEnv, and its ManiSkill2_real2sim"
        ) from error
    return simpler_env


class Env:
    """simulator.Env of one task around SimplerEnv's gymnasium environment."""

    def __init__(self, made: Any, task: simulator.Task, image_size: int):
        self._made, self._task, self._size = made, task, image_size
        self._google = task.suite == "simpler_google_robot"
        self._seen: dict = {}

    def reset(self, start: simulator.Start) -> None:
        if start.seed is not None:
            raise errors.UserError("SIMPLER's episodes are numbered; there are no recorded ones to replay")
        self._seen, _ = self._made.reset(options={"obj_init_options": {"episode_id": start.number}})
        self._convert = simpler.FractalActions() if self._google else simpler.bridge_actions

    def instruction(self) -> str:
        return self._made.unwrapped.get_language_instruction()

    def state(self) -> np.ndarray:
        return simpler.fractal_state(self._pose()) if self._google else simpler.bridge_state(self._pose())

    def opening(self) -> float:
        return float(self._pose()[7])

    def _pose(self) -> np.ndarray:
        agent = self._seen["agent"]
        if "eef_pos" not in agent:
            raise errors.UserError(
                f"this SimplerEnv does not say where the gripper is: agent has {', '.join(sorted(agent))}, not "
                "eef_pos. Install the fork that adds it: github.com/allenzren/SimplerEnv"
            )
        return np.asarray(agent["eef_pos"], np.float64)

    def pictures(self, views: Sequence[str]) -> dict[str, np.ndarray]:
        """SIMPLER renders at every step, whether somebody looks or not."""
        if not views:
            return {}
        import cv2

        camera, found = self._seen["image"][CAMERAS[self._task.suite]], {}
        for view in views:
            if view == "depth":
                found[view] = np.asarray(camera["depth"], np.float32).reshape(camera["rgb"].shape[:2])
            else:
                size = (self._size, self._size)
                found[view] = cv2.resize(np.asarray(camera["rgb"]), size, interpolation=cv2.INTER_LANCZOS4)
        return found

    def convert(self, chunk: np.ndarray) -> np.ndarray:
        return self._convert(chunk)

    def step(self, action: np.ndarray) -> bool:
        self._seen, _, success, _, _ = self._made.step(np.asarray(action, np.float64))
        return bool(success)

    def expert(self) -> Callable[[], np.ndarray | None]:
        raise errors.UserError("there is no scripted expert for SIMPLER")

    def close(self) -> None:
        self._made.close()
