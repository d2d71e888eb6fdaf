"""SIMPLER (Li et al. 2024) in the conventions of open-pi-zero's adapters (src/agent/env_adapter/simpler.py).

  eef_pos [8]  what the author's fork of SimplerEnv adds to obs["agent"]: xyz (m) and quaternion wxyz of the end
               effector in the robot's base frame, gripper openness in [0, 1]. The stock SimplerEnv lacks it
  action [7]   xyz delta (m), rotation delta as axis times angle (rad), gripper

The two robots differ in state, gripper and tasks: simpler_widowx.py, simpler_google.py. SIMPLER is on no package
registry and its scenes are downloads, so this adapter runs where a user has installed the fork; here it is tested
against a stand-in that plays observations in the fork's format. Episodes run to their last step and the flag of that
step decides, as in the published evaluation: `Env.step` says success there only.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import simulator

ACTION_DIM = 7
FORK = "https://github.com/allenzren/SimplerEnv"
# Bridge's end effector poses are relative to a gripper that points down (widowx_controller.py of bridge_data_robot).
TOP_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
STICKY_STEPS = 15


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of the two robots.

    Attributes:
      state: eef_pos f64 [8] -> f32 [state dims].
      sticky: the gripper keeps a command for STICKY_STEPS predicted actions.
    """

    state: Callable[[np.ndarray], np.ndarray]
    sticky: bool


def widowx_state(eef_pos: np.ndarray) -> np.ndarray:
    """f32 [7]: xyz, roll pitch yaw against the top-down pose, openness; as the Bridge data has it."""
    rotation = matrix(eef_pos[3:7]) @ TOP_DOWN.T
    return np.concatenate([eef_pos[:3], euler_from_matrix(rotation), eef_pos[7:8]]).astype(np.float32)


def google_state(eef_pos: np.ndarray) -> np.ndarray:
    """f32 [8]: xyz, quaternion xyzw, closedness; as the Fractal data has it."""
    return np.concatenate([eef_pos[:3], np.roll(eef_pos[3:7], -1), 1 - eef_pos[7:8]]).astype(np.float32)


def to_widowx(actions: np.ndarray) -> np.ndarray:
    """Standardised actions f32 [Z, 7] (roll pitch yaw, gripper 1 open) to SIMPLER's (axis angle, gripper +1 open)."""
    gripper = np.where(actions[:, 6:] > 0.5, 1.0, -1.0)
    return np.concatenate([actions[:, :3], axis_angles(actions[:, 3:6]), gripper], axis=1).astype(np.float32)


def to_google(actions: np.ndarray) -> np.ndarray:
    """Standardised actions f32 [Z, 7] to SIMPLER's, gripper +1 close and still continuous: see `StickyGripper`."""
    gripper = -(2.0 * actions[:, 6:] - 1.0)
    return np.concatenate([actions[:, :3], axis_angles(actions[:, 3:6]), gripper], axis=1).astype(np.float32)


class StickyGripper:
    """Google robot's gripper: a command above 0.5 is kept for 15 predicted actions, then the next one is looked at.

    open-pi-zero runs the rule over every predicted action of a chunk although only the first are executed: a command is
    kept for half as many executed steps, and an action that is never executed can start one. Kept as it is, because the
    published success rates were measured with it.
    """

    def __init__(self):
        self._kept, self._count = None, 0

    def __call__(self, command: float) -> float:
        if self._kept is None and abs(command) > 0.5:
            self._kept = command
        if self._kept is None:
            return command
        out, self._count = self._kept, self._count + 1
        if self._count == STICKY_STEPS:
            self._kept, self._count = None, 0
        return out


