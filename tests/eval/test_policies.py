"""Policies of closed-loop evaluation: what a robot refuses, what the comparisons do, that batches do not matter."""

import dataclasses
import pathlib
import types

import fake_simulator
import jax
import numpy as np
import pytest
import stored_runs

from qdepth_jax import errors, planner
from qdepth_jax.data import normalise, text
from qdepth_jax.eval import closed_loop, policies, replays
from qdepth_jax.models import policy
from qdepth_jax.sim import demos, libero_tasks, metaworld_tasks, simulator

WORDS = pathlib.Path(__file__).resolve().parents[2] / "data" / "text_tokenizer" / "libero.model"


def normaliser(dims, seed=0):
    values = np.random.default_rng(seed).uniform(-0.2, 0.4, (50, dims)).astype(np.float32)
    return normalise.Normaliser(normalise.compute(values), "minmax")


def loaded(action_dim=7, state_dim=8, **fields):
    """A planner without weights."""
    config = policy.sized(
        "tiny", action_dim=action_dim, proprio_dim=state_dim, vocabulary=640, text_length=24, depth=None, layers=1,
        scan=False, **fields,
    )  # fmt: skip
    found = types.SimpleNamespace(max_text_tokens=24, text_rule="raw", proprio_dim=0)
    return planner.Planner(
        config, {}, found, "libero_object", normaliser(action_dim), normaliser(state_dim, 1), None, None
    )


def query(task=0, start=0, plan=0, wanted=4, step=0, state=(0.0, 0.0)):
    picture = np.full((8, 8, 3), (10 * start + plan) % 256, np.uint8)
    return policies.Query(
        fake_simulator.task(task),
        start,
        plan,
        step,
        wanted,
        f"go {task}",
        {"main": picture},
        np.asarray(state, np.float32),
    )


def test_a_policy_must_have_the_robots_cameras_and_numbers():
    policies.check(loaded(), libero_tasks.ROBOT)
    policies.check(loaded(4, 4), metaworld_tasks.ROBOT)
    with pytest.raises(errors.UserError, match=r"sees the cameras main, wrist; metaworld has main, not wrist"):
        policies.check(loaded(4, 4, views=("main", "wrist")), metaworld_tasks.ROBOT)
    with pytest.raises(
        errors.UserError, match=r"'libero_object', gives 7 action numbers .* metaworld takes 4 and has 4"
    ):
        policies.check(loaded(), metaworld_tasks.ROBOT)
    with pytest.raises(errors.UserError, match=r"reads 7 of state; libero takes 7 and has 8"):
        policies.check(loaded(7, 7), libero_tasks.ROBOT)


def test_noise_belongs_to_an_episode():
    seeds = {policies.noise_seed(seed, query(task, k)) for seed in (0, 1) for task in (0, 1) for k in range(50)}
    assert len(seeds) == 200 and all(0 <= seed < 2**32 for seed in seeds)
    assert policies.noise_seed(0, query()) == policies.noise_seed(0, query(plan=7, step=3))
    # CRC-32 of "0/fake/0/0": results of earlier runs stay comparable.
    assert policies.noise_seed(0, query()) == 0x366A1CCC


def test_mean_action_is_that_of_the_statistics_whatever_it_sees():
    held = loaded()
    found = policies.mean_action(held, libero_tasks.ROBOT)
    first, second = found.plan([query(wanted=3), query(start=4, wanted=8)])
    assert first.shape == (3, 7) and second.shape == (8, 7)
    mean = np.asarray(held.action.statistics.mean)
    assert (first[:, :6] == mean[:6].astype(np.float32)).all()
    assert (second[:, 6] == (-1 if mean[6] > 0.5 else 1)).all()
    assert found.views == () and found.identity["policy"] == "mean_action"


def recording(number, action, success=True, task_id=0):
    return demos.Recording(f"episode {number}", "fake", task_id, 500, np.zeros(1, np.float32), action, success)


