"""Vector quantisation: nearest code, and the four ways a codebook is learnt.

  ema    codes are running means of the features assigned to them; started from data, dead codes revived (the default:
         the plain objective collapsed to 6 of 256 codes on robot depth in an independent re-implementation, and EMA
         with data start and revival reached 250 of 256)
  l2     features and codes lie on a sphere, so that the nearest code is the one of the largest cosine (ViT-VQGAN, Yu et
         al. 2021); learnt like `ema`, the mean pulled back to the sphere, as spherical k-means does
  plain  codes are parameters, moved by the codebook term of the VQ-VAE loss (QDepth-VLA eq. 2; van den Oord 2017)
  fsq    finite scalar quantisation: an implicit grid, nothing to learn (Mentzer et al. 2023)

Tokens that stand for no depth teach nothing: every statistic is over the `kept` ones alone.

Axes: N features (batch x tokens), C codes, D code dim. Statistics are sums over the global batch: under jit with a
sharded batch they are global by construction. All arithmetic is float32.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from qdepth_jax import errors

KINDS = ("ema", "l2", "plain", "fsq")
# Kinds whose codes are running means in the model state: they start from data, at a step of their own.
RUNNING = ("ema", "l2")

# A revived code starts at so many times the count below which it would be dead again: about ln(4)/(1-decay) steps to
# find features.
REVIVED = 4.0


def squared_distances(z: Array, codes: Array) -> Array:
    """||z_n - c_k||^2, f32 [..., N, C] from z [..., N, D] and codes [C, D]; expanded as one matrix product."""
    z, codes = z.astype(jnp.float32), codes.astype(jnp.float32)
    cross = jnp.einsum("...nd,cd->...nc", z, codes)
    z_norm = jnp.sum(z * z, axis=-1, keepdims=True)
    code_norm = jnp.sum(codes * codes, axis=-1)
    return z_norm - 2.0 * cross + jnp.broadcast_to(code_norm, cross.shape)


def nearest(z: Array, codes: Array) -> Array:
    """Index of the nearest code, i32 [..., N] (QDepth-VLA eq. 1)."""
    return jnp.argmin(squared_distances(z, codes), axis=-1).astype(jnp.int32)


def on_sphere(x: Array) -> Array:
    """x [..., D] at length sqrt(D): unit mean square, the scale that the decoder gets from the other kinds too."""
    x = x.astype(jnp.float32)
    # Not x / norm(x): its gradient is not finite at 0.
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)


def init_state(num_codes: int, code_dim: int) -> dict[str, Array]:
    """Codebook state of a running mean, before it has seen data (`updates` = 0)."""
    return {
        "codebook": jnp.zeros((num_codes, code_dim), jnp.float32),
        "count": jnp.zeros((num_codes,), jnp.float32),
        "sum": jnp.zeros((num_codes, code_dim), jnp.float32),
        "updates": jnp.zeros((), jnp.int32),
    }


def start_from_data(state: dict[str, Array], z: Array, key: Array, kept: Array | None = None) -> dict[str, Array]:
    """On the very first update, replace the empty codebook by C features drawn from the batch; later a no-op.

    Args:
      state: see `init_state`.
      z: f32 [N, D] encoder features of the global batch.
      key: random key of this step.
      kept: bool [N], features that may be drawn; None = all. Without any the start waits for another batch.
    """
    num_codes = state["codebook"].shape[0]
    kept = jnp.ones(z.shape[:1], bool) if kept is None else kept
    upto = jnp.cumsum(kept)
    picked = jax.random.randint(key, (num_codes,), 0, jnp.maximum(upto[-1], 1))  # the how-manieth of the kept ones
    drawn = z[jnp.minimum(jnp.searchsorted(upto, picked, side="right"), z.shape[0] - 1)]
    fresh = (state["updates"] == 0) & (upto[-1] > 0)
    share = upto[-1] / num_codes
    count = jnp.where(fresh, share, state["count"])
    return state | {
        "codebook": jnp.where(fresh, drawn, state["codebook"]),
        "count": count,
        "sum": jnp.where(fresh, drawn * share, state["sum"]),
    }


def ema_update(
    state: dict[str, Array],
    z: Array,
    index: Array,
    key: Array,
    decay: float,
    spherical: bool = False,
    dead_share: float = 0.05,
    kept: Array | None = None,
) -> dict[str, Array]:
    """One EMA step of the codes towards their features, then revival of dead codes.

    Args:
      state: see `init_state`, already started from data.
      z: f32 [N, D]; index: i32 [N], the code of each feature.
      key: random key of this step (which features dead codes jump to, see `draw_by_weight`).
      decay: EMA decay, 0.99 in the re-implementation that measured the cure.
      dead_share: a code is dead when its running count is below this share of the count under uniform use.
      spherical: codes are the directions of the means (`l2`); `z` then lies on the sphere.
      kept: bool [N], features that count; None = all.

    Returns:
      The new state. A dead code becomes a badly coded feature. Without any feature that counts, the old one.
    """
    num_codes = state["codebook"].shape[0]
    kept = jnp.ones(index.shape, bool) if kept is None else kept
    assigned = jax.nn.one_hot(index, num_codes, dtype=jnp.float32) * kept[:, None]
    count = decay * state["count"] + (1.0 - decay) * jnp.sum(assigned, axis=0)
    total = decay * state["sum"] + (1.0 - decay) * jnp.einsum("nc,nd->cd", assigned, z)
    uniform = jnp.sum(kept) / num_codes
    dead = count < dead_share * uniform
    revived_count = REVIVED * dead_share * uniform
    count = jnp.where(dead, revived_count, count)
    error = jnp.sum(jnp.square(z - state["codebook"][index]), axis=-1) * kept
    total = jnp.where(dead[:, None], draw_by_weight(z, error, kept, num_codes, key) * revived_count, total)
    mean = total / jnp.maximum(count, 1e-12)[:, None]
    new = {
        "codebook": on_sphere(mean) if spherical else mean,
        "count": count,
        "sum": total,
        "updates": state["updates"] + 1,
    }
    return jax.tree.map(lambda after, before: jnp.where(jnp.any(kept), after, before), new, state)


def draw_by_weight(z: Array, weight: Array, kept: Array, n: int, key: Array) -> Array:
    """n rows of z [N, D] with probability proportional to weight [N] (where all are 0: uniform over bool `kept`).

    Weighted by squared error it is the seeding rule of k-means++: a revived code goes where the codebook is worst, not
    once more into the crowd (on robot depth most tokens are empty background).
    """
    weight = jnp.where(jnp.sum(weight) > 0, weight, kept.astype(weight.dtype))
    upto = jnp.cumsum(weight)
    picked = jnp.searchsorted(upto, jax.random.uniform(key, (n,)) * upto[-1])
    return z[jnp.minimum(picked, z.shape[0] - 1)]


def straight_through(z: Array, quantised: Array) -> Array:
    """Forward value of `quantised`, gradient of `z`."""
    return z + jax.lax.stop_gradient(quantised - z)


def fsq_levels(num_codes: int) -> tuple[int, ...]:
    """Levels per dimension whose product is `num_codes`: the level sets of the FSQ paper where it names one."""
    published = {256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5)}
    # DEVIATION: (8, 6, 5) holds 240 codes, the paper's nearest to 2^8; we need exactly K so that both heads compare.
    exact = {64: (4, 4, 4), 256: (8, 8, 4), 1024: (16, 8, 8), 4096: (8, 8, 8, 8)}
    if num_codes not in exact:
        raise errors.UserError(
            f"no FSQ level set for {num_codes} codes: use one of {sorted(exact)} ({published} published)"
        )
    return exact[num_codes]


def fsq_codebook(levels: tuple[int, ...]) -> Array:
    """The implicit grid as a codebook, f32 [C, len(levels)], values in [-1, 1], index order = mixed radix."""
    axes = [jnp.linspace(-1.0, 1.0, level, dtype=jnp.float32) for level in levels]
    return jnp.stack([a.reshape(-1) for a in jnp.meshgrid(*axes, indexing="ij")], axis=-1)


def fsq_quantise(z: Array, levels: tuple[int, ...]) -> tuple[Array, Array]:
    """Bound z [..., len(levels)] by tanh and round to the grid: (quantised straight-through, index)."""
    bounded = jnp.tanh(z.astype(jnp.float32))
    steps = jnp.asarray([level - 1 for level in levels], jnp.float32)
    steps = jnp.broadcast_to(steps, bounded.shape)
    digit = jnp.round((bounded + 1.0) * 0.5 * steps)
    radix = jnp.asarray([math.prod(levels[i + 1 :]) for i in range(len(levels))], jnp.int32)
    index = jnp.sum(digit.astype(jnp.int32) * jnp.broadcast_to(radix, digit.shape), axis=-1)
    return straight_through(bounded, digit / steps * 2.0 - 1.0), index


def usage(index: Array, num_codes: int, kept: Array | None = None) -> tuple[Array, Array]:
    """(distinct codes used, perplexity = exp(entropy of use)) of the indices where bool `kept`, f32 scalars."""
    weight = jnp.ones(index.shape, jnp.float32) if kept is None else kept.astype(jnp.float32)
    count = jnp.zeros((num_codes,), jnp.float32).at[index.reshape(-1)].add(weight.reshape(-1))
    p = count / jnp.maximum(jnp.sum(count), 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    return jnp.sum(count > 0).astype(jnp.float32), jnp.exp(entropy)
