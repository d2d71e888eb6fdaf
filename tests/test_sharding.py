"""The mesh and the table: total coverage, no silent replication, clear errors; slices; the rows a host reads."""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import errors, optim, sharding, sharding_table, train_step
from qdepth_jax.models import policy, tokenizer

QUANTISERS = ("ema", "l2", "plain", "fsq")
GOLDEN = pathlib.Path(__file__).parent / "golden" / "sharding_qdepth_full.txt"
ROOT = pathlib.Path(__file__).resolve().parent.parent


def full_state(objective, frozen=()):
    tx = optim.make(config_lib.OptimConfig(), 1000, frozen)
    return jax.eval_shape(lambda key: train_step.init_state(key, objective, tx, True), jax.random.key(0))


@functools.cache
def qdepth_state():
    config = policy.sized("full")
    return full_state(policy.make_objective(config), policy.frozen_table(config))


@functools.cache
def states():
    """A full-size state of every kind of model."""
    baseline = policy.sized("full", depth=None)
    full = policy.sized("full")
    adaptive = policy.sized("pi05")
    pixels = dataclasses.replace(full, depth=dataclasses.replace(full.depth, head="pixels"))
    return {
        "qdepth": qdepth_state(),
        "baseline": full_state(policy.make_objective(baseline), policy.frozen_table(baseline)),
        "pi05": full_state(policy.make_objective(adaptive), policy.frozen_table(adaptive)),
        "pixels": full_state(policy.make_objective(pixels), policy.frozen_table(pixels)),
    } | {kind: full_state(tokenizer.make_objective(tokenizer.TokenizerConfig(quantiser=kind))) for kind in QUANTISERS}


@pytest.mark.parametrize(
    ("replica", "fsdp", "tensor"), [(1, 8, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 1, 8), (-1, 2, 2)]
)
def test_full_size_policy_and_tokenizer_fit_every_mesh_of_eight(replica, fsdp, tensor):
    mesh = sharding.make_mesh(config_lib.MeshConfig(replica, fsdp, tensor))
    for name in ("qdepth", "ema", "plain"):
        state = states()[name]
        placed = sharding.state_shardings(mesh, state)
        per_device = sum(
            math.prod(s.shard_shape(x.shape))
            for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
        )
        whole = sum(x.size for x in jax.tree.leaves(state))
        # Only `replica` copies a policy; the tokenizer is replicated by its rows of the table.
        ways = mesh.shape["fsdp"] * mesh.shape["tensor"] if name == "qdepth" else 1
        assert whole / ways <= per_device
        assert (per_device < whole) == (ways > 1)


def test_nothing_above_a_mebibyte_of_the_policy_is_replicated():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    state = qdepth_state()
    placed = jax.tree.leaves(sharding.state_shardings(mesh, state))
    total = 0
    for (path, leaf), s in zip(jax.tree_util.tree_leaves_with_path(state), placed):
        per_device = math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole = leaf.size * leaf.dtype.itemsize
        assert per_device < whole or whole < 2**20, sharding.path_of(path)
        total += per_device
    everything = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total < 1.01 * everything / 8


def test_frozen_embedding_has_no_moments_but_everything_else_has_two():
    state = qdepth_state()
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    embedding = state.params["llm"]["embedder"]["input_embedding"].size
    moments = sum(x.size for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x.ndim)
    assert moments == 2 * (size(state.params) - embedding)


def test_a_leaf_without_a_rule_is_an_error_with_its_name():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    with pytest.raises(errors.UserError, match="params/new_module/thing"):
        sharding.state_shardings(mesh, {"params": {"new_module": {"thing": jnp.zeros((8,))}}})


def test_a_size_that_does_not_divide_names_leaf_axis_and_layouts_that_work():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    with pytest.raises(errors.UserError) as caught:
        sharding.state_shardings(mesh, {"params": {"action_decoder": {"kernel": jnp.zeros((20, 7))}}})
    assert re.search(r"params/action_decoder/kernel.*size 20 does not divide by fsdp=8", str(caught.value))
    # fsdp 4 divides 20; the rest of the devices may go to either other axis.
    assert str(caught.value).endswith(
        "nearest layouts that work: replica=2 fsdp=4 tensor=1; replica=1 fsdp=4 tensor=2; replica=4 fsdp=2 tensor=1"
    )