def test_replays_start_where_they_were_recorded_and_are_compared_by_their_flag(monkeypatch):
    """The recording begins at x = 0.5 (seed 500): from x = 0 the same actions would fail."""
    reaching = np.tile(np.float32([[0.125, 0, 1]]), (4, 1))
    recordings = [recording(0, reaching), recording(1, reaching[:3]), recording(2, reaching[:2], success=False)]
    monkeypatch.setattr(demos, "read_recordings", lambda directory: {"train": recordings[:2], "val": recordings[2:]})
    monkeypatch.setattr(simulator, "ADAPTERS", (("fake", "fake_simulator"),))
    fewer, some, _ = replays.replay("somewhere", 1)
    replaying, jobs, recordings = replays.replay("somewhere")
    # Of the first of each split; what is added later goes on in the same log.
    assert some == [jobs[0], jobs[2]] and fewer.identity == replaying.identity
    found = closed_loop.run(replaying, jobs, closed_loop.Options(execute=3, processes=0))
    assert [(e.success, e.steps) for e in found] == [(True, 4), (False, 3), (False, 2)]
    assert replays.same_flags(found, recordings) == {
        "replayed": 3, "same_flag": 2, "share": 0.6667, "other_flag": ["episode 1"], "other_step": []
    }  # fmt: skip
    crashed = [dataclasses.replace(found[0], crash="diverged"), *found[1:]]
    assert replays.same_flags(crashed, recordings)["replayed"] == 2
    # One longer than the task's official cap is replayed to its end.
    slow = np.r_[np.zeros((50, 3), np.float32), reaching]
    monkeypatch.setattr(demos, "read_recordings", lambda directory: {"train": [recording(0, slow)]})
    replaying, jobs, recordings = replays.replay("somewhere")
    found = closed_loop.run(replaying, jobs, closed_loop.Options(execute=3, processes=0))
    assert replays.same_flags(found, recordings)["other_flag"] == [] and found[0].steps == 54


@pytest.mark.slow
def test_a_trained_policy_plans_alike_in_any_batch_and_any_number_of_processes(monkeypatch):
    """To the bit: rows of the one program do not see each other."""
    held = loaded(3, 2, views=("main",))._replace(words=text.TextTokenizer(str(WORDS)))
    with pytest.raises(errors.UserError, match="at least 1"):
        policies.trained(held, fake_simulator.ROBOT, batch=0)
    held = policies.untrained_weights(held._replace(variables={"state": {}}), seed=3)
    found = policies.trained(held, fake_simulator.ROBOT, batch=4)
    assert found.identity["weights"] != policies.trained(
        policies.untrained_weights(held, seed=4), fake_simulator.ROBOT, batch=4
    ).identity["weights"]  # fmt: skip
    queries = [query(k % 2, k, k // 2, state=(k / 8, -k)) for k in range(4)]
    together = found.plan(queries)
    for k, one in enumerate(queries):
        np.testing.assert_array_equal(found.plan([one])[0], together[k])
    for k, chunk in zip((2, 0, 3), found.plan([queries[2], queries[0], queries[3]])):
        np.testing.assert_array_equal(chunk, together[k])
    assert np.abs(together[0] - found.plan([query(state=(0, 0), plan=1)])[0]).max() > 1e-3  # other noise
    monkeypatch.setenv("FAKE_SECONDS", "0.02")
    tasks = [fake_simulator.task(k, cap=30) for k in range(2)]
    options = closed_loop.Options(execute=3, processes=0, image_size=8)
    alone = closed_loop.evaluate(found, tasks, range(3), options)
    assert alone == closed_loop.evaluate(found, tasks, range(3), dataclasses.replace(options, processes=3))
    assert len({e.steps for e in alone}) > 1
    jax.clear_caches()


@pytest.mark.parametrize(
    ("ahead", "label"), [(0, "predicted, m"), (16, "predicted t+16, m"), (None, "predicted t+?, m")]
)
def test_depth_of_a_later_frame_is_called_so(ahead, label):
    held = loaded(3, 2)._replace(words=text.TextTokenizer(str(WORDS)))
    held.found.depth_ahead = ahead
    pixels = dataclasses.replace(policy.sized("tiny").depth, head="pixels")
    held = held._replace(config=dataclasses.replace(held.config, depth=pixels))
    assert policies.trained(held, fake_simulator.ROBOT).depth_label == label


@pytest.mark.slow
def test_a_policy_with_a_depth_expert_says_depth_in_metres(tmp_path):
    stored_runs.write_qdepth(tmp_path)
    robot = simulator.Robot("fake", ("main",), 7, 7, 10.0, lambda x: x)
    held = planner.load(str(tmp_path / "policy"), decode_depth=True)
    found = policies.trained(held, robot, batch=2)
    assert found.depth_label == "predicted, m" and found.views == ("main",)
    depth = found.depth([query(state=np.zeros(7)), query(start=3, state=np.ones(7))])
    assert depth.shape == (2, 8, 8)
    assert policies.trained(held._replace(decoder=None), robot, batch=2).depth is None
