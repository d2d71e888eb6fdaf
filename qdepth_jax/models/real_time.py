"""Real-time chunking: a new action chunk that continues the one which the robot is still executing.

While the network computes, the robot goes on with the old chunk. Its first actions are therefore decided already and
frozen; those after them are still open, but should not be left for another plan (Black et al. 2025, "Real-Time
Execution of Action Chunking Flow Policies", arXiv 2506.07339). Both variants change the velocity of the flow alone:

  inpaint  the predicted chunk is mixed with the old one, action by action
  guided   the paper's: a step against the squared distance to the old chunk, through the network's Jacobian (its eq. 2
           to 4, after Pokle et al. 2023). It costs a backward pass through the action stream at every step.

DEVIATION: the paper only guides its frozen actions too; here they come out exactly, because they are executed anyway.

Axis letters: B batch, Z horizon, A action dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import flow, objective, policy, sampling

VARIANTS = ("inpaint", "guided")
MAX_GUIDANCE = 5.0  # the paper's beta: with few steps, stronger guidance makes actions oscillate


def soft_weights(frozen: int, known: int, horizon: int) -> np.ndarray:
    """How much the old chunk binds each action of the new one (eq. 5 of the paper).

    Args:
      frozen: actions that will have been executed when the new chunk arrives. known: actions left of the old chunk.

    Returns:
      f32 [horizon]: 1 for the frozen, falling towards 0 up to `known`, 0 behind.
    """
    if not 0 <= frozen <= known <= horizon:
        raise errors.UserError(f"need 0 <= frozen <= known <= horizon, got {frozen}, {known}, {horizon}")
    at = np.arange(horizon)
    c = (known - at) / (known - frozen + 1)
    falling = c * np.expm1(c) / np.expm1(1.0)
    return np.where(at < frozen, 1.0, np.where(at < known, falling, 0.0)).astype(np.float32)


def sample_actions(
    config: policy.PolicyConfig,
    params,
    state,
    batch: objective.Batch,
    noise: Array,
    previous: Array,
    weights: Array,
    variant: str = "inpaint",
    solver: str = "euler",
) -> Array:
    """`sampling.sample_actions`, continuing an old chunk.

    Args:
      batch: images, text, proprio. noise: f32 [B, Z, A].
      previous, weights, variant, solver: see `continue_chunk`.

    Returns:
      f32 [B, Z, robot_action_dim], normalised actions.
    """
    del state  # as in sampling.sample_actions
    check_solver(variant, solver)
    velocity = sampling.run_prefix(config, params, batch).velocity
    return continue_chunk(config, velocity, noise, previous, weights, variant, solver)


def continue_chunk(
    config: policy.PolicyConfig,
    plain: flow.Velocity,
    noise: Array,
    previous: Array,
    weights: Array,
    variant: str = "inpaint",
    solver: str = "euler",
) -> Array:
    """Integrates the flow of `sampling.run_prefix` towards an old chunk.

    Args:
      noise: f32 [B, Z, A].
      previous: f32 [B, Z, robot_action_dim], what is left of the old chunk, normalised, from now on; zeros behind.
      weights: f32 [B, Z] in [0, 1], see `soft_weights`. Where 1, the action is `previous` to the bit; an example
        whose weights are all 0 is sampled as if there were no old chunk.
      solver: of flow.SOLVERS.

    Raises:
      UserError: an unknown variant, or a solver that asks for the velocity at the data, where the pull is infinite.
    """
    check_solver(variant, solver)
    used = config.robot_action_dim
    # Numbers that only fill an action up are zeros in training, so they are known as well.
    old = jnp.pad(previous.astype(jnp.float32), ((0, 0), (0, 0), (0, config.action_dim - used)))
    chunk = flow.integrate(continued(plain, old, weights, config.flow, variant), noise, config.flow, solver)
    return jnp.where(weights[..., None] >= 1.0, old, chunk)[..., :used]


def check_solver(variant: str, solver: str) -> None:
    """Raises UserError for an unknown variant or a solver that cannot continue a chunk, see `continue_chunk`."""
    if variant not in VARIANTS:
        raise errors.UserError(f"real-time chunking {variant!r} is unknown: use one of {VARIANTS}")
    if solver == "heun":
        raise errors.UserError(
            "real-time chunking divides by the distance from the data, and heun's last evaluation lies there: use "
            "euler or midpoint, or no real-time chunking"
        )


def continued(plain: flow.Velocity, old: Array, weights: Array, config: flow.FlowConfig, variant: str) -> flow.Velocity:
    """The velocity that leads to a chunk near `old` f32 [B, Z, A], as far as `weights` f32 [B, Z] bind it."""
    direction = -1.0 if config.noise_at else 1.0
    w = weights[..., None]

    def velocity(x: Array, t: Array) -> Array:
        s = (1.0 - t if config.noise_at else t)[:, None, None]  # distance from the noise, 0 to 1 - 1 / steps

        def data(x: Array) -> tuple[Array, Array]:
            v = plain(x, t)
            return x + (1.0 - s) * direction * v, v

        if variant == "inpaint":
            predicted, v = data(x)
            change = w * (old - predicted) / (1.0 - s)
        else:
            predicted, pull, v = jax.vjp(data, x, has_aux=True)
            (gradient,) = pull(w * (old - predicted))
            # (1 - s) / (s r^2) with r^2 = (1 - s)^2 / (s^2 + (1 - s)^2); infinite at the noise, hence the cap.
            strength = (s**2 + (1.0 - s) ** 2) / jnp.maximum(s * (1.0 - s), 1e-6)
            change = jnp.minimum(strength, MAX_GUIDANCE) * gradient
            change = jnp.where(w >= 1.0, (old - predicted) / (1.0 - s), change)
        bound = jnp.any(w > 0.0, axis=1, keepdims=True)
        return jnp.where(bound, v + direction * change, v)

    return velocity
