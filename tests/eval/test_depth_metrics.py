"""Depth error measures against the formulas written out, and the floor against a search."""

import numpy as np

from qdepth_jax.data import sidecar
from qdepth_jax.eval import depth_metrics, offline, report


def test_sums_over_batches_equal_the_formulas():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.5, 3.0, (6, 8, 8)).astype(np.float32)
    predicted = (true * rng.uniform(0.6, 1.6, true.shape)).astype(np.float32)
    valid = rng.random(true.shape) < 0.7
    sums = depth_metrics.DepthSums()
    for i in range(0, 6, 2):
        sums.add(predicted[i : i + 2], true[i : i + 2], valid[i : i + 2])
    got = sums.result()
    p, t = predicted[valid].astype(float), true[valid].astype(float)
    assert abs(got["rmse"] - np.sqrt(np.mean((p - t) ** 2))) < 1e-9
    assert abs(got["abs_rel"] - np.mean(np.abs(p - t) / t)) < 1e-9
    assert abs(got["delta_1"] - np.mean(np.maximum(p / t, t / p) < 1.25)) < 1e-12
    assert got["pixels"] == valid.sum()


def test_constant_per_token_cannot_be_improved():
    rng = np.random.default_rng(1)
    true = rng.normal(size=(2, 8, 8)).astype(np.float32)
    valid = rng.random(true.shape) < 0.6
    floor = depth_metrics.constant_per_token(true, valid, 2)
    assert len(np.unique(floor[0])) == 4
    best = np.square(floor - true)[valid].sum()
    for cell in (slice(0, 4), slice(4, 8)):
        for shift in (-0.01, 0.01):
            moved = floor.copy()
            moved[:, cell, 0:4] += shift
            assert np.square(moved - true)[valid].sum() > best


def test_code_usage():
    got = depth_metrics.code_usage(np.asarray([[0, 0], [3, 3]]), 8)
    assert got["codes_used"] == 2 and got["codes"] == 8 and abs(got["perplexity"] - 2) < 1e-9


def test_most_frequent_code_is_taken_per_position():
    tokens = np.asarray([[1, 5], [1, 5], [2, 6]], np.uint16)
    np.testing.assert_array_equal(offline.most_frequent(tokens, 8), [1, 5])
    tokens = np.asarray([[65535, 65535], [65535, 65535], [2, 65535]], np.uint16)  # invalid ones are no codes
    np.testing.assert_array_equal(offline.most_frequent(tokens, 8), [2, 0])


def summary(rmse, action, accuracy):
    figures = {
        "actions": {"policy": {"l1": action}, "mean_action": {"l1": 0.3}, "repeat_last_action": {"l1": 0.2}},
        "depth_tokens": {"accuracy": accuracy, "most_frequent_per_position_accuracy": 0.5},
    }
    held_out = {"codes_used": 130, "codes": 256, "rmse": rmse, "constant_per_token": {"rmse": 0.2}}
    return {"tokenizer": {"held_out": {"x": held_out}}, "policies": {"p": {"figures": figures}}}


def test_report_verdicts_follow_the_numbers():
    assert all(c["ok"] for c in report.checks(summary(0.099, 0.19, 0.51)))
    assert [c["ok"] for c in report.checks(summary(0.101, 0.25, 0.49))] == [True, False, True, False, False]


def test_report_files(tmp_path):
    path = report.write(
        str(tmp_path / "r"), summary(0.09, 0.1, 0.6) | {"commands": ["a < b"]}, {"P": "<b>x</b>"}, {"C": "<"}
    )
    page = (tmp_path / "r" / "report.html").read_text()
    assert path.endswith("report.html") and "a &lt; b" in page and "<b>x</b>" in page
    assert (tmp_path / "r" / "summary.json").exists()


def episodes(count=5, seed=0, grid=2, codes=16):
    """Sums of episodes of one to four frames, and the arrays they came from."""
    rng = np.random.default_rng(seed)
    sums, parts = [], []
    for i in range(count):
        truth = rng.uniform(0.5, 3.0, (1 + i % 4, 8, 8)).astype(np.float32)
        value = (truth * rng.uniform(0.6, 2.4, truth.shape)).astype(np.float32)
        valid = rng.random(truth.shape) < 0.6
        kept = sidecar.token_validity(valid, grid)
        index = rng.integers(0, codes, kept.shape)
        parts.append((value, truth, valid, index, kept))
        sums.append(depth_metrics.episode_sums(value, truth, valid, grid, index, kept, codes))
    return sums, parts


