"""Constraints are really in the program under a mesh, change no value, and scatter gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax import config as config_lib
from qdepth_jax import sharding
from qdepth_jax.models import layout


def mesh(*sizes):
    return sharding.make_mesh(config_lib.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def test_nothing_happens_without_a_mesh():
    text = jax.jit(lambda x, w: layout.pin(x @ layout.gather(w, layout.FSDP))).lower(jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert "sharding_constraint" not in text.as_text()


def test_constraints_are_in_the_lowered_text():
    with jax.set_mesh(mesh(2, 2, 2)):
        pinned = jax.jit(lambda x: layout.pin(x, None, layout.TENSOR)).lower(jnp.ones((8, 3, 4))).as_text()
        assert "sharding_constraint" in pinned and '{"replica", "fsdp"}, {}, {"tensor"}' in pinned
        odd = jax.jit(lambda x: layout.pin(x, None, layout.TENSOR)).lower(jnp.ones((8, 3, 1))).as_text()
        assert '{"replica", "fsdp"}, {}, {}' in odd
        assert "sharding_constraint" not in jax.jit(layout.pin).lower(jnp.ones((3, 4))).as_text()


def test_a_gathered_weight_is_whole_and_its_gradient_is_split():
    def loss(w, x):
        return jnp.sum(jnp.square(layout.pin(x) @ layout.gather(w, layout.FSDP, layout.TENSOR)))

    with jax.set_mesh(mesh(1, 4, 2)):
        text = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 6)), jnp.ones((8, 8))).as_text()
    assert '{}, {"tensor"}' in text
    assert '{"fsdp"}, {"tensor"}' in text


@pytest.mark.parametrize("axes", [(), (layout.FSDP, layout.TENSOR)])
def test_values_and_gradients_stay(axes):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(8, 6)).astype(np.float32), rng.normal(size=(8, 8)).astype(np.float32)
    run = jax.value_and_grad(lambda w, x: jnp.sum(jnp.tanh(layout.pin(x @ layout.gather(w, *axes)))))
    plain = jax.jit(run)(w, x)
    with jax.set_mesh(mesh(2, 2, 2)):
        split = jax.jit(run)(w, x)
    for a, b in zip(plain, split):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
