"""Blocks of attempts; the simulator is left out."""

import multiprocessing

from qdepth_jax.sim import collection, demos


class Env:
    def close(self):
        pass


def plan(episodes):
    return collection.Plan("libero_object", (0,), episodes, 0, 10, 1000, None, demos.Encoding())


def attempts(monkeypatch, tmp_path, alive):
    made = []

    class Parent:
        def is_alive(self):
            return alive(made)

    def attempt(plan, env, work, task, number):
        made.append(number)
        return collection.Attempt(number, plan.seed + number, demos.SUCCESS, 1)

    monkeypatch.setattr(multiprocessing, "parent_process", Parent)
    monkeypatch.setattr(collection, "make_env", lambda plan, task: (Env(), ""))
    monkeypatch.setattr(collection, "run_attempt", attempt)
    assert collection.run_block(plan(5), str(tmp_path), 0, range(10)) == ""
    return made


def test_a_block_ends_with_the_episodes_wanted(monkeypatch, tmp_path):
    assert attempts(monkeypatch, tmp_path, lambda made: True) == [0, 1, 2, 3, 4]


def test_a_block_does_not_outlive_the_command(monkeypatch, tmp_path):
    assert attempts(monkeypatch, tmp_path, lambda made: len(made) < 2) == [0, 1]
