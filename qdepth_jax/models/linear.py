"""Dense layers of the parts that are trained from scratch, and the initialiser of every parameter.

open-pi-zero leaves every layer that PaliGemma does not provide at PyTorch's default, weight and bias uniform in
+-1/sqrt(fan_in); so do we.

Axis letters: B batch, T tokens, D width, M any leading axes folded into one.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qdepth_jax.models import layout


def uniform(bound: float) -> Callable[..., Array]:
    """Initialiser: f32, uniform in +-bound.

    Element i is a hash of (key, i). JAX's own generator costs 0.7 s of XLA:CPU compilation for each parameter (33 s for
    a model of any size); this costs 0.04 s, and an element depends on neither shape nor sharding.
    """

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        index, stride = jnp.zeros(shape, jnp.uint32), 1
        for axis in reversed(range(len(shape))):
            index += jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * jnp.uint32(stride % 2**32)
            stride *= shape[axis]
        bits = _mix(_mix(index ^ key[0]) ^ key[-1])
        unit = (bits >> 8).astype(dtype) * 2.0**-24  # [0, 1)
        return (2.0 * unit - 1.0) * bound

    return init


def normal_like(stddev: float) -> Callable[..., Array]:
    """Initialiser: f32 with this standard deviation (uniform; the shape of an initial distribution hardly matters)."""
    return uniform(3.0**0.5 * stddev)


def fan_in_uniform(fan_in: int, scale: float = 1.0) -> Callable[..., Array]:
    """Initialiser: f32, uniform in +-scale/sqrt(fan_in)."""
    return uniform(scale / fan_in**0.5)


def xavier_uniform(fan_in: int, fan_out: int) -> Callable[..., Array]:
    """Initialiser: f32, uniform in +-sqrt(6 / (fan_in + fan_out))."""
    return uniform((6.0 / (fan_in + fan_out)) ** 0.5)


def _mix(x: Array) -> Array:
    """Integer hash u32 -> u32 in which every input bit flips every output bit with probability near 1/2 (lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def fold(x: Array) -> Array:
    """[..., D] -> [M, D]. A dense layer on [M, D] is one 2-D dot forward and backward (1.5x faster on XLA:CPU)."""
    return x.reshape(-1, x.shape[-1])


class Linear(nn.Module):
    """x @ kernel + bias. x [..., D] -> `dtype` [..., features]; f32 kernel [D, features], bias [features]."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = fan_in_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        y = fold(x).astype(self.dtype) @ layout.gather(kernel.astype(self.dtype)) + bias.astype(self.dtype)[None]
        return layout.pin(y.reshape(*x.shape[:-1], self.features))
