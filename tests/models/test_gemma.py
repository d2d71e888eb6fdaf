"""Rotary positions and norm: properties and values by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax.models import gemma, norms


def _rotated(x, position, theta=100.0):
    cos, sin = gemma.rope_table(np.array([position]), x.shape[-1], theta)
    return gemma.apply_rope(x[None, None, None], cos, sin)[0, 0, 0]


def test_rope_pairs_the_halves():
    x = jnp.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    # Pair (0, 3) turns by position * theta^0.
    np.testing.assert_allclose(_rotated(x, 2), [math.cos(2), 0, 0, math.sin(2), 0, 0], atol=1e-6)
    y = jnp.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    a = 2 * 100.0 ** (-2 / 6)
    np.testing.assert_allclose(_rotated(y, 2), [0, -math.sin(a), 0, 0, math.cos(a), 0], atol=1e-6)


def test_rope_keeps_norms_and_depends_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    assert _rotated(q, 0) == pytest.approx(q)
    assert jnp.linalg.norm(_rotated(q, 17)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-6)
    near, far = (_rotated(q, p + 3) @ _rotated(k, p) for p in (1, 41))
    assert near == pytest.approx(float(far), rel=1e-4)
    assert abs(near - _rotated(q, 5) @ _rotated(k, 1)) > 1e-3


def test_rms_norm_multiplies_by_one_plus_scale():
    x = jnp.array([[3.0, 4.0]])
    y = norms.RMSNorm(1e-6).apply({"params": {"scale": jnp.array([0.0, 1.0])}}, x)
    np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-6)