class Env:
    """simulator.Env of one SIMPLER task.

    `make`: name -> the gym environment; None = simpler_env.make.
    """

    def __init__(self, task: simulator.Task, kind: Kind, make: Callable[[str], Any] | None = None):
        self._task, self._kind = task, kind
        self._image = None
        if make is None:
            simpler_env, self._image = import_simpler()
            make = simpler_env.make
        self._env = make(task.name)
        spec = getattr(self._env, "spec", None)
        if spec is not None and spec.max_episode_steps != task.step_cap:
            raise errors.UserError(
                f"{task.name} has {spec.max_episode_steps} steps here and {task.step_cap} in the published evaluation: "
                "another version of SIMPLER"
            )

    def reset(self, start: simulator.Start) -> None:
        if start.state is not None or start.seed is not None:
            raise errors.UserError(f"{self._task.name} starts from numbered placements, not from recorded states")
        self._seen, _ = self._env.reset(options={"obj_init_options": {"episode_id": start.number}})
        self._sticky, self._steps = StickyGripper(), 0
        self.state()  # an environment without eef_pos is told before anything moves

    def instruction(self) -> str:
        """As it is now: long tasks change it on the way."""
        return self._env.get_language_instruction()

    def prepare(self, actions: np.ndarray) -> np.ndarray:
        """A whole predicted chunk f32 [Z, 7] as it will be executed: the sticky rule counts every action of it."""
        if not self._kind.sticky:
            return actions
        gripper = [[self._sticky(float(command))] for command in actions[:, 6]]
        return np.concatenate([actions[:, :6], gripper], axis=1).astype(np.float32)

    def state(self) -> np.ndarray:
        agent = self._seen["agent"]
        if "eef_pos" not in agent:
            raise errors.UserError(
                f"the observations of {self._task.name} have no agent/eef_pos (they have {', '.join(sorted(agent))}): "
                f"the stock SimplerEnv lacks it, install the fork {FORK} and its ManiSkill2_real2sim"
            )
        return self._kind.state(np.asarray(agent["eef_pos"], np.float64))

    def opening(self) -> float:
        return float(self._seen["agent"]["eef_pos"][7])

    def pictures(self, views: Sequence[str]) -> dict[str, np.ndarray]:
        """The policy resizes it. DEVIATION: cv2's INTER_LANCZOS4, without antialiasing, is what open-pi-zero used."""
        if "depth" in views:
            raise errors.UserError("SIMPLER's pictures are photographs with rendered robots: they have no depth")
        if not views:
            return {}
        image = self._image(self._env, self._seen) if self._image else self._seen["image"]
        return {"main": np.asarray(image, np.uint8)}

    def step(self, action: np.ndarray) -> bool:
        """True at the last step of the episode alone, if it ends in success."""
        self._seen, _, success, truncated, _ = self._env.step(np.asarray(action, np.float64))
        self._steps += 1
        if truncated and self._steps < self._task.step_cap:
            raise simulator.SimulatorFailure(
                f"{self._task.name} ended after {self._steps} steps, its episodes are known to have "
                f"{self._task.step_cap}: another version of SIMPLER?"
            )
        return bool(success) and self._steps == self._task.step_cap

    def expert(self) -> Callable[[], np.ndarray | None]:
        raise errors.UserError("SIMPLER has no scripted expert")

    def close(self) -> None:
        self._env.close()


def import_simpler():
    """(simpler_env, its function that picks the picture out of an observation)."""
    try:
        import simpler_env
        from simpler_env.utils.env.observation_utils import get_image_from_maniskill2_obs_dict
    except ImportError as error:
        raise errors.UserError(
            f"SIMPLER cannot be imported ({error}): it is on no package registry, install the fork {FORK} "
            "(with ManiSkill2_real2sim) and its assets"
        ) from error
    return simpler_env, get_image_from_maniskill2_obs_dict


def versions() -> dict[str, str]:
    """Of what decides how an episode looks; 'unknown' for a checkout that was never installed as a package."""
    found = {}
    for name in ("simpler_env", "mani_skill2_real2sim"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def listed(suite: str, tasks: Sequence[tuple[str, str, int]], starts: int, adapter: str) -> list[simulator.Task]:
    """Tasks from (name, instruction, step cap) rows."""
    return [
        simulator.Task(suite, number, name, instruction, cap, starts, adapter)
        for number, (name, instruction, cap) in enumerate(tasks)
    ]


# ---- rotations ----


def matrix(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """Rotation matrix f64 [3, 3] of a quaternion of any length but 0."""
    w, x, y, z = quaternion_wxyz / np.linalg.norm(quaternion_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def euler_from_matrix(rotation: np.ndarray) -> np.ndarray:
    """Angles about the fixed axes x, y, z (transforms3d "sxyz"), f64 [3]."""
    across = np.hypot(rotation[0, 0], rotation[1, 0])
    if across < 4 * np.finfo(np.float64).eps:  # pitch +-90 degrees: yaw is 0 by convention
        return np.array([np.arctan2(-rotation[1, 2], rotation[1, 1]), np.arctan2(-rotation[2, 0], across), 0.0])
    return np.array(
        [
            np.arctan2(rotation[2, 1], rotation[2, 2]),
            np.arctan2(-rotation[2, 0], across),
            np.arctan2(rotation[1, 0], rotation[0, 0]),
        ]
    )


def axis_angles(euler: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw [Z, 3] ("sxyz") to axis times angle [Z, 3], as transforms3d has it: angle 2 acos(w), no flip."""
    half = np.asarray(euler, np.float64) / 2
    (cr, cp, cy), (sr, sp, sy) = np.cos(half).T, np.sin(half).T
    w = cr * cp * cy + sr * sp * sy
    vector = np.stack(
        [sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy], axis=-1
    )  # fmt: skip
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(length, w[:, None])
    return np.where(length > 0, vector / np.where(length > 0, length, 1.0) * angle, 0.0)
