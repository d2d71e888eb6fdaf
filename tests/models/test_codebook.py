"""Quantisers against brute force, and the cure for collapse shown on a case that collapses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax.models import codebook


def test_nearest_is_brute_force():
    rng = np.random.default_rng(0)
    z, codes = rng.normal(size=(3, 50, 7)).astype(np.float32), rng.normal(size=(11, 7)).astype(np.float32)
    brute = np.argmin(((z[..., None, :] - codes) ** 2).sum(-1), axis=-1)
    np.testing.assert_array_equal(codebook.nearest(z, codes), brute)
    distance = np.asarray(codebook.squared_distances(z, codes))
    np.testing.assert_allclose(distance, ((z[..., None, :] - codes) ** 2).sum(-1), atol=1e-4)


def test_ema_update_is_the_running_mean():
    z = jnp.asarray([[1.0], [3.0], [10.0], [10.0]])
    state = {
        "codebook": jnp.asarray([[0.0], [9.0]]),
        "count": jnp.asarray([4.0, 4.0]),
        "sum": jnp.asarray([[0.0], [36.0]]),
        "updates": jnp.asarray(5),
    }
    out = codebook.ema_update(state, z, jnp.asarray([0, 0, 1, 1]), jax.random.key(0), decay=0.5)
    np.testing.assert_allclose(out["count"], [3.0, 3.0])
    np.testing.assert_allclose(out["sum"], [[2.0], [28.0]])
    np.testing.assert_allclose(out["codebook"], [[2 / 3], [28 / 3]], rtol=1e-6)
    assert int(out["updates"]) == 6


def test_start_from_data_happens_once():
    z = jax.random.normal(jax.random.key(0), (64, 3))
    empty = codebook.init_state(8, 3)
    started = codebook.start_from_data(empty, z, jax.random.key(1))
    rows = np.asarray(z)
    for code in np.asarray(started["codebook"]):
        assert (np.abs(rows - code).sum(1) == 0).any(), "a starting code must be a feature of the batch"
    later = started | {"updates": jnp.asarray(1)}
    again = codebook.start_from_data(later, z + 100.0, jax.random.key(2))
    np.testing.assert_array_equal(again["codebook"], started["codebook"])


def test_dead_codes_are_revived_where_plain_nearest_assignment_leaves_them_dead():
    """All codes but one start far from the data: without revival they would never be chosen again."""
    z = jax.random.normal(jax.random.key(0), (512, 4))
    far = jnp.full((15, 4), 1000.0)
    codes = jnp.concatenate([jnp.zeros((1, 4)), far])
    state = {"codebook": codes, "count": jnp.full(16, 32.0), "sum": codes * 32.0, "updates": jnp.asarray(1)}
    assert codebook.usage(codebook.nearest(z, codes), 16)[0] == 1
    for i in range(400):
        index = codebook.nearest(z, state["codebook"])
        state = codebook.ema_update(state, z, index, jax.random.key(i), decay=0.9)
    used, perplexity = codebook.usage(codebook.nearest(z, state["codebook"]), 16)
    assert used == 16 and perplexity > 8


@pytest.mark.parametrize("num_codes", [64, 256])
def test_fsq_index_names_the_code_it_quantises_to(num_codes):
    levels = codebook.fsq_levels(num_codes)
    table = codebook.fsq_codebook(levels)
    assert table.shape == (num_codes, len(levels))
    z = jax.random.normal(jax.random.key(0), (200, len(levels))) * 2
    quantised, index = codebook.fsq_quantise(z, levels)
    np.testing.assert_allclose(table[index], quantised, atol=1e-6)
    assert len(np.unique(np.asarray(table), axis=0)) == num_codes


def test_straight_through_passes_value_and_gradient():
    value, grad = jax.value_and_grad(lambda z: codebook.straight_through(z, 5.0) * 3.0)(1.0)
    assert (value, grad) == (15.0, 3.0)


def test_usage_counts():
    used, perplexity = codebook.usage(jnp.asarray([0, 0, 1, 1]), 8)
    assert used == 2 and abs(perplexity - 2.0) < 1e-5


def test_spherical_update_is_the_direction_of_the_mean():
    z = codebook.on_sphere(jax.random.normal(jax.random.key(0), (40, 6)) + 1.0)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), np.sqrt(6), rtol=1e-5)
    state = codebook.start_from_data(codebook.init_state(4, 6), z, jax.random.key(1))
    index = codebook.nearest(z, state["codebook"])
    out = codebook.ema_update(state, z, index, jax.random.key(2), decay=0.0, spherical=True)
    for k in range(4):
        mean = np.asarray(z)[np.asarray(index) == k].mean(axis=0)
        np.testing.assert_allclose(out["codebook"][k], np.sqrt(6) * mean / np.linalg.norm(mean), rtol=1e-4)


def test_the_gradient_onto_the_sphere_is_finite_at_the_origin():
    grad = jax.grad(lambda z: codebook.on_sphere(z)[0])(jnp.zeros(3))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_tokens_without_depth_change_nothing(spherical):
    """The same statistics, start and revivals as if only the others were there."""
    z = jax.random.normal(jax.random.key(0), (40, 4))
    kept = jnp.arange(40) % 3 > 0
    mixed = jnp.where(kept[:, None], z, 1e3)
    alone = z[np.flatnonzero(kept)]
    every = jnp.ones(len(alone), bool)
    states = []
    for features, mask in ((mixed, kept), (alone, every)):
        state = codebook.start_from_data(codebook.init_state(8, 4), features, jax.random.key(1), mask)
        for i in range(3):
            index = jnp.where(features[:, 0] > 0, 0, 1)  # six of eight codes die
            key = jax.random.key(2 + i)
            state = codebook.ema_update(state, features, index, key, 0.5, spherical, 0.25, mask)
        states.append(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *states)
    index = codebook.nearest(mixed, states[0]["codebook"])
    assert codebook.usage(index, 8, kept)[0] == codebook.usage(index[np.flatnonzero(kept)], 8)[0]


def test_a_batch_without_depth_leaves_the_codebook_alone():
    z, nothing = jax.random.normal(jax.random.key(0), (6, 4)), jnp.zeros(6, bool)
    empty = codebook.init_state(8, 4)
    state = codebook.start_from_data(empty, z, jax.random.key(1), nothing)
    state = codebook.ema_update(state, z, jnp.zeros(6, jnp.int32), jax.random.key(2), 0.9, kept=nothing)
    jax.tree.map(np.testing.assert_array_equal, state, empty)