@pytest.mark.parametrize(("devices", "slices"), [(256, 1), (512, 2), (1024, 4), (24, 1), (768, 3)])
def test_proposed_layouts_hold_the_whole_state(devices, slices):
    """What a message proposes must work for every leaf; found by the message alone, checked by placing it."""
    asked = {"replica": slices, "fsdp": devices // slices, "tensor": 1}
    if devices == 24:
        asked = {"replica": 3, "fsdp": 8, "tensor": 1}
        sharding.place(asked, qdepth_state())  # this one fits
        asked = {"replica": 1, "fsdp": 24, "tensor": 1}
    with pytest.raises(errors.UserError) as caught:
        sharding.place(asked, qdepth_state(), slices=slices)
    found = re.findall(r"replica=(\d+) fsdp=(\d+) tensor=(\d+)", str(caught.value).rpartition("work:")[2])
    assert len(found) == sharding.SHOWN
    for numbers in found:
        sizes = dict(zip(sharding.AXES, map(int, numbers)))
        assert math.prod(sizes.values()) == devices and sizes["replica"] % slices == 0
        sharding.place(sizes, qdepth_state(), slices=slices)
    if devices != 24:
        assert found[0] == (str(devices // 128), "128", "1"), "SigLIP's 1152 = 128 * 9 allows 128"
        # A parameter is named once, not again for each moment and average.
        assert str(caught.value).count("img/head/kernel") == 1


@pytest.mark.parametrize("sizes", [(2, 128, 1), (8, 128, 1), (2, 128, 4), (1, 128, 8)])
def test_every_model_fits_256_and_1024_chips(sizes):
    for name, state in states().items():
        rows = sharding.place(dict(zip(sharding.AXES, sizes)), state)
        assert len(rows) == len(jax.tree.leaves(state))
        for row in rows:
            assert name in QUANTISERS or row.bytes < row.whole or row.whole < 2**20, row


def test_every_row_of_the_table_places_something():
    used = {
        row.pattern for state in states().values() for row in sharding.place(dict.fromkeys(sharding.AXES, 1), state)
    }
    assert used == {pattern for pattern, _ in sharding.RULES}


def test_gradients_moments_and_averages_lie_as_their_parameter():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 4, 2))
    for state in states().values():
        placed = sharding.state_shardings(mesh, state)
        assert jax.tree.leaves(sharding.state_shardings(mesh, state.params)) == jax.tree.leaves(placed.params)
        assert jax.tree.leaves(sharding.state_shardings(mesh, {"grads": state.params})) == jax.tree.leaves(
            placed.params
        )
        spec = {}
        for row in sharding.place(mesh.shape, state):
            part, name = sharding.part_of(row.path)
            if part in sharding_table.COLUMNS:
                assert spec.setdefault(name, row.spec) == row.spec
        assert set(spec) == {sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}


def test_the_table_of_the_full_model_is_the_golden_one():
    """After a wanted change `python tests/test_sharding.py` writes it anew."""
    assert "\n".join(golden_lines()) + "\n" == GOLDEN.read_text()


def golden_lines():
    """The whole page for 16 chips, the totals for 256 and 1024."""
    sizes = {"replica": 1, "fsdp": 16, "tensor": 1}
    lines, summary = sharding_table.report("qdepth", sizes, 1, qdepth_state())
    assert summary["state_bytes"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(qdepth_state()))
    for numbers, slices in (((2, 128, 1), 1), ((4, 64, 1), 2), ((8, 128, 1), 4), ((2, 128, 4), 1)):
        sizes = dict(zip(sharding.AXES, numbers))
        page, _ = sharding_table.report("qdepth", sizes, slices, qdepth_state())
        lines += ["", page[0], *page[-4:]]
    return lines


def test_table_agrees_with_the_shards_jax_makes():
    state = states()["plain"]
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 4, 2))
    _, summary = sharding_table.report("plain", mesh.shape, 1, state)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(sharding.state_shardings(mesh, state)), strict=True)
    size = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)
    assert summary["bytes_per_device"]["total"] == size
    assert {"decoder/from_features/kernel", "encoder/down_2/kernel"} < set(summary["whole_above_1_mib"])


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (1, 4, 1), (16, -1, 1), (0, 8, 1), (-2, -4, 1)])
def test_meshes_that_do_not_fit_eight_devices(sizes):
    with pytest.raises(errors.UserError):
        sharding.make_mesh(config_lib.MeshConfig(*sizes))


