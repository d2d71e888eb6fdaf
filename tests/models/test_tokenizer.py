"""The depth tokenizer: shapes, masks, gradients, learning, and the conventions others rely on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdepth_jax import depth, errors
from qdepth_jax.models import tokenizer

TINY = tokenizer.TokenizerConfig(
    depth_size=32,
    grid=4,
    num_codes=64,
    code_dim=8,
    widths=(16, 16),
    blocks=1,
    start_step=10,
    range=depth.DepthRange("metric", 0.0, 4.0),
)


def make_batch(n=8, size=32, seed=0):
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 4000, (n, 4, 4)).repeat(size // 4, 1).repeat(size // 4, 2).astype(np.uint16)
    return {
        "depth": jnp.asarray(raw),
        "depth_scale": jnp.full((n,), 0.001),
        "depth_offset": jnp.zeros((n,)),
        "position": jnp.arange(n, dtype=jnp.uint32),
    }


@pytest.mark.parametrize("quantiser", ["ema", "plain", "fsq"])
def test_each_quantiser_learns_and_decodes_what_it_encodes(quantiser):
    config = dataclasses.replace(TINY, quantiser=quantiser)
    objective, batch, key = tokenizer.make_objective(config), make_batch(), jax.random.key(0)
    variables = objective.init(key)
    params, state = variables["params"], variables["state"]

    tx = optax.adam(3e-3)
    moments = tx.init(params)

    @jax.jit
    def step(params, state, moments, i):
        def loss(p):
            out = objective.loss(p, state, batch, key, i)
            return out.loss, out

        grads, out = jax.grad(loss, has_aux=True)(params)
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(params, updates), out.state, moments, out.metrics

    first = None
    for i in range(60):
        params, state, moments, metrics = step(params, state, moments, jnp.asarray(i))
        first = first or {k: float(v) for k, v in metrics.items()}
    assert float(metrics["reconstruction_l2"]) < 0.8 * first["reconstruction_l2"]
    x, valid = tokenizer.preprocess(config, batch["depth"], batch["depth_scale"], batch["depth_offset"])
    codes = tokenizer.encode(config, params, state, x, valid)
    assert codes.shape == (8, 16) and codes.dtype == jnp.int32 and int(codes.max()) < 64
    decoded = tokenizer.decode(config, params, state, codes)
    assert decoded.shape == (8, 32, 32)
    rmse = float(jnp.sqrt(jnp.mean(jnp.square(decoded - x)))) * 2.0  # half range of 0..4 m
    assert rmse < float(metrics["rmse"]) * 1.2, "decode(encode(x)) is what training measured"


def test_invalid_pixels_do_not_reach_loss_or_gradient():
    objective, batch, key = tokenizer.make_objective(TINY), make_batch(), jax.random.key(0)
    variables = objective.init(key)
    raw = np.asarray(batch["depth"]).copy()
    raw[:, :8, :8] = 0
    beyond = raw.copy()
    beyond[:, :8, :8] = 60000  # 60 m: outside the range, so masked too
    a = objective.loss(variables["params"], variables["state"], batch | {"depth": jnp.asarray(raw)}, key, 0)
    b = objective.loss(variables["params"], variables["state"], batch | {"depth": jnp.asarray(beyond)}, key, 0)
    assert float(a.loss) == float(b.loss)
    assert float(a.metrics["valid_pixels"]) == 1 - 64 / 1024


def test_metric_and_relative_ranges_round_trip():
    raw = jnp.asarray([[[1000, 2000], [3000, 0]]], jnp.uint16)
    metric = depth.DepthRange("metric", 0.5, 3.5)
    x, valid = depth.normalise(raw, jnp.asarray([0.001]), jnp.zeros(1), metric)
    np.testing.assert_array_equal(valid[0], [[True, True], [True, False]])
    np.testing.assert_allclose(depth.denormalise(x, metric)[0, 0], [1.0, 2.0], rtol=1e-6)
    relative = depth.DepthRange("relative", 1.0, 0.0)
    x, valid = depth.normalise(raw, jnp.asarray([1 / 4000]), jnp.zeros(1), relative)
    np.testing.assert_allclose(x[0, 0], [0.5, 0.0], atol=1e-6)  # inverse depth 0.25 is far, so positive
    assert bool(valid[0, 0, 0])


def test_nearest_resampling_never_blends_across_an_edge():
    raw = np.full((1, 48, 40), 1000, np.uint16)
    raw[:, :, 20:] = 3000
    x, _ = tokenizer.preprocess(TINY, jnp.asarray(raw), jnp.asarray([0.001]), jnp.zeros(1))
    assert x.shape == (1, 32, 32)
    assert set(np.unique(np.asarray(x)).round(6)) == {-0.5, 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 5}, "do not fit"),
        ({"widths": (16,)}, "need 2"),
        ({"quantiser": "vq"}, "unknown"),
    ],
)
def test_bad_sizes_name_the_fix(change, message):
    with pytest.raises(errors.UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_range_is_refused():
    with pytest.raises(errors.UserError, match="near < far"):
        depth.DepthRange("metric", 3.0, 1.0)


def test_identity_follows_encoder_and_codebook_but_not_decoder():
    variables = tokenizer.init(TINY, jax.random.key(0))
    params, state = variables["params"], variables["state"]
    base = tokenizer.identity(TINY, params, state)
    decoder = jax.tree.map(lambda x: x + 1, params["decoder"])
    assert tokenizer.identity(TINY, params | {"decoder": decoder}, state) == base
    assert tokenizer.identity(TINY, params, state | {"codebook": state["codebook"] + 1}) != base


def test_full_size_defaults_match_the_paper():
    config = tokenizer.TokenizerConfig()
    assert (config.grid, config.num_codes, config.code_dim, config.beta, config.depth_size) == (16, 256, 160, 0.25, 256)
    shapes = jax.eval_shape(lambda key: tokenizer.init(config, key), jax.random.key(0))
    assert shapes["state"]["codebook"].shape == (256, 160)
