"""Block mode: the order and the reads for object stores, where one request per image is too many.

A block is a run of whole episodes of one shard, about `block_bytes` long, read with one sequential request. Per epoch
the blocks of a data set are permuted, `window` of them at a time form a window, and the frames of a window are permuted
among themselves. The shuffle is as wide as a window instead of the whole data set; everything else stays: an epoch
visits every frame once, the order is a pure function of (seed, position), the state is one integer.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np

PIECE = 8 << 20  # bytes of one ranged read of a block
MIN_BLOCKS = 8  # in a window, where episodes are short enough: few blocks shuffle badly


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The n blocks of one data set that hold frames to sample.

    Attributes:
      first: i64 [n + 1]; block k holds the sampled frames first[k]..first[k+1]-1 (indices into `valid`).
      shard: i32 [n]; low, high: i64 [n], the byte range in the shard.
      of_episode: i32 [E], block of every episode, -1 where none of its frames is sampled.
      window: blocks shuffled together.
    """

    first: np.ndarray
    shard: np.ndarray
    low: np.ndarray
    high: np.ndarray
    of_episode: np.ndarray
    window: int

    def place(self, block: int, shard_path: Callable[[int], str]) -> tuple[str, int, int]:
        """(path, low, high) of a block."""
        return shard_path(int(self.shard[block])), int(self.low[block]), int(self.high[block])

    @property
    def window_frames(self) -> float:
        """Mean number of frames that are shuffled together."""
        return float(self.first[-1]) * min(1.0, self.window / len(self.shard))


def make_blocks(episodes: np.ndarray, episode_of_frame: np.ndarray, block_bytes: int, window_bytes: float) -> Blocks:
    """Cuts shards into blocks.

    Args:
      episodes: the index's episode table (shard, offset, size), in file order.
      episode_of_frame: i32 [V], episode of every sampled frame, ascending.
      block_bytes: an episode belongs to block offset // block_bytes of its shard; longer episodes make longer blocks.
        A window of fewer than MIN_BLOCKS such blocks gets smaller ones.
      window_bytes: size of the shuffle window; at least two blocks are shuffled together all the same.
    """
    block_bytes = max(1, min(block_bytes, int(window_bytes / MIN_BLOCKS)))
    key = episodes["shard"].astype(np.int64) << 40 | episodes["offset"] // block_bytes
    _, block, counts = np.unique(key, return_inverse=True, return_counts=True)
    frames = np.bincount(block[episode_of_frame], minlength=len(counts))
    used = np.flatnonzero(frames)
    number = np.full(len(counts), -1, np.int32)
    number[used] = np.arange(len(used))
    begin = np.concatenate([[0], np.cumsum(counts)[:-1]])
    final = begin + counts - 1
    low = episodes["offset"][begin][used].astype(np.int64)
    high = (episodes["offset"] + episodes["size"])[final][used].astype(np.int64)
    window = max(2, int(window_bytes / (high - low).mean()))
    return Blocks(
        first=np.concatenate([[0], np.cumsum(frames[used])]),
        shard=episodes["shard"][begin][used],
        low=low,
        high=high,
        of_episode=number[block],
        window=min(window, len(used)),
    )


def memory(tables: Sequence[Blocks]) -> int:
    """Bytes that hold this window and the next one of every data set."""
    return sum(2 * int(np.sort(table.high - table.low)[-table.window :].sum()) for table in tables)


Permute = Callable[[np.ndarray, int, int], np.ndarray]


