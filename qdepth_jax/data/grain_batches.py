"""The loader behind Grain's protocol, so that Grain's checkpointing, prefetching and inspection work on it.

    batches = grain_batches.batches(loader).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    iterator = iter(batches)
    iterator.set_state(state)          # the state is one integer: {"next_index": step}

Element n is global batch n of this host, so the state of one host is the state of all, for any number of hosts.
"""

import grain

from qdepth_jax.data import loader

# Batches never end; Grain wants a length. 2**40 batches are 34,000 years at one per microsecond.
LENGTH = 1 << 40


class Batches(grain.MapDataset[loader.HostBatch]):
    """Batch number n at index n."""

    def __init__(self, reader: loader.Loader):
        super().__init__()
        self._reader = reader

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int | slice) -> loader.HostBatch:
        if isinstance(index, slice):
            return self.slice(index)
        return self._reader.batch(int(index))


def batches(reader: loader.Loader) -> Batches:
    """A Grain data set of the batches of `reader`. Needs the package grain (extra `grain`)."""
    return Batches(reader)
