"""Checkpoints: other meshes, damage, wrong models, which ones stay, no room on the disk."""

import collections
import json
import resource
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import flip_in_array, make_state, mesh_of, on_devices, target_on, write

from qdepth_jax import checkpoint, checkpoint_read, errors, train_step, workdirs
from qdepth_jax import config as config_lib


def latest(folder, state=None, mesh=None, **arguments):
    with checkpoint.open_manager(str(folder), config_lib.TrainConfig(keep_checkpoints=9)) as manager:
        target = target_on(mesh or mesh_of(1, 1, 1), state or make_state())
        return checkpoint.restore_latest(manager, target, **arguments)


@pytest.mark.parametrize("save_on", [(1, 4, 2), pytest.param((2, 1, 1), marks=pytest.mark.slow)])
def test_a_checkpoint_restores_onto_any_mesh(tmp_path, save_on):
    saved = write(tmp_path, [3], mesh_of(*save_on))
    for sizes in ((1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 8, 1)):
        mesh = mesh_of(*sizes)
        restored, meta, step = latest(tmp_path, mesh=mesh)
        assert meta["step"] == step == 3 and int(restored.step) == 3
        want = target_on(mesh, make_state())
        saved = saved.replace(step=restored.step)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        for a, b, w in zip(*(jax.tree.leaves(t) for t in (saved, restored, want)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert b.dtype == a.dtype and b.sharding.is_equivalent_to(w.sharding, b.ndim)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=device), make_state())
    for average, want in ((True, saved.ema), (False, saved.params)):
        model, _ = checkpoint.restore_model(str(tmp_path), {"params": target.params, "state": target.state}, average)
        np.testing.assert_array_equal(model["params"]["img"]["w"], want["img"]["w"])
        np.testing.assert_array_equal(model["state"]["codebook"], saved.state["codebook"])


def test_a_state_donated_right_after_the_save_is_saved_as_it_was(tmp_path):
    state = on_devices(make_state(), mesh_of(1, 4, 2))
    before = jax.device_get(state)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
    with checkpoint.open_manager(str(tmp_path)) as manager:
        checkpoint.save(manager, state, {"step": 1}, 1)
        jax.block_until_ready(change(state))
    restored, _, _ = latest(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), before)


def test_every_field_of_the_train_state_is_saved():
    @flax.struct.dataclass
    class Wider(train_step.TrainState):
        skipped: jax.Array = 0
        skipped_in_row: jax.Array = 0

    fields = {k: v for k, v in vars(make_state()).items() if k not in ("skipped", "skipped_in_row")}
    items = checkpoint_read.items_of(Wider(**fields, skipped=np.int32(5), skipped_in_row=np.int32(2)))
    assert int(items["train"]["skipped"]) == 5 and int(items["train"]["skipped_in_row"]) == 2
    assert {"params", "state", "ema", "train"} == items.keys()


def test_the_random_key_survives(tmp_path):
    for implementation in ("threefry2x32", "rbg"):
        key = jax.random.key(12, impl=implementation)
        meta = json.loads(json.dumps({"random_key": checkpoint.random_key_meta(key)}))
        assert jax.random.bits(checkpoint.random_key_of(meta)) == jax.random.bits(key)


def test_one_changed_bit_is_found_and_the_checkpoint_before_is_used(tmp_path, capsys):
    write(tmp_path, [1, 2, 3])
    folder = tmp_path / "checkpoints"
    flip_in_array(folder / "3", "params", "img.w/")
    flip_in_array(folder / "2", "ema", "b/")
    barriers = []
    state, meta, step = latest(tmp_path, barrier=barriers.append)
    assert meta["step"] == step == int(state.step) == 1 and len(barriers) == 1
    err = capsys.readouterr().err
    assert "checkpoints/3: other numbers than were saved in params/img/w." in err
    assert "checkpoints/2: other numbers than were saved in ema/b." in err and "CONTINUING FROM STEP 1" in err
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"1", "damaged.2.0", "damaged.3.0"}, "moved aside, not deleted"
    # The run goes on, saves the same steps again, and damages its names once more.
    write(tmp_path, [3])
    flip_in_array(folder / "3", "params", "img.w/")
    assert latest(tmp_path)[2] == 1
    assert (folder / "damaged.3.1").is_dir()
    model_target = target_on(mesh_of(1, 1, 1), make_state())
    write(tmp_path, [4])
    flip_in_array(folder / "4", "ema", "b/")
    _, meta = checkpoint.restore_model(str(tmp_path), {"params": model_target.params, "state": model_target.state})
    assert meta["step"] == 1 and (folder / "4").is_dir(), "a reader moves nothing"