class BlockOrder:
    """Order of one data set in block mode.

    Args:
      blocks: the data set's blocks.
      permute: (rank i64 [n], size, key) -> i64 [n], a permutation of 0..size-1 for every key >= 0.
    """

    def __init__(self, blocks: Blocks, permute: Permute):
        self._blocks, self._permute = blocks, permute
        self._epoch = functools.lru_cache(maxsize=4)(self._tables)

    def locate(self, epoch: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Sampled frame at place `rank` of `epoch`; i64 [n], i64 [n] -> i64 [n]."""
        out = np.empty(len(rank), np.int64)
        for e in np.unique(epoch).tolist():
            these = np.flatnonzero(epoch == e)
            order, ends, bounds = self._epoch(e)
            window = np.searchsorted(bounds, rank[these], side="right") - 1
            place = np.empty(len(these), np.int64)
            for w in np.unique(window).tolist():
                mine = window == w
                size = int(bounds[w + 1] - bounds[w])
                # Key 0, 1, ... of an epoch: its windows; all epochs together never share a key.
                key = e * (len(bounds) + 1) + w + 1
                place[mine] = bounds[w] + self._permute(rank[these][mine] - bounds[w], size, 2 * key)
            at = np.searchsorted(ends, place, side="right")
            block = order[at]
            begin = np.where(at > 0, ends[at - 1], 0)
            out[these] = self._blocks.first[block] + place - begin
        return out

    def ahead(self, epoch: int, rank: int) -> list[int]:
        """Blocks of the window that holds `rank`, then those of the next window (maybe of the next epoch)."""
        order, _, bounds = self._epoch(epoch)
        w, k = int(np.searchsorted(bounds, rank, side="right") - 1), self._blocks.window
        following = order[(w + 1) * k : (w + 2) * k]
        if not len(following):
            following = self._epoch(epoch + 1)[0][:k]
        return [*order[w * k : (w + 1) * k].tolist(), *following.tolist()]

    def _tables(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(blocks in order, frames up to and including each, frames before each window and in all)."""
        count = len(self._blocks.shard)
        order = self._permute(np.arange(count), count, 2 * epoch + 1)
        ends = np.cumsum(np.diff(self._blocks.first)[order])
        bounds = np.concatenate([[0], ends[self._blocks.window - 1 :: self._blocks.window]])
        if bounds[-1] != ends[-1]:
            bounds = np.append(bounds, ends[-1])
        return order, ends, bounds


class BlockCache:
    """Blocks in memory, least recently used out first; safe for threads.

    Args:
      read: (path, offset, size) -> bytes.
      capacity: bytes kept; one batch's own blocks may go beyond.
    """

    def __init__(self, read: Callable[[str, int, int], bytes], capacity: int):
        self._read, self._capacity = read, capacity
        self._kept: collections.OrderedDict[tuple[str, int], tuple[int, concurrent.futures.Future[bytes]]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(4, "block")
        self.bytes_read = 0

    def request(self, blocks: Sequence[tuple[str, int, int]]) -> None:
        """Starts reading (path, low, high) where they are not kept, soonest needed first; makes room for them."""
        with self._lock:
            for block in blocks:
                self._get(*block)
            for path, low, _ in reversed(blocks):
                self._kept.move_to_end((path, low))
            total = sum(size for size, _ in self._kept.values())
            while total > self._capacity and len(self._kept) > 1:
                _, (size, _) = self._kept.popitem(last=False)
                total -= size

    def bytes_at(self, path: str, low: int, high: int, offset: int, size: int) -> memoryview:
        """`size` bytes at `offset` of the file, out of the block low..high."""
        with self._lock:
            future = self._get(path, low, high)
        try:
            data = future.result()
        except Exception:
            with self._lock:  # the next batch tries again
                if self._kept.get((path, low), (0, None))[1] is future:
                    del self._kept[path, low]
            raise
        return memoryview(data)[offset - low : offset - low + size]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._kept.clear()

    def _get(self, path: str, low: int, high: int) -> concurrent.futures.Future[bytes]:
        key = (path, low)
        if key not in self._kept:
            self._kept[key] = (high - low, self._pool.submit(self._load, path, low, high))
            self.bytes_read += high - low  # here, under the lock: threads adding at once lose counts
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def _load(self, path: str, low: int, high: int) -> bytes:
        return b"".join(self._read(path, at, min(PIECE, high - at)) for at in range(low, high, PIECE))
