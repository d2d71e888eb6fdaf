"""Policies that closed-loop evaluation can run: a trained one, and those it has to be compared with.

A policy is asked for many episodes at once; what it answers for one must not depend on the others (evaluation promises
equal results for any number of processes). Its actions are in the simulator's own convention.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import demos, simulator


@dataclasses.dataclass(frozen=True)
class Query:
    """One episode that waits for actions.

    Attributes:
      start: number of its start. plan: how often it was planned for before, 0 at first.
      step: control steps executed so far. wanted: actions that will be executed of the answer.
      instruction: what the robot is told now.
      pictures: view -> u8 [H, W, 3] of the policy's views. state: f32 [state_dim].
    """

    task: simulator.Task
    start: int
    plan: int
    step: int
    wanted: int
    instruction: str
    pictures: dict[str, np.ndarray]
    state: np.ndarray


@dataclasses.dataclass(frozen=True)
class Policy:
    """Attributes:
    identity: JSON that says which policy this is: two with equal identities act alike. Results carry it.
    plan: at most `batch` queries -> actions f32 [k, action_dim] for each, in the simulator's convention; fewer than
      wanted = the policy ends that episode there.
    robot: whose tasks it can be given; None = any.
    views: pictures it needs; () = none is rendered.
    horizon: actions of a chunk, 0 = as many as are wanted.
    depth: at most `batch` queries -> f32 [n, R, R], the depth that it believes in; None = it has none.
    depth_label: what that is, with its unit: "predicted t+16, m" is the depth 16 frames later, t+? = not recorded.
    inside: the scripted expert acts inside of the simulator's process; `plan` is never called.
    """

    identity: dict[str, Any]
    plan: Callable[[Sequence[Query]], Sequence[np.ndarray]]
    robot: str | None = None
    views: tuple[str, ...] = ()
    batch: int = 1
    horizon: int = 0
    depth: Callable[[Sequence[Query]], np.ndarray] | None = None
    depth_label: str = ""
    inside: bool = False


def trained(
    planner: Any, robot: simulator.Robot, batch: int = 4, seed: int = 0, weights_seed: int | None = None
) -> Policy:
    """A loaded policy (planner.load) on a robot.

    Args:
      batch: rows of the one compiled program, however many episodes wait: part of the identity, because a program for
        4 rounds otherwise than one for 1.
      seed: of the flow noise, which depends on (seed, task, start, plan) alone.
      weights_seed: that of `untrained_weights` where the planner has them: results do not call such a policy trained.

    Raises:
      UserError: it was trained for other cameras or dimensions than the robot's.
    """
    import jax

    from qdepth_jax import planner as planner_lib

    check(planner, robot)
    if batch < 1:
        raise errors.UserError(f"a batch of {batch} rows: at least 1 is needed")

    def rows(queries: Sequence[Query]) -> list[Any]:
        return [
            planner_lib.make_row(planner, q.pictures, q.state, q.instruction, noise_seed(seed, q), q.plan)
            for q in queries
        ]

    def plan(queries: Sequence[Query]) -> list[np.ndarray]:
        return [robot.to_simulator(chunk) for chunk in planner_lib.plan(planner, rows(queries), batch)]

    def depth(queries: Sequence[Query]) -> np.ndarray:
        return planner_lib.predict_depth(planner, rows(queries), batch)

    says_depth = planner.config.depth is not None and (planner.config.depth.head == "pixels" or planner.decoder)
    label = ""
    if says_depth:
        found = planner.decoder[0].range if planner.decoder else planner.config.depth.range
        when = {0: "", None: " t+?"}.get(ahead := planner.found.depth_ahead, f" t+{ahead}")
        label = f"predicted{when}, {'m' if found.kind == 'metric' else 'relative inverse depth'}"
    return Policy(
        identity={
            **(
                {"policy": "trained"} if weights_seed is None else {"policy": "untrained", "weights_seed": weights_seed}
            ),
            "weights": planner_lib.identity(planner),
            "dataset": planner.dataset,
            "seed": seed,
            "batch": batch,
            "device": jax.default_backend(),
        },
        plan=plan,
        robot=robot.name,
        views=tuple(planner.config.views),
        batch=batch,
        horizon=planner.config.horizon,
        depth=depth if says_depth else None,
        depth_label=label,
    )


def check(planner: Any, robot: simulator.Robot) -> None:
    """Raises UserError if a loaded policy does not fit a robot: says what it was trained for and what the robot has."""
    views = tuple(planner.config.views)
    if unknown := [view for view in views if view not in robot.views]:
        raise errors.UserError(
            f"this policy sees the cameras {', '.join(views)}; {robot.name} has {', '.join(robot.views)}, "
            f"not {', '.join(unknown)}"
        )
    dims = planner.action.statistics.dims, planner.proprio.statistics.dims
    if dims != (robot.action_dim, robot.state_dim) or planner.config.robot_action_dim != robot.action_dim:
        raise errors.UserError(
            f"this policy, with the statistics of {planner.dataset!r}, gives {planner.config.robot_action_dim} action "
            f"numbers ({dims[0]} in the statistics) and reads {dims[1]} of state; {robot.name} takes "
            f"{robot.action_dim} and has {robot.state_dim}"
        )


def noise_seed(seed: int, query: Query) -> int:
    """In [0, 2^32): which noise an episode gets, whoever runs it."""
    return zlib.crc32(f"{seed}/{query.task.suite}/{query.task.task_id}/{query.start}".encode())


def untrained_weights(planner: Any, seed: int, weights: str = "float") -> Any:
    """The planner with fresh random weights of the same architecture, held as asked; the codebook stays."""
    import jax

    from qdepth_jax.models import inference, policy

    fresh = jax.jit(lambda key: policy.init(planner.config, key)["params"])(jax.random.key(seed))
    return planner._replace(variables={**planner.variables, "params": inference.pack(planner.config, fresh, weights)})


def mean_action(planner: Any, robot: simulator.Robot) -> Policy:
    """Repeats the mean of the training actions, whatever it sees."""
    check(planner, robot)
    mean = robot.to_simulator(np.asarray(planner.action.statistics.mean, np.float32)[None])
    identity = {"policy": "mean_action", "dataset": planner.dataset, "action": mean[0].tolist()}
    return Policy(identity, lambda queries: [np.repeat(mean, q.wanted, 0) for q in queries], robot.name, batch=64)


def expert() -> Policy:
    """The scripted expert, with privileged state: LIBERO's is ours (sim/expert.py), Meta-World brings its own."""
    identity = {"policy": "expert", "source": demos.expert_digest()}
    return Policy(identity, lambda queries: [], inside=True)


def replay(actions: dict[tuple[str, int, int], np.ndarray], identity: dict[str, Any], robot: str) -> Policy:
    """Recorded actions f32 [T, A] by (suite, task_id, start), from the first to the last, whatever it sees."""

    def plan(queries: Sequence[Query]) -> list[np.ndarray]:
        found = [(q, actions[q.task.suite, q.task.task_id, q.start]) for q in queries]
        return [recorded[q.step : q.step + q.wanted] for q, recorded in found]

    return Policy({"policy": "replay"} | identity, plan, robot, batch=64)
