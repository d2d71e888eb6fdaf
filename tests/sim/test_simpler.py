"""SIMPLER's conventions against SciPy's rotations and the rules of open-pi-zero's adapters; the adapter against a
stand-in that plays observations in the format of the author's fork (the simulator itself cannot be had here)."""

import types

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qdepth_jax import errors
from qdepth_jax.sim import simpler, simpler_google, simpler_widowx, simulator


@pytest.fixture
def euler():
    return np.random.default_rng(0).uniform([-3, -1.5, -3], [3, 1.5, 3], (200, 3))


def test_rotations_are_scipys(euler):
    rotations = Rotation.from_euler("xyz", euler)  # lower case: about fixed axes
    x, y, z, w = rotations.as_quat().T
    for wxyz, angles in zip(np.stack([w, x, y, z], -1), euler):
        np.testing.assert_allclose(simpler.euler_from_matrix(simpler.matrix(2.5 * wxyz)), angles, atol=1e-9)
    small = np.abs(euler).max(axis=1) < 1.5  # beyond, transforms3d gives angles above pi, SciPy never
    assert small.sum() > 20
    np.testing.assert_allclose(simpler.axis_angles(euler[small]), rotations[small].as_rotvec(), atol=1e-9)
    np.testing.assert_array_equal(simpler.axis_angles(np.zeros((1, 3))), np.zeros((1, 3)))


def test_pitch_of_ninety_degrees():
    rotation = Rotation.from_euler("xyz", [0.3, np.pi / 2, 0.0]).as_matrix()
    np.testing.assert_allclose(simpler.euler_from_matrix(rotation), [0.3, np.pi / 2, 0.0], atol=1e-7)


def wxyz(rotation):
    x, y, z, w = rotation.as_quat()
    return np.array([w, x, y, z])


def test_states():
    down = wxyz(Rotation.from_matrix(simpler.TOP_DOWN))
    state = simpler.widowx_state(np.array([0.3, -0.1, 0.2, *down, 0.75]))
    np.testing.assert_allclose(state, [0.3, -0.1, 0.2, 0, 0, 0, 0.75], atol=1e-7)
    turned = wxyz(Rotation.from_euler("xyz", [0.1, -0.2, 0.4]) * Rotation.from_matrix(simpler.TOP_DOWN))
    np.testing.assert_allclose(simpler.widowx_state(np.array([0, 0, 0, *turned, 1]))[3:6], [0.1, -0.2, 0.4], atol=1e-6)
    state = simpler.google_state(np.array([0.3, -0.1, 0.2, 0.5, 0.1, 0.2, 0.3, 0.75]))
    np.testing.assert_allclose(state, [0.3, -0.1, 0.2, 0.1, 0.2, 0.3, 0.5, 0.25], atol=1e-7)


def test_actions():
    actions = np.array([[0.1, 0.2, 0.3, 0.0, 0.0, 0.5, 0.51], [0, 0, 0, 0.5, 0, 0, 0.5]], np.float32)
    np.testing.assert_allclose(simpler.to_widowx(actions)[:, 6], [1, -1])
    np.testing.assert_allclose(simpler.to_widowx(actions)[0, :6], [0.1, 0.2, 0.3, 0, 0, 0.5], atol=1e-7)
    np.testing.assert_allclose(simpler.to_google(actions)[:, 6], [-0.02, 0.0], atol=1e-6)


def test_sticky_gripper_keeps_a_command_for_fifteen_actions():
    sticky = simpler.StickyGripper()
    commands = [0.3, 0.5, -0.8, *np.linspace(-1, 1, 14), 0.2, 0.9, -0.9]
    out = [sticky(c) for c in commands]
    assert out == [0.3, 0.5, *[-0.8] * 15, 0.2, 0.9, 0.9]


class Fork:
    """Plays observations in the fork's format; remembers what it was told."""

    def __init__(self, steps, keys=("eef_pos", "qpos")):
        self.spec, self._keys, self.actions = types.SimpleNamespace(max_episode_steps=steps), keys, []

    def _observation(self):
        pose = np.array([0.1 * len(self.actions), 0, 0.2, *wxyz(Rotation.from_matrix(simpler.TOP_DOWN)), 0.5])
        agent = {"eef_pos": pose, "qpos": np.zeros(8)}
        picture = np.full((48, 64, 3), len(self.actions), np.uint8)
        return {"agent": {key: agent[key] for key in self._keys}, "image": picture}

    def reset(self, options):
        self.options, self.actions = options, []
        return self._observation(), {}

    def get_language_instruction(self):
        return "open the drawer" if len(self.actions) < 3 else "put the apple into the drawer"

    def step(self, action):
        self.actions.append(action)
        ended = len(self.actions) == self.spec.max_episode_steps
        return self._observation(), 0.0, len(self.actions) in (2, self.spec.max_episode_steps), ended, {}

    def close(self):
        pass


def task(cap, module=simpler_widowx):
    return simulator.Task(module.ROBOT.name, 0, "widowx_carrot_on_plate", "", cap, 240, module.__name__)


def test_an_episode_runs_to_its_last_step_and_its_flag_decides():
    fork = Fork(5)
    env = simpler.Env(task(5), simpler_widowx.KIND, lambda name: fork)
    env.reset(simulator.Start(7))
    assert fork.options == {"obj_init_options": {"episode_id": 7}}
    assert env.pictures(("main",))["main"].shape == (48, 64, 3) and env.pictures(()) == {}
    flags, instructions = [], []
    for _ in range(5):
        instructions.append(env.instruction())
        flags.append(env.step(np.zeros(7, np.float32)))
    assert flags == [False] * 4 + [True]  # the flag of step 2 is forgotten
    assert len(set(instructions)) == 2
    np.testing.assert_allclose(env.state(), [0.5, 0, 0.2, 0, 0, 0, 0.5], atol=1e-6)


def test_the_sticky_rule_counts_actions_that_are_never_executed():
    env = simpler.Env(task(9, simpler_google), simpler_google.KIND, lambda name: Fork(9))
    env.reset(simulator.Start(0))
    first = np.zeros((4, 7), np.float32)
    first[3, 6] = 1.0  # the last of the chunk, behind the two that are executed
    assert env.prepare(first)[:, 6].tolist() == [0, 0, 0, 1]
    assert env.prepare(np.zeros((4, 7), np.float32))[:, 6].tolist() == [1, 1, 1, 1]
    env.reset(simulator.Start(1))
    assert env.prepare(np.zeros((4, 7), np.float32))[:, 6].tolist() == [0, 0, 0, 0]


def test_what_does_not_fit_is_told():
    with pytest.raises(errors.UserError, match="60 steps here and 120 in the published"):
        simpler.Env(task(120), simpler_widowx.KIND, lambda name: Fork(60))
    env = simpler.Env(task(5), simpler_widowx.KIND, lambda name: Fork(5, keys=("qpos",)))
    with pytest.raises(errors.UserError, match=r"no agent/eef_pos .*they have qpos.* install the fork"):
        env.reset(simulator.Start(0))
    env = simpler.Env(task(5), simpler_widowx.KIND, lambda name: Fork(5))
    with pytest.raises(errors.UserError, match="not from recorded states"):
        env.reset(simulator.Start(0, seed=3))
    with pytest.raises(errors.UserError, match="have no depth"):
        env.pictures(("main", "depth"))
    with pytest.raises(errors.UserError, match="SIMPLER cannot be imported"):
        simpler_widowx.list_tasks("simpler_widowx")
