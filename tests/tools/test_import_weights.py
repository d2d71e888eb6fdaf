"""The import command: a file of each format to a checkpoint that other commands read; nothing half-written."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import stored_runs

from qdepth_jax import checkpoint, checkpoint_read, errors, sharding
from qdepth_jax import config as config_lib
from qdepth_jax.models import gemma, paligemma, policy, policy_config, siglip
from qdepth_jax.weights import big_vision, importing, openpi, table

ROOT = pathlib.Path(__file__).parents[2]
PALIGEMMA = paligemma.PaligemmaConfig(
    siglip=siglip.SiglipConfig(28, 14, 24, 2, 2, 40),
    vlm=gemma.ExpertConfig(32, 64),
    layers=2,
    heads=4,
    kv_heads=1,
    head_dim=8,
    vocabulary=128,
)
MESH = config_lib.MeshConfig(1, -1, 1)


@pytest.fixture(scope="module")
def command():
    """The tool as a module."""
    with stored_runs.tool_module("import_weights") as module:
        yield module


def random(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = importing.shapes_of(config)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def write_npz(folder, name="pt.npz", drop=""):
    saved = dict(table.save(random(PALIGEMMA), big_vision.rows(PALIGEMMA)))
    np.savez(folder / name, **{f"params/{key}": array for key, array in saved.items() if key != drop})
    return str(folder / name)


def stored(output, config):
    """All parameters of an imported checkpoint, on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), importing.shapes_of(config)
    )
    return checkpoint.restore_model(str(output), {"params": target, "state": {}})


def test_a_checkpoint_that_others_read(tmp_path, command):
    path = write_npz(tmp_path)
    output = tmp_path / "deep" / "ckpt"
    summary = command.run("big_vision", path, str(output), MESH)
    assert summary["read"] == 32 and summary["unused"] == [] and summary["missing"] == []
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(random(PALIGEMMA)))
    assert json.loads(json.dumps(summary)) == summary
    variables, meta = stored(output, PALIGEMMA)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(variables["params"]), random(PALIGEMMA))
    assert meta["step"] == 0 and meta["source"] == {"format": "big_vision", "files": {"pt.npz": os.path.getsize(path)}}
    config = config_lib.build(paligemma.PaligemmaConfig, meta["config"]["model"], "model")
    assert config == PALIGEMMA and meta["config"]["model_kind"] == "paligemma"
    assert sorted(p.name for p in output.parent.iterdir()) == ["ckpt"]


@pytest.mark.slow
def test_a_policy_starts_from_it(tmp_path, command):
    """openpi's pi0 in Orbax; the policy that is stored loads with the command that loads trained ones."""
    import orbax.checkpoint as ocp

    from qdepth_jax import earlier_stages

    sizes = {
        "siglip": siglip.SiglipConfig(28, 14, 24, 2, 2, 32),
        "vlm": gemma.ExpertConfig(32, 48),
        "action": gemma.ExpertConfig(16, 24),
        "depth": None,
        "layers": 2,
        "heads": 4,
        "head_dim": 8,
        "vocabulary": 40,
        "action_dim": 8,
        "proprio_dim": 8,
        "views": openpi.VIEWS,
        "text_length": 48,
        "horizon": 6,
    }
    config = policy_config.PolicyConfig(**{**policy_config.CONVENTIONS["pi0"], **sizes})
    params = random(config)
    tree = {"params": table.nest(dict(table.save(params, openpi.rows(config))))}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave(tree))
    summary = command.run("openpi", str(tmp_path), str(tmp_path / "ckpt"), MESH, changes=["horizon=6"])
    assert summary["read"] == 50
    kind, found, variables, _ = earlier_stages.load_model(str(tmp_path / "ckpt"))
    assert kind == "policy" and found == config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(variables["params"]), params)


@pytest.mark.slow
def test_bfloat16_is_rounded_once(tmp_path, command):
    command.run("big_vision", write_npz(tmp_path), str(tmp_path / "ckpt"), MESH, dtype="bfloat16")
    folder = tmp_path / "ckpt" / "checkpoints" / "0"
    leaves = checkpoint_read.read_meta(folder)["leaves"]["params"]
    assert {leaf["dtype"] for leaf in leaves.values()} == {"bfloat16"}


@pytest.mark.slow
def test_every_mesh_stores_the_same(tmp_path, command):
    path, sums = write_npz(tmp_path), []
    for name, mesh in (("a", MESH), ("b", config_lib.MeshConfig(2, 2, 2)), ("c", config_lib.MeshConfig(8, 1, 1))):
        command.run("big_vision", path, str(tmp_path / name), mesh)
        sums.append(checkpoint_read.read_meta(tmp_path / name / "checkpoints" / "0")["leaves"])
    assert sums[0] == sums[1] == sums[2]


