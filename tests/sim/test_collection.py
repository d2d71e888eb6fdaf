"""Blocks of attempts; the simulator is left out."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest

from qdepth_jax import errors, files
from qdepth_jax.sim import collection, demos

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Its workers import it too, so they have the attempt that takes so long.
COMMAND = """
import pathlib, signal, sys, time
from qdepth_jax import command
from qdepth_jax.sim import collection, demos

def attempt(*_):
    print("under way", flush=True)
    time.sleep(600)

def main(argv):
    plan = collection.Plan("libero_object", (0,), 20, 0, 20, 1000, None, demos.Encoding(), {})
    collection.collect(plan, pathlib.Path(argv[1]), processes=2)

collection.make_env, collection.run_attempt = lambda *_: (None, ""), attempt
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without
    command.run(main)
"""


class Env:
    def close(self):
        pass


def plan(episodes, most=10):
    return collection.Plan("libero_object", (0,), episodes, 0, most, 1000, None, demos.Encoding(), {"mujoco": "3"})


@pytest.fixture
def made(monkeypatch):
    """The numbers of the attempts that were made; every third fails. Processes are threads here."""
    numbers = []

    def attempt(plan, env, work, task, number):
        numbers.append(number)
        outcome = demos.FAILED if number % 3 == 2 else demos.SUCCESS
        folder = work / f"task_{task:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        one = collection.Attempt(number, plan.seed + number, outcome, 1)
        files.write_whole(folder / f"{number:05d}.json", json.dumps(dataclasses.asdict(one)))
        return one

    monkeypatch.setattr(collection, "make_env", lambda plan, task: (Env(), ""))
    monkeypatch.setattr(collection, "run_attempt", attempt)
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda n, *_, **__: concurrent.futures.ThreadPoolExecutor(n)
    )
    return numbers


def test_a_block_ends_with_the_episodes_wanted(made, tmp_path):
    assert collection.run_block(plan(5), str(tmp_path), 0, range(10)) == ""
    assert made == [0, 1, 2, 3, 4, 5, 6]


def test_a_block_ends_where_those_before_it_suffice(made, tmp_path):
    for first in (0, 10):
        collection.run_block(plan(9, 30), str(tmp_path), 0, range(first, first + 10))
    assert made == [*range(10), 10, 11, 12]  # seven of the first ten, then 10 and 12


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGKILL, -9, ""), (signal.SIGTERM, -15, ""), (signal.SIGINT, 130, "stopped; the same command")],
)
def test_simulators_do_not_outlive_the_command(tmp_path, number, code, said):
    (tmp_path / "run.py").write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "work")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["under way\n"] * 2
        process.send_signal(number)
        _, errors_said = process.communicate(timeout=60)  # its processes hold these pipes, too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code and said in errors_said and "Traceback" not in errors_said


@pytest.mark.parametrize("wanted", [3, 7, 9, 16])
def test_what_counts_does_not_depend_on_what_was_on_disk(made, tmp_path, wanted):
    """Whichever attempts an interrupted run had finished, in whichever blocks."""
    whole, _ = collection.collect(plan(wanted, 40), tmp_path / "whole", processes=1)
    assert len(collection.accepted(whole[0])) == wanted and whole[0][-1].outcome == demos.SUCCESS
    draw = random.Random(wanted)
    for case in range(10):
        work = tmp_path / str(case)
        collection.check_identity(plan(wanted, 40), work)
        for number in draw.sample(range(40), draw.randrange(1, 30)):
            collection.run_attempt(plan(wanted, 40), None, work, 0, number)
        again, _ = collection.collect(plan(wanted, 40), work, processes=2)
        assert again == whole


def test_the_attempts_of_a_task_are_limited(made, tmp_path):
    found, _ = collection.collect(plan(30, 24), tmp_path, processes=1)
    assert len(found[0]) == 24 and len(collection.accepted(found[0])) == 16 and sorted(made) == list(range(24))


def test_attempts_of_another_simulator_are_not_mixed_in(tmp_path):
    collection.check_identity(plan(3), tmp_path)
    with pytest.raises(
        errors.UserError, match=r"otherwise: made_by.mujoco: '3' there, '4' here\. Choose another --name"
    ):
        collection.check_identity(dataclasses.replace(plan(3), made_by={"mujoco": "4"}), tmp_path)


def test_a_data_set_that_came_from_elsewhere_is_not_written_over(tmp_path):
    """The work folder is that of the name, whatever the version."""
    work, mine, other = (tmp_path / name for name in ("demos/.work/x", "demos/x/2.0.0", "demos/x/1.0.0"))
    work.mkdir(parents=True)
    for directory in (mine, mine):  # once made, it may be made again
        collection.assemble(plan(3), {}, work, directory, 32, "2.0.0")
    other.mkdir()
    collection.check_target(work, other)
    (other / "x-train.tfrecord-00000-of-00001").write_bytes(b"shipped")
    with pytest.raises(
        errors.UserError, match=r"1\.0\.0 is not empty and was not made from the attempts in .*/x: choose"
    ):
        collection.assemble(plan(3), {}, work, other, 32, "1.0.0")
    assert [path.name for path in other.iterdir()] == ["x-train.tfrecord-00000-of-00001"]
    (tmp_path / "demos").rename(tmp_path / "moved")
    collection.check_target(tmp_path / "moved/.work/x", tmp_path / "moved/x/2.0.0")
