"""The norms of the Gemma mixture: plain, and adaptive to a condition (pi0.5's flow time)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qdepth_jax.models import layout


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (1 + scale), in f32. [..., D] -> f32 [..., D]."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * (1.0 + scale).reshape((1,) * (x.ndim - 1) + (-1,))


class AdaptiveNorm(nn.Module):
    """(normed x) * (1 + scale) + shift, with scale, shift and a gate from the condition by one dense layer.

    The dense layer starts at zero, so that a fresh expert adds nothing to its stream (pi0.5, after DiT's adaLN-Zero).
    """

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[Array, Array]:
        """[B, T, D], condition [B, D] -> f32 [B, T, D] and the gate `dtype` [B, 1, D]."""
        width, zeros = x.shape[-1], nn.initializers.zeros
        dot = layout.gathered_dot(layout.FSDP, None)
        dense = nn.Dense(3 * width, dtype=self.dtype, kernel_init=zeros, dot_general=dot, name="Dense_0")
        scale, shift, gate = jnp.split(dense(condition)[:, None], 3, axis=-1)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * (1.0 + scale.astype(jnp.float32)) + shift.astype(jnp.float32), gate


def normed(norm: nn.Module, x: Array, condition: Array | None, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """Normed x [B, T, D] in `dtype`, and the gate of an adaptive norm [B, 1, D] or None."""
    if condition is None:
        return norm(x).astype(dtype), None
    normed, gate = norm(x, condition)
    return normed.astype(dtype), gate
