"""A 32-bit sum of every array of a checkpoint, equal for any mesh: what finds a flipped bit that decodes without error.

The storage layer checks its own index, not the numbers: a flipped bit inside a compressed chunk often decodes to other
numbers. So each leaf is summed before a save and again after a restore:

    sum over elements i of mix(bits_i ^ (i * GOLDEN))   modulo 2**32

`mix` is the finaliser of MurmurHash3 (Appleby, public domain), a bijection of 32 bits. Any change of a single element
therefore changes the sum for certain; any other change (elements swapped, shifted, zeroed) goes unseen once in 2**32.
Addition modulo 2**32 has no order, so shards, devices and hosts do not matter.

Two ways to the same number: on accelerators a compiled pass over the shards where they lie; on CPU devices NumPy on
the same memory, because XLA:CPU takes longer to compile 150 such reductions (10 s) than a small run lasts.
"""

import concurrent.futures
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

GOLDEN = 0x9E3779B1  # odd, so that i -> i * GOLDEN is a bijection too; the prime next to 2**32 / golden ratio
_STEPS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None))  # (shift, multiply) of MurmurHash3's fmix32
_BLOCK = 1 << 16  # elements that NumPy works on at a time: a few arrays of this size stay in the cache
_LARGE = 1 << 22  # elements of a shard from which a thread of its own pays: below, threads wait for each other's lock


def sums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """name -> sum of its bit pattern; dtype and shape are not part of it.

    Collective: on several hosts all of them call it with the same names, and all get the same answer.

    Raises:
      TypeError: a leaf whose elements are not plain numbers of 1, 2 or 4 bytes.
    """
    for name, x in leaves.items():
        if x.dtype.itemsize not in (1, 2, 4) or not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == jnp.bool_):
            raise TypeError(f"{name}: no checksum for elements of type {x.dtype}")
    return sums_on_host(leaves) if on_host(leaves) else sums_on_device(leaves)


def on_host(leaves: dict[str, jax.Array]) -> bool:
    """Whether `sums` needs no compiled program for these."""
    return all(d.platform == "cpu" for x in leaves.values() for d in x.sharding.device_set)


def sums_on_device(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """`sums` by compiled programs. One leaf at a time: that bounds temporary memory to one leaf, and many collectives
    in flight starve the thread pool of simulated CPU devices to a deadlock."""
    return {name: int(np.asarray(_program(_everywhere(x.sharding))(x))) for name, x in leaves.items()}


def sums_on_host(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """`sums` by NumPy: every process its own shards, each part of an array once, then added up over processes."""
    shards = [(n, s) for n, x in enumerate(leaves.values()) for s in x.addressable_shards if s.replica_id == 0]
    strides = [_strides(x.shape) for x in leaves.values()]
    total = np.zeros(len(leaves), np.uint64)

    def add(jobs, mapped):
        for (n, _), part in zip(jobs, mapped(lambda job: _shard_sum(job[1].data, job[1].index, strides[job[0]]), jobs)):
            total[n] += np.uint64(part)

    large = [job for job in shards if job[1].data.size >= _LARGE]
    add([job for job in shards if job[1].data.size < _LARGE], map)
    if large:
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            add(large, pool.map)
    total = total.astype(np.uint32)
    if any(not x.is_fully_addressable for x in leaves.values()):
        total = np.asarray(multihost_utils.process_allgather(total)).reshape(-1, len(leaves)).sum(0, dtype=np.uint32)
    return {name: int(value) for name, value in zip(leaves, total, strict=True)}


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Elements between neighbours along each axis of the whole array."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _everywhere(placed: jax.sharding.Sharding) -> NamedSharding | None:
    """Every process has to hold the answer."""
    return NamedSharding(placed.mesh, P()) if isinstance(placed, NamedSharding) else None


@functools.cache
def _program(out_sharding: NamedSharding | None):
    return jax.jit(_leaf_sum, out_shardings=out_sharding)


def _leaf_sum(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    h, position = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32), jnp.zeros(x.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(x.shape)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    h = h ^ (position * jnp.uint32(GOLDEN))
    for shift, factor in _STEPS:
        h = h ^ (h >> shift)
        h = h if factor is None else h * jnp.uint32(factor)
    return jnp.sum(h, dtype=jnp.uint32)


def _shard_sum(shard: jax.Array, index: tuple[slice, ...], strides: list[int]) -> int:
    """The part of a leaf's sum that one shard contributes; `index` is where it lies in the whole array."""
    bits = np.asarray(shard, order="C")
    bits = bits.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[bits.dtype.itemsize])
    # i * GOLDEN is a sum of one term per axis: wrapping arithmetic keeps it exact.
    terms = [
        ((np.arange(size, dtype=np.uint64) + (part.start or 0)) * np.uint64(stride) * np.uint64(GOLDEN)).astype(
            np.uint32
        )
        for size, part, stride in zip(bits.shape, index, strides, strict=True)
    ]
    split = bits.ndim
    while split > 0 and math.prod(bits.shape[split - 1 :]) <= _BLOCK:
        split -= 1
    outer, inner = _outer_sum(terms[:split]), _outer_sum(terms[split:])
    bits, total = bits.reshape(outer.size, inner.size), 0
    rows = max(1, _BLOCK // max(inner.size, 1))
    for row in range(0, outer.size, rows):
        h = outer[row : row + rows, None] + inner[None, :]
        h ^= bits[row : row + rows]
        spare = np.empty_like(h)
        for shift, factor in _STEPS:
            np.right_shift(h, np.uint32(shift), out=spare)
            h ^= spare
            if factor is not None:
                h *= np.uint32(factor)
        total += int(h.sum(dtype=np.uint32))
    return total % 2**32


def _outer_sum(terms: list[np.ndarray]) -> np.ndarray:
    """All sums of one element per term, flat, the last term running fastest."""
    out = np.zeros(1, np.uint32)
    for term in terms:
        out = (out[:, None] + term[None, :]).reshape(-1)
    return out
