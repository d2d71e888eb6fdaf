"""Checkpoints: other meshes, partial reads, earlier stages, no room on the disk."""

import collections
import functools
import json

import jax
import numpy as np
import pytest

from qdepth_jax import checkpoint, errors, optim, sharding, train_step
from qdepth_jax import config as config_lib
from qdepth_jax.models import policy

CONFIG = policy.sized("tiny", layers=1)
KEY = jax.random.key(0)


def state_on(mesh_config, devices):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    objective = policy.make_objective(CONFIG)
    tx = optim.make(config_lib.OptimConfig(), 10, policy.frozen_table(CONFIG))
    init = functools.partial(train_step.init_state, objective=objective, tx=tx, ema=True)
    placed = sharding.state_shardings(mesh, jax.eval_shape(init, KEY))
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init, KEY), placed
    )
    return init, placed, target


def test_a_checkpoint_of_eight_devices_restores_onto_other_meshes(tmp_path):
    init, placed, _ = state_on(config_lib.MeshConfig(1, 4, 2), 8)
    saved = jax.jit(init, out_shardings=placed)(KEY)
    with checkpoint.open_manager(str(tmp_path)) as manager:
        checkpoint.save(manager, saved, {"step": 3, "config": {}}, 3)
        manager.wait_until_finished()
    for mesh, devices in (((1, 8, 1), 8), ((2, 2, 2), 8), ((1, 1, 1), 1)):
        _, _, target = state_on(config_lib.MeshConfig(*mesh), devices)
        with checkpoint.open_manager(str(tmp_path), read_only=True) as manager:
            restored = checkpoint.restore(manager, 3, target)
        for a, b, want in zip(*(jax.tree.leaves(t) for t in (saved, restored, target)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert b.sharding.is_equivalent_to(want.sharding, b.ndim)
    model, meta = checkpoint.restore_model(str(tmp_path), {"params": target.params, "state": target.state})
    assert meta["step"] == 3
    np.testing.assert_array_equal(model["state"]["codebook"], saved.state["codebook"])


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(errors.UserError, match=r"0 MiB free, but 2 checkpoints .* choose another --workdir"):
        checkpoint.check_disk(str(tmp_path), {"x": jax.ShapeDtypeStruct((1000,), np.float32)}, 2)
    assert not list(tmp_path.iterdir())


def test_missing_and_empty_workdirs_say_so(tmp_path):
    with pytest.raises(errors.UserError, match="no checkpoints in"):
        checkpoint.read_meta(str(tmp_path / "nothing"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(errors.UserError, match="no complete checkpoint"):
        checkpoint.read_meta(str(tmp_path))


def test_lengths_may_change_between_starts_but_nothing_else(tmp_path):
    config = {"train": {"total_steps": 10, "batch_size": 8}, "seed": 0, "mesh": {"fsdp": 1}}
    checkpoint.check_same_experiment(str(tmp_path), config)
    assert not list(tmp_path.iterdir()), "the check writes nothing"
    checkpoint.write_config(str(tmp_path), config)
    longer = config | {"train": {"total_steps": 20, "batch_size": 8}, "mesh": {"fsdp": 4}}
    checkpoint.check_same_experiment(str(tmp_path), longer)
    checkpoint.write_config(str(tmp_path), longer)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["total_steps"] == 20
    with pytest.raises(errors.UserError, match="seed: 0 there, 1 here"):
        checkpoint.check_same_experiment(str(tmp_path), longer | {"seed": 1})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.UserError, match="damaged"):
        checkpoint.check_same_experiment(str(tmp_path), longer)


def test_a_damaged_checkpoint_names_its_folder_and_the_one_before(tmp_path):
    init, placed, target = state_on(config_lib.MeshConfig(1, 1, 1), 1)
    saved = jax.jit(init, out_shardings=placed)(KEY)
    with checkpoint.open_manager(str(tmp_path), keep=2) as manager:
        for step in (1, 2):
            checkpoint.save(manager, saved, {"step": step, "config": {}}, step)
        manager.wait_until_finished()
    for file in (tmp_path / "checkpoints" / "2" / "params").iterdir():
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with (
        checkpoint.open_manager(str(tmp_path), read_only=True) as manager,
        pytest.raises(errors.UserError, match=r"checkpoints/2 cannot be restored; delete .* to continue from step 1"),
    ):
        checkpoint.restore(manager, 2, target)


def test_existing_checkpoints_count_as_room(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    state = {"x": jax.ShapeDtypeStruct((2**20,), np.float32)}
    room = 9 * 2**20  # one checkpoint of 4 MiB and its allowance
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(room, 0, room))
    checkpoint.check_disk(str(tmp_path), state, 2, existing=2)
    with pytest.raises(errors.UserError, match="9 MiB free"):
        checkpoint.check_disk(str(tmp_path), state, 2)
