"""Meta-World v3 tasks with the scripted policies that ship with the package.

  action f32[4]  gripper xyz delta (1 = 0.01 m) and gripper effort, all in [-1, 1]; 80 Hz
  state f32[4]   gripper xyz (m) and its opening
  image, depth   camera corner2, moved towards the table, mounted upside down: rotated by 180 degrees

The goal of reach, push and pick-place is visible only as a site (a marker): RGB shows sites, depth does not.
"""

import contextlib
import warnings

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import metaworld_instructions, simulator
from qdepth_jax.sim import render as render_lib

CAMERA = "corner2"
# Where published visual policies put it (Masked World Models, LeRobot's metaworld environment): from its own place the
# objects are three pixels wide.
CAMERA_POSITION = (0.75, 0.075, 0.7)
STEP_CAP = 500  # Meta-World's own episode length: a step beyond it raises ValueError
ACTION_DIM = 4


def _import_metaworld():
    render_lib.import_mujoco()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from metaworld import env_dict, policies
    except ImportError as error:
        raise errors.UserError(f"Meta-World cannot be imported ({error}): pip install -e '.[sim]'") from error
    return env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE, policies.ENV_POLICY_MAP


def check_install() -> None:
    """Raises UserError with the fix if Meta-World or its GL library cannot be loaded."""
    _import_metaworld()


def list_tasks() -> list[str]:
    """The 50 task names in alphabetical order; needs no simulator."""
    return sorted(metaworld_instructions.INSTRUCTIONS)


class MetaWorldEnv:
    """One task; every reset draws a new goal and placement from its seed."""

    def __init__(self, task_id: int, image_size: int = 128, supersample: int = 2):
        environments, policies = _import_metaworld()
        self.task_id, self.task = task_id, list_tasks()[task_id]
        self.instruction = metaworld_instructions.INSTRUCTIONS[self.task]
        self._make = environments[self.task + "-goal-observable"]
        self._make_policy = policies[self.task]
        self._image_size, self._supersample, self._renderer = image_size, supersample, None
        self._env = self._make(seed=0)
        self._env._freeze_rand_vec = False  # a goal-observable class keeps its first goal for ever otherwise
        self._env.model.camera(CAMERA).pos[:] = CAMERA_POSITION
        self._env.seeded_rand_vec = True  # draw goals from the environment's generator, not from numpy's global one

    def reset(self, seed: int) -> None:
        """New episode. The same seed gives the same episode."""
        self._env.seed(seed)
        self._observation, _ = self._env.reset()
        self.set_sim_state(self.sim_state())  # the goal's marker moves only now
        self._policy = self._make_policy()

    def step(self, action: np.ndarray) -> bool:
        """One control step of 12.5 ms with f32[4]. Returns the package's own success flag."""
        action = np.asarray(action, np.float32)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"Meta-World needs {ACTION_DIM} finite action numbers, got {action!r}")
        with simulator.physics(self._env.data):
            self._observation, _, _, _, info = self._env.step(np.clip(action, -1, 1))
        return bool(info["success"] >= 1)

    def expert_action(self) -> np.ndarray:
        """f32[4] of the shipped scripted policy."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.clip(self._policy.get_action(self._observation), -1, 1).astype(np.float32)

    def proprio(self) -> np.ndarray:
        """f32[4]"""
        return self._observation[:4].astype(np.float32)

    def sim_state(self) -> np.ndarray:
        """f64 [nq + nv] positions and velocities: enough to draw the frame, not to continue the episode."""
        return np.concatenate([self._env.data.qpos, self._env.data.qvel])

    def set_sim_state(self, state: np.ndarray) -> None:
        import mujoco

        model, data = self._env.model, self._env.data
        data.qpos[:], data.qvel[:] = state[: model.nq], state[model.nq :]
        mujoco.mj_forward(model, data)

    def render(self, depth: bool = True) -> dict[str, np.ndarray]:
        """'image' u8 [H, W, 3] and, unless not wanted, 'depth' f32 [H, W] in metres of the present state."""
        if self._renderer is None:
            size = self._image_size
            # Collision geoms are in a group that is not drawn anyway; group 0 holds the objects.
            self._renderer = render_lib.SceneRenderer(self._env.model, size, size, self._supersample, hidden_groups=())
        # Without shadows and reflections: a tenth of the time on a CPU, and there is no published look to agree with.
        rgb, _ = self._renderer.render(self._env.data, CAMERA, sites=True, effects=False)
        views = {"image": rgb[::-1, ::-1].copy()}
        if depth:
            views["depth"] = self._renderer.render(self._env.data, CAMERA, effects=False)[1][::-1, ::-1].copy()
        return views

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        with contextlib.suppress(Exception):  # the package's own renderer may never have existed
            self._env.close()
