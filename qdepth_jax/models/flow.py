"""Conditional flow matching as in open-pi-zero: t = 0 is noise, t = 1 is data.

Pure functions. Randomness comes from one key per example, so that it depends on no batch size, device or host.

Axis letters: B batch, Z horizon, A action dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qdepth_jax import errors

TIME_SAMPLERS = ("beta", "uniform")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Conventions of training and sampling; stored with every checkpoint.

    Attributes:
      sigma_min: what is left of the noise at t = 1.
      time: `beta` draws z ~ Beta(beta_a, 1) and t = time_max * (1 - z), most mass at the noisy end (mean 0.40);
        `uniform` draws t ~ U(0, 1 - 1e-5).
        DEVIATION: open-pi-zero stratifies `uniform` over the batch, (u + i/B) mod (1 - 1e-5) with one u for all; that
        would make an example's time depend on the batch it lies in. The marginal distribution is the same.
      time_period: longest period of the sinusoidal time embedding is 2 pi times this.
      steps: Euler steps of the sampler.
      clip: final actions are clamped to [-clip, clip].
    """

    sigma_min: float = 0.001
    time: str = "beta"
    beta_a: float = 1.5
    time_max: float = 0.999
    time_period: float = 10_000.0
    steps: int = 10
    clip: float = 1.0

    def __post_init__(self):
        if self.time not in TIME_SAMPLERS:
            raise errors.UserError(f"flow time sampling {self.time!r} is unknown: use one of {TIME_SAMPLERS}")
        if self.steps < 1:
            raise errors.UserError(f"flow steps must be at least 1, got {self.steps}")


def example_keys(key: Array, position: Array) -> Array:
    """One key for each example: the run's key with the global example index u32 [B] folded in. -> keys [B]."""
    return jax.vmap(lambda p: jax.random.fold_in(key, p))(position)


def sample_time(keys: Array, config: FlowConfig) -> Array:
    """keys [B] -> t f32 [B] in [0, 1)."""
    u = jax.vmap(jax.random.uniform)(keys)
    if config.time == "uniform":
        return u * (1.0 - 1e-5)
    # Beta(a, 1) has the distribution function z^a, so its inverse is exact and needs no rejection.
    return config.time_max * (1.0 - u ** (1.0 / config.beta_a))


def sample_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """keys [B] -> standard normal f32 [B, *shape]."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def interpolate(noise: Array, action: Array, t: Array, sigma_min: float) -> Array:
    """x_t = (1 - (1 - sigma) t) noise + t action. noise, action f32 [B, Z, A], t f32 [B] -> f32 [B, Z, A]."""
    t = t[:, None, None]
    return (1.0 - (1.0 - sigma_min) * t) * noise + t * action


def target_velocity(noise: Array, action: Array, sigma_min: float) -> Array:
    """d x_t / dt = action - (1 - sigma) noise. f32 [B, Z, A]."""
    return action - (1.0 - sigma_min) * noise


def loss(velocity: Array, target: Array, valid: Array) -> Array:
    """Squared error, mean over the valid steps of each example, then over the batch.

    The mean is taken per example so that micro-batches of equal size average to the full batch.

    Args:
      velocity, target: [B, Z, A]. valid: bool [B, Z].

    Returns:
      f32 scalar. With all steps valid it is the plain mean.
    """
    error = jnp.mean(jnp.square(velocity.astype(jnp.float32) - target), axis=-1)
    weight = valid.astype(jnp.float32)
    return jnp.mean(jnp.sum(error * weight, axis=-1) / jnp.maximum(jnp.sum(weight, axis=-1), 1.0))


def integrate(velocity: Callable[[Array, Array], Array], noise: Array, config: FlowConfig) -> Array:
    """Forward Euler from t = 0, then the clamp.

    Args:
      velocity: (x f32 [B, Z, A], t f32 [B]) -> [B, Z, A].
      noise: f32 [B, Z, A], x at t = 0.

    Returns:
      f32 [B, Z, A] in [-clip, clip].
    """
    dt = 1.0 / config.steps

    def step(x: Array, i: Array) -> tuple[Array, None]:
        t = jnp.full((x.shape[0],), i * dt, jnp.float32)
        return x + dt * velocity(x, t).astype(jnp.float32), None

    x, _ = jax.lax.scan(step, noise.astype(jnp.float32), jnp.arange(config.steps, dtype=jnp.float32))
    return jnp.clip(x, -config.clip, config.clip)


def time_embedding(t: Array, width: int, period: float) -> Array:
    """[sin(t f), cos(t f)], f_k = period^(-k / (width/2 - 1)), raw t. t f32 [B] -> f32 [B, width]."""
    half = width // 2
    frequencies = (period ** (-np.arange(half) / (half - 1))).astype(np.float32)
    angles = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
