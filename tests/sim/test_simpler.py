"""SIMPLER's conventions without SIMPLER: recorded Bridge states, scipy's rotations, sticky gripper, protocol."""

import pathlib
import sys
import types

import numpy as np
import pytest
from scipy.spatial import transform

from qdepth_jax import errors
from qdepth_jax.data import example, tfrecord
from qdepth_jax.eval import closed_loop, policies
from qdepth_jax.sim import simpler, simpler_tasks, simulator


def test_recorded_bridge_states_come_back_from_the_pose_that_the_simulator_would_give(bridge_dir):
    """Bridge stores xyz, roll-pitch-yaw against the gripper pointing down, 0, opening."""
    states = []
    for shard in sorted(pathlib.Path(bridge_dir).glob("*.tfrecord-*")):
        for record in tfrecord.scan_records(shard):
            features = example.scan(record.payload)
            states.append(np.array(features["steps/observation/state"].value).reshape(-1, 7))
    states = np.concatenate(states)
    assert len(states) == 500
    turned = transform.Rotation.from_euler("xyz", states[:, 3:6]) * transform.Rotation.from_matrix(simpler.DOWN)
    poses = np.concatenate([states[:, :3], np.roll(turned.as_quat(), 1, axis=1), states[:, 6:]], axis=1)
    found = np.stack([simpler.bridge_state(pose) for pose in poses])
    wrapped = np.angle(np.exp(1j * (found[:, 3:6] - states[:, 3:6])))  # yaw beyond half a turn is the same rotation
    np.testing.assert_allclose(wrapped, 0, atol=2e-5)
    np.testing.assert_allclose(found[:, [0, 1, 2, 6]], states[:, [0, 1, 2, 6]], atol=1e-6)


def test_rotations_are_scipys():
    rng = np.random.default_rng(0)
    for angles in [*rng.uniform(-np.pi, np.pi, (50, 3)), np.zeros(3), [1e-9, 0, 0], [np.pi, 0, 0], [0, 0, np.pi]]:
        theirs = transform.Rotation.from_euler("xyz", angles)
        ours = simpler.matrix_of_euler(*angles)
        np.testing.assert_allclose(ours, theirs.as_matrix(), atol=1e-12)
        np.testing.assert_allclose(simpler.matrix_of_wxyz(np.roll(theirs.as_quat(), 1)), ours, atol=1e-12)
        np.testing.assert_allclose(simpler.matrix_of_euler(*simpler.euler_of(ours)), ours, atol=1e-9)
        back = transform.Rotation.from_rotvec(simpler.axis_angle_of(ours)).as_matrix()
        np.testing.assert_allclose(back, ours, atol=1e-9)
        assert np.linalg.norm(simpler.axis_angle_of(ours)) <= np.pi + 1e-9
    quarter = simpler.matrix_of_euler(0.3, np.pi / 2, 0.2)
    np.testing.assert_allclose(simpler.matrix_of_euler(*simpler.euler_of(quarter)), quarter, atol=1e-9)


def test_fractal_states_hold_xyzw_and_closedness():
    pose = np.array([1, 2, 3, 0.9, 0.1, 0.2, 0.3, 0.25])
    np.testing.assert_allclose(simpler.fractal_state(pose), [1, 2, 3, 0.1, 0.2, 0.3, 0.9, 0.75], rtol=1e-6)


def test_bridge_actions_turn_by_axis_and_angle_and_open_with_plus_one():
    chunk = np.float32([[0.1, 0, 0, 0.3, -0.2, 0.9, 0.51], [0, 0, 0, 0, 0, 0.4, 0.5]])
    found = simpler.bridge_actions(chunk)
    np.testing.assert_allclose(
        found[:, 3:6], transform.Rotation.from_euler("xyz", chunk[:, 3:6]).as_rotvec(), atol=1e-6
    )
    np.testing.assert_array_equal(found[:, [0, 6]], np.float32([[0.1, 1], [0, -1]]))


def test_the_google_robots_gripper_sticks_for_fifteen_actions_executed_or_not():
    """Openings: 0.5 keeps (0), 0.1 closes (0.8). The third action triggers, though two are executed."""
    convert = simpler.FractalActions()
    openings = [0.5, 0.4, 0.1, 0.9] + [0.5] * 16
    chunks = np.zeros((5, 4, 7), np.float32)
    chunks[..., 6] = np.reshape(openings, (5, 4))
    commands = np.concatenate([convert(chunk)[:, 6] for chunk in chunks])
    np.testing.assert_allclose(commands, [0.0, 0.2] + [0.8] * 15 + [0.0] * 3, atol=1e-6)
    np.testing.assert_allclose(convert(np.float32([[0, 0, 0, 0, 0, 0, 1.0]]))[0, 6], -1.0)  # it can stick again
    assert simpler.FractalActions()(np.float32([[0, 0, 0, 0, 0, 0, 0.5]]))[0, 6] == 0.0  # a new episode forgets


