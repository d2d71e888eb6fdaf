"""Block mode: epochs stay permutations, reads stay local, memory stays bounded, hosts and resumes agree."""

import dataclasses

import numpy as np
import pytest
from libero_writer import make_libero
from test_loader import FEATURES, _config, _hash

from qdepth_jax.data import blocks, loader, order

EPISODES = np.zeros(40, [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("length", "<i4")])
EPISODES["shard"] = np.arange(40) // 10
EPISODES["size"] = np.random.default_rng(0).integers(500, 1500, 40)
EPISODES["length"] = np.random.default_rng(1).integers(1, 30, 40)
for _shard in range(4):
    _sizes = EPISODES["size"][_shard * 10 : _shard * 10 + 10]
    EPISODES["offset"][_shard * 10 : _shard * 10 + 10] = 12 + np.cumsum(_sizes + 16) - _sizes - 16
OF_FRAME = np.repeat(np.arange(40), EPISODES["length"])


def _locate(mix, positions):
    """(data set, frame) at global positions."""
    which, sample = mix.samples(positions)
    return which, mix.locate(which, sample)


def _blocks(block=2500, window=8000.0, keep=None):
    return blocks.make_blocks(EPISODES, OF_FRAME if keep is None else OF_FRAME[keep], block, window)


def test_blocks_are_whole_episodes_of_one_shard_and_hold_every_frame_once():
    made = _blocks()
    assert made.first[-1] == len(OF_FRAME) and 1 < made.window < len(made.shard)
    for k in range(len(made.shard)):
        mine = np.flatnonzero(made.of_episode == k)
        assert (EPISODES["shard"][mine] == made.shard[k]).all() and (np.diff(mine) == 1).all()
        assert made.low[k] == EPISODES["offset"][mine[0]]
        assert made.high[k] == EPISODES["offset"][mine[-1]] + EPISODES["size"][mine[-1]]
        frames = np.arange(made.first[k], made.first[k + 1])
        assert set(OF_FRAME[frames]) == set(mine.tolist())


def test_blocks_without_a_sampled_frame_are_never_read():
    keep = EPISODES["shard"][OF_FRAME] != 2
    made = _blocks(keep=keep)
    assert 2 not in made.shard and made.first[-1] == keep.sum()
    assert (made.of_episode[EPISODES["shard"] == 2] == -1).all()


def test_every_epoch_is_a_permutation_inside_windows():
    made = _blocks()
    size = int(made.first[-1])
    mix = order.Order((size,), (1.0,), 5, blocks=(made,))
    for epoch in range(3):
        _, index = _locate(mix, np.arange(epoch * size, (epoch + 1) * size))
        np.testing.assert_array_equal(np.sort(index), np.arange(size))
        block = np.searchsorted(made.first, index, side="right") - 1
        # A block's frames lie within one window: no further apart than the window is long.
        longest = int(np.sort(np.diff(made.first))[-made.window :].sum())
        for k in range(len(made.shard)):
            places = np.flatnonzero(block == k)
            assert places.max() - places.min() < longest
        assert (np.diff(block) != 0).mean() > 0.4  # shuffled inside, not block after block
    first, second = (_locate(mix, np.arange(e * size, (e + 1) * size))[1] for e in (0, 1))
    assert (first == second).mean() < 0.05
    assert not np.array_equal(_locate(order.Order((size,), (1.0,), 6, blocks=(made,)), np.arange(size))[1], first)


