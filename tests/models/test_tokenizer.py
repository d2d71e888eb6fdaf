"""The depth tokenizer: shapes, masks, gradients, learning, and the conventions others rely on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdepth_jax import depth, errors
from qdepth_jax.data import sidecar
from qdepth_jax.models import codebook, depth_expert, tokenizer

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


@pytest.mark.parametrize(
    "quantiser", ["ema", "plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsq", "l2"))]
)
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


def test_tokens_that_stand_for_depth_are_those_of_the_sidecar():
    """The rule stands twice, because data knows no model: once in a program, once in NumPy."""
    rng = np.random.default_rng(0)
    valid = rng.random((6, 32, 32)) < rng.random((6, 4, 4)).repeat(8, 1).repeat(8, 2)
    valid[0, :4, :8], valid[0, 4:8, :8] = True, False  # exactly half
    found = np.asarray(tokenizer.token_validity(TINY, jnp.asarray(valid)))
    np.testing.assert_array_equal(found, sidecar.token_validity(valid, TINY.grid))
    assert found[0, 0] and 0 < found.mean() < 1


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
        ({"crop_scale": (0.9, 0.5)}, "low <= high"),
        ({"flip": 2.0}, "0..1"),
        ({"dead_share": 0.0}, "4 times"),
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


def test_later_settings_leave_the_identity_of_earlier_tokenizers():
    """The number was computed before there was a crop or a mirror."""
    shapes = jax.eval_shape(lambda key: tokenizer.init(TINY, key), jax.random.key(0))
    variables = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    assert tokenizer.identity(TINY, variables["params"], variables["state"]) == "34fd4518e3121cf3"
    mirrored = dataclasses.replace(TINY, flip=0.5)
    assert tokenizer.identity(mirrored, variables["params"], variables["state"]) != "34fd4518e3121cf3"


def test_full_size_defaults_match_the_paper():
    config = tokenizer.TokenizerConfig()
    assert (config.grid, config.num_codes, config.code_dim, config.beta, config.depth_size) == (16, 256, 160, 0.25, 256)
    shapes = jax.eval_shape(lambda key: tokenizer.init(config, key), jax.random.key(0))
    assert shapes["state"]["codebook"].shape == (256, 160)


@functools.cache
def trained(quantiser, grid, steps=25):
    """A small tokenizer after a few steps, its variables and the codes of its batch."""
    config = dataclasses.replace(
        TINY, depth_size=4 * grid, grid=grid, num_codes=256, widths=(8,), start_step=5, quantiser=quantiser
    )
    objective, batch, key = tokenizer.make_objective(config), make_batch(4, 4 * grid), jax.random.key(0)
    variables, tx = jax.jit(objective.init)(key), optax.adam(3e-3)
    params, state = variables["params"], variables["state"]
    moments = tx.init(params)

    @jax.jit
    def step(params, state, moments, i):
        grads, out = jax.grad(lambda p: (o := objective.loss(p, state, batch, key, i), (o.loss, o))[1], has_aux=True)(
            params
        )
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(params, updates), out.state, moments

    for i in range(steps):
        params, state, moments = step(params, state, moments, jnp.asarray(i))
    x, valid = tokenizer.preprocess(config, batch["depth"], batch["depth_scale"], batch["depth_offset"])
    return config, params, state, x, valid


SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("grid", [16, 32])
@pytest.mark.parametrize("quantiser", codebook.KINDS)
def test_cross_entropy_of_an_untrained_policy_starts_at_ln_k(quantiser, grid):
    config, params, state, x, valid = trained(quantiser, grid)
    targets = tokenizer.encode(config, params, state, x, valid)
    assert targets.shape == (4, grid * grid)
    head = depth_expert.DepthConfig(grid=grid, code_dim=config.feature_dim, conv_width=32)
    stream = jax.random.normal(jax.random.key(1), (4, grid * grid, 64))
    out, _ = jax.jit(depth_expert.DepthDecoder(head).init_with_output)(jax.random.key(2), stream)
    codes = tokenizer.codes_of(config, params, state)
    logits = depth_expert.code_logits(out, codes, head.temperature)
    loss, _ = depth_expert.code_loss(logits, targets, jnp.ones(targets.shape, bool))
    assert float(loss) == pytest.approx(np.log(256), rel=0.1)


@SLOW
def test_codes_and_features_of_l2_stay_on_the_sphere():
    config, params, state, x, valid = trained("l2", 16)
    z = tokenizer.Encoder(config).apply({"params": params["encoder"]}, x, valid)
    for rows in (state["codebook"], z):
        np.testing.assert_allclose(jnp.mean(jnp.square(rows), axis=-1), 1.0, rtol=1e-4)
    cosine = z @ state["codebook"].T
    codes = tokenizer.encode(config, params, state, x, valid)
    chosen = jnp.take_along_axis(cosine, codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, cosine.max(axis=-1), rtol=1e-4)


@SLOW
@pytest.mark.parametrize("quantiser", ["ema", "l2", "fsq"])
def test_soft_tokens_approach_the_hard_ones(quantiser):
    config, params, state, x, valid = trained(quantiser, 16)
    codes = tokenizer.encode(config, params, state, x, valid)
    hard = tokenizer.decode(config, params, state, codes)
    sure = tokenizer.decode_expected(config, params, state, jax.nn.one_hot(codes, 256))
    np.testing.assert_allclose(sure, hard, atol=1e-4)
    p = tokenizer.code_probabilities(config, params, state, x, valid, 1e-6)
    np.testing.assert_array_equal(jnp.argmax(p, axis=-1), codes)
    soft = tokenizer.code_probabilities(config, params, state, x, valid, 0.5)
    np.testing.assert_allclose(soft.sum(-1), 1.0, rtol=1e-5)
    assert float(soft.max()) < 0.999
    blended = tokenizer.decode_expected(config, params, state, soft)
    assert blended.shape == hard.shape and float(jnp.abs(blended - hard).max()) > 1e-3


@SLOW
@pytest.mark.parametrize("quantiser", codebook.KINDS)
def test_depth_that_says_nothing_leaves_everything_finite(quantiser):
    """One depth everywhere, and no valid pixel at all: all features are equal, so all codes start as one."""
    config = dataclasses.replace(TINY, quantiser=quantiser, start_step=0)
    objective, key = tokenizer.make_objective(config), jax.random.key(0)
    variables = jax.jit(objective.init)(key)
    step = jax.jit(
        jax.value_and_grad(lambda p, s, b: (o := objective.loss(p, s, b, key, 0), (o.loss, o))[1], has_aux=True)
    )
    for value in (1500, 0):
        batch = make_batch() | {"depth": jnp.full((8, 32, 32), value, jnp.uint16)}
        (loss, out), grads = step(variables["params"], variables["state"], batch)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((loss, out.state, out.metrics, grads)))
        assert float(out.metrics["valid_pixels"]) == (value > 0)
        x, valid = tokenizer.preprocess(config, batch["depth"], batch["depth_scale"], batch["depth_offset"])
        codes = tokenizer.encode(config, variables["params"], out.state, x, valid)
        assert int(codes.min()) >= 0 and int(codes.max()) < 64
