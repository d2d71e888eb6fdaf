"""Depth error measures against the formulas written out, and the floor against a search."""

import numpy as np

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
