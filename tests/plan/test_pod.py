"""Whole plans: by formula in the fast suite, by the TPU compiler where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import bridge, demo
from qdepth_jax import chips, errors, sharding
from qdepth_jax.plan import estimate, pod, program, report, search, state, topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(scope="module")
def full():
    return program.plan_of(bridge.get_config())


def test_state_falls_as_one_over_fsdp_up_to_128(full):
    sizes = state.by_fsdp(full.state)
    assert [ways for ways, _ in sizes] == [1, 2, 4, 8, 16, 32, 64, 128], "SigLIP's width divides no further"
    whole = sizes[0][1]
    for ways, size in sizes:
        assert size == pytest.approx(whole / ways, rel=0.03)  # what the table replicates is the rest
    on_chip = state.of({"replica": 2, "fsdp": 128, "tensor": 1}, full.state)
    assert on_chip.total == sizes[-1][1] and on_chip.copied == ()


def test_a_large_leaf_that_lies_whole_is_named():
    import jax

    leaf = jax.ShapeDtypeStruct((1024, 1024), "float32")
    on_chip = state.of({"replica": 1, "fsdp": 4, "tensor": 1}, {"params": {"img": {"bias": leaf}}})
    assert on_chip.copied == (("params/img/bias", 2**22, "(bias|scale)$"),)


def test_formula_collectives_are_zero_3(full):
    sizes = {"replica": 1, "fsdp": 16, "tensor": 1}
    found = estimate.network(full, sizes)
    trained = 2_947_000_000  # weights split over fsdp that have a gradient
    gathered = sum(item.count * item.payload for item in found if item.kind == "all-gather")
    scattered = sum(item.count * item.payload for item in found if item.kind == "reduce-scatter")
    micro = full.train.micro_batches
    assert gathered == 2 * scattered == pytest.approx(2 * micro * 2 * trained, rel=0.05)
    replicas = estimate.network(full, {"replica": 4, "fsdp": 4, "tensor": 1})
    summed = sum(item.count * item.payload for item in replicas if item.kind == "all-reduce")
    assert summed == pytest.approx(scattered / 4, rel=0.01)


def test_plan_without_compiling_says_so_and_adds_up():
    config = bridge.get_config()
    result = pod.plan(config, topology.parse("v5e-16"), compiles=False)
    text = report.text(result)
    assert "ESTIMATED without compiling" in text and "16 h100" in text
    assert result["batch"] == {"global": 1024, "micro_batches": 4, "ways": 16, "per_chip": 16}
    line = result["roofline"][0]
    assert line["best"] == max(line[name] for name in ("compute", "hbm", "ici", "dcn"))
    assert line["hours"] == pytest.approx(line["best"] * config.train.total_steps / 3600)
    assert line["compute"] == result["flops"]["executed_per_step"] / (16 * chips.CHIPS["v5e"].peak_flops)
    json.dumps(result)


def test_a_batch_that_does_not_divide_names_one_that_does(full):
    odd = full._replace(train=dataclasses.replace(full.train, batch_size=1000))
    with pytest.raises(errors.UserError, match=r"batch_size=1000 .* 4 x 1 x 16: use 1024"):
        sharding.check_batch(odd.train, {"replica": 1, "fsdp": 16, "tensor": 1})


@pytest.mark.slow
def test_search_ranks_what_fits_and_says_why_not():
    rows = search.candidates(bridge.get_config(), topology.parse("v5e-16"))
    fitting = [row for row in rows if row["best"]]
    assert fitting == sorted(fitting, key=lambda row: row["best"]) == rows[: len(fitting)]
    assert rows[0]["needed"] < search.DOUBT * chips.CHIPS["v5e"].usable_bytes
    refused = [row["verdict"] for row in rows if not row["best"]]
    assert any("too large by" in verdict for verdict in refused)
    assert any(row["fsdp"] == 1 and "too large" in row["verdict"] for row in rows), "35 GiB of state on one chip"
    assert "too large by" in report.candidates(rows)


@pytest.mark.slow
def test_the_command_without_libtpu_says_what_is_missing():
    run = subprocess.run(
        [sys.executable, ROOT / "tools/plan_pod.py", f"--config={ROOT}/experiments/demo.py", "--topology=h100-8"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert "NOT COMPILED" in run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["chips"] == 8


@needs_libtpu
@pytest.mark.slow
def test_compiled_for_four_chips_of_v5e():
    topology.prepare_environment()
    config = demo.get_config()
    config.train.batch_size, config.train.micro_batches = 16, 2
    config.model.dtype, config.model.remat, config.model.scan = "bfloat16", "full", True
    config.model.layers, config.model.siglip.depth = 2, 2
    result = pod.plan(config, topology.parse("v5e:2x2"), compiles=True)
    memory = result["memory"]
    assert memory["compiled"] and memory["fits"] and 0 < memory["needed"] < 2**30
    rows = {(row["kind"], row["dtype"]): row for row in result["collectives"]["rows"]}
    assert ("all-gather", "bf16") in rows, "weights are gathered in the dtype of the activations"
    assert {row["axes"] for row in rows.values()} == {"fsdp"}
    assert not result["collectives"]["unknown_loops"]
    # Weights and gradients travel, activations do not.
    assert result["collectives"]["sent"] < 2.5 * result["collectives"]["formula_sent"]
