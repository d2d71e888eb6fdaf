"""Normalisation: formulas, roundtrip, floors, what travels as JSON."""

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.data import normalise

VALUES = np.random.default_rng(0).normal([1, -2, 0], [3, 0.1, 1], (1000, 3)).astype(np.float32)


def test_statistics_are_exact():
    s = normalise.compute(VALUES)
    wide = VALUES.astype(np.float64)
    np.testing.assert_allclose(s.mean, wide.mean(0))
    np.testing.assert_allclose(s.std, wide.std(0))
    np.testing.assert_allclose(s.q99, np.percentile(wide, 99, axis=0))
    assert s.low == tuple(wide.min(0)) and s.count == 1000


@pytest.mark.parametrize("count", [1, 2, 5, 99, 100, 101, 4097])
def test_statistics_by_column_equal_numpy_on_the_whole(count, tmp_path, monkeypatch):
    monkeypatch.setattr(normalise, "_BLOCK", 64)  # many blocks
    rng = np.random.default_rng(count)
    values = rng.normal([1e3, -2, 0, 0], [3, 1e-3, 1, 0], (3 * count, 4)).astype(np.float32)
    values[:, 2] = rng.integers(0, 2, len(values))  # ties
    np.save(tmp_path / "column.npy", values)
    mapped = np.load(tmp_path / "column.npy", mmap_mode="r")
    rows = np.sort(rng.choice(3 * count, count, replace=False))
    for got, used in ((normalise.compute(mapped, rows), values[rows]), (normalise.compute(mapped), values)):
        wide = used.astype(np.float64)
        assert got.count == len(used)
        assert got.low == tuple(wide.min(0)) and got.high == tuple(wide.max(0))
        np.testing.assert_array_equal(got.q01, np.quantile(wide, 0.01, axis=0))
        np.testing.assert_array_equal(got.q99, np.quantile(wide, 0.99, axis=0))
        np.testing.assert_allclose(got.mean, wide.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.std, wide.std(0), rtol=1e-10, atol=1e-15)
    np.testing.assert_array_equal(mapped, values)  # the column itself keeps its order


def test_quantiles_between_two_values_equal_numpy_to_the_last_bit():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(2, 300)) * 10.0 ** rng.integers(-3, 4, 300)).astype(np.float32)
    got = normalise.compute(values)
    for q, ours in ((0.01, got.q01), (0.99, got.q99)):
        np.testing.assert_array_equal(ours, np.quantile(values.astype(np.float64), q, axis=0))


def test_a_value_that_is_not_finite_names_frame_and_dimension():
    values = np.zeros((9, 2), np.float32)
    values[7, 1] = np.nan
    with pytest.raises(errors.UserError, match=r"frame 7 has nan in dimension 1.*--quarantine"):
        normalise.compute(values, np.array([1, 3, 7]))
    assert normalise.compute(values, np.array([1, 3])).count == 2


def test_bounds_equal_open_pi_zero_formula_and_clip():
    s = normalise.compute(VALUES)
    ours = normalise.normalise(VALUES, normalise.Normaliser(s, "bounds"))
    q01, q99 = np.array(s.q01), np.array(s.q99)
    expected = np.clip(2 * (VALUES - q01) / (q99 - q01 + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    assert ours.min() == -1 and ours.max() == 1 and ours.dtype == np.float32


@pytest.mark.parametrize("kind", normalise.KINDS)
def test_unnormalise_undoes_and_leaves_raw_dimensions(kind):
    s = normalise.compute(VALUES)
    n = normalise.Normaliser(s, kind, raw_dims=(2,))
    inside = np.clip(VALUES, s.q01, s.q99).astype(np.float32)
    x = normalise.normalise(inside, n)
    np.testing.assert_array_equal(x[:, 2], inside[:, 2])
    np.testing.assert_allclose(normalise.unnormalise(x, n), inside, atol=2e-6)
    if kind == "normal":
        np.testing.assert_allclose(normalise.normalise(VALUES, n)[:, :2].std(0), 1, rtol=1e-5)


def test_predictions_outside_are_clipped_before_they_reach_a_robot():
    n = normalise.Normaliser(normalise.compute(VALUES), "bounds", raw_dims=(2,))
    out = normalise.unnormalise(np.array([5.0, -5, 5]), n)
    np.testing.assert_allclose(out, [n.statistics.q99[0], n.statistics.q01[1], 5], rtol=1e-6)


def test_nearly_constant_dimension_is_floored_and_named(caplog):
    values = np.stack([np.linspace(-1, 1, 100), np.full(100, 0.3), np.full(100, 1.0)], 1).astype(np.float32)
    values[0, 1] += 1e-7
    n = normalise.Normaliser(normalise.compute(values), "minmax", raw_dims=(2,))
    assert normalise.warn_constant(n, "libero action") == (1,)
    assert "libero action: dimensions [1] are nearly constant" in caplog.text
    assert np.abs(normalise.normalise(values, n)[:, 1]).max() < 2e-3
    assert normalise.policies(n) == ("scaled", "floored", "raw")


def test_json_roundtrip_and_errors():
    n = normalise.Normaliser(normalise.compute(VALUES), "normal", (1,))
    assert normalise.Normaliser.from_json(n.to_json()) == n
    with pytest.raises(errors.UserError, match="use one of bounds"):
        normalise.Normaliser(n.statistics, "q99")
    with pytest.raises(errors.UserError, match=r"\[3\]"):
        normalise.Normaliser(n.statistics, "bounds", (3,))
