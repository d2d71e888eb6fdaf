"""LIBERO in the real simulator: depth at edges, published conventions, resets, replay of the shipped demonstrations.

Needs the extra `sim`; minutes long, so marked slow.
"""

import pathlib

import numpy as np
import pytest

pytest.importorskip("libero", reason="extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")

from qdepth_jax.eval import closed_loop, policies, replays
from qdepth_jax.sim import collection, demos, expert, libero, libero_tasks, render, rollout, simulator

pytestmark = pytest.mark.slow
DATA = pathlib.Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def env():
    env = libero.LiberoEnv(libero.list_tasks("libero_spatial")[0], image_size=128)
    env.reset(3)
    yield env
    env.close()


def test_one_pass_depth_is_mujocos_own_two_pass_depth(env):
    """And with multisampling on it would not be: the reason why it is off."""
    import mujoco

    size = 256
    errors = {}
    for samples in (0, 4):
        renderer = render.SceneRenderer(env.model, size, size, supersample=1)
        env.model.vis.quality.offsamples = samples
        if samples:  # what the renderer would be without its own setting
            renderer._context = mujoco.MjrContext(env.model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, renderer._context)
            renderer._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        _, ours = renderer.sample(env.data, "agentview")
        renderer.close()
        two_pass = mujoco.Renderer(env.model, size, size)
        two_pass.enable_depth_rendering()
        two_pass.update_scene(env.data, camera="agentview", scene_option=render.visible_geometry(mujoco))
        errors[samples] = np.abs(ours - two_pass.render())
        two_pass.close()
    env.model.vis.quality.offsamples = 0
    assert np.median(errors[0]) < 1e-4
    assert errors[0].max() < 2e-3
    assert errors[4].max() > 0.1


def test_views_are_the_benchmarks_own_images_rotated(env):
    from libero.libero.envs import OffScreenRenderEnv

    ours = env.render()
    theirs = OffScreenRenderEnv(
        bddl_file_name=env.task.problem_file, camera_heights=128, camera_widths=128, camera_depths=False
    )
    theirs.seed(3)
    theirs.reset()
    seen = theirs.set_init_state(env.sim_state())
    theirs.close()
    for name, camera in libero.CAMERAS.items():
        published = seen[f"{camera}_image"][::-1, ::-1].astype(int)
        assert np.abs(published - ours[name]).mean() < 4
        assert np.abs(published[:, ::-1] - ours[name]).mean() > 20


def test_diverged_physics_are_no_failed_episode(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    env.data.qvel[:] = np.nan
    with pytest.raises(simulator.SimulatorFailure, match=r"the physics diverged \(mjWARN_BADQVEL\) at time"):
        env.step(libero.IDLE_ACTION)
    env.reset(3)


def test_a_seed_is_an_episode_whatever_came_before():
    """Task 7 puts a bowl on a fixture, which drifts under plain soft resets."""
    env = libero.LiberoEnv(libero.list_tasks("libero_spatial")[7])
    starts = []
    for seed in (5, 6, 5, 7, 8, 5):
        env.reset(seed)
        if seed == 5:
            starts.append((env.initial_state, env.sim_state(), env.model.body_pos.copy()))
    env.close()
    for start in starts[1:]:
        for ours, first in zip(start, starts[0]):
            np.testing.assert_allclose(ours, first, atol=1e-9)


@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial"])
def test_shipped_demonstrations_replay_to_success(suite):
    """Through closed-loop evaluation, as a policy that recites."""
    policy, jobs, recordings = replays.replay(DATA / suite / "1.0.0", per_split=1)
    found = closed_loop.run(policy, jobs, closed_loop.Options(processes=0, execute=8))
    assert [e.plans for e in found] == [-(-e.steps // 8) for e in found]
    assert replays.same_flags(found, recordings) | {"other_step": []} == {
        "replayed": 2, "same_flag": 2, "share": 1.0, "other_flag": [], "other_step": []
    }  # fmt: skip


def test_a_start_is_an_episode_whatever_came_before_and_pictures_are_what_was_asked_for():
    """Also in another process, and also when somebody looks."""
    task = simulator.list_tasks("libero_object", ["1"])[0]
    whole = closed_loop.evaluate(policies.expert(), [task], [0, 7], closed_loop.Options(processes=1))
    assert all(e.success for e in whole)
    env, seen = libero_tasks.make_env(task, 32, 1), []
    for number in (7, 0):
        start = simulator.Start(number)
        act = rollout.expert_act(env)
        views = ("main", "wrist", "depth") if number else ("wrist",)
        outcome = rollout.run_episode(
            env, start, lambda s, act=act: seen.append(s) or act(s), execute=8, cap=280, views=views
        )  # fmt: skip
        assert outcome.steps == next(e.steps for e in whole if e.start == number)
        assert {name: x.shape for name, x in seen[-1].pictures.items()} == {
            view: (32, 32) if view == "depth" else (32, 32, 3) for view in views
        }
    env.close()


def test_what_the_expert_cannot_do_is_said():
    tasks = {task.name: task for task in libero.list_tasks("libero_goal")}
    env = libero.LiberoEnv(tasks["turn_on_the_stove"])
    reasons = expert.unsupported(env)
    env.close()
    assert len(reasons) == 1 and "turnon" in reasons[0]


def test_an_interrupted_collection_continues_to_the_same_episodes(tmp_path):
    """Finished attempts are read, not simulated again, and other settings are refused."""
    plan = collection.Plan("libero_spatial", (8,), 1, 0, 4, 1001, None, demos.Encoding(32, 85, 1), {})
    first, _ = collection.collect(plan, tmp_path, processes=1)
    path = tmp_path / "task_008" / "00000.episode"
    written = path.stat().st_mtime_ns
    more = collection.dataclasses.replace(plan, episodes=2)
    second, _ = collection.collect(more, tmp_path, processes=2)
    assert path.stat().st_mtime_ns == written
    assert second[8][: len(first[8])] == first[8]
    assert len(collection.accepted(second[8])) == 2
    with pytest.raises(ValueError, match="seed: 1001 there, 5 here"):
        collection.collect(collection.dataclasses.replace(plan, seed=5), tmp_path, processes=1)