def test_nothing_is_moved_where_none_is_good(tmp_path):
    write(tmp_path, [1, 2])
    for step in "12":
        flip_in_array(tmp_path / "checkpoints" / step, "params", "b/")
    with pytest.raises(errors.UserError, match=r"nothing was moved or deleted.*\n  step 2: .*params/b.*\n  step 1: "):
        latest(tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


def test_a_failure_on_one_host_is_a_failure_on_all(tmp_path):
    write(tmp_path, [1, 2])
    answers = iter([True, False])  # all can read; another one found damage in meta
    _, _, step = latest(tmp_path, agree=lambda ok: ok and next(answers, True), is_main=False)
    assert step == 1
    assert (tmp_path / "checkpoints" / "2").is_dir(), "only the main process moves files"
    with pytest.raises(errors.UserError, match="no sign of damage: another process says why"):
        latest(tmp_path, agree=lambda ok: False)


def test_a_store_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, [1, 2])

    def refuse(*_):
        try:
            raise ValueError("PERMISSION_DENIED: Error reading gs://b/x: HTTP response code: 403")
        except ValueError as error:
            raise RuntimeError("reading failed") from error

    monkeypatch.setattr(checkpoint_read, "_read_item", refuse)
    with pytest.raises(errors.UserError, match="cannot be read at the moment, which is no sign of damage: Runtime"):
        latest(tmp_path)


def test_a_checkpoint_of_another_model_lists_the_leaves_and_moves_nothing(tmp_path):
    write(tmp_path, [1, 2])
    state = make_state()
    other = state.replace(
        params={"img": {"w": np.zeros((8, 32), np.float32)}, "new": np.zeros(3, np.float32)},
        state=state.state | {"codebook": state.state["codebook"].astype(np.float16)},
        ema=None,
    )
    with pytest.raises(errors.UserError) as raised:
        latest(tmp_path, other)
    assert str(raised.value).splitlines()[1:] == [
        "  ema/b: float32[8] in the checkpoint, not here",
        "  ema/img/w: float32[8, 16] in the checkpoint, not here",
        "  params/img/w: float32[8, 16] in the checkpoint, float32[8, 32] here",
        "  params/new: not in the checkpoint, float32[3] here",
        "  params/b: float32[8] in the checkpoint, not here",
        "  state/codebook: float32[4, 8] in the checkpoint, float16[4, 8] here",
    ]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}

    def refuse(meta):
        raise errors.UserError(f"not this one: {meta['step']}")

    with pytest.raises(errors.UserError, match="not this one: 2"):
        latest(tmp_path, check=refuse)