def test_specs_align_to_the_last_dimensions():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 4, 2))
    leaves = {
        "llm": {"layers": {"mlp": {"linear": jnp.zeros((3, 16, 8))}}},
        "img": {"x": {"Dense_0": {"kernel": jnp.zeros((8, 6))}}},
    }
    placed = sharding.state_shardings(mesh, leaves)
    assert placed["llm"]["layers"]["mlp"]["linear"].spec == P(None, "tensor", "fsdp")
    assert placed["img"]["x"]["Dense_0"]["kernel"].spec == P("fsdp", "tensor")


# ---- slices ----


class Chip:
    """What a mesh asks of a device that is not there."""

    def __init__(self, number, process=0, platform="cpu", slice_index=None, coords=None):
        self.id, self.process_index, self.platform, self.coords = number, process, platform, coords
        self.device_kind, self.core_on_chip = "TPU v5 lite", 0
        if slice_index is not None:
            self.slice_index = slice_index


def pod(slices, side=4):
    """v5e-like slices of side x side chips, four chips a host, in no helpful order."""
    chips = [
        Chip(s * side**2 + y * side + x, s * side**2 // 4 + (y // 2) * side // 2 + x // 2, "tpu", s, (x, y, 0))
        for s in range(slices)
        for y in range(side)
        for x in range(side)
    ]
    return [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]


@pytest.mark.parametrize(("replica", "fsdp", "tensor"), [(2, 16, 1), (-1, 8, 2), (-1, 8, 1), (8, 1, 4)])
def test_only_replica_crosses_slices(replica, fsdp, tensor):
    mesh = sharding.make_mesh(config_lib.MeshConfig(replica, fsdp, tensor), pod(2))
    assert all(len({chip.slice_index for chip in copy.flat}) == 1 for copy in mesh.devices)
    assert len({chip.id for chip in mesh.devices.flat}) == 32
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3
    # Gradients are reduced over the torus first: copies of one slice are neighbours on `replica`.
    order = [copy.flat[0].slice_index for copy in mesh.devices]
    assert order == sorted(order)


def test_neighbours_on_an_axis_are_neighbours_in_the_torus():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 4, 4), pod(1))
    for line in (*mesh.devices[0], *mesh.devices[0].T):
        x, y, _ = np.transpose([chip.coords for chip in line])
        assert len(set(x)) == 1 or len(set(y)) == 1


@pytest.mark.parametrize(
    ("sizes", "slices", "devices", "message"),
    [
        ((1, -1, 1), 0, pod(2), "2 slices.*must divide it, and it is 1; layouts that work: replica=2 fsdp=16 tensor=1"),
        ((3, -1, 1), 0, pod(2), "3 must divide 32"),
        ((2, -1, 1), 4, pod(2), "mesh.slices=4, but the devices are in 2 slices"),
        ((2, -1, 1), 1, pod(2), "mesh.slices=1, but the devices are in 2 slices"),
        ((2, -1, 1), 0, pod(2)[:-1], "unequal size"),
        ((1, -1, 1), 3, None, "mesh.slices=3 does not divide 8"),
        ((1, -1, 1), 2, None, "only `replica` may cross"),
        ((1, -1, 1), -1, None, "mesh.slices=-1"),
    ],
)
def test_slices_that_cannot_be(sizes, slices, devices, message):
    with pytest.raises(errors.UserError, match=message):
        sharding.make_mesh(config_lib.MeshConfig(*sizes, slices), devices)


