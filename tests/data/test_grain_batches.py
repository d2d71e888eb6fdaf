"""Grain's own tooling on the loader: prefetching iterators, state, checkpoint of one integer."""

import json

import numpy as np
import pytest
from test_loader import _config, _hash

from qdepth_jax.data import loader

grain = pytest.importorskip("grain", reason="grain is not installed (extra `test` brings it)")


def test_grain_iterates_saves_and_restores(libero_dir):
    from qdepth_jax.data import grain_batches

    reader = loader.Loader(_config(libero_dir), ("image_main", "action", "frame"), 8, seed=2)
    data = grain_batches.batches(reader)
    expected = [_hash(reader.batch(step)) for step in range(8)]
    assert _hash(data[5]) == expected[5]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=3)
    iterator = iter(data.to_iter_dataset(options))
    assert [_hash(next(iterator)) for _ in range(3)] == expected[:3]
    state = json.loads(json.dumps(iterator.get_state()))
    assert [value for value in state.values() if isinstance(value, int)] == [3]
    assert [_hash(next(iterator)) for _ in range(2)] == expected[3:5]
    other = iter(data.to_iter_dataset(options))
    other.set_state(state)
    assert [_hash(next(other)) for _ in range(5)] == expected[3:]


def test_grain_transformations_apply(libero_dir):
    from qdepth_jax.data import grain_batches

    reader = loader.Loader(_config(libero_dir), ("frame",), 8)
    data = grain_batches.batches(reader).map(lambda batch: int(batch["frame"].sum()))
    assert data[2] == int(reader.batch(2)["frame"].sum())
    assert np.array_equal(grain_batches.batches(reader)[1:3][0]["frame"], reader.batch(1)["frame"])
