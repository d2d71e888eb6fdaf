"""The parity command: green on the golden vector, red on a damaged one, a message on an unusable one."""

import importlib.util
import json
import os
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", ROOT.parent / "shared"))
GOLDEN = SHARED / "fixtures" / "open_pi_zero_tiny.npz"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_parity = tool("check_parity")


@pytest.fixture(scope="module")
def arrays():
    if not GOLDEN.is_file():
        pytest.skip(f"no golden vector at {GOLDEN}; QDEPTH_SHARED names the folder that holds fixtures/")
    return check_parity.read(GOLDEN)


@pytest.fixture(scope="module")
def rows(arrays):
    return check_parity.compare_open_pi_zero(arrays, 2e-5, 1e-4)


def test_golden_vector(rows, capsys):
    assert check_parity.report(rows) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] and result["compared"] > 100
    assert max(result[name] for name in ("vision_features", "velocity", "infer_actions")) < 2e-6
    names = {row["name"] for row in rows}
    assert "grad_norm/joint_model.mixtures.vlm.layers.2.self_attn.q_proj.weight" in names


def test_a_wrong_reference_is_red(arrays, rows, capsys):
    damaged = [dict(row) for row in rows]
    damaged[1]["error"] = 3e-5
    assert check_parity.report(damaged) == 1
    damaged[1]["error"] = float("nan")
    assert check_parity.report(damaged) == 1
    capsys.readouterr()


def test_gradient_rules(arrays):
    """A key the reference lacks needs an exactly zero gradient of ours, except for the frozen set."""
    config, _ = check_parity.policy_from(arrays)
    value = check_parity.gradient_rows
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    absent = "joint_model.mixtures.vlm.layers.2.self_attn.o_proj.weight"
    assert [r["error"] for r in value(config, {}, {absent: zero}, 1e-4)] == [0.0]
    assert [r["error"] > r["tolerance"] for r in value(config, {}, {absent: one}, 1e-4)] == [True]
    frozen = "joint_model.mixtures.vlm.layers.2.self_attn.v_proj.weight"
    assert value(config, {}, {frozen: one}, 1e-4) == []
    unknown = value(config, {"grad_norm/new.weight": np.float32(1)}, {}, 1e-4)
    assert unknown[0]["error"] == float("inf")


def _main(*arguments):
    return check_parity.main(["check_parity.py", *map(str, arguments)])


def test_unusable_files(arrays, tmp_path, capsys):
    check_parity.flags.FLAGS.mark_as_parsed()
    assert _main(tmp_path / "nothing.npz") == 2
    (tmp_path / "text.npz").write_text("no archive")
    assert _main(tmp_path / "text.npz") == 2
    np.savez(tmp_path / "other.npz", params=np.zeros(2))
    assert _main(tmp_path / "other.npz") == 2
    few = {name: array for name, array in arrays.items() if name not in ("t", "velocity")}
    np.savez(tmp_path / "few.npz", **few)
    assert _main(tmp_path / "few.npz") == 2
    odd = {**arrays, "input_ids": arrays["input_ids"][:, ::-1]}
    np.savez(tmp_path / "odd.npz", **odd)
    assert _main(tmp_path / "odd.npz") == 2
    gap = {name: array for name, array in arrays.items() if name != "w/action_decoder.bias"}
    np.savez(tmp_path / "gap.npz", **gap)
    assert _main(tmp_path / "gap.npz") == 2
    messages = capsys.readouterr().err
    for fragment in (
        "nothing.npz is no file",
        "cannot be read as .npz",
        "unknown layout",
        "lacks ['t', 'velocity']",
        "image tokens",
        "action_decoder.bias: not in the file",
    ):
        assert fragment in messages