def test_islands_are_cut_from_the_device_list():
    mesh = sharding.make_mesh(config_lib.MeshConfig(-1, 2, 1, slices=4))
    assert dict(mesh.shape) == {"replica": 4, "fsdp": 2, "tensor": 1}
    assert mesh.devices.flatten().tolist() == jax.devices()
    gpus = [Chip(i, i // 4, "gpu", slice_index=i // 4) for i in range(8)]
    mesh = sharding.make_mesh(config_lib.MeshConfig(), gpus)  # nodes that a fast fabric joins
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 8, "tensor": 1}


# ---- rows ----


def chips_of(processes):
    return np.array([Chip(i, p) for i, p in enumerate(processes)], object)


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        ((1, 4, 1), [0, 0, 1, 1], {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        ((1, 4, 1), [1, 0, 1, 0], {0: [2, 3, 6, 7], 1: [0, 1, 4, 5]}),  # not contiguous
        ((2, 2, 1), [0, 1, 0, 1], {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}),
        ((1, 2, 2), [0, 1, 0, 1], {0: [0, 1, 2, 3, 4, 5, 6, 7], 1: [0, 1, 2, 3, 4, 5, 6, 7]}),  # tensor spans them
        ((1, 2, 2), [0, 0, 1, 2], {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [4, 5, 6, 7]}),
        ((1, 4, 1), [0, 0, 0, 1], {0: [0, 1, 2, 3, 4, 5], 1: [6, 7]}),  # unequal hosts
    ],
)
def test_rows_of_a_batch_by_process(sizes, processes, expected):
    mesh = Mesh(chips_of(processes).reshape(sizes), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    found = {p: sharding.batch_rows(mesh, 8, p) for p in set(processes)}
    assert {p: rows.tolist() for p, rows in found.items()} == expected
    assert all(rows.dtype == np.int64 for rows in found.values())


def test_rows_cover_the_batch_and_follow_any_order_of_devices():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        sizes = [(2, 4, 2), (1, 8, 2), (4, 2, 2), (16, 1, 1), (1, 4, 4)][seed % 5]
        mesh = Mesh(
            chips_of(draw.permutation(np.repeat(range(4), 4))).reshape(sizes),
            sharding.AXES,
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
        )
        times = collections.Counter()
        for process in range(4):
            rows = sharding.batch_rows(mesh, 48, process).tolist()
            assert rows == sorted(set(rows))
            times.update(rows)
            # By hand: device (r, f, t) holds part r * fsdp + f.
            held = {(r * sizes[1] + f) for (r, f, _), d in np.ndenumerate(mesh.devices) if d.process_index == process}
            part = 48 // (sizes[0] * sizes[1])
            assert set(rows) == {row for h in held for row in range(h * part, (h + 1) * part)}
        assert set(times) == set(range(48)) and max(times.values()) <= sizes[2]


def test_one_process_reads_everything_in_order():
    mesh = sharding.make_mesh(config_lib.MeshConfig(2, 2, 2))
    rows = sharding.batch_rows(mesh, 12)
    assert rows.tolist() == list(range(12))
    array = jax.make_array_from_process_local_data(NamedSharding(mesh, sharding.BATCH), rows.astype(np.int32), (12,))
    assert np.array_equal(array, rows)
    with pytest.raises(errors.UserError, match="batch size 10 does not divide over replica x fsdp = 2 x 2: use 12"):
        sharding.batch_rows(mesh, 10)
    with pytest.raises(errors.UserError, match="process 3 has no device"):
        sharding.batch_rows(mesh, 12, 3)


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(golden_lines()) + "\n")


def test_the_command_prints_the_table_and_totals():
    arguments = ["--config=experiments/demo.py:tokenizer", "--devices=16", "--mesh=2,8,1", "--slices=2"]
    done = subprocess.run(
        [sys.executable, "tools/show_sharding.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "encoder/" in done.stdout and "codebook" in done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["mesh"] == {"replica": 2, "fsdp": 8, "tensor": 1} and summary["leaves"] == 168
    assert summary["bytes_per_device"]["total"] == summary["state_bytes"]  # a tokenizer is whole everywhere
    bad = [*arguments[:2], "--mesh=2,3,1"]
    done = subprocess.run(
        [sys.executable, "tools/show_sharding.py", *bad], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "layouts that work: replica=4 fsdp=4 tensor=1; " in done.stderr
