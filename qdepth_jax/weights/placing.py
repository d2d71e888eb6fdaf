"""Puts a leaf together from blocks, straight into the shards of its devices.

Small leaves are put together on the host. Of large ones each device gets, block after block, the part that lies in its
shard: the host holds one block, a device its shard and its part of one block.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Leaves up to this many bytes are whole on the host for a moment: each program that writes a block into a shard has to
# be compiled for each device, and most leaves are small.
WHOLE_BYTES = 128 * 2**20

Piece = tuple[tuple[int, ...], np.ndarray]  # start, block; both with all axes of the leaf


def assemble(leaf: Any, pieces: Iterator[Piece]) -> Any:
    """One leaf.

    Args:
      leaf: shape, dtype and, if it is to lie on devices, sharding.
      pieces: blocks that together cover it once.

    Returns:
      jax.Array in that sharding, or a NumPy array.
    """
    sharding = getattr(leaf, "sharding", None)
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if sharding is None or leaf.size * dtype.itemsize <= WHOLE_BYTES:
        whole = np.empty(shape, dtype)
        for start, block in pieces:
            whole[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
        if sharding is None:
            return whole
        return jax.make_array_from_callback(shape, sharding, lambda index: whole[index])
    return _stream(shape, dtype, sharding, pieces)


def _stream(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding, pieces: Iterator[Piece]):
    spans = {
        device: [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    local = sharding.shard_shape(shape)
    shards = {device: jnp.zeros(local, dtype, device=device) for device in spans}
    for start, block in pieces:
        parts: dict[tuple, np.ndarray] = {}  # shards of equal span share one cast copy
        for device, span in spans.items():
            low = [max(a, first) for a, (first, _) in zip(start, span, strict=True)]
            high = [min(a + n, last) for a, n, (_, last) in zip(start, block.shape, span, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            cut = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            if (name := tuple((s.start, s.stop) for s in cut)) not in parts:
                parts[name] = np.ascontiguousarray(block[cut], dtype)
            where = tuple(np.int32(a - first) for a, (first, _) in zip(low, span, strict=True))
            shards[device] = _write(shards[device], jax.device_put(parts[name], device), where)
        # Not waiting, the queue would hold every block of the leaf.
        jax.block_until_ready(list(shards.values()))
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, block: jax.Array, start: tuple[np.int32, ...]) -> jax.Array:
    """The shard with a block written into it, in place."""
    return jax.lax.dynamic_update_slice(shard, block, start)
