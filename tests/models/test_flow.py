"""Flow matching: the path, its derivative, time sampling, the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.models import flow

KEYS = jax.vmap(lambda p: jax.random.fold_in(jax.random.key(0), p))(jnp.arange(4000))


@pytest.mark.parametrize("noise_at", [0, 1])
def test_velocity_is_the_derivative_of_the_path(noise_at):
    noise, action = jax.random.normal(jax.random.key(0), (2, 1, 4, 3))
    eps, config = 1e-2, flow.FlowConfig(noise_at=noise_at)
    ahead, behind = (flow.interpolate(noise, action, jnp.array([0.4 + e]), config) for e in (eps, -eps))
    np.testing.assert_allclose(
        (ahead - behind) / (2 * eps), flow.target_velocity(noise, action, config), rtol=1e-4, atol=1e-4
    )


def test_ends_of_the_path():
    noise, action = jnp.full((1, 1, 1), 2.0), jnp.full((1, 1, 1), 5.0)
    config = flow.FlowConfig()
    assert flow.interpolate(noise, action, jnp.zeros(1), config).item() == 2.0
    assert flow.interpolate(noise, action, jnp.ones(1), config).item() == pytest.approx(5.0 + 0.001 * 2.0, abs=1e-6)
    # openpi: x_t = t noise + (1 - t) actions, u_t = noise - actions.
    config = flow.FlowConfig(noise_at=1, sigma_min=0.0)
    assert flow.interpolate(noise, action, jnp.full(1, 0.25), config).item() == pytest.approx(0.25 * 2 + 0.75 * 5)
    assert flow.target_velocity(noise, action, config).item() == -3.0


def test_beta_time_has_the_distribution_of_beta():
    t = np.asarray(flow.sample_time(KEYS, flow.FlowConfig()))
    assert t.min() >= 0 and t.max() <= 0.999
    # t = 0.999 (1 - z), z ~ Beta(1.5, 1): P(t > x) = (1 - x / 0.999)^1.5, mean 0.999 * 0.4.
    assert t.mean() == pytest.approx(0.3996, abs=0.012)
    for x in (0.2, 0.5, 0.8):
        assert (t > x).mean() == pytest.approx((1 - x / 0.999) ** 1.5, abs=0.025)


def test_time_of_pi0_has_the_other_direction():
    t = np.asarray(flow.sample_time(KEYS, flow.FlowConfig(noise_at=1)))
    np.testing.assert_allclose(t, 1 - np.asarray(flow.sample_time(KEYS, flow.FlowConfig())), atol=1e-7)
    # openpi: t = 0.001 + 0.999 Beta(1.5, 1), mean 0.001 + 0.999 * 0.6.
    assert t.min() >= 0.001 - 1e-6 and t.max() <= 1 and t.mean() == pytest.approx(0.6004, abs=0.012)


def test_uniform_time():
    t = np.asarray(flow.sample_time(KEYS, flow.FlowConfig(time="uniform")))
    assert t.min() >= 0 and t.max() < 1 and t.mean() == pytest.approx(0.5, abs=0.015)


def test_randomness_belongs_to_the_example():
    key = jax.random.key(3)
    all_keys = flow.example_keys(key, jnp.arange(8, dtype=jnp.uint32))
    some_keys = flow.example_keys(key, jnp.array([5, 2], jnp.uint32))
    noise = flow.sample_noise(all_keys, (4, 7))
    np.testing.assert_array_equal(flow.sample_noise(some_keys, (4, 7)), noise[jnp.array([5, 2])])
    assert noise.std() == pytest.approx(1.0, abs=0.15)


def test_loss_ignores_masked_steps_and_is_a_mean_of_examples():
    velocity = jnp.array([[[1.0], [9.0]], [[2.0], [4.0]]])
    target = jnp.zeros((2, 2, 1))
    valid = jnp.array([[True, False], [True, True]])
    assert flow.loss(velocity, target, valid) == pytest.approx((1.0 + (4.0 + 16.0) / 2) / 2)
    assert flow.loss(velocity, target, jnp.ones((2, 2), bool)) == pytest.approx((1 + 81 + 4 + 16) / 4)


def test_integration_is_forward_euler_and_clamps_once():
    config = flow.FlowConfig(steps=4)
    # dx/dt = t: forward Euler with 4 steps adds (0 + 1/4 + 2/4 + 3/4) / 4 = 0.375.
    out = flow.integrate(lambda x, t: jnp.broadcast_to(t[:, None, None], x.shape), jnp.zeros((2, 1, 1)), config)
    np.testing.assert_allclose(out, 0.375, rtol=1e-6)
    # From 3 down to 0.6: a clamp inside the loop would give another result.
    out = flow.integrate(lambda x, t: jnp.full_like(x, -2.4), jnp.full((1, 1, 1), 3.0), config)
    assert out.item() == pytest.approx(0.6, rel=1e-5)
    out = flow.integrate(lambda x, t: jnp.full_like(x, 9.0), jnp.zeros((1, 1, 1)), config)
    assert out.item() == 1.0


def test_integration_from_noise_at_one():
    config = flow.FlowConfig(noise_at=1, steps=4, clip=0.0)
    # dx/dt = t from t = 1 down: 9 - (1 + 3/4 + 2/4 + 1/4) / 4, and no clamp.
    out = flow.integrate(lambda x, t: jnp.broadcast_to(t[:, None, None], x.shape), jnp.full((2, 1, 1), 9.0), config)
    np.testing.assert_allclose(out, 9 - 0.625, rtol=1e-6)


def test_time_embedding_of_pi0():
    """Periods 4e-3 to 4, openpi's posemb_sincos."""
    config = flow.FlowConfig(time_shortest=4e-3, time_period=1000.0)
    out = np.asarray(flow.time_embedding(jnp.array([0.25]), 8, config))[0]
    f = 2 * np.pi / np.array([0.004, 0.04, 0.4, 4.0])
    np.testing.assert_allclose(out, np.concatenate([np.sin(0.25 * f), np.cos(0.25 * f)]), atol=5e-5)


def test_time_embedding_by_hand():
    out = np.asarray(flow.time_embedding(jnp.array([0.5]), 6, flow.FlowConfig(time_period=100.0)))[0]
    f = np.array([1.0, 0.1, 0.01])
    np.testing.assert_allclose(out, np.concatenate([np.sin(0.5 * f), np.cos(0.5 * f)]), rtol=1e-6)


def test_unknown_time_sampling():
    with pytest.raises(errors.UserError, match="'normal' is unknown"):
        flow.FlowConfig(time="normal")
    with pytest.raises(errors.UserError, match="noise_at=2 must be 0"):
        flow.FlowConfig(noise_at=2)
