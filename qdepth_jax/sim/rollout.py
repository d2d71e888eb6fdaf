"""One closed-loop episode in an environment, whoever acts.

Physics runs without cameras; pictures are rendered only when somebody plans, once per executed part of a chunk.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qdepth_jax.sim import simulator


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known when somebody plans.

    Attributes:
      step: control steps executed so far. wanted: actions that will be executed now.
      instruction: what the robot is told. pictures: as Env.pictures gives them. state: f32 [state_dim].
      commands, openings: of the gripper, one number for each step since the last plan.
    """

    step: int
    wanted: int
    instruction: str
    pictures: dict[str, np.ndarray]
    state: np.ndarray
    commands: tuple[float, ...]
    openings: tuple[float, ...]


class Outcome(NamedTuple):
    success: bool
    steps: int
    plans: int


# Of what was seen -> actions, the next one first. They are taken one by one, so that an expert can look before each.
# Fewer than wanted end the episode.
Act = Callable[[Seen], Iterable[np.ndarray]]


def run_episode(
    env: simulator.Env,
    start: simulator.Start,
    act: Act,
    *,
    execute: int,
    cap: int,
    views: Sequence[str] = (),
    to_the_end: bool = False,
    last: Callable[[Seen], None] | None = None,
) -> Outcome:
    """Runs one episode to `cap` steps, to where `act` gives fewer actions than wanted, or to its first success.

    The last not if `to_the_end`: success is then the flag of the last step.

    Args:
      execute: actions executed of every chunk.
      views: pictures that `act` needs ("depth" too); () = nothing is rendered.
      last: is given what is seen at the end, for a video.

    Raises:
      simulator.SimulatorFailure: the episode is a crash.
    """
    env.reset(start)
    steps = plans = 0
    success = ended = False
    commands: list[float] = []
    openings: list[float] = []

    def seen(wanted: int) -> Seen:
        pictures, state = env.pictures(views), env.state()
        found = Seen(steps, wanted, env.instruction(), pictures, state, tuple(commands), tuple(openings))
        commands.clear()
        openings.clear()
        return found

    while steps < cap and not ended and (to_the_end or not success):
        wanted, before = min(execute, cap - steps), steps
        actions = act(seen(wanted))
        plans += 1
        for action in itertools.islice(actions, wanted):
            success = env.step(action)
            steps += 1
            commands.append(float(action[-1]))
            openings.append(env.opening())
            if success and not to_the_end:
                break
        ended = steps - before < wanted
    if last is not None:
        last(seen(0))
    return Outcome(success, steps, plans)


def expert_act(env: simulator.Env) -> Act:
    """Acts as the environment's scripted expert does, which is made when the episode has begun."""
    expert = None

    def act(seen: Seen) -> Iterable[np.ndarray]:
        nonlocal expert
        if seen.step == 0:
            expert = env.expert()
        while (action := expert()) is not None:
            yield action

    return act
