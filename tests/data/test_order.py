"""Order: permutations, exact mixture shares, independence of hosts."""

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.data import order

SOUP = [0.54087122203, 0.8341046294, 1, 2, 1, 1, 2, 1, 2, 2, 1, 0.1, 2, 1, 3, 0.1, 2, 1, 1, 0.2, 1, 1, 1, 2, 1]


def _locate(mix, positions):
    """(data set, frame) at global positions."""
    which, sample = mix.samples(positions)
    return which, mix.locate(which, sample)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 250, 4097])
def test_every_epoch_is_a_permutation(size):
    for epoch in range(3):
        drawn = order.permute(np.arange(size), size, 7, 0, np.full(size, epoch))
        np.testing.assert_array_equal(np.sort(drawn), np.arange(size))


def test_epochs_seeds_and_data_sets_differ_and_look_random():
    size, rank = 1000, np.arange(1000)

    def draw(seed=1, stream=0, epoch=0):
        return order.permute(rank, size, seed, stream, np.full(size, epoch))

    base = draw()
    for other in (draw(seed=2), draw(stream=1), draw(epoch=1)):
        assert (base == other).mean() < 0.02  # expectation of independent permutations: 0.001
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.12
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 0.12
    assert abs(np.corrcoef(base, rank)[0, 1]) < 0.12
    # Where frame 0 of a small set lands over epochs: uniform within 5 sigma.
    epochs = np.arange(8000)
    first = order.permute(np.zeros(8000, np.int64), 8, 3, 0, epochs)
    counts = np.bincount(first, minlength=8)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 7 / 8)


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [2, 1, 0.5], [0.999, 0.001], SOUP])
def test_mixture_error_is_at_most_one_sample(weights):
    target = order.shares(weights, [10] * len(weights), balance=False)
    mix = order.Order((10,) * len(weights), target, seed=0)
    which, _ = _locate(mix, np.arange(10_000))
    for number, share in enumerate(target):
        count = np.concatenate([[0], np.cumsum(which == number)])
        assert np.abs(count - share * np.arange(10_001)).max() <= 1.0, number


def test_epochs_of_a_mix_visit_each_frame_equally_and_cross_periods():
    sizes = (30, 50)
    mix = order.Order(sizes, order.shares([1, 3], sizes, balance=False), seed=5)
    which, index = _locate(mix, np.arange(order.period_of(2) - 400, order.period_of(2) + 400))
    for number, size in enumerate(sizes):
        counts = np.bincount(index[which == number], minlength=size)
        assert counts.max() - counts.min() <= 2 and counts.sum() == (which == number).sum()


def test_any_slicing_gives_the_same_order():
    mix = order.Order((100, 37), (0.75, 0.25), seed=3)
    whole = _locate(mix, np.arange(512))
    for hosts in (1, 2, 4, 8):
        parts = [_locate(mix, np.arange(h * 512 // hosts, (h + 1) * 512 // hosts)) for h in range(hosts)]
        np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), whole[0])
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), whole[1])


def test_without_shuffle_it_walks_in_order():
    mix = order.Order((5,), (1.0,), shuffle=False)
    np.testing.assert_array_equal(_locate(mix, np.arange(12))[1], np.arange(12) % 5)


def test_bad_mixes():
    with pytest.raises(errors.UserError, match="positive"):
        order.shares([1, 0], [1, 1], False)
    with pytest.raises(errors.UserError, match="below"):
        order.Order((5, 5), (1 - 1e-7, 1e-7))
    with pytest.raises(errors.UserError, match="frame to sample"):
        order.Order((0,), (1.0,))
