"""Attention with soft-cap and grouped heads, for the vision tower and the mixture, and its backward pass.

The backward pass is written out: autodiff of softmax over tanh recomputes exponentials in several fused loops and takes
twice the time on XLA:CPU. It also states what is kept: the weights and, with a soft-cap, the tanh.

Axis letters: B batch, T query, S key, N heads, K kv heads, H head dim, X = (B, K) folded,
M = (heads of one kv head, T) folded.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

# What a rematerialisation policy may keep of `attend`: its operands and result (stack.REMAT).
NAMES = ("attention_q", "attention_k", "attention_v", "attention_out")


def attend(q: Array, k: Array, v: Array, mask: Array | None, softcap: float = 0.0, query_scale: float = 0.0) -> Array:
    """softmax(cap(q k / sqrt(query_scale))) v, logits and softmax in f32.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H]; head n uses kv head n // (N / K).
      mask: bool [B, T, S], True where visible, or None for full attention. A row without any key averages all values.
      softcap: logits become softcap * tanh(logits / softcap); 0 switches it off.
      query_scale: 0 = H.

    Returns:
      [B, T, N, H] in the dtype of v.
    """
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1:3]
    # Heads join the query axis, so that each kv head is one matrix product (one kv head: [B, N*T, H] x [B, S, H]).
    # Batch and heads are the major parts of their folds: their sharding survives.
    q = (q * (query_scale or h) ** -0.5).transpose(0, 2, 1, 3).reshape(b * kv_heads, -1, h)
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * kv_heads, s, h) for x in (k, v))
    out = _folded(q, k, v, mask, softcap)
    return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _folded(q: Array, k: Array, v: Array, mask: Array | None, softcap: float) -> Array:
    """q [X, M, H], k and v [X, S, H], mask [B, T, S] -> [X, M, H]. Three axes: a fourth doubles the time on XLA:CPU."""
    return _forward(q, k, v, mask, softcap)[0]


def _forward(q, k, v, mask, softcap):
    q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), NAMES))
    logits = jnp.einsum("XMH,XSH->XMS", q, k, preferred_element_type=jnp.float32)
    tanh = jnp.tanh(logits / softcap) if softcap else None
    if softcap:
        logits = softcap * tanh
    logits = _where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = checkpoint_name(jnp.einsum("XMS,XSH->XMH", weights, v), NAMES[-1])
    return out, (q, k, v, mask, tanh, weights, out)


def _backward(softcap, kept, g):
    q, k, v, mask, tanh, weights, out = kept
    d_weights = jnp.einsum("XMH,XSH->XMS", g, v, preferred_element_type=jnp.float32)
    # sum_s weights d_weights = g . out: the softmax's own correction, without another pass over S.
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_logits = weights.astype(jnp.float32) * (d_weights - inner)
    if softcap:
        d_logits = d_logits * (1.0 - tanh * tanh)
    # Only matters for a row without any key: its weights are not zero.
    d_logits = _where(mask, d_logits, 0.0).astype(q.dtype)
    d_q = jnp.einsum("XMS,XSH->XMH", d_logits, k)
    d_k = jnp.einsum("XMS,XMH->XSH", d_logits, q)
    d_v = jnp.einsum("XMS,XMH->XSH", weights, g.astype(v.dtype))
    return d_q, d_k, d_v, None


def _where(mask: Array | None, x: Array, fill: float) -> Array:
    """x f32 [X, M, S] where mask [B, T, S] is True, which holds for all heads; fill elsewhere."""
    if mask is None:
        return x
    b, t, s = mask.shape
    return jnp.where(mask[:, None], x.reshape(b, -1, t, s), fill).reshape(x.shape)


_folded.defvjp(_forward, _backward)
