"""Codebook logits, where cross-entropy starts, and the pixel targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax import depth, errors
from qdepth_jax.models import depth_expert


def test_logits_are_the_papers_formula():
    """-||x - c||^2 / tau with x = mean + s x' and tau = temperature s^2, computed the long way."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(7, 5)) * 30 + 11
    x = rng.normal(size=(2, 3, 5))
    mean = codes.mean(0)
    s2 = ((codes - mean) ** 2).sum(1).mean()
    vectors = mean + np.sqrt(s2) * x
    expected = -((vectors[:, :, None] - codes[None, None]) ** 2).sum(-1) / (0.5 * s2)
    ours = depth_expert.code_logits(jnp.asarray(x, jnp.float32), jnp.asarray(codes, jnp.float32), 0.5)
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scale, offset", [(1e-3, 0.0), (1.0, 5.0), (1e3, -4e3), (1.0, 0.0)])
@pytest.mark.parametrize("rank", [4, 160])
def test_cross_entropy_of_an_untrained_decoder_starts_at_ln_c(scale, offset, rank):
    config = depth_expert.DepthConfig(grid=4)
    rng = np.random.default_rng(rank)
    flat = rng.normal(size=(config.codes, rank)) @ rng.normal(size=(rank, config.code_dim))
    codebook = jnp.asarray(flat * scale + offset, jnp.float32)
    decoder = depth_expert.DepthDecoder(config)
    # What comes in is a normed stream: unit mean square.
    stream = jax.random.normal(jax.random.key(0), (4, config.tokens, config.expert.width // 8))
    x, _ = decoder.init_with_output(jax.random.key(1), stream)
    targets = jnp.asarray(rng.integers(0, config.codes, (4, config.tokens)))
    loss, accuracy = depth_expert.code_loss(
        depth_expert.code_logits(x, codebook, config.temperature), targets, jnp.ones(targets.shape, bool)
    )
    assert float(loss) == pytest.approx(np.log(config.codes), rel=0.1)
    assert accuracy < 0.1


@pytest.mark.parametrize("used", [1, 6, 40, 100, 200, 256])
def test_a_collapsed_codebook_starts_at_ln_c_too(used):
    """Some codes in use far out, the rest near zero as they were started: what the plain objective leaves behind."""
    codes = jax.random.normal(jax.random.key(used), (256, 32))
    codes = jnp.where(jnp.arange(256)[:, None] < used, codes, codes / 256)
    logits = depth_expert.code_logits(jnp.zeros((1, 800, 32)), codes, 0.0)
    targets, everywhere = jnp.arange(800)[None] % used, jnp.ones((1, 800), bool)
    loss, _ = depth_expert.code_loss(logits, targets, everywhere)
    assert float(loss) == pytest.approx(np.log(256), rel=0.1)
    naive, _ = depth_expert.code_loss(
        depth_expert.code_logits(jnp.zeros((1, 800, 32)), codes, 1.0), targets, everywhere
    )
    assert used > 100 or float(naive) > 1.1 * np.log(256), "with the fixed temperature it does not"


@pytest.mark.parametrize("seed", range(4))
def test_the_start_temperature_holds_for_the_worst_targets(seed):
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(64, 5)) * rng.exponential(size=(64, 1)) ** 2 + rng.normal(size=5)
    logits = depth_expert.code_logits(jnp.zeros((1, 1, 5)), jnp.asarray(codes, jnp.float32), 0.0)
    loss = -np.asarray(jax.nn.log_softmax(logits))[0, 0]
    assert 0.04 * np.log(64) < np.abs(loss - np.log(64)).max() < 0.1 * np.log(64), "and it is no larger than needed"


def test_codes_equally_far_from_their_mean_need_no_more_than_one():
    codes = jnp.concatenate([jnp.eye(32), -jnp.eye(32)])
    assert depth_expert.start_temperature(depth_expert.unit_codebook(codes * 7 + 3)[0]) == 1.0


def test_the_codes_own_vector_is_its_most_likely_code():
    codebook = jax.random.normal(jax.random.key(0), (16, 6)) * 4 + 2
    own, _, _ = depth_expert.unit_codebook(codebook)
    logits = depth_expert.code_logits(own[None], codebook, 0.1)
    np.testing.assert_array_equal(jnp.argmax(logits[0], axis=-1), np.arange(16))


def test_masked_tokens_do_not_count():
    logits = jnp.array([[[0.0, 3.0], [5.0, 0.0]]])
    loss, accuracy = depth_expert.code_loss(logits, jnp.array([[1, 1]]), jnp.array([[True, False]]))
    assert float(loss) == pytest.approx(np.log1p(np.exp(-3.0)), rel=1e-5)
    assert accuracy == 1.0
    loss, _ = depth_expert.code_loss(logits, jnp.array([[1, 1]]), jnp.zeros((1, 2), bool))
    assert float(loss) == 0.0


def test_pixel_targets_are_nearest_pixels_in_token_order():
    config = depth_expert.DepthConfig(
        grid=2, head="pixels", pixels_per_token=2, range=depth.DepthRange("metric", 0.0, 16.0)
    )
    raw = np.arange(1, 17, dtype=np.uint16).reshape(1, 4, 4)
    raw[0, 3, 3] = 0
    batch = {"depth": jnp.asarray(raw), "depth_scale": jnp.ones(1), "depth_offset": jnp.zeros(1)}
    x, valid = depth_expert.pixel_targets(batch, config)
    metres = np.asarray((x + 1) * 8)[0]
    np.testing.assert_allclose(metres[0], [1, 2, 5, 6])
    np.testing.assert_allclose(metres[1], [3, 4, 7, 8])
    np.testing.assert_allclose(metres[3][:3], [11, 12, 15])
    assert valid.sum() == 15 and not valid[0, 3, 3]
    # Twice the resolution, same scene: nearest neighbour picks pixels, it does not mix.
    big = {**batch, "depth": jnp.asarray(raw.repeat(2, 1).repeat(2, 2))}
    np.testing.assert_array_equal(depth_expert.pixel_targets(big, config)[0], x)


@pytest.mark.parametrize("change", [{"head": "voxels"}, {"temperature": -1.0}, {"loss_weight": -1.0}])
def test_bad_configs(change):
    with pytest.raises(errors.UserError):
        depth_expert.DepthConfig(**change)
