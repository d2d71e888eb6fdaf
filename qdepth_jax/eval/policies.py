"""Policies that closed-loop evaluation can run: a trained one, and those it has to be compared with.

A policy is asked for many episodes at once; what it answers for one must not depend on the others (evaluation promises
equal results for any number of processes). Its actions are in the simulator's own convention.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import simulator


@dataclasses.dataclass(frozen=True)
class Query:
    """One episode that waits for actions.

    Attributes:
      start: number of its start. plan: how often it was planned for before, 0 at first.
      pictures: view -> u8 [H, W, 3] of the policy's views. state: f32 [state_dim].
    """

    task: simulator.Task
    start: int
    plan: int
    pictures: dict[str, np.ndarray]
    state: np.ndarray


@dataclasses.dataclass(frozen=True)
class Policy:
    """Attributes:
    identity: JSON that says which policy this is: two with equal identities act alike. Results carry it.
    plan: queries -> actions f32 [k, action_dim] for each, in the simulator's convention; fewer than the steps that are
      executed of a chunk = the policy ends its episode there.
    views: pictures it needs; () = none is rendered.
    batch: most queries of one call.
    depth: queries -> f32 [n, R, R], the depth that it believes in; None = it has none. depth_unit: for labels.
    inside: the scripted expert acts inside of the simulator's process; `plan` is never called.
    """

    identity: dict[str, Any]
    plan: Callable[[Sequence[Query]], Sequence[np.ndarray]]
    views: tuple[str, ...] = ()
    batch: int = 1
    depth: Callable[[Sequence[Query]], np.ndarray] | None = None
    depth_unit: str = ""
    inside: bool = False


def trained(planner: Any, robot: simulator.Robot, batch: int = 4, seed: int = 0) -> Policy:
    """A loaded policy (planner.load) on a robot.

    Args:
      batch: rows of the one compiled program, however many episodes wait: part of the identity, because a program for
        4 rounds otherwise than one for 1.
      seed: of the flow noise, which depends on (seed, task, start, plan) alone.

    Raises:
      UserError: it was trained for other cameras or dimensions than the robot's.
    """
    raise NotImplementedError


def untrained(planner: Any, seed: int) -> Any:
    """The planner with fresh random weights of the same architecture."""
    raise NotImplementedError


def mean_action(planner: Any, robot: simulator.Robot) -> Policy:
    """Repeats the mean of the training actions, whatever it sees."""
    raise NotImplementedError


def expert() -> Policy:
    """The scripted expert, with privileged state."""
    return Policy({"policy": "expert"}, lambda queries: [], inside=True)


def replay(actions: dict[tuple[str, int, int], np.ndarray], identity: dict[str, Any]) -> Policy:
    """Recorded actions f32 [T, A] by (suite, task_id, start), from their first to their last, whatever it sees."""
    raise NotImplementedError
