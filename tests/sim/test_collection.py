"""Blocks of attempts; the simulator is left out."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import random

import pytest

from qdepth_jax import errors, files
from qdepth_jax.sim import collection, demos


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
        concurrent.futures, "ProcessPoolExecutor", lambda n, context: concurrent.futures.ThreadPoolExecutor(n)
    )
    return numbers


def test_a_block_ends_with_the_episodes_wanted(made, tmp_path):
    assert collection.run_block(plan(5), str(tmp_path), 0, range(10)) == ""
    assert made == [0, 1, 2, 3, 4, 5, 6]


def test_a_block_ends_where_those_before_it_suffice(made, tmp_path):
    for first in (0, 10):
        collection.run_block(plan(9, 30), str(tmp_path), 0, range(first, first + 10))
    assert made == [*range(10), 10, 11, 12]  # seven of the first ten, then 10 and 12


def test_a_block_does_not_outlive_the_command(made, monkeypatch, tmp_path):
    class Parent:
        def is_alive(self):
            return len(made) < 2

    monkeypatch.setattr(multiprocessing, "parent_process", Parent)
    collection.run_block(plan(5), str(tmp_path), 0, range(10))
    assert made == [0, 1]


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
    with pytest.raises(errors.UserError, match=r"'mujoco': '3'.*'mujoco': '4'.*another --work_dir"):
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