def files_of(folder):
    """Relative names of the files of one checkpoint, data files with random names reduced to their folder."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


@pytest.mark.slow
def test_damage_to_any_file_is_found_or_harmless(tmp_path, capsys):
    """Every file of a committed checkpoint cut, emptied, deleted, and with bits flipped: never other numbers."""
    # Wide enough that arrays lie in files of their own: up to 1 KB, Orbax writes them into its index.
    saved = write(tmp_path, [1, 2], mesh_of(1, 2, 1), make_state(width=512))
    folder, target = tmp_path / "checkpoints", target_on(mesh_of(1, 1, 1), make_state(width=512))
    want, outcomes = jax.device_get(saved.replace(step=np.int32(2))), collections.Counter()
    with checkpoint.open_manager(str(tmp_path)) as manager:
        for n, file in enumerate(files_of(folder / "2")):
            content = file.read_bytes()
            harms = {"cut": content[: len(content) // 2], "deleted": None}
            for share in (0.1 * (n % 10), 0.999):
                changed = bytearray(content)
                changed[int(len(content) * share)] ^= 1 << (n % 8)
                harms[f"flipped at {share}"] = bytes(changed)
            for harm, bytes_now in harms.items():
                file.unlink() if bytes_now is None else file.write_bytes(bytes_now)
                state, meta, step = checkpoint.restore_latest(manager, target)
                assert meta["step"] == step == int(state.step), (file, harm)
                state = jax.device_get(state).replace(step=np.int32(2))
                jax.tree.map(np.testing.assert_array_equal, state, want)
                said, aside = "DAMAGED CHECKPOINT" in capsys.readouterr().err, folder / "damaged.2.0"
                assert said == (step == 1) == aside.exists(), (file, harm)
                outcomes["found" if said else "harmless"] += 1
                if said:
                    aside.rename(folder / "2")
                file.write_bytes(content)
    # Harmless: markers of a finished save, and what each process wrote before it was merged into one index.
    assert outcomes["found"] > 60, outcomes


def steps_in(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_newest_every_and_best_stay(tmp_path):
    train = config_lib.TrainConfig(
        keep_checkpoints=2, keep_every=4, keep_best=2, best_metric="val/loss", best_mode="min", eval_every=1
    )
    values = {1: 5.0, 2: 1.0, 3: float("nan"), 5: 3.0, 6: None, 7: 2.0, 8: 9.0, 9: 8.0}
    state = on_devices({"x": np.zeros(3, np.float32)}, mesh_of(1, 1, 1))
    state = train_step.TrainState(
        **{f: jnp.int32(0) for f in checkpoint_read.scalar_fields()}, params=state, state={}, opt_state=(), ema=None
    )

    def run(steps):
        with checkpoint.open_manager(str(tmp_path), train) as manager:
            for step in steps:
                value = values.get(step, 4.5)
                metrics = None if value is None else {"val/loss": value, "val/other": -value}
                checkpoint.save(manager, state, {"step": step}, step, metrics)
            manager.wait_until_finished()

    run(range(1, 7))
    assert steps_in(tmp_path) == [2, 4, 5, 6], "best 2 and 5, multiple 4, newest 5 and 6"
    # A damaged meta forgets a metric, it does not stop the run.
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    run(range(7, 10))
    assert steps_in(tmp_path) == [2, 4, 7, 8, 9], "metrics of the earlier start count: 2 stays, 7 pushes 5 out"
    with (
        checkpoint.open_manager(str(tmp_path), train) as manager,
        pytest.raises(errors.UserError, match=r"best_metric='val/loss' is none of .*: use one of val/other"),
    ):
        checkpoint.save(manager, state, {"step": 10}, 10, {"val/other": 1.0})
    assert checkpoint.read_meta(str(tmp_path))["metrics"]["val/other"] == -8.0


def test_remains_of_an_interrupted_save_are_removed(tmp_path):
    write(tmp_path, [1])
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "big").write_bytes(bytes(1000))
    assert latest(tmp_path)[2] == 1
    assert not half.exists()


def test_a_step_is_saved_once(tmp_path):
    write(tmp_path, [3])
    with pytest.raises(ValueError, match="already holds step 3: step 3 cannot be saved"):
        write(tmp_path, [3])


def test_missing_and_empty_workdirs_say_so(tmp_path):
    with pytest.raises(errors.UserError, match="no checkpoints in"):
        checkpoint.read_meta(str(tmp_path / "nothing"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(errors.UserError, match="no complete checkpoint"):
        checkpoint.read_meta(str(tmp_path))
    with pytest.raises(errors.UserError, match="no complete checkpoint"):
        latest(tmp_path)


def disk_of(monkeypatch, free):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda _: usage(10**9, 0, free))


def test_no_room_is_said_before_a_checkpoint_is_begun(tmp_path, monkeypatch, capsys):
    write(tmp_path, [1])
    disk_of(monkeypatch, 5 * 2**20)
    write(tmp_path, [2])
    assert "DISK NEARLY FULL" in capsys.readouterr().err
    disk_of(monkeypatch, 3 * 2**20)
    with pytest.raises(errors.UserError, match=r"no room for the checkpoint of step 3: .* 3 MiB free, it needs 4 MiB"):
        write(tmp_path, [3])
    assert latest(tmp_path)[2] == 2


def test_a_disk_that_fills_during_a_save_leaves_the_earlier_ones(tmp_path):
    write(tmp_path, [1, 2])
    state = on_devices(make_state(), mesh_of(1, 1, 1))
    noise = np.random.default_rng(0).standard_normal(2**18).astype(np.float32)
    big = state.replace(params=state.params | {"b": jax.device_put(noise)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(errors.UserError, match=r"is full; earlier checkpoints are complete. Free space and give"),
            checkpoint.open_manager(str(tmp_path), config_lib.TrainConfig(keep_checkpoints=9)) as manager,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))  # writes beyond it fail in the background
            checkpoint.save(manager, big, {"step": 3}, 3)
            checkpoint.save(manager, state, {"step": 4}, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert latest(tmp_path)[2] == 2
    # Threads of the failed save may still tidy up in this very process, where a user would have a new one.
    before, now = None, sorted(tmp_path.rglob("*"))
    while now != before:
        time.sleep(0.3)
        before, now = now, sorted(tmp_path.rglob("*"))
    write(tmp_path, [3])
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2", "3"}, "no remains"


def test_parameters_alone_are_a_checkpoint_to_start_from(tmp_path):
    mesh = mesh_of(1, 4, 2)
    state = on_devices(make_state(), mesh)
    params = state.params
    checkpoint.save_params(str(tmp_path), params, {"config": {"name": "imported"}, "source": "elsewhere"})
    checkpoint.save_params(str(tmp_path / "exported"), params, {}, state.state, step=7)
    assert checkpoint.read_meta(str(tmp_path / "exported"))["leaves"].keys() == {"params", "state"}
    assert checkpoint.read_meta(str(tmp_path / "exported"))["step"] == 7

    def choose(there):
        return {
            path: jax.ShapeDtypeStruct(
                x["shape"], x["dtype"], sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            )
            for path, x in there.items()
        }

    found, meta = checkpoint.restore_leaves(str(tmp_path), choose)
    assert meta["step"] == 0 and meta["source"] == "elsewhere" and found.keys() == {"img/w", "b"}
    np.testing.assert_array_equal(found["img/w"], params["img"]["w"])
    with pytest.raises(errors.UserError, match=r"holds checkpoints already \(steps \[0\]\)"):
        checkpoint.save_params(str(tmp_path), params, {})
