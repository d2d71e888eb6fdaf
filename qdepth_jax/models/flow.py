"""Conditional flow matching. Which end of the time axis is noise is a field: 0 in open-pi-zero, 1 in openpi's pi0.

Pure functions. Randomness comes from one key per example, so that it depends on no batch size, device or host.

Axis letters: B batch, Z horizon, A action dim.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from qdepth_jax import errors

TIME_SAMPLERS = ("beta", "uniform")

Velocity = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Conventions of training and sampling; stored with every checkpoint.

    Attributes:
      noise_at: the flow time that is noise, 0 or 1; the other end is data.
      sigma_min: what is left of the noise at the data end.
      time: `beta` draws z ~ Beta(beta_a, 1) and t = time_max * (1 - z), most mass at the noisy end (mean 0.40);
        `uniform` draws t ~ U(0, 1 - 1e-5). Both are distances from the noise: with noise_at = 1 they are 1 - t, which
        for `beta` is pi0's t ~ 0.001 + 0.999 Beta(1.5, 1).
        DEVIATION: open-pi-zero stratifies `uniform` over the batch, (u + i/B) mod (1 - 1e-5) with one u for all; that
        would make an example's time depend on the batch it lies in. The marginal distribution is the same.
      time_shortest, time_period: shortest period of the sinusoidal time embedding, and the longest as a multiple of it.
      steps: of the sampler.
      clip: final actions are clamped to [-clip, clip]; 0 = no clamp.
    """

    noise_at: int = 0
    sigma_min: float = 0.001
    time: str = "beta"
    beta_a: float = 1.5
    time_max: float = 0.999
    time_shortest: float = 2 * math.pi
    time_period: float = 10_000.0
    steps: int = 10
    clip: float = 1.0

    def __post_init__(self):
        if self.time not in TIME_SAMPLERS:
            raise errors.UserError(f"flow time sampling {self.time!r} is unknown: use one of {TIME_SAMPLERS}")
        if self.noise_at not in (0, 1):
            raise errors.UserError(f"flow noise_at={self.noise_at} must be 0 (open-pi-zero) or 1 (pi0)")
        if self.steps < 1:
            raise errors.UserError(f"flow steps must be at least 1, got {self.steps}")


def example_keys(key: Array, position: Array) -> Array:
    """One key for each example: the run's key with the global example index u32 [B] folded in. -> keys [B]."""
    return jax.vmap(lambda p: jax.random.fold_in(key, p))(position)


def sample_time(keys: Array, config: FlowConfig) -> Array:
    """keys [B] -> t f32 [B] in [0, 1), or in (0, 1] where the noise is at 1."""
    u = jax.vmap(jax.random.uniform)(keys)
    if config.time == "uniform":
        return _turned(u * (1.0 - 1e-5), config)
    # Beta(a, 1) has the distribution function z^a, so its inverse is exact and needs no rejection.
    return _turned(config.time_max * (1.0 - u ** (1.0 / config.beta_a)), config)


def sample_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """keys [B] -> standard normal f32 [B, *shape]."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def interpolate(noise: Array, action: Array, t: Array, config: FlowConfig) -> Array:
    """x_t = (1 - (1 - sigma) s) noise + s action, s = |t - noise_at|.

    noise, action f32 [B, Z, A], t f32 [B] -> f32 [B, Z, A].
    """
    s = _turned(t, config)[:, None, None]
    return (1.0 - (1.0 - config.sigma_min) * s) * noise + s * action


def target_velocity(noise: Array, action: Array, config: FlowConfig) -> Array:
    """d x_t / dt = action - (1 - sigma) noise, or the negative of it where the noise is at 1. f32 [B, Z, A]."""
    return _direction(config) * (action - (1.0 - config.sigma_min) * noise)


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


def _euler(velocity: Callable, x: Array, t: Array, dt: float) -> Array:
    return velocity(x, t)


def _midpoint(velocity: Callable, x: Array, t: Array, dt: float) -> Array:
    return velocity(x + 0.5 * dt * velocity(x, t), t + 0.5 * dt)


def _heun(velocity: Callable, x: Array, t: Array, dt: float) -> Array:
    first = velocity(x, t)
    return 0.5 * (first + velocity(x + dt * first, t + dt))


# Name -> (mean velocity over a step, evaluations of the network in a step). Heun's last one lies at the data end.
SOLVERS = {"euler": (_euler, 1), "midpoint": (_midpoint, 2), "heun": (_heun, 2)}


def check_solver(name: str) -> None:
    """Raises UserError for an unknown solver."""
    if name not in SOLVERS:
        raise errors.UserError(f"flow solver {name!r} is unknown: use one of {sorted(SOLVERS)}")


def integrate(velocity: Velocity, noise: Array, config: FlowConfig, solver: str = "euler") -> Array:
    """From the noise to the data in `config.steps` steps, then the clamp.

    Args:
      velocity: (x f32 [B, Z, A], t f32 [B]) -> [B, Z, A].
      noise: f32 [B, Z, A], x at t = noise_at.
      solver: a name of SOLVERS; both originals use forward Euler.

    Returns:
      f32 [B, Z, A] in [-clip, clip].
    """
    check_solver(solver)
    dt, slope = _direction(config) / config.steps, SOLVERS[solver][0]

    def at(x: Array, t: Array) -> Array:
        return velocity(x, jnp.full((x.shape[0],), t)).astype(jnp.float32)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        x, t = carry
        # The time is a running sum, as in both originals: pi0's time embedding sees the last digit of it.
        return (x + dt * slope(at, x, t, dt), t + dt), None

    start = (noise.astype(jnp.float32), jnp.float32(config.noise_at))
    (x, _), _ = jax.lax.scan(step, start, length=config.steps)
    return jnp.clip(x, -config.clip, config.clip) if config.clip else x


def _turned(t: Array, config: FlowConfig) -> Array:
    """Flow time to distance from the noise and back."""
    return 1.0 - t if config.noise_at else t


def _direction(config: FlowConfig) -> float:
    return -1.0 if config.noise_at else 1.0


def time_embedding(t: Array, width: int, config: FlowConfig) -> Array:
    """[sin(2 pi t / p), cos(2 pi t / p)], p_k = time_shortest * time_period^(k / (width/2 - 1)). f32 [B] -> [B, width].

    In f32 and in the order of openpi's posemb_sincos: pi0's fastest angle is 1571 t, where the last digit of a period
    moves the sine by 1e-4.
    """
    periods = config.time_shortest * config.time_period ** jnp.linspace(0.0, 1.0, width // 2)
    frequencies = 1.0 / periods * 2 * math.pi
    angles = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
