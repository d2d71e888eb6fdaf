"""The sums of checkpoints: equal on any mesh and by both ways, and no change of one element goes unseen."""

import functools

import checkpoint_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import checkpoint, checkpoint_sum

LEAVES = {
    "f32": (np.float32, (4, 8, 6), P(None, "fsdp", "tensor")),
    "bf16": (jnp.bfloat16, (16, 3), P("fsdp")),
    "i32": (np.int32, (8,), P(("fsdp", "tensor"))),
    "u8": (np.uint8, (5, 7), P()),
    "bool": (np.bool_, (8, 2), P("fsdp", "tensor")),
    "scalar": (np.float32, (), P()),
    "empty": (np.float32, (0, 8), P(None, "fsdp")),
}


@functools.cache
def values():
    g = np.random.default_rng(0)
    return {name: np.asarray(g.standard_normal(shape) * 50).astype(t) for name, (t, shape, _) in LEAVES.items()}


def on(*sizes):
    devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return {name: jax.device_put(x, NamedSharding(mesh, LEAVES[name][2])) for name, x in values().items()}


def by_hand(x):
    """The definition in the module's docstring, with Python's own integers; fmix32 as in MurmurHash3.cpp."""
    total = 0
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    for i, bits in enumerate(np.asarray(x).reshape(-1).view(width).tolist()):
        h = bits ^ (i * 0x9E3779B1 % 2**32)
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        total += h ^ (h >> 16)
    return total % 2**32


def test_equal_on_any_mesh_and_as_defined():
    want = {name: by_hand(x) for name, x in values().items()}
    for sizes in ((1, 1, 1), (1, 2, 1), (1, 4, 2), (2, 2, 2)):
        assert checkpoint_sum.sums(on(*sizes)) == want, sizes
    one_device = {name: jnp.asarray(x) for name, x in values().items()}
    assert checkpoint_sum.sums(one_device) == want
    # Accelerators take the other way; it is compiled here for eight simulated devices.
    some = {name: x for name, x in on(2, 2, 2).items() if name in ("f32", "bf16", "scalar")}
    assert checkpoint_sum.sums_on_device(some) == {name: want[name] for name in some}


def test_blocks_of_numpy_do_not_show(monkeypatch):
    want = checkpoint_sum.sums(on(1, 2, 1))
    for block in (1, 5, 48):
        monkeypatch.setattr(checkpoint_sum, "_BLOCK", block)
        assert checkpoint_sum.sums(on(1, 2, 1)) == want


@pytest.mark.parametrize("name", ["f32", "bf16", "i32", "scalar"])
def test_any_flipped_bit_is_found(name):
    x = values()[name]
    width = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    before = checkpoint_sum.sums({name: jnp.asarray(x)})
    for element in {0, x.size // 2, x.size - 1}:
        for bit in range(8 * x.dtype.itemsize):
            changed = np.array(x)
            changed.reshape(-1).view(width)[element] ^= width(1 << bit)
            assert checkpoint_sum.sums({name: jnp.asarray(changed)}) != before, (element, bit)


def test_swapped_shifted_and_zeroed_elements_are_found():
    x = values()["f32"].copy()
    x[0, 0, :2] = [1.5, -1.5]  # differ by their highest bit alone: a plain weighted sum would miss the swap
    before = checkpoint_sum.sums({"x": jnp.asarray(x)})
    swapped = x.copy()
    swapped[0, 0, :2] = [-1.5, 1.5]
    for changed in (swapped, np.roll(x, 1), x.transpose(0, 2, 1).reshape(x.shape), np.zeros_like(x), x[::-1]):
        assert checkpoint_sum.sums({"x": jnp.asarray(changed)}) != before


def test_types_without_a_sum_are_refused():
    with pytest.raises(TypeError, match=r"rng: no checksum for elements of type key"):
        checkpoint_sum.sums({"rng": jax.random.key(0)})


def test_what_a_save_needs_compiled_is_compiled_before_training(monkeypatch):
    summed = []
    monkeypatch.setattr(checkpoint_sum, "on_host", lambda leaves: False)
    monkeypatch.setattr(checkpoint_sum, "sums_on_device", lambda leaves: summed.extend(leaves))
    checkpoint.warm_up(checkpoint_states.make_state())
    assert {"img/w", "b", "codebook", "step"} <= set(summed) and len([name for name in summed if name == "b"]) == 2
