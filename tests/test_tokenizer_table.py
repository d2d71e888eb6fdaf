"""The table of quantisers: its means and ranges, and where an untrained policy's cross-entropy starts."""

import json

import numpy as np
import pytest
import stored_runs


@pytest.fixture(scope="module")
def tokenizer_table():
    with stored_runs.tool_module("tokenizer_table", "benchmarks") as module:
        yield module


def result(kind, seed, rmse):
    held = {"codes_used": 250, "perplexity": 110.0, "rmse": rmse, "abs_rel": 0.01, "delta_1": 0.99, "interval_95": None}
    held |= {"floor_over_tokens": {"rmse": 0.2 / rmse, "abs_rel": 5.0}, "constant_per_token": {"rmse": 0.2}}
    soft = {"0.01": {"rmse": rmse * 0.9, "abs_rel": 0.01}, "0.1": {"rmse": rmse * 2, "abs_rel": 0.02}}
    rest = {"step": 10, "start": 1.01, "cpu_seconds": 100.0 + seed, "command": ["-m", "train", "--config=x", "--a"]}
    return {"kind": kind, "seed": seed, "held_out": held, "by_data_set": {}, "soft": soft} | rest


def test_a_row_is_the_mean_of_its_seeds_with_the_range(tokenizer_table):
    text = tokenizer_table.table([result("ema", 0, 0.04), result("ema", 1, 0.06), result("fsq", 0, 0.05)])
    ema, fsq = text.splitlines()[2:]
    assert ema.startswith("| `ema` | 2 | 250 (250 to 250) |") and fsq.startswith("| `fsq` | 1 | 250 |")
    assert "| 0.0500 (0.0400 to 0.0600) |" in ema and "| 0.0450 (0.0360 to 0.0540) |" in ema
    assert "| 4.17 (3.33 to 5.00) |" in ema and ema.endswith("| 100 |") and "| 4.00 |" in fsq


def test_files_hold_every_finished_run(tmp_path, tokenizer_table):
    for kind, seed in (("ema", 0), ("l2", 0)):
        (tmp_path / f"{kind}_{seed}").mkdir()
        (tmp_path / f"{kind}_{seed}" / "RESULT.json").write_text(json.dumps(result(kind, seed, 0.05)))
    (tmp_path / "fsq_0").mkdir()  # killed before it was measured
    tokenizer_table._write_tables(tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["kind"], row["rmse"], row["over_rmse"]) for row in rows] == [("ema", 0.05, 4.0), ("l2", 0.05, 4.0)]
    assert (tmp_path / "table.md").read_text().count("\n") == 4


@pytest.mark.parametrize("used", [4, 256])
def test_cross_entropy_starts_at_ln_k_with_the_frequencies_of_the_data(used, tokenizer_table):
    codes = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    codes[used:] /= 256
    count = np.where(np.arange(256) < used, 10.0, 0.0)
    assert tokenizer_table.start(codes, count, 4) == pytest.approx(1.0, abs=0.1)
