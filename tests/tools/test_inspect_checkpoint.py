"""What the inspection says of a run, an import and an export, and of what differs between two of them."""

import json
import sys

import jax
import numpy as np
import pytest
import stored_runs
from checkpoint_states import flip_in_array, make_state, mesh_of
from checkpoint_states import write as write_state

from qdepth_jax import checkpoint, checkpoint_report, errors, export_model, stored_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, stored_runs.write(folder, "policy", stored_runs.BASELINE, steps=(6, 7))


def find(path, step=None):
    return stored_model.find(str(path), step)


def test_the_tree_of_a_run(run):
    lines, summary = checkpoint_report.describe(find(run[0]), [])
    text = "\n".join(lines)
    count = sum(x.size for x in jax.tree.leaves(run[1].params))
    assert summary["items"]["params"]["elements"] == summary["items"]["ema"]["elements"] == count
    assert sum(summary["parts"].values()) == count and set(summary["parts"]) == {"vision", "vlm", "action"}
    assert summary["step"] == 7 and summary["data"] == {"libero_object": "f" * 40}
    assert "llm/embedder/input_embedding" in text and "float32   [640, 32]" in text
    assert any(line.startswith("train  opt_state/0/mu/x") for line in lines)
    short, _ = checkpoint_report.describe(find(run[0], 6), ["params"], depth=1)
    assert short[0].endswith("step 6") and any(line.startswith("params img ") and "arrays" in line for line in short)
    with pytest.raises(errors.UserError, match="no item 'state': there are params, ema, train"):
        checkpoint_report.describe(find(run[0]), ["state"])


def test_how_a_leaf_was_split(tmp_path):
    write_state(tmp_path, [4], mesh_of(1, 4, 2))
    found = stored_model.shardings(find(tmp_path))
    assert found["params"]["img/w"] == "(fsdp, tensor) on replica=1 fsdp=4 tensor=2"
    assert found["train"]["opt_state/0/0/mu/b"] == "(tensor) on replica=1 fsdp=4 tensor=2"


def test_equal_checkpoints_are_equal(run, tmp_path):
    export_model.write_export(
        str(run[0]), str(tmp_path / "out"), export_model.Options(average=False, format="safetensors"), lambda line: None
    )
    lines, summary = checkpoint_report.compare(find(run[0]), find(tmp_path / "out"), ["params"], values=True)
    assert summary["same"] and summary["equal"] == len(jax.tree.leaves(run[1].params)) and not summary["fields"]
    assert "0 not; no field differs" in lines[-1]
    _, whole = checkpoint_report.compare(find(run[0]), find(tmp_path / "out"), [])
    assert not whole["same"] and whole["only_first"] == sum(
        len(v) for k, v in find(run[0]).leaves.items() if k != "params"
    )


def save(folder, params):
    config = {"config": {"model_kind": "policy", "name": folder.name, "model": {}}}
    checkpoint.save_params(str(folder), jax.device_put(params, jax.devices()[0]), config)


def test_every_kind_of_difference(tmp_path):
    params = make_state().params
    save(tmp_path / "a", params | {"gone": np.ones(2, np.float32), "s": np.ones(3, np.float32)})
    other = {"img": {"w": params["img"]["w"].copy()}, "b": params["b"].astype(np.float16).astype(np.float32)}
    other["img"]["w"][2, 3] += 0.5
    save(tmp_path / "b", other | {"new": np.ones(2, np.float32), "s": np.ones(4, np.float32)})
    a, b = find(tmp_path / "a"), find(tmp_path / "b")
    lines, summary = checkpoint_report.compare(a, b, [], values=True)
    text = "\n".join(lines)
    assert "only in the first: params/gone" in text and "only in the second: params/new" in text
    assert "other shape: params/s: [3] / [4]" in text and "field config.name: 'a' there, 'b' here" in text
    relative = 0.5 / abs(params["img"]["w"][2, 3])
    assert f"other numbers: params/img/w: at most 0.5 absolute, {relative:.3g} relative" in text
    assert summary["largest"]["leaf"] == "params/img/w" and summary["largest"]["absolute"] == 0.5
    assert summary["changed"] == 2 and not summary["same"]
    _, quick = checkpoint_report.compare(a, b, [])
    assert quick["changed"] == 2 and quick["largest"] == {}


def test_numbers_that_are_not_finite_are_infinitely_far(tmp_path):
    x = np.asarray([1.0, np.nan, 2.0], np.float32)
    save(tmp_path / "a", {"x": x})
    save(tmp_path / "b", {"x": np.asarray([1.0, np.nan, np.inf], np.float32)})
    _, summary = checkpoint_report.compare(find(tmp_path / "a"), find(tmp_path / "b"), [], values=True)
    assert summary["largest"]["absolute"] == "inf"
    assert json.loads(json.dumps(summary, allow_nan=False))


def test_damage_is_said(tmp_path):
    for name in ("a", "b"):
        write_state(tmp_path / name, [4], state=make_state(seed=name == "b"))
    flip_in_array(tmp_path / "b" / "checkpoints" / "4", "params", "b/")
    with pytest.raises(errors.UserError, match="other numbers than were saved in params/b"):
        checkpoint_report.compare(find(tmp_path / "a"), find(tmp_path / "b"), ["params"], values=True)


def test_the_command(run, capsys):
    with stored_runs.command("inspect_checkpoint") as inspect:
        assert inspect(str(run[0])) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["model_kind"] == "policy"
        assert inspect(str(run[0]), str(run[0]), "--values", "--items=params,train") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["same"]
        assert inspect(str(run[0])) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] == 53
    with stored_runs.command("inspect_checkpoint") as inspect:
        with pytest.raises(errors.UserError, match="one or two paths"):
            inspect()
        with pytest.raises(errors.UserError, match="no checkpoints in"):
            inspect(str(run[0] / "checkpoints"))


def test_values_are_read_and_not_only_their_sums(run, tmp_path, capsys):
    """A bit that flipped in a file leaves the recorded sums equal: only reading tells."""
    for name in ("a", "b"):
        export_model.write_export(
            str(run[0]), str(tmp_path / name), export_model.Options(format="safetensors"), lambda line: None
        )
    path = tmp_path / "b" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))
    with stored_runs.command("inspect_checkpoint") as inspect:
        assert inspect(str(tmp_path / "a"), "--values") == 0
        with pytest.raises(errors.UserError, match="other numbers than were saved"):
            inspect(str(tmp_path / "a"), str(tmp_path / "b"), "--values")
    path.write_bytes(bytes(data[:-8]))
    with pytest.raises(errors.UserError, match=r"model\.safetensors has .* bytes, .* were written"):
        checkpoint_report.describe(find(tmp_path / "b"), [])


def test_files_of_torch_are_inspected_without_it(run, tmp_path, monkeypatch):
    export_model.write_export(
        str(run[0]), str(tmp_path / "a"), export_model.Options(format="safetensors"), lambda line: None
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    lines, summary = checkpoint_report.describe(find(tmp_path / "a")._replace(form="open_pi_zero_pt"), [])
    assert summary["form"] == "open_pi_zero_pt" and any("llm/embedder" in line for line in lines)