def test_blocks_ahead_hold_what_comes_next():
    made = _blocks()
    size = int(made.first[-1])
    for shuffle in (True, False):
        mix = order.Order((size,), (1.0,), 5, shuffle, blocks=(made,))
        for sample in (0, size // 3, size - 1, 2 * size + 7):
            _, index = _locate(mix, np.arange(sample, sample + 12))
            needed = np.searchsorted(made.first, index, side="right") - 1
            assert set(needed.tolist()) <= set(mix.blocks_ahead(0, sample))


def test_a_small_window_gets_small_blocks_and_never_fewer_than_two():
    assert _blocks(block=4000, window=900.0).window == 2
    fine, coarse = _blocks(block=10**9, window=8000.0), _blocks(block=10**9, window=10**9)
    assert len(fine.shard) > len(coarse.shard) == 4 and coarse.window == 4


def test_cache_reads_once_and_stays_below_its_bound():
    data = {"a": bytes(range(250)) * 40, "b": bytes(range(250))[::-1] * 40}
    reads = []

    def read(path, offset, size):
        reads.append((path, offset, size))
        return data[path][offset : offset + size]

    cache = blocks.BlockCache(read, 5000)
    wanted = [("a", 0, 2000), ("a", 2000, 4000), ("b", 0, 1000)]
    cache.request(wanted)
    for path, low, high in wanted:
        assert bytes(cache.bytes_at(path, low, high, low + 7, 100)) == data[path][low + 7 : low + 107]
    cache.request(wanted)
    assert len(reads) == 3
    cache.request([("b", 1000, 4000)])  # the two oldest have to go; what was asked for first stays longest
    assert sum(size for size, _ in cache._kept.values()) <= 5000
    assert bytes(cache.bytes_at("a", 2000, 4000, 3999, 1)) == data["a"][3999:4000]
    cache.close()


@pytest.fixture
def in_blocks(tmp_path):
    mix = [
        make_libero(tmp_path, tuple(range(3, 15))),
        make_libero(tmp_path, (6, 11, 2, 9), name="libero_spatial", seed=3),
    ]
    return _config(*mix, read="blocks", block_mib=0.03, block_window_mib=0.15)


def test_same_batches_for_hosts_and_resume_and_the_same_frames_as_frame_mode(in_blocks):
    whole = loader.Loader(in_blocks, FEATURES, 8, seed=5)
    expected = [_hash(whole.batch(step)) for step in range(20)]
    assert [_hash(whole.batch(step)) for step in (13, 2, 19)] == [expected[s] for s in (13, 2, 19)]
    for hosts in (2, 4, 8):
        parts = [
            loader.Loader(in_blocks, FEATURES, 8, seed=5, process_index=h, process_count=hosts) for h in range(hosts)
        ]
        for step in (0, 11):
            pieces = [part.batch(step) for part in parts]
            assert _hash({k: np.concatenate([piece[k] for piece in pieces]) for k in FEATURES}) == expected[step]
    # A row holds what frame mode would put there for the same frame: only the order differs.
    plain = loader.Loader(dataclasses.replace(in_blocks, read="frames"), FEATURES, 8, seed=5)
    rows = {}
    for step in range(40):
        batch = plain.batch(step)
        for row in range(8):
            rows[int(batch["dataset"][row]), int(batch["frame"][row])] = {k: batch[k][row] for k in FEATURES}
    batch = whole.batch(3)
    for row in range(8):
        other = rows[int(batch["dataset"][row]), int(batch["frame"][row])]
        for key in set(FEATURES) - {"position"}:
            np.testing.assert_array_equal(batch[key][row], other[key])
    assert whole.identity() != plain.identity()


def test_blocks_are_read_about_once_an_epoch(in_blocks):
    reader = loader.Loader(dataclasses.replace(in_blocks, datasets=in_blocks.datasets[:1]), ("image_main",), 8)
    table = reader.order.blocks[0]
    limit = blocks.memory((table,))
    assert 2 * table.window < len(table.shard)
    assert limit < int((table.high - table.low).sum())
    for step in range(reader.steps_per_epoch):
        reader.batch(step)
        assert sum(size for size, _ in reader._cache._kept.values()) <= limit
    total = int((table.high - table.low).sum())
    assert reader._cache.bytes_read <= total + limit  # the epoch, and what was read ahead


def test_mixes_of_unequal_shares_work_with_the_usual_sizes(in_blocks):
    few = dataclasses.replace(in_blocks.datasets[0], weight=0.001)
    config = dataclasses.replace(in_blocks, datasets=(few, in_blocks.datasets[1]), block_mib=64, block_window_mib=1024)
    reader = loader.Loader(config, ("frame", "dataset", "image_main"), 8)
    assert [table.window for table in reader.order.blocks] == [len(table.shard) for table in reader.order.blocks]
    assert (np.concatenate([reader.batch(step)["dataset"] for step in range(30)]) == 1).mean() > 0.99


def test_a_block_that_could_not_be_read_is_tried_again():
    calls = []

    def read(path, offset, size):
        calls.append(offset)
        if len(calls) == 1:
            raise OSError("not now")
        return bytes(size)

    cache = blocks.BlockCache(read, 1000)
    with pytest.raises(OSError, match="not now"):
        cache.bytes_at("a", 0, 100, 5, 10)
    assert bytes(cache.bytes_at("a", 0, 100, 5, 10)) == bytes(10) and len(calls) == 2
    cache.close()
