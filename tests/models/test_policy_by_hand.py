"""The policy against an independent NumPy version: other sizes, seeds, padding, views, head groups than the fixture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import policy_by_hand
import pytest

from qdepth_jax.models import policy
from qdepth_jax.models.gemma import ExpertConfig
from qdepth_jax.weights import open_pi_zero

CONFIGS = {
    "baseline": policy.sized("tiny", depth=None, proprio_steps=2, proprio_dim=8, horizon=3, layers=2),
    "depth, two views, two kv heads": policy.sized(
        "tiny", kv_heads=2, views=("main", "wrist"), text_length=7, layers=2
    ),
    "no soft-cap, own theta": policy.sized(
        "tiny", depth=None, softcap=0.0, action=ExpertConfig(20, 12, 1000.0), layers=2, scan=False
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward(name):
    config = CONFIGS[name]
    rng = np.random.default_rng(len(name))
    params = jax.jit(lambda k: policy.init(config, k)["params"])(jax.random.key(len(name)))
    # Zero norms and small logits would hide mistakes.
    params = jax.tree.map(lambda x: x * 1.5 + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    size = config.siglip.image_size
    images = rng.uniform(-1, 1, (2, len(config.views), size, size, 3)).astype(np.float32)
    text = rng.integers(1, config.vocabulary, (2, config.text_length))
    text[0, 2:] = 0
    proprio = rng.normal(size=(2, config.proprio_steps, config.proprio_dim))
    x_t = rng.normal(size=(2, config.horizon, config.action_dim))
    t = np.array([0.1, 0.7])

    inputs = (images, text.astype(np.int32), *(a.astype(np.float32) for a in (proprio, x_t, t)))
    out = jax.jit(policy.Policy(config).apply)({"params": params}, *map(jnp.asarray, inputs))
    weights = open_pi_zero.save(params, copies=("action",))
    depth_params = params if config.depth is not None else None
    for i in range(2):
        velocity, features, depth = policy_by_hand.forward(
            weights, config, images[i], text[i], proprio[i], x_t[i], t[i], depth_params
        )
        np.testing.assert_allclose(out.vision_features[i], features, atol=1e-4)
        np.testing.assert_allclose(out.velocity[i], velocity, atol=1e-4)
        if depth is None:
            assert out.depth is None
            continue
        by_hand = _decode(params["depth_decoder"], depth, config.depth.grid)
        np.testing.assert_allclose(out.depth[i], by_hand, atol=1e-4)


def _decode(params, x, grid):
    """The two convolutions by explicit sums."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = x.reshape(grid, grid, -1)
    for name in ("conv_1", "conv_2"):
        kernel, bias = p[name]["kernel"], p[name]["bias"]
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        y = np.zeros((grid, grid, len(bias)))
        for i in range(grid):
            for j in range(grid):
                y[i, j] = np.einsum("hwd,hwde->e", padded[i : i + 3, j : j + 3], kernel) + bias
        x = policy_by_hand.gelu(y) if name == "conv_1" else y
    return x.reshape(grid * grid, -1)


def test_padding_amount_does_not_matter():
    short = policy.sized("tiny")
    long = dataclasses.replace(short, text_length=9)
    params = jax.jit(lambda k: policy.init(short, k)["params"])(jax.random.key(0))
    rng = np.random.default_rng(0)
    size = short.siglip.image_size
    images = jnp.asarray(rng.uniform(-1, 1, (2, 1, size, size, 3)), jnp.float32)
    proprio, x_t = (
        jnp.asarray(rng.normal(size=(2, 1, 7)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 4, 7)), jnp.float32),
    )
    text = np.array([[3, 4, 5, 0, 0], [6, 7, 0, 0, 0]], np.int32)
    outs = [
        jax.jit(policy.Policy(config).apply)(
            {"params": params},
            images,
            jnp.asarray(np.pad(text, ((0, 0), (0, extra)))),
            proprio,
            x_t,
            jnp.array([0.2, 0.6]),
        )
        for config, extra in ((short, 0), (long, 4))
    ]
    np.testing.assert_allclose(outs[0].velocity, outs[1].velocity, atol=2e-6)
    np.testing.assert_allclose(outs[0].depth, outs[1].depth, atol=2e-6)
