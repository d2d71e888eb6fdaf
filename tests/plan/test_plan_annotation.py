"""The plan of labelling: how many windows, and what they cost by formula; compiled where libtpu is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from qdepth_jax import chips, video_depth
from qdepth_jax.models import depth_anything, depth_flops
from qdepth_jax.plan import annotation, placed, topology

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_windows_are_those_of_the_procedure():
    lengths = np.arange(23, 23 + 3 * video_depth.STEP)  # every remainder three times
    true = sum(len(video_depth.plan_windows(n)) for n in lengths)
    work, windows = annotation.work_of(lengths, (256, 256), "test")
    assert windows == true == pytest.approx(work.windows)
    assert annotation.work_of(np.array([1, 22, 23]), (256, 256), "test")[1] == 4
    endless = annotation.Work(10**7, 10, (256, 256), "test")
    assert endless.computed == pytest.approx(32 / 22, rel=1e-4)
    assert 1.8 < annotation.DATA["bridge"].computed < 1.9  # 37.6 frames: the last window is half empty


def test_a_plan_by_formula():
    config = depth_anything.sized("vitl", video=True, dtype="bfloat16")
    where = topology.parse("v5e:1x1")
    made = annotation.plan("vitl", "bfloat16", (256, 256), 518, 2, where, compiles=False)
    assert made["network"] == [518, 518] and made["hbm_bytes"] is None
    peak = chips.CHIPS["v5e"].peak_flops
    assert made["bound"] == pytest.approx(2 * depth_flops.total(config, 32, 518, 518) / peak)
    # 4.4 PFLOP a frame and a half of Bridge, at peak.
    hours = annotation.chip_hours(made, annotation.DATA["bridge"].windows, efficiency=0.5)
    assert hours["assumed"] == pytest.approx(2 * hours["bound"])
    assert hours["bound"] == pytest.approx(1.39e12 * 32 * 131_194 / peak / 3600, rel=1e-3)
    json.dumps(made)


@pytest.mark.slow
def test_the_command_by_formula_and_its_refusals():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "tools/plan_annotation.py", "--nocompile", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    done = run("--input_size=518,252", "--data=bridge", "--chips=v5p")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["network"] for row in rows] == [[518, 518], [252, 252]]
    assert rows[0]["chip_hours"]["bound"] > 4 * rows[1]["chip_hours"]["bound"]
    for bad, says in (("--chips=h100", "use TPUs"), ("--data=kuka", "known are bridge, fractal")):
        done = run(bad)
        assert done.returncode == 2 and says in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.slow
def test_compiled_for_one_chip_of_v5e(tmp_path):
    where = topology.parse("v5e:1x1")
    made, twice = (
        annotation.plan("vits", "bfloat16", (64, 64), 70, batch, where, True, str(tmp_path)) for batch in (1, 2)
    )
    assert made["fits"] and 0 < made["needed"] < 2**30
    # Each reads every weight at least once. More windows need not move more: a small batch is cut up in other ways.
    config = depth_anything.sized("vits", video=True, dtype="bfloat16")
    params = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    weights = 4 * sum(x.size for x in jax.tree.leaves(params))
    assert all(weights <= plan["hbm_bytes"] < 2 * weights for plan in (made, twice))
    assert annotation.plan("vits", "bfloat16", (64, 64), 70, 1, where, True, str(tmp_path)) == made


def test_the_total_of_a_report_on_memory():
    report = (
        "Memory Space: default (color=0)\nTotal bytes: 12439799808 (11.58GiB)\n\nMemory Space: vmem (color=1)\nTotal"
    )
    assert placed.total_bytes(report) == 12439799808
    with pytest.raises(ValueError, match="no total"):
        placed.total_bytes("Memory Space: vmem (color=1)\nTotal bytes: 3")
