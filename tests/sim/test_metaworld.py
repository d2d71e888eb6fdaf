"""Meta-World adapter: instructions for every task, deterministic seeds, upright views, a scripted success."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import stored_runs
from absl import flags

from qdepth_jax import errors
from qdepth_jax.eval import closed_loop, policies
from qdepth_jax.sim import collection, metaworld, metaworld_instructions, metaworld_tasks, simulator

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_fifty_different_instructions():
    table = metaworld_instructions.INSTRUCTIONS
    assert len(table) == 50
    assert len(set(table.values())) == 50
    assert all(text == text.strip().lower() and 3 < len(text) < 80 for text in table.values())


@pytest.mark.slow
def test_scripted_policy_solves_door_open_and_a_seed_is_an_episode():
    if importlib.util.find_spec("metaworld") is None:  # importing it here would fix MuJoCo's GL backend too early
        pytest.skip("extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")
    env = metaworld.MetaWorldEnv(metaworld.list_tasks().index("door-open-v3"), image_size=64)
    from metaworld import policies

    assert metaworld.list_tasks() == sorted(policies.ENV_POLICY_MAP)
    starts = []
    for seed in (1, 2, 1):
        env.reset(seed)
        starts.append(env._observation.copy())
    np.testing.assert_array_equal(starts[0], starts[2])
    assert np.abs(starts[0] - starts[1]).max() > 1e-3
    seen = env.render()
    # Upright: the table in front is nearer than what lies behind it.
    assert np.median(seen["depth"][-8:]) < np.median(seen["depth"][:8])
    assert any(env.step(env.expert_action()) for _ in range(metaworld.STEP_CAP))
    env.close()


@pytest.mark.slow
def test_diverged_physics_are_no_failed_episode(tmp_path, monkeypatch):
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    env, idle = metaworld.MetaWorldEnv(metaworld.list_tasks().index("door-open-v3"), image_size=64), np.zeros(4)
    env.reset(1)
    env.step(idle)
    wanted = env.sim_state()
    env._env.data.qvel[:] = np.nan
    with pytest.raises(simulator.SimulatorFailure, match=r"the physics diverged \(mjWARN_BADQVEL\) at time"):
        env.step(idle)
    env.reset(1)
    env.step(idle)
    np.testing.assert_array_equal(env.sim_state(), wanted)
    env.close()


@pytest.mark.slow
def test_killed_in_the_middle_the_command_continues_to_the_same_results(tmp_path):
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")

    def start(folder):
        arguments = ["--policy=expert", "--suite=metaworld_mt10", "--tasks=reach-v3,40,door-open-v3", "--episodes=4"]
        arguments += ["--image_size=64", "--failure_videos=0", f"--output={tmp_path / folder}"]
        return subprocess.Popen([sys.executable, str(ROOT / "tools" / "evaluate.py"), *arguments])

    process, log = start("killed"), tmp_path / "killed" / "episodes.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert log.read_bytes().count(b"\n") < 9
    time.sleep(1.0)  # the lock goes with the process
    assert start("killed").wait(600) == 0 and start("whole").wait(600) == 0
    for name in ("result.json", "result.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert found["suites"]["metaworld_mt10"]["successes"] == 8
    assert sorted(p.name for p in (tmp_path / "killed" / "videos").iterdir()) == [
        "metaworld_mt10_task015_start000_success.mp4", "metaworld_mt10_task040_start000_success.mp4"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seed=499", r"--seed=499: Meta-World's seeds 0 to 499 .*use --seed=500 or more"),
        ("--max_steps=501", r"--max_steps=501: .* ends after 500 steps .*use at most --max_steps=500"),
    ],
)
def test_demonstrations_neither_start_where_evaluation_does_nor_outlast_the_simulator(
    tmp_path, monkeypatch, flag, message
):
    monkeypatch.setattr(collection, "collect", lambda *args: pytest.fail("it collects"))
    with stored_runs.tool_module("collect_demos") as tool:
        flags.FLAGS(["collect_demos", "--suite=metaworld", flag, f"--output_dir={tmp_path}"])
        with pytest.raises(errors.UserError, match=message):
            tool.run()
    assert not list(tmp_path.iterdir())


def test_suites_of_metaworld(monkeypatch):
    monkeypatch.setattr(metaworld, "check_install", lambda: None)
    whole = metaworld_tasks.list_tasks("metaworld_mt50")
    ten = metaworld_tasks.list_tasks("metaworld_mt10")
    assert [task.task_id for task in whole] == list(range(50))
    assert {task.name for task in ten} == set(metaworld_tasks.MT10) and len(ten) == 10
    assert all(task.name == metaworld.list_tasks()[task.task_id] for task in ten)
    cap = metaworld.STEP_CAP
    closed_loop.check(policies.expert(), [(ten[0], simulator.Start(0))], closed_loop.Options(max_steps=cap), None)
    with pytest.raises(errors.UserError, match=r"--max_steps=501: .*metaworld_mt10 reach-v3 ends after 500 steps"):
        closed_loop.check(policies.expert(), [(ten[7], simulator.Start(0))], closed_loop.Options(max_steps=501), None)
    assert max(range(ten[0].starts)) < 1000  # seeds of demonstrations begin there (tools/collect_demos.py)
    with pytest.raises(ValueError, match="unknown Meta-World suite 'metaworld_mt1': use metaworld, metaworld_mt50"):
        metaworld_tasks.list_tasks("metaworld_mt1")