def test_figures_of_episodes_are_those_of_all_their_pixels():
    sums, parts = episodes()
    got = depth_metrics.figures(sums)
    value, truth, valid, index, kept = (np.concatenate(part) for part in zip(*parts))
    assert kept.any() and not kept.all()
    assert (got["episodes"], got["frames"], got["invalid_tokens"]) == (5, len(value), (~kept).sum())
    assert got["masked_share"] == (~valid).mean() and got["invalid_token_share"] == (~kept).mean()
    where = valid & kept.reshape(-1, 2, 2).repeat(4, 1).repeat(4, 2)
    p, t = value[where].astype(float), truth[where].astype(float)
    assert got["pixels"] == where.sum()
    np.testing.assert_allclose(got["rmse"], np.sqrt(np.mean((p - t) ** 2)))
    np.testing.assert_allclose(got["abs_rel"], np.mean(np.abs(p - t) / t))
    for n in (1, 2, 3):
        np.testing.assert_allclose(got[f"delta_{n}"], np.mean(np.maximum(p / t, t / p) < 1.25**n))
    assert 0 < got["delta_1"] < got["delta_2"] < got["delta_3"] < 1
    floor = depth_metrics.constant_per_token(truth, where, 2)[where]
    np.testing.assert_allclose(got["constant_per_token"]["rmse"], np.sqrt(np.mean((floor - t) ** 2)))
    ratio = got["constant_per_token"]["abs_rel"] / got["abs_rel"]
    np.testing.assert_allclose(got["floor_over_tokens"]["abs_rel"], ratio)
    usage = depth_metrics.code_usage(index[kept], 16)
    assert (got["codes_used"], got["codes"]) == (usage["codes_used"], 16)
    np.testing.assert_allclose(got["perplexity"], usage["perplexity"])


def test_sums_of_batches_add_up_to_their_episode_and_survive_a_file():
    value, truth, valid, index, kept = (np.concatenate(part) for part in zip(*episodes()[1]))
    whole = depth_metrics.episode_sums(value, truth, valid, 2, index, kept, 16)
    parts = []
    for i in range(0, len(value), 3):
        v, t, there, codes, stands = (x[i : i + 3] for x in (value, truth, valid, index, kept))
        parts.append(depth_metrics.episode_sums(v, t, there, 2, codes, stands, 16))
    added = depth_metrics.total([depth_metrics.no_sums(16), *parts])
    for name, x in whole.items():
        np.testing.assert_allclose(added[name], x, rtol=1e-12)
    row = depth_metrics.as_row(whole)
    assert row.shape == (depth_metrics.row_size(16),) and row.dtype == np.float64
    for name, x in depth_metrics.from_rows(row[None])[0].items():
        np.testing.assert_array_equal(x, whole[name])


def test_the_interval_covers_the_truth_in_19_of_20_data_sets_of_six_episodes():
    """Episodes differ from one another much more than frames do; squared error per pixel has mean 1 over them."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        sums = []
        for level in rng.uniform(0.5, 1.5, 6):
            one = depth_metrics.no_sums(4)
            one["tokens"] = np.asarray([1000, 1000 * level, 1000, 100, 900, 950, 1000.0])
            sums.append(one)
        low, high = depth_metrics.figures(sums)["interval_95"]["rmse"]
        covered += low <= 1.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_no_interval_from_one_episode_and_figures_of_nothing_are_finite():
    sums, _ = episodes()
    assert depth_metrics.figures(sums[:1])["interval_95"] is None
    blind = depth_metrics.no_sums(16)
    assert depth_metrics.figures([sums[0], blind])["interval_95"] is None
    np.testing.assert_equal(
        depth_metrics.figures([*sums, blind])["interval_95"], depth_metrics.figures(sums)["interval_95"]
    )
    for none in ([], [blind]):
        got = depth_metrics.figures(none)
        assert got["rmse"] == got["perplexity"] == got["codes_used"] == 0 and got["interval_95"] is None
