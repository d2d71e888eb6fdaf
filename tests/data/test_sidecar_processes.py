"""Several processes write one sidecar, are killed at any moment, start again in any number: the bytes are the same."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import sidecar_child

from qdepth_jax import errors
from qdepth_jax.data import sidecar, sidecar_lock

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def content(root) -> dict[str, bytes]:
    """Every file below a folder."""
    root = pathlib.Path(root)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    sidecar_child.write(str(root), 0, 1)
    found = content(root)
    files = ("metadata.json", "values.npy", "scale.npy", "figures.npy", "sums.npy")
    assert set(found) == {f"train/{name}" for name in files}
    opened = sidecar.open_sidecar(str(root), "train")
    for episode, start in enumerate(sidecar_child.STARTS):
        wanted = sidecar_child.values(episode)
        np.testing.assert_array_equal(opened.values[start : start + len(wanted)], wanted)
    assert opened.figures[:, 0].tolist() == list(range(40)) and opened.figures[:, 1].sum() == opened.metadata.frames
    return found


@pytest.fixture(scope="module")
def rounds():
    """Runs rounds of processes (sidecar_child.run_round); their exit codes."""
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "sidecar_child.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    def run(**wanted):
        child.stdin.write(json.dumps(wanted) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    yield run
    child.stdin.close()
    child.wait(timeout=30)
    child.stdout.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_kills_at_any_moment_change_no_byte(tmp_path, expected, rounds, processes):
    rng, pause = random.Random(processes), 0.003
    for trial in range(4):
        root = str(tmp_path / str(trial))
        for _ in range(5):
            victim = rng.randrange(processes)
            kill = [victim, rng.uniform(0, 0.3 * pause * len(sidecar_child.LENGTHS) / processes)]
            codes = rounds(root=root, processes=processes, pause=pause, kill=kill)
            assert codes.pop(victim) in (-signal.SIGKILL, 0) and not any(codes)
        others = rng.choice([1, 2, 3, 4])
        assert not any(rounds(root=root, processes=others, pause=0, kill=None))
        assert content(root) == expected


def test_many_start_at_once_and_one_publishes(tmp_path, expected, rounds):
    for trial in range(8):
        root = str(tmp_path / str(trial))
        assert rounds(root=root, processes=5, pause=0, kill=None) == [0] * 5
        assert content(root) == expected
    assert sidecar_child.write(root, 2, 4) == f"{root}/train"


def test_who_is_not_last_publishes_nothing(tmp_path, expected):
    assert sidecar_child.write(str(tmp_path), 1, 3) is None and sidecar_child.write(str(tmp_path), 0, 3) is None
    assert not os.path.exists(tmp_path / "train")
    assert sidecar_child.write(str(tmp_path), 2, 3) == str(tmp_path / "train")
    assert content(tmp_path) == expected


def test_a_second_process_of_one_number_is_refused(tmp_path):
    first = sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3, 0, 2)
    with pytest.raises(
        errors.UserError, match=rf"process 0 of 2 is running already \(process {os.getpid()} on .*own --"
    ):
        sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3, 0, 2)
    with pytest.raises(
        errors.UserError, match=r"written by process 0 of 2 .* this is process 0 of 1: .*--num_processes"
    ):
        sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3)
    second = sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3, 1, 2)
    assert set(first.pending()) | set(second.pending()) == set(range(40))
    assert not set(first.pending()) & set(second.pending())
    first.close()
    second.close()
    assert len(sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3).pending()) == 40
    with pytest.raises(errors.UserError, match="--process_id=2 --num_processes=2"):
        sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3, 2, 2)


def test_a_kill_right_after_the_rename_is_tidied_up(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(sidecar.shutil, "rmtree", lambda *_, **__: None)
    sidecar_child.write(str(tmp_path), 0, 1)
    monkeypatch.undo()
    assert any("state" in name for name in content(tmp_path))
    sidecar.open_sidecar(str(tmp_path), "train")  # readers do not mind
    sidecar_child.write(str(tmp_path), 0, 1)
    assert content(tmp_path) == expected


def test_half_a_beginning_is_begun_again(tmp_path, expected):
    os.makedirs(tmp_path / "train.partial" / "state")
    (tmp_path / "train.partial" / "values.npy").write_bytes(b"half")
    sidecar_child.write(str(tmp_path), 0, 1)
    assert content(tmp_path) == expected


def test_an_unfinished_folder_of_an_older_layout_is_refused(tmp_path):
    writer = sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3)
    writer.close()
    os.rename(tmp_path / "train.partial" / "state" / "done.npy", tmp_path / "train.partial" / "done.npy")
    sidecar.shutil.rmtree(tmp_path / "train.partial" / "state")
    with pytest.raises(errors.UserError, match="older version: delete it"):
        sidecar.Writer(str(tmp_path), sidecar_child.METADATA, 3)
    sidecar.Writer(str(tmp_path / "sums"), sidecar_child.METADATA, 3).close()
    os.unlink(tmp_path / "sums" / "train.partial" / "sums.npy")
    with pytest.raises(errors.UserError, match="older version: delete it"):
        sidecar.Writer(str(tmp_path / "sums"), sidecar_child.METADATA, 3)


def test_the_lock_that_waited_is_the_lock_that_is_seen(tmp_path):
    path, inside, most = str(tmp_path / "lock"), [], []

    def enter():
        for _ in range(30):
            with sidecar_lock.exclusive(path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120 and max(most) == 1 and not os.path.exists(path)
