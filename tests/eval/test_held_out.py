"""Depth of a policy in metres: pixels in their places, tokens without depth left out."""

import dataclasses

import jax
import numpy as np
import pytest
import stored_runs

from qdepth_jax import depth
from qdepth_jax.data import data_config
from qdepth_jax.eval import held_out, offline
from qdepth_jax.models import depth_expert, gemma, policy, tokenizer

RANGE = depth.DepthRange("metric", 0.5, 2.5)
GRID, R = 2, 4
CODER = tokenizer.TokenizerConfig(depth_size=16, grid=GRID, widths=(8, 8), num_codes=8, code_dim=4, range=RANGE)
MODEL = policy.sized(
    "tiny",
    depth=depth_expert.DepthConfig(
        expert=gemma.ExpertConfig(width=16, mlp=24), grid=GRID, head="pixels", pixels_per_token=R, range=RANGE
    ),
)


@pytest.fixture
def result():
    """Two frames of 8x8 in millimetres; the second one's upper left token has no depth."""
    raw = np.random.default_rng(0).integers(600, 2400, (2, 8, 8)).astype(np.uint16)
    raw[1, :4, :4] = 0
    value = raw.astype(np.float64) / 1000
    x = 2 * (value - RANGE.near) / (RANGE.far - RANGE.near) - 1
    # Token t holds the pixels of its own square, row by row.
    tokens = [x[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] for row in range(2) for column in range(2)]
    pixels = np.stack([t.reshape(2, R * R) for t in tokens], axis=1).astype(np.float32)
    fields = dict.fromkeys(f.name for f in dataclasses.fields(offline.Result))
    one = np.full(2, 0.001, np.float32)
    return offline.Result(**fields | {"pixels": pixels, "raw_depth": raw, "scale": one, "offset": 0 * one})


def test_true_pixels_have_no_error_and_missing_ones_do_not_count(result):
    found = held_out._depth_figures(MODEL, result, CODER, {}, np.full((16, 16), 1.5, np.float32))
    assert found["policy"]["rmse"] < 1e-6 and found["unit"] == "m"
    assert found["policy"]["pixels"] == 2 * 256 - 64
    truth = result.raw_depth[result.raw_depth > 0] / 1000
    assert found["mean_map"]["rmse"] == pytest.approx(np.sqrt(np.mean((truth - 1.5) ** 2)), rel=1e-5)
    assert "tokenizer" not in found


def test_pixels_in_another_place_are_an_error(result):
    wrong = dataclasses.replace(result, pixels=result.pixels[:, [0, 2, 1, 3]])
    assert held_out._depth_figures(MODEL, wrong, CODER, {}, np.zeros((16, 16), np.float32))["policy"]["rmse"] > 0.3


def test_the_tokenizers_own_error_is_that_of_its_own_codes(result):
    """Also beside tokens without depth: a made-up code in their place changes what the neighbours decode to."""
    coder = dataclasses.replace(CODER, quantiser="fsq", num_codes=64)
    variables = tokenizer.init(coder, jax.random.key(0))
    x, seen = tokenizer.preprocess(coder, result.raw_depth, result.scale, result.offset)
    codes = np.asarray(tokenizer.encode(coder, variables["params"], variables["state"], x, seen))
    assert codes[1, 0] and not seen[1, 0, 0]  # upper left of the second frame
    given = dataclasses.replace(result, codes=codes, pixels=None)
    flat = np.full((16, 16), 1.5, np.float32)
    found = held_out._depth_figures(MODEL, given, coder, variables, flat)
    assert found["tokenizer"] == found["policy"]  # a policy that says every code right
    codes = codes.copy()
    codes[1, 0] = 0
    other = held_out._depth_figures(MODEL, dataclasses.replace(given, codes=codes), coder, variables, flat)
    assert other["policy"] != found["policy"] and other["tokenizer"] == found["tokenizer"]


def test_a_policy_that_knows_missing_views_is_evaluated(libero_dir):
    config = policy.sized(
        "tiny", vocabulary=640, text_length=24, depth=None, proprio_dim=8, layers=1, views=("main", "wrist"),
        missing_views=True,
    )  # fmt: skip
    data = data_config.DataConfig(
        (data_config.DatasetConfig(path=libero_dir),), views=config.views, horizon=config.horizon, missing_views="mask",
        max_text_tokens=config.text_length, text_tokenizer=stored_runs.WORDS, image_size=(32, 32),
    )  # fmt: skip
    found = offline.evaluate(config, policy.init(config, jax.random.key(0)), data, {}, batches=1)
    assert found.figures["frames"] == 32 and np.isfinite(found.predicted).all()
