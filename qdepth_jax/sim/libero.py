"""LIBERO and LIBERO-PRO environments in the conventions of the published RLDS data sets (`modified_libero_rlds`).

  action f32[7]       OSC_POSE delta: xyz (1 = 0.05 m), axis-angle (1 = 0.5 rad), gripper -1 open / +1 close; 20 Hz
  state f32[8]        end effector xyz (m), its orientation as axis-angle (3), gripper finger positions (2)
  joint_state f32[7]  joint angles (rad)
  images              the simulator's raw images (stored bottom-up) rotated by 180 degrees: upright, and mirrored
                      left-right against what a real camera sees. Models trained on the published data expect that.

Physics runs without cameras; `LiberoEnv.render` draws a frame only when somebody asks for one.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import warnings
from pathlib import Path

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import render as render_lib
from qdepth_jax.sim import simulator

ACTION_DIM = 7
SETTLE_STEPS = 10  # idle steps before every episode: objects fall onto the table (openvla and openpi do the same)
PLACEMENT_ATTEMPTS = 100
IDLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
# Step caps of the openvla and openpi evaluation scripts, by the suite a variant derives from.
STEP_CAPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# In these variants the changed instruction stands in the problem file; the file name still carries the original one.
INSTRUCTION_IN_PROBLEM_FILE = ("_lan", "_task")


SimulatorFailure = simulator.SimulatorFailure


@dataclasses.dataclass(frozen=True)
class LiberoTask:
    suite: str
    task_id: int
    name: str
    instruction: str
    problem_file: str


def _import_libero():
    render_lib.import_mujoco()
    backend = os.environ["MUJOCO_GL"]  # robosuite writes another one where it does not know it
    try:
        # The package warns about macros and prints missing variants on import: nothing a user could act on.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs import env_wrapper
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"LIBERO cannot be imported ({error}): pip install -e '.[sim]' (it carries every asset)"
        ) from error
    except ImportError as error:  # robosuite, of a GL backend
        raise errors.UserError(
            f"LIBERO cannot be imported with MUJOCO_GL={backend} ({error}): set MUJOCO_GL=osmesa (CPU) or egl (GPU)"
        ) from error
    return benchmark, get_libero_path, env_wrapper


def step_cap(suite: str) -> int:
    """Official number of steps of one evaluation episode of `suite` or of the suite it is a variant of."""
    for name, cap in STEP_CAPS.items():
        if suite == name or suite.startswith(name + "_"):
            return cap
    raise errors.UserError(
        f"no official step cap is known for suite {suite!r}; known: {sorted(STEP_CAPS)} and variants"
    )


def list_tasks(suite: str) -> list[LiberoTask]:
    """All tasks of a suite, in the benchmark's own order."""
    benchmark, get_libero_path, _ = _import_libero()
    known = benchmark.get_benchmark_dict()
    if suite.lower() not in known:
        near = difflib.get_close_matches(suite.lower(), known, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise errors.UserError(
            f"unknown LIBERO suite {suite!r}: {hint}There are {', '.join(STEP_CAPS)} and LIBERO-PRO's variants of them "
            "(_lan, _object, _swap, _task, ...)"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        tasks = known[suite.lower()](task_order_index=0)
    listed = []
    for k in range(tasks.n_tasks):
        task = tasks.get_task(k)
        path = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        if not path.is_file():
            raise errors.UserError(f"suite {suite!r} is named by the package but its problem file is missing: {path}")
        instruction = task.language
        if suite.endswith(INSTRUCTION_IN_PROBLEM_FILE):
            from libero.libero.envs import bddl_utils

            instruction = bddl_utils.get_problem_info(str(path))["language_instruction"]
        listed.append(LiberoTask(suite, k, task.name, instruction.strip(), str(path)))
    return listed


def evaluation_states(task: LiberoTask) -> np.ndarray:
    """The benchmark's 50 fixed evaluation starts of a task, f64 [N, D]. Never used for demonstrations."""
    benchmark, _, _ = _import_libero()
    with contextlib.redirect_stdout(io.StringIO()):
        tasks = benchmark.get_benchmark(task.suite)(task_order_index=0)
        return np.asarray(tasks.get_task_init_states(task.task_id))


class LiberoEnv:
    """One task. `observation` is the privileged robosuite dict; `proprio` and `render` are what a policy may see."""

    def __init__(self, task: LiberoTask, image_size: int = 128, supersample: int = 2):
        _, _, env_wrapper = _import_libero()
        mujoco = render_lib.import_mujoco()
        self.task = task
        with contextlib.redirect_stdout(io.StringIO()):
            control = env_wrapper.ControlEnv(
                bddl_file_name=task.problem_file,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                hard_reset=False,  # 0.1 s instead of 6 s
                ignore_done=True,
                horizon=100_000,
            )
        self.domain = control.env
        self.sim = self.domain.sim
        # A soft reset adds the sampled pose of a fixture to what the model already holds, so objects placed on or in
        # fixtures drift away from reset to reset. Every reset below starts from the poses of a freshly compiled model.
        pristine = mujoco.MjModel.from_xml_string(self.domain.model.get_xml())
        self._body_pos, self._body_quat = pristine.body_pos.copy(), pristine.body_quat.copy()
        self._image_size, self._supersample, self._renderer = image_size, supersample, None
        self.observation: dict = {}
        self.initial_state = np.zeros(0, np.float32)

    @property
    def model(self):
        """mujoco.MjModel"""
        return self.sim.model._model

    @property
    def data(self):
        """mujoco.MjData"""
        return self.sim.data._data

    def reset(self, seed: int, initial_state: np.ndarray | None = None) -> None:
        """New episode, settled: placements drawn from `seed`, or the given simulator state with the fixtures of `seed`.

        `self.initial_state` (f32 [D]: time, qpos, qvel before settling) with the same seed restores this very episode.
        """
        from robosuite.utils import errors as robosuite_errors

        self.model.body_pos[:] = self._body_pos
        self.model.body_quat[:] = self._body_quat
        self.sim.forward()
        self.domain.seed(seed)  # numpy's global generator, from which the placement samplers draw
        for _ in range(PLACEMENT_ATTEMPTS):
            with contextlib.suppress(robosuite_errors.RandomizationError):
                self.domain.reset()
                break
        else:
            raise SimulatorFailure(f"no valid placement in {PLACEMENT_ATTEMPTS} attempts with seed {seed}")
        # The gripper's own memory of where its fingers were sent survives a reset otherwise.
        gripper = self.domain.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        # A drawn state goes through float32: what is stored is exactly what was simulated.
        drawn = initial_state is None
        state = self.sim.get_state().flatten().astype(np.float32) if drawn else np.asarray(initial_state)
        if len(state) != self.model.nq + self.model.nv + 1:
            raise ValueError(
                f"{self.task.name}: initial state has {len(state)} numbers, the scene needs "
                f"{self.model.nq + self.model.nv + 1}; it belongs to another task or simulator version"
            )
        self.initial_state = state.astype(np.float32)
        self.set_sim_state(state.astype(np.float64))
        for _ in range(SETTLE_STEPS):
            self.step(IDLE_ACTION)

    def step(self, action: np.ndarray) -> bool:
        """One control step of 50 ms with f32[7]. Returns the benchmark's own success flag."""
        action = np.asarray(action, np.float32)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"LIBERO needs {ACTION_DIM} finite action numbers, got {action!r}")
        with simulator.physics(self.data):
            self.observation, _, _, _ = self.domain.step(action.astype(np.float64))
        return self.success()

    def success(self) -> bool:
        return bool(self.domain._check_success())

    def goals(self) -> list[list[str]]:
        """The goal as a conjunction of predicates, e.g. [['on', 'akita_black_bowl_1', 'plate_1']]."""
        return [list(goal) for goal in self.domain.parsed_problem["goal_state"]]

    def holds(self, goal: list[str]) -> bool:
        return bool(self.domain._eval_predicate(goal))

    def sim_state(self) -> np.ndarray:
        """f64 [1 + nq + nv]: time, positions, velocities."""
        return self.sim.get_state().flatten().copy()

    def set_sim_state(self, state: np.ndarray) -> None:
        self.sim.set_state_from_flattened(state)
        self.sim.forward()
        self.domain._check_success()
        self.domain._post_process()
        self.domain._update_observables(force=True)
        self.observation = self.domain._get_observations()

    def proprio(self) -> dict[str, np.ndarray]:
        """{'state': f32[8], 'joint_state': f32[7]} of the present observation."""
        seen = self.observation
        state = np.concatenate(
            [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        )
        return {"state": state.astype(np.float32), "joint_state": seen["robot0_joint_pos"].astype(np.float32)}

    def render(self, names: tuple[str, ...] = tuple(CAMERAS)) -> dict[str, np.ndarray]:
        """The named views u8 [H, W, 3] of the present state, and 'depth' f32 [H, W] in metres with the main view."""
        if self._renderer is None:
            size = self._image_size
            self._renderer = render_lib.SceneRenderer(self.model, size, size, self._supersample)
        views = {}
        for name in names:
            rgb, depth = self._renderer.render(self.data, CAMERAS[name])
            views[name] = published_view(rgb)
            if name == "image":
                views["depth"] = published_view(depth)
        return views

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self.domain.close()


def published_view(upright: np.ndarray) -> np.ndarray:
    """An upright view [H, W, ...] as the published data stores it: a bottom-up image rotated by 180 degrees."""
    return np.ascontiguousarray(upright[:, ::-1])


def axis_angle(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """Unit quaternion (x, y, z, w) to axis times angle (rad), as robosuite and so the published data compute it.

    The angle is 2 acos(w) in [0, 2 pi]: quaternions are not flipped to w >= 0.
    """
    w = np.clip(quaternion_xyzw[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return quaternion_xyzw[:3] * 2.0 * np.arccos(w) / sine
