"""Independent groups of rows on all devices of a process: each device takes one whole group.

What a device computes depends on its own group alone, in a program of one fixed shape. So the results have the same
bytes for any number of devices and any order of the groups, which a batch that is split over devices cannot promise:
its share of rows, and with it the order of sums in matrix products, changes with their number.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

IN_FLIGHT = 2  # batches: one computes while the host fetches the one before and prepares the next


def stream(
    function: Callable[..., Any],
    constants: Any,
    groups: Iterable[tuple[np.ndarray, ...]],
    devices: list[jax.Device],
    on_fill: Callable[[int], None] = lambda count: None,
) -> Iterator[Any]:
    """function(constants, *group) of every group, in order. Compiled once for each shape of groups.

    Args:
      function: pure; arrays of a group in, a pytree of arrays out. It knows nothing of devices. The same object is
        compiled once.
      constants: pytree, one copy on every device.
      groups: tuples of arrays, all of the same shapes; taken as they are needed.
      devices: of this process.
      on_fill: called with how many groups of a batch were computed only to fill it (copies of the last one).

    Yields:
      The results as NumPy arrays.
    """
    run, split, whole = _compiled(function, tuple(devices))
    constants = jax.device_put(constants, whole)
    running: collections.deque[tuple[Any, int]] = collections.deque()
    for batch in _batches(groups, len(devices)):
        fill = len(devices) - len(batch)
        on_fill(fill)
        stacked = tuple(np.stack(arrays) for arrays in zip(*batch, *[batch[-1]] * fill))
        running.append((run(constants, jax.device_put(stacked, split)), len(batch)))
        if len(running) == IN_FLIGHT:
            yield from _rows(*running.popleft())
    while running:
        yield from _rows(*running.popleft())


@functools.lru_cache(maxsize=8)
def _compiled(function: Callable[..., Any], devices: tuple[jax.Device, ...]):
    """(jitted (constants, batch), sharding of the batch, of the constants). All splits of a data set share it."""
    mesh = Mesh(np.asarray(devices), ("group",), axis_types=(AxisType.Auto,))

    def local(constants: Any, *batch: jax.Array) -> Any:
        out = function(constants, *(array[0] for array in batch))
        return jax.tree.map(lambda x: x[None], out)

    @jax.jit
    def run(constants: Any, batch: tuple[jax.Array, ...]) -> Any:
        specs = (P(), *(P("group") for _ in batch))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("group"), check_vma=False)
        return mapped(constants, *batch)

    return run, NamedSharding(mesh, P("group")), NamedSharding(mesh, P())


def _batches(groups: Iterable[tuple[np.ndarray, ...]], size: int) -> Iterator[list[tuple[np.ndarray, ...]]]:
    batch = []
    for group in groups:
        batch.append(group)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(out: Any, count: int) -> Iterator[Any]:
    out = jax.device_get(out)
    for row in range(count):
        yield jax.tree.map(lambda x, row=row: x[row], out)


def chunks(rows: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """[N, ...] in groups [G, size, ...], the last row repeated to fill the last group; and how often it was."""
    fill = -len(rows) % size
    filled = np.concatenate([rows, np.repeat(rows[-1:], fill, axis=0)])
    return filled.reshape(-1, size, *rows.shape[1:]), fill