def test_nothing_is_left_of_a_failure(tmp_path, command, monkeypatch):
    with pytest.raises(errors.UserError, match="encoder_norm/bias: not in the file"):
        command.run(
            "big_vision", write_npz(tmp_path, drop="img/Transformer/encoder_norm/bias"), str(tmp_path / "ckpt"), MESH
        )
    path = write_npz(tmp_path, "good.npz")

    def full(workdir, params, meta):
        pathlib.Path(workdir, "checkpoints", "0.orbax-checkpoint-tmp").mkdir(parents=True)
        raise errors.UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_params", full)
    with pytest.raises(errors.UserError, match="disk is full"):
        command.run("big_vision", path, str(tmp_path / "ckpt"), MESH)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.npz", "pt.npz"]


def test_weights_whose_sizes_cannot_be_told(tmp_path, command):
    with pytest.raises(errors.UserError, match="no big_vision PaliGemma weights: llm/layers/mlp/linear is not there"):
        command.run("big_vision", write_npz(tmp_path, drop="llm/layers/mlp/linear"), str(tmp_path / "ckpt"), MESH)
    np.savez(tmp_path / "odd.npz", **{"img/pos_embedding": np.zeros(3), "llm/layers/attn/q_einsum/w": np.zeros(3)})
    with pytest.raises(errors.UserError, match="is it a file of that code base"):
        command.run("big_vision", str(tmp_path / "odd.npz"), str(tmp_path / "ckpt"), MESH)


def test_damage_found_while_reading_leaves_nothing(tmp_path, command):
    path = pathlib.Path(write_npz(tmp_path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match="is damaged"):
        command.run("big_vision", str(path), str(tmp_path / "ckpt"), MESH)
    assert not (tmp_path / "ckpt").exists()


def test_weights_that_no_device_can_hold(tmp_path, command, monkeypatch):
    monkeypatch.setattr(importing.npz, "memory_bytes", lambda: 1000)
    with pytest.raises(errors.UserError, match=r"GiB on each of 8 devices.*--dtype=bfloat16"):
        command.run("big_vision", write_npz(tmp_path), str(tmp_path / "ckpt"), MESH)


def test_sizes_that_the_mesh_does_not_divide(tmp_path, command):
    with pytest.raises(errors.UserError, match=r"(?s)cannot shard this state.*nearest layouts that work"):
        command.run("big_vision", write_npz(tmp_path), str(tmp_path / "ckpt"), config_lib.MeshConfig(1, 1, 8))
    assert sharding.AXES == ("replica", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("horizon", "must be FIELD=VALUE"),
        ("norm_ep=1", 'no field norm_ep: did you mean "norm_eps"'),
        ("flow.steps=3", "no section flow"),
        ("layers=two", "model.layers must be int"),
        pytest.param("layers=3", "the model needs", marks=pytest.mark.slow),
    ],
)
def test_changes_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(errors.UserError, match=message):
        importing.open_weights("big_vision", write_npz(tmp_path), changes=[change])


def test_policies_and_fields_of_fields():
    config = importing.changed(policy.sized("tiny"), {"flow.steps": 3, "horizon": 8, "depth": None})
    assert (config.flow.steps, config.horizon, config.depth) == (3, 8, None)


def call(*flags):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "import_weights.py"), *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_flags():
    done = call("--help")
    assert done.returncode == 0 and "lerobot_pi0" in done.stdout
    done = call("--format=gguf", "--input=x", "--output=y")
    assert done.returncode == 2 and "gguf" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    path, output = write_npz(tmp_path), tmp_path / "ckpt"
    arguments = ("--format=big_vision", f"--input={path}", f"--output={output}", "--image_size=42", "--mesh=1,-1,2")
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["image_size"] == 42 and summary["read"] == 32 and "reading big_vision" in done.stderr
    before = sorted(p.stat().st_mtime_ns for p in output.rglob("*"))
    done = call(*arguments)
    assert done.returncode == 2 and "exists: choose another folder" in done.stderr
    assert sorted(p.stat().st_mtime_ns for p in output.rglob("*")) == before
    for given, message in (
        ((*arguments[:2], f"--output={tmp_path}/b", "--mesh=1,2"), "must be three numbers"),
        (("--format=openpi", f"--input={path}", f"--output={tmp_path}/b"), "is no Orbax checkpoint"),
        (("--format=hf_paligemma", f"--input={tmp_path}", f"--output={tmp_path}/b"), "holds 0 .safetensors files"),
        ((*arguments[:1], "--input=s3://b/x.npz", f"--output={tmp_path}/b"), "only local folders and gs://"),
    ):
        done = call(*given)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()
