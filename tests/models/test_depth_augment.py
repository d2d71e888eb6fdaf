"""Crops and mirrors of depth maps: what may change (places) and what may not (values)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax.models import depth_augment, tokenizer

KEY = jax.random.key(7)


def ramps(n=64, h=24, w=40):
    """Maps in which every pixel names its place: row * 100 + column + 1."""
    raw = np.arange(h)[:, None] * 100 + np.arange(w)[None] + 1
    return {
        "depth": jnp.asarray(np.broadcast_to(raw, (n, h, w)), jnp.uint16),
        "position": jnp.arange(n, dtype=jnp.uint32),
    }


def test_a_mirror_is_a_mirror_and_half_of_the_maps_are():
    batch = ramps(400)
    out = np.asarray(depth_augment.augment(batch, KEY, (1.0, 1.0), 0.5)["depth"])
    whole = np.asarray(batch["depth"])
    same, turned = (out == whole).all(axis=(1, 2)), (out == whole[:, :, ::-1]).all(axis=(1, 2))
    assert (same ^ turned).all() and 0.4 < turned.mean() < 0.6
    always = np.asarray(depth_augment.augment(batch, KEY, (1.0, 1.0), 1.0)["depth"])
    np.testing.assert_array_equal(always, whole[:, :, ::-1])


def test_a_crop_is_a_rectangle_of_the_map_at_the_scale_asked_for():
    out = np.asarray(depth_augment.augment(ramps(), KEY, (0.25, 0.25), 0.0)["depth"]).astype(int) - 1
    rows, columns = out // 100, out % 100
    assert (rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all(), "an axis-aligned grid of real pixels"
    for place, size in ((rows[:, :, 0], 24), (columns[:, 0], 40)):
        assert (np.diff(place, axis=1) >= 0).all() and set(np.diff(place, axis=1).ravel()) == {0, 1}
        extent = place[:, -1] - place[:, 0] + 1
        assert (abs(extent - size / 2) <= 1).all(), "a quarter of the area is half of each side"
        assert place.min() == 0 and place.max() == size - 1 and len(set(place[:, 0])) > size // 4


def test_no_value_is_invented():
    rng = np.random.default_rng(0)
    batch = ramps(8) | {"depth": jnp.asarray(rng.choice([0, 700, 2900], (8, 24, 40)), jnp.uint16)}
    out = depth_augment.augment(batch, KEY, (0.3, 1.0), 0.5)["depth"]
    assert out.dtype == jnp.uint16 and set(np.unique(out)) <= {0, 700, 2900}


def test_each_example_draws_by_its_position_alone():
    batch = ramps(16)
    out = np.asarray(depth_augment.augment(batch, KEY, (0.3, 0.9), 0.5)["depth"])
    order = np.random.default_rng(0).permutation(16)
    shuffled = {name: x[order] for name, x in batch.items()}
    np.testing.assert_array_equal(depth_augment.augment(shuffled, KEY, (0.3, 0.9), 0.5)["depth"], out[order])
    assert len({x.tobytes() for x in out}) > 12


@pytest.mark.parametrize(("change", "there"), [({}, False), ({"flip": 0.5}, True), ({"crop_scale": (0.5, 1.0)}, True)])
def test_training_alone_augments_and_only_where_asked(change, there):
    config = tokenizer.TokenizerConfig(depth_size=16, grid=4, num_codes=64, widths=(8,), **change)
    objective = tokenizer.make_objective(config)
    assert (objective.augment is not None) == there
    if there:
        batch = ramps(4, 16, 16)
        assert not np.array_equal(objective.augment(batch, KEY)["depth"], batch["depth"])
