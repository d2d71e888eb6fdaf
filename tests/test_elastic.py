"""Save on 8 devices, resume on 1, 2, 4 and 16 with other mesh shapes and micro-batches: the same run goes on."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from qdepth_jax import watch

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),  # two of the runs share theirs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "elastic_child.py", tmp_path_factory.mktemp("elastic")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("name", ["one", "two", "four", "sixteen"])
def test_resume_on_other_devices_is_the_same_run(runs, name):
    expected, saved, found = runs["uninterrupted"], runs["saved"], runs[name]
    assert [row["step"] for row in found["rows"]] == list(range(1, 13))
    # No sample twice, none left out: the positions of both starts together are those of the uninterrupted run.
    taken = saved["positions"][:6] + found["positions"][:6]
    assert taken == expected["positions"][:12]
    assert sorted(p for step in taken for p in step[1:]) == list(range(12 * 16))
    for row, other in zip(expected["rows"], found["rows"], strict=True):
        assert row.keys() - set(watch.MEASURED) == other.keys() - set(watch.MEASURED)
        for key in row.keys() - set(watch.MEASURED):
            np.testing.assert_allclose(other[key], row[key], rtol=2e-4, atol=1e-6, err_msg=f"step {row['step']} {key}")
    pairs = [(float(o[k]), float(r[k])) for r, o in zip(expected["rows"], found["rows"]) for k in ("loss", "grad_norm")]
    print("largest relative difference of loss and grad_norm:", f"{max(abs(a / b - 1) for a, b in pairs):.1e}")
    # What the comparison would say of another order: neighbouring steps differ by far more than the tolerance.
    losses = np.asarray([row["loss"] for row in expected["rows"]])
    assert np.abs(np.diff(losses)).min() > 2e-3 * losses.max()
