"""An adapter (qdepth_jax/sim/simulator.py) of a simulator that costs nothing and fails on demand.

The hand stands at x; an action adds its first number; x >= 1 is success. A task's name says what happens at which
start: "crash=3 die=4 stuck=5 bug=6": divergence, a killed process, silence, a mistake. FAKE_SECONDS: of a step.
"""

import os
import pathlib
import signal
import time

import numpy as np

from qdepth_jax.sim import simulator

ROBOT = simulator.Robot("fake", ("main", "wrist"), 2, 3, 10.0, lambda x: x)


def task(task_id: int = 0, name: str = "", cap: int = 40, suite: str = "fake") -> simulator.Task:
    return simulator.Task(suite, task_id, name, f"go {task_id}", cap, 50, __name__)


def list_tasks(suite: str) -> list[simulator.Task]:
    return [task(0, "first", suite=suite), task(1, "second", suite=suite)]


def robot(suite: str) -> simulator.Robot:
    return ROBOT


def versions() -> dict[str, str]:
    return {"fake": "1"}


def make_env(task: simulator.Task, image_size: int, supersample: int) -> "Env":
    return Env(task, image_size)


class Env:
    def __init__(self, task: simulator.Task, image_size: int):
        self._task, self._size = task, image_size
        self._faults = dict(part.split("=", 1) for part in task.name.split() if "=" in part)
        if "pids" in self._faults:
            (pathlib.Path(self._faults["pids"]) / str(os.getpid())).touch()

    def reset(self, start: simulator.Start) -> None:
        self._start, self._x, self._opening = start.number, 0.0 if start.seed is None else start.seed / 1000, 1.0

    def instruction(self) -> str:
        return self._task.instruction

    def state(self) -> np.ndarray:
        return np.asarray([self._x, self._start], np.float32)

    def opening(self) -> float:
        return self._opening

    def pictures(self, views) -> dict[str, np.ndarray]:
        grey = np.full((self._size, self._size, 3), int(255 * min(self._x, 1)) % 256, np.uint8)
        return {view: grey[..., 0] / 255.0 if view == "depth" else grey for view in views}

    def convert(self, chunk: np.ndarray) -> np.ndarray:
        return chunk

    def step(self, action: np.ndarray) -> bool:
        here = str(self._start)
        if self._x > 0.2 and self._faults.get("crash") == here:
            raise simulator.SimulatorFailure("diverged")
        if self._x > 0.2 and self._faults.get("die") == here:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._faults.get("bug") == here:
            self.no_such_thing()
        if self._faults.get("stuck") == here:
            time.sleep(3600)
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
        self._x += float(action[0])
        self._opening = 0.9 * self._opening
        return self._x >= 1.0

    def expert(self):
        """Gives up in the starts from 40 on."""
        return lambda: None if self._start >= 40 else np.asarray([0.11, 0, 1], np.float32)

    def close(self) -> None:
        pass
