"""Real-time chunking: what is frozen stays, what is free is plain sampling, and what is between is drawn to the old."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_runs
import synthetic

from qdepth_jax import errors
from qdepth_jax.models import flow, policy, real_time, sampling

B, Z, A = 3, 6, 2


def test_weights_fall_as_in_the_paper():
    # Horizon 8, 2 executed meanwhile, 5 left (H - s = 5): c_i = (5 - i) / 4, w_i = c_i (e^c_i - 1) / (e - 1).
    found = real_time.soft_weights(2, 5, 8)
    c = np.asarray([0.75, 0.5, 0.25])
    np.testing.assert_allclose(found, [1, 1, *(c * (np.exp(c) - 1) / (np.e - 1)), 0, 0, 0], rtol=1e-6)
    assert real_time.soft_weights(4, 4, 4).tolist() == [1, 1, 1, 1] and not real_time.soft_weights(0, 0, 4).any()
    for wrong in ((3, 2, 8), (2, 9, 8), (-1, 2, 8)):
        with pytest.raises(errors.UserError, match="frozen <= known <= horizon"):
            real_time.soft_weights(*wrong)


@functools.cache
def chunks(noise_at, variant, sigma=0.001):
    """(plain, continued chunk, old chunk): a flow whose data is N(m, 0.25) with actions that move together."""
    config = flow.FlowConfig(noise_at=noise_at, sigma_min=sigma, steps=10, clip=0.0)
    mean = jnp.sin(jnp.arange(Z * A, dtype=jnp.float32)).reshape(1, Z, A)
    # Covariance of the steps: neighbours move together, as in a chunk of a robot.
    k = 0.25 * np.exp(-np.abs(np.subtract.outer(np.arange(Z), np.arange(Z))) / 2.0)
    variance, axes = (jnp.asarray(x, jnp.float32) for x in np.linalg.eigh(k))

    def velocity(x, t):
        s = (1.0 - t if noise_at else t)[0]
        # x = (1 - s) n + s a: E[a - n | x] for a Gaussian a (sigma_min left out).
        gain = (s * variance - (1 - s)) / ((1 - s) ** 2 + s**2 * variance)
        found = mean + jnp.einsum("zk,k,yk,bya->bza", axes, gain, axes, x - s * mean)
        return -found if noise_at else found

    noise = jax.random.normal(jax.random.key(0), (B, Z, A))
    old = jnp.asarray(np.random.default_rng(1).normal(size=(B, Z, A)), jnp.float32)
    weights = jnp.asarray(np.stack([real_time.soft_weights(2, 4, Z), np.zeros(Z), np.ones(Z)]), jnp.float32)
    guided = real_time.continued(velocity, old, weights, config, variant)
    return [np.asarray(jax.jit(lambda n, v=v: flow.integrate(v, n, config))(noise)) for v in (velocity, guided)] + [
        np.asarray(old)
    ]


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("variant", real_time.VARIANTS)
def test_frozen_soft_and_free_actions(noise_at, variant):
    plain, found, old = chunks(noise_at, variant)
    np.testing.assert_allclose(found[0, :2], old[0, :2], atol=1e-5)  # sample_actions puts in the very bits
    np.testing.assert_allclose(found[2], old[2], atol=1e-5)
    np.testing.assert_array_equal(found[1], plain[1])
    # Between: nearer to the old chunk than without, but not on it.
    before, after = (np.abs(x[0, 2:4] - old[0, 2:4]).mean() for x in (plain, found))
    assert 0.01 < after < before
    if variant == "guided":
        # Through the Jacobian the free actions follow their bound neighbours; without it they cannot know of them.
        assert np.abs(found[0, 4:] - plain[0, 4:]).max() > 0.01


@pytest.mark.slow
def test_of_a_policy():
    config = policy.sized("tiny", action_dim=9, action_used=7, layers=1, depth=None, scan=False)
    variables = stored_runs.random_like(stored_runs.shapes("policy", config), 0)
    batch = synthetic.policy_batch(config, 3)
    noise = jax.random.normal(jax.random.key(1), (3, config.horizon, config.action_dim))
    old = jax.random.normal(jax.random.key(2), (3, config.horizon, 7))
    weights = np.zeros((3, config.horizon), np.float32)
    weights[0], weights[2] = real_time.soft_weights(2, 3, config.horizon), 1.0

    @jax.jit
    def sample(params):
        given = (config, params, variables["state"], batch, noise)
        return sampling.sample_actions(*given), [
            real_time.sample_actions(*given, old, weights, variant) for variant in real_time.VARIANTS
        ]

    plain, continued = sample(variables["params"])
    for found in continued:
        np.testing.assert_array_equal(found[0, :2], old[0, :2])  # also outside of the sampler's clip
        np.testing.assert_array_equal(found[2], old[2])
        np.testing.assert_array_equal(found[1], plain[1])
    assert np.abs(continued[0][0, 2:] - plain[0, 2:]).max() > 1e-3


def test_unknown_variant():
    with pytest.raises(errors.UserError, match="unknown: use one of"):
        real_time.sample_actions(policy.sized("tiny"), {}, {}, {}, None, None, None, "soft")
