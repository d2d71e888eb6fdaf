"""Attention of a few new tokens to a cache and to themselves, as sampling runs it at every flow step.

Joining keys and values would copy the cache in every layer of every step; here the logits are joined, which have a few
rows. No backward pass of its own: only guided real-time chunking differentiates through it, for a handful of rows.

Axis letters: B batch, T query, S cached key, N heads, K kv heads, H head dim, X = (B, K) folded,
M = (heads of one kv head, T) folded.
"""

import jax
import jax.numpy as jnp
from jax import Array


def attend(
    q: Array, k: Array, v: Array, cached_k: Array, cached_v: Array, mask: Array, softcap: float, query_scale: float
) -> Array:
    """`attention.attend` over the cached keys and, behind them, the new ones.

    Args:
      q: [B, T, N, H]. k, v: [B, T, K, H]. cached_k, cached_v: [B, S, K, H].
      mask: bool [B, T, S + T]. softcap, query_scale: as there.

    Returns:
      [B, T, N, H] in the dtype of v.
    """
    b, t, n, h = q.shape
    kv_heads, cached = k.shape[2], cached_k.shape[1]
    q = (q * (query_scale or h) ** -0.5).transpose(0, 2, 1, 3).reshape(b * kv_heads, -1, h)
    k, v, cached_k, cached_v = (
        x.transpose(0, 2, 1, 3).reshape(b * kv_heads, -1, h) for x in (k, v, cached_k, cached_v)
    )
    logits = [jnp.einsum("XMH,XSH->XMS", q, x, preferred_element_type=jnp.float32) for x in (cached_k, k)]
    logits = jnp.concatenate(logits, axis=-1)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, None], logits.reshape(b, n, t, -1), jnp.finfo(jnp.float32).min).reshape(logits.shape)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = [
        jnp.einsum("XMS,XSH->XMH", w, x, preferred_element_type=jnp.float32)
        for w, x in ((weights[..., :cached], cached_v), (weights[..., cached:], v))
    ]
    return (out[0] + out[1]).astype(v.dtype).reshape(b, n, t, h).transpose(0, 2, 1, 3)
