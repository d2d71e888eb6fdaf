"""Attention against loops, and its written-out backward pass against autodiff."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax.models import attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention_against_loops(kv_heads, softcap):
    rng = np.random.default_rng(0)
    b, t, s, n, h = 2, 3, 5, 4, 6
    q, k, v = (
        rng.normal(size=(b, t, n, h)) * 3,
        rng.normal(size=(b, s, kv_heads, h)) * 3,
        rng.normal(size=(b, s, kv_heads, h)),
    )
    mask = rng.random((b, t, s)) < 0.6
    mask[:, :, 0] = True
    out = attention.attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(mask), softcap)
    for i in range(b):
        for j in range(t):
            for head in range(n):
                kv = head // (n // kv_heads)
                logits = k[i, :, kv] @ q[i, j, head] / math.sqrt(h)
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                p = np.exp(logits) * mask[i, j]
                np.testing.assert_allclose(out[i, j, head], p / p.sum() @ v[i, :, kv], atol=1e-5)


def test_a_row_without_keys_is_finite():
    x = jnp.ones((1, 2, 1, 4))
    out = attention.attend(x, x, x, jnp.zeros((1, 2, 2), bool), 50.0)
    np.testing.assert_allclose(out, 1.0)


def _plain(q, k, v, mask, softcap):
    """The same with autodiff, one head group at a time."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits, axis=-1), v)


@pytest.mark.parametrize("kv_heads, softcap, masked", [(1, 3.0, True), (2, 0.0, True), (4, 3.0, False)])
def test_gradient_is_that_of_autodiff(kv_heads, softcap, masked):
    keys = jax.random.split(jax.random.key(0), 5)
    q = 3 * jax.random.normal(keys[0], (2, 3, 4, 6))
    k, v = (3 * jax.random.normal(key, (2, 5, kv_heads, 6)) for key in keys[1:3])
    # One row sees nothing at all.
    mask = jax.random.bernoulli(keys[3], 0.6, (2, 3, 5)).at[0, 1].set(False) if masked else None
    g = jax.random.normal(keys[4], q.shape)

    def gradient(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(function(*x, mask, softcap) * g), (0, 1, 2)))(q, k, v)

    for ours, theirs in zip(gradient(attention.attend), gradient(_plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        assert np.abs(theirs).max() > 0.1
