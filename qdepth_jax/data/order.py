"""Which frame comes at global position p: a pure function of (seed, p), the same for any number of hosts.

Two parts, both without state:

* the mixture schedule: position p -> (data set, how many samples of it came before). Tijdeman's rule ("chairman
  assignment") keeps every data set within one sample of its exact share at every position. The rule is sequential, so
  one period is tabulated and repeated; shares are rounded to 1 / period.
* per data set and epoch a permutation of its frames: a keyed Feistel network on the next power of four, walked until it
  lands inside (cycle walking). O(1) memory, any size up to 2**62, vectorised. Grain's `index_shuffle` is the same idea
  in C++, limited to 2**31 and called per element; it would bring grain and array_record as dependencies for 30 lines.
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import blocks as blocks_lib

_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Order:
    """Order of a mix of D data sets.

    Attributes:
      sizes: number of sampled frames of each data set.
      shares: target share of each, sums to 1 (rounded to 1 / period when used).
      seed: everything random follows from it.
      shuffle: False walks every data set in frame order (validation).
      blocks: of each data set, its blocks (then it is shuffled in windows of blocks) or None; () = none has.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    seed: int = 0
    shuffle: bool = True
    blocks: tuple[blocks_lib.Blocks | None, ...] = ()

    def __post_init__(self):
        if not self.sizes or len(self.sizes) != len(self.shares):
            raise errors.UserError(f"{len(self.sizes)} data sets but {len(self.shares)} weights")
        if min(self.sizes) < 1:
            raise errors.UserError(f"every data set needs a frame to sample, sizes are {self.sizes}")
        counts = _period_counts(self.shares, period_of(len(self.sizes)))
        if min(counts) < 1:
            raise errors.UserError(
                f"the smallest share {min(self.shares):.2g} is below 1/{sum(counts)} of the mix: "
                "raise its weight or drop it"
            )
        object.__setattr__(self, "_counts", np.array(counts, np.int64))
        object.__setattr__(self, "_table", _schedule(counts))
        windowed = {
            number: blocks_lib.BlockOrder(blocks, functools.partial(self._permute_with_key, number))
            for number, blocks in enumerate(self.blocks)
            if blocks is not None and self.shuffle
        }
        object.__setattr__(self, "_windowed", windowed)

    def locate(self, which: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Samples, as `samples` numbers them -> index into the sampled frames of their data set, i64 [n]."""
        out = np.empty(len(which), np.int64)
        for number, size in enumerate(self.sizes):
            mine = np.flatnonzero(which == number)
            if not len(mine):
                continue
            epoch, rank = sample[mine] // size, sample[mine] % size
            if number in self._windowed:
                out[mine] = self._windowed[number].locate(epoch, rank)
            else:
                out[mine] = permute(rank, size, self.seed, number, epoch) if self.shuffle else rank
        return out

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i64 [n] -> (data set i32 [n], number of samples drawn from it before i64 [n])."""
        positions = np.asarray(positions, np.int64)
        dataset, before = self._table
        turn, place = np.divmod(positions, len(dataset))
        which = dataset[place]
        return which.astype(np.int32), turn * self._counts[which] + before[place]

    def blocks_ahead(self, number: int, sample: int) -> list[int]:
        """Blocks of data set `number` that its sample number `sample` and the following ones come from."""
        size = self.sizes[number]
        if number in self._windowed:
            return self._windowed[number].ahead(sample // size, sample % size)
        found = self.blocks[number]
        k = int(np.searchsorted(found.first, sample % size, side="right")) - 1
        return [(k + i) % len(found.shard) for i in range(min(2 * found.window, len(found.shard)))]

    def _permute_with_key(self, number: int, rank: np.ndarray, size: int, key: int) -> np.ndarray:
        return permute(rank, size, self.seed, number, np.full(len(rank), key))


def draw(seed: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Uniform u64 [n] for every random choice about the samples at positions i64 [n]; streams are independent."""
    key = _mix(np.uint64(seed % 2**64) ^ _mix(np.array([stream + (1 << 32)], np.uint64)))
    return _mix(key + _mix(np.asarray(positions).astype(np.uint64)))


def draw_below(seed: int, positions: np.ndarray, stream: int, limit: np.ndarray) -> np.ndarray:
    """Uniform i64 [n] in 0..limit-1 (limit i64 [n] >= 1; the bias is below limit / 2**53)."""
    unit = (draw(seed, positions, stream) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return np.minimum((unit * limit).astype(np.int64), limit - 1)


def shares(weights: Sequence[float], sizes: Sequence[int], balance: bool) -> tuple[float, ...]:
    """Normalised shares; with `balance` a weight counts per frame (octo's `balance_weights`)."""
    if any(not 0 < weight < 1e12 for weight in weights):
        raise errors.UserError(f"weights must be positive and below 1e12, got {list(weights)}")
    raw = [weight * (size if balance else 1) for weight, size in zip(weights, sizes)]
    return tuple(value / sum(raw) for value in raw)


def permute(rank: np.ndarray, size: int, seed: int, stream: int, epoch: np.ndarray) -> np.ndarray:
    """Position in an epoch -> frame index; for every (seed, stream, epoch) a permutation of 0..size-1.

    rank i64 [n] in [0, size), epoch i64 [n] -> i64 [n].
    """
    half = max(1, -(-(max(size - 1, 1)).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    key = _mix(np.uint64(seed % 2**64) ^ _mix(np.array([stream + 1], np.uint64)))
    keys = _mix(key + _mix(epoch.astype(np.uint64) + np.uint64(1)))
    x = rank.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> shift, x[todo] & mask
        for turn in range(_ROUNDS):
            scrambled = _mix(keys[todo] + _mix(right + (np.uint64(turn + 1) << np.uint64(56))))
            left, right = right, (left ^ scrambled) & mask
        x[todo] = (left << shift) | right
        # A value outside of the range is permuted again: on the cycle of a valid start the first valid value is
        # reached by exactly one start, so this stays a permutation. At most 4 turns on average.
        todo = todo[x[todo] >= np.uint64(size)]
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of u64 with good avalanche. Arrays overflow without a warning."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def period_of(datasets: int) -> int:
    """Length of the tabulated schedule.

    The rule errs by at most 1 - 1/(2D - 2) samples, rounding to 1/period by n/period after n samples: long enough that
    both stay below one sample over 10,000. 65,536 for up to 4 data sets, 524,288 (one second to tabulate) for 25.
    """
    return max(1 << 16, 1 << (20_000 * max(datasets - 1, 1) - 1).bit_length())


def _period_counts(target: Sequence[float], period: int) -> list[int]:
    """Shares as whole numbers that sum to the period, by largest remainder."""
    exact = [share * period for share in target]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: period - sum(counts)]:
        counts[i] += 1
    return counts


def _schedule(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period of T = sum(counts) positions: (data set i16 [T], earlier samples of that data set i32 [T])."""
    period = sum(counts)
    if len(counts) == 1:
        return np.zeros(period, np.int16), np.arange(period, dtype=np.int32)
    table = np.empty(period, np.int16)
    # Tijdeman 1980: sample n of a data set with share s may be drawn once s * t exceeds n + slack, and is due when
    # s * t reaches n + 1 - slack; of those that may, take the one that is due first. The error stays below 1 - slack.
    slack = 1 / (2 * len(counts) - 2)
    share = [count / period for count in counts]
    drawn = [0] * len(counts)
    waiting = [((slack) / s - 1, i) for i, s in enumerate(share)]
    heapq.heapify(waiting)
    ready: list[tuple[float, int]] = []
    for t in range(period):
        while waiting and waiting[0][0] <= t + 1e-9:
            _, i = heapq.heappop(waiting)
            heapq.heappush(ready, ((drawn[i] + 1 - slack) / share[i], i))
        _, i = heapq.heappop(ready)
        table[t] = i
        drawn[i] += 1
        heapq.heappush(waiting, ((drawn[i] + slack) / share[i] - 1, i))
    before = np.empty(period, np.int32)
    for i, count in enumerate(counts):
        mine = np.flatnonzero(table == i)
        if len(mine) != count:
            raise AssertionError(f"schedule gives data set {i} {len(mine)} of {count} samples")
        before[mine] = np.arange(count)
    return table, before