class Recorded:
    """SimplerEnv's environment as far as it is used: success comes at step 3 and goes again at step 5."""

    def __init__(self, cap):
        self.spec, self.unwrapped = types.SimpleNamespace(max_episode_steps=cap), self
        self.asked, self.actions = [], []

    def get_language_instruction(self):
        return f"part {len(self.actions) // 4}"

    def _observation(self):
        rgb = np.full((48, 64, 3), 90, np.uint8)
        pose = np.array([0.3, 0, 0.1, *np.roll(transform.Rotation.from_matrix(simpler.DOWN).as_quat(), 1), 1.0])
        return {"agent": {"eef_pos": pose}, "image": {"3rd_view_camera": {"rgb": rgb, "depth": np.ones((48, 64, 1))}}}

    def reset(self, options):
        self.asked.append(options)
        self.actions = []
        return self._observation(), {}

    def step(self, action):
        self.actions.append(action)
        success = len(self.actions) in (3, 4) or len(self.actions) == self.spec.max_episode_steps == 60
        return self._observation(), 0.0, success, False, {}

    def close(self):
        pass


@pytest.fixture
def simpler_env(monkeypatch):
    made = []
    monkeypatch.setitem(
        sys.modules,
        "simpler_env",
        types.SimpleNamespace(make=lambda name: made.append(Recorded(caps[name])) or made[-1]),
    )
    caps = {"widowx_carrot_on_plate": 60, "widowx_put_eggplant_in_basket": 120, "widowx_stack_cube": 300}
    monkeypatch.setattr(simpler_tasks, "versions", lambda: {"simpler_env": "x"})
    return made


def test_an_episode_runs_to_its_end_and_hears_the_instruction_anew(simpler_env):
    tasks = simulator.list_tasks("simpler_widowx", ["widowx_carrot_on_plate", "widowx_put_eggplant_in_basket"])
    heard = []

    def plan(queries):
        heard.extend(query.instruction for query in queries)
        np.testing.assert_allclose(queries[0].state, [0.3, 0, 0.1, 0, 0, 0, 1], atol=1e-6)
        return [np.tile(np.float32([[0, 0, 0, 0, 0, 0.5, 1]]), (4, 1)) for _ in queries]

    policy = policies.Policy({"policy": "x"}, plan, "widowx", horizon=4)
    found = closed_loop.evaluate(policy, tasks, [7], closed_loop.Options(execute=4, processes=0))
    assert [(e.success, e.steps, e.plans) for e in found] == [(True, 60, 15), (False, 120, 30)]
    assert heard[:15] == [f"part {k}" for k in range(15)]
    assert simpler_env[0].asked == [{"obj_init_options": {"episode_id": 7}}]
    np.testing.assert_allclose(simpler_env[0].actions[0], [0, 0, 0, 0, 0, 0.5, 1], atol=1e-6)


def test_pictures_are_opencvs(simpler_env):
    cv2 = pytest.importorskip("cv2")
    env = simpler_tasks.make_env(simulator.list_tasks("simpler_widowx")[0], 24, 1)
    env.reset(simulator.Start(0))
    found = env.pictures(("main", "depth"))
    assert found["main"].shape == (24, 24, 3) and found["depth"].shape == (48, 64)
    env._seen["image"]["3rd_view_camera"]["rgb"] = picture = np.random.default_rng(0).integers(
        0, 255, (48, 64, 3), np.uint8
    )
    wanted = cv2.resize(picture, (24, 24), interpolation=cv2.INTER_LANCZOS4)
    np.testing.assert_array_equal(env.pictures(("main",))["main"], wanted)


def test_what_is_not_the_published_set_up_is_refused(simpler_env, monkeypatch):
    stack = simulator.list_tasks("simpler_widowx", ["widowx_stack_cube"])[0]
    with pytest.raises(errors.UserError, match="ends after 300 steps here, after 60 in the published numbers"):
        simpler_tasks.make_env(stack, 224, 1)
    env = simpler_tasks.make_env(simulator.list_tasks("simpler_widowx")[0], 224, 1)
    env.reset(simulator.Start(0))
    env._seen["agent"] = {"qpos": 0}
    with pytest.raises(errors.UserError, match="agent has qpos, not eef_pos"):
        env.state()
    monkeypatch.setitem(sys.modules, "simpler_env", None)
    with pytest.raises(errors.UserError, match="SIMPLER cannot be imported"):
        simulator.list_tasks("simpler_google_robot")
    with pytest.raises(errors.UserError, match="unknown SIMPLER suite 'simpler_franka'"):
        simulator.list_tasks("simpler_franka")
