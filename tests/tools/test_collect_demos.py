"""tools/collect_demos.py with attempts that cost nothing: how a data set grows, and what is refused."""

import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import stored_runs

from qdepth_jax import errors, files, workdirs
from qdepth_jax.data import example
from qdepth_jax.sim import collection, demos, libero, libero_tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]


def attempt(plan, env, work, task, number):
    """Every attempt succeeds."""
    folder, seed = work / f"task_{task:03d}", plan.seed + number
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "episode_metadata/file_path": [f"{task}/{seed}".encode()],
        "episode_metadata/suite": [plan.suite.encode()],
        "episode_metadata/task_id": np.array([task]),
        "episode_metadata/seed": np.array([seed]),
        "episode_metadata/initial_state": np.zeros(2, np.float32),
        "episode_metadata/success": np.array([True]),
        "steps/action": np.zeros(7, np.float32),
        "steps/reward": np.ones(1, np.float32),
    }
    files.write_whole(folder / f"{number:05d}.episode", example.encode(content))
    one = collection.Attempt(number, seed, demos.SUCCESS, 1)
    files.write_whole(folder / f"{number:05d}.json", json.dumps(dataclasses.asdict(one)))


@pytest.fixture
def collect(monkeypatch, tmp_path):
    """Runs the command; returns split -> "task/seed" of the episodes that are then in the data set."""
    env = types.SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(collection, "make_env", lambda plan, task: (env, ""))
    monkeypatch.setattr(collection, "run_attempt", attempt)
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda n, *_, **__: concurrent.futures.ThreadPoolExecutor(n)
    )
    monkeypatch.setattr(
        libero, "list_tasks", lambda suite: [libero.LiberoTask(suite, k, f"task {k}", "", "") for k in range(4)]
    )
    monkeypatch.setattr(libero_tasks, "versions", dict)

    def run(*arguments):
        with stored_runs.command("collect_demos") as main:
            main("--suite=libero_object", f"--output_dir={tmp_path}", *arguments)
        found = demos.read_recordings(tmp_path / "libero_object" / "1.0.0")
        return {split: {one.file_path for one in episodes} for split, episodes in found.items()}

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_data_set_grows_and_episodes_stay_in_their_split(collect, tmp_path):
    assert collect("--tasks=1", "--episodes=1") == {"train": {"1/1000"}}
    assert collect("--tasks=1", "--episodes=2") == {"train": {"1/1000", "1/1001"}}
    whole = {"train": {f"{task}/{seed}" for task in (0, 1) for seed in (1000, 1001)}, "val": {"0/1002", "1/1002"}}
    grown = ("--tasks=0,1", "--episodes=2", "--val_episodes=1")
    assert collect(*grown) == whole
    before = content(tmp_path / "libero_object" / "1.0.0")
    assert collect(*grown) == whole and content(tmp_path / "libero_object" / "1.0.0") == before
    more = collect("--tasks=all", "--episodes=2", "--val_episodes=3")
    assert all(whole[split] < more[split] for split in whole) and len(more["val"]) == 12


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tasks=3", "--episodes=2", "--val_episodes=1"),  # takes a task away
        ("--tasks=1,3", "--episodes=1", "--val_episodes=2"),  # train to val
        ("--tasks=1,3", "--episodes=2", "--val_episodes=0"),  # takes val away
        ("--tasks=1,3", "--episodes=3", "--val_episodes=1"),  # val to train
        ("--tasks=all", "--episodes=3", "--val_episodes=5"),
    ],
)
def test_what_is_published_stays_in_its_split(collect, monkeypatch, tmp_path, arguments):
    collect("--tasks=1,3", "--episodes=2", "--val_episodes=1")
    before = content(tmp_path / "libero_object" / "1.0.0")
    monkeypatch.setattr(collection, "run_attempt", lambda *_: pytest.fail("it simulates"))
    message = (
        rf"1\.0\.0 holds --tasks=1,3, of each up to 2 episodes in train and 1 in val: .*{arguments[1]} {arguments[2]} "
        r"would .* --episodes=2 and --val_episodes=1 or more; .*another --version"
    )
    with pytest.raises(errors.UserError, match=message):
        collect(*arguments)
    assert content(tmp_path / "libero_object" / "1.0.0") == before


def test_a_damaged_data_set_is_named_and_made_again(collect, tmp_path):
    whole, directory = collect("--tasks=1", "--episodes=2"), tmp_path / "libero_object" / "1.0.0"
    (shard,) = directory.glob("*.tfrecord-*")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(
        errors.UserError, match=r"00000-of-00001: record 1 .*truncated.* Or delete .*1\.0\.0: it is made"
    ):
        collect("--tasks=1", "--episodes=2")
    for path in directory.iterdir():
        path.unlink()
    assert collect("--tasks=1", "--episodes=2") == whole


def test_a_second_start_is_refused(collect, tmp_path):
    work = tmp_path / ".work" / "libero_object"
    work.mkdir(parents=True)
    with workdirs.only_one(work, print), pytest.raises(errors.UserError, match=rf"--work_dir={work} is in use"):
        collect("--tasks=1", "--episodes=1")
    assert [path.name for path in work.iterdir()] == ["lock"]
    collect("--tasks=1", "--episodes=1")


@pytest.mark.parametrize("suite", ["metaworld", "libero_object"])
def test_a_missing_simulator_is_named(monkeypatch, tmp_path, suite):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setitem(sys.modules, "mujoco", None)  # as if it were not installed
    monkeypatch.setattr(collection, "collect", lambda *_: pytest.fail("it collects"))
    with stored_runs.command("collect_demos") as main, pytest.raises(errors.UserError, match=r"package 'mujoco': pip"):
        main(f"--suite={suite}", f"--output_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: flag --output_dir=None: "),
        (["--output_dir=x", "--processes=0"], "error: flag --processes=0: "),
        (["--output_dir="], "error: --output_dir=: demonstrations are written to a folder of a local disk"),
        (["--output_dir=gs://b/x"], "error: --output_dir=gs://b/x: demonstrations are written to a folder"),
    ],
)
def test_bad_flags_end_with_two(tmp_path, arguments, message):
    line = [sys.executable, str(ROOT / "tools" / "collect_demos.py"), "--suite=libero_object", *arguments]
    found = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr.startswith(message) and found.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
