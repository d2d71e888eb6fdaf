"""Batches as a pure function of (config, seed, step), and an iterator that prepares them ahead.

A batch is planned at once (which frames, which byte ranges), then a thread pool reads and decodes every image straight
into its place in the batch array. The state of the iterator is one integer, the step; any number of hosts sees the
same global batch, each its own rows of it.
"""

import collections
import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import (
    batch_keys,
    batch_memory,
    blocks,
    data_config,
    file_faults,
    frame_reader,
    normalise,
    order,
    samples,
    sidecar,
    source,
    text,
)

HostBatch = dict[str, np.ndarray]
Job = Callable[[], None]

# Bumped when equal configs would give other batches than before, so that no run resumes on a different order.
ORDER_VERSION = 1
# Steps whose order is computed together: for the rows of one batch alone, NumPy's cost is that of its calls.
PLANNED = 16


class Loader:
    """Reads batches; safe to call from several threads.

    Args:
      config: the data section.
      features: batch keys to produce, see batch_keys.py.
      batch_size: global batch.
      seed: of the order.
      process_index, process_count: this host; it gets rows [i * B / n, (i + 1) * B / n) of the global batch.
      rows: instead, the ascending rows of the global batch that this host's devices hold (sharding.batch_rows): on a
        mesh they need be neither equal parts nor contiguous.
      normalisers: data set name -> {"action", "proprio"}, from a checkpoint; others come from the data.
      on_shard: progress of an index build, (shard, bytes).

    Raises:
      UserError: configuration and data do not fit, each with the fix.
    """

    def __init__(
        self,
        config: data_config.DataConfig,
        features: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        rows: np.ndarray | None = None,
        normalisers: Mapping[str, Mapping[str, normalise.Normaliser]] | None = None,
        on_shard: Callable[[str, int], None] | None = None,
    ):
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise errors.UserError(f"batch size {batch_size} does not divide over {process_count} hosts")
        if not 0 <= process_index < process_count:
            raise errors.UserError(f"host {process_index} of {process_count}: hosts count from 0")
        if rows is None:
            part = batch_size // process_count
            rows = np.arange(process_index * part, (process_index + 1) * part)
        elif process_count != 1:
            raise ValueError("rows say what this host reads: give no process_index and process_count beside them")
        self._rows = np.array(rows, np.int64)
        if not len(rows) or self._rows[0] < 0 or self._rows[-1] >= batch_size or (np.diff(self._rows) <= 0).any():
            raise ValueError(f"rows {self._rows.tolist()} must ascend within a batch of {batch_size}")
        if not config.datasets:
            raise errors.UserError("data.datasets is empty: name at least one data set folder")
        self.config, self.features, self.batch_size, self.seed = config, tuple(features), batch_size, seed
        self._process = os.getpid()
        self._anew = functools.partial(
            Loader, config, features, batch_size, seed=seed, rows=self._rows, normalisers=normalisers
        )
        self.sources = [
            source.open_source(entry, config, seed=seed, normalisers=normalisers, on_shard=on_shard)
            for entry in config.datasets
        ]
        names = [item.definition.name for item in self.sources]
        if len(set(names)) < len(names):
            # Normalisation is kept by name, and a name stands for one embodiment.
            raise errors.UserError(f"the mix names a data set twice: {names}; merge the copies or keep one")
        batch_keys.check(self.features, config, self.sources)
        sizes = tuple(len(item.frames.valid) for item in self.sources)
        # As the published mixes do it: long episodes weigh what they are, and are thinned out afterwards.
        weighed = [item.frames.weighed for item in self.sources]
        shares = order.shares([item.weight for item in self.sources], weighed, config.balance)
        tables = ()
        if config.read == "blocks":
            window = config.block_window_mib * 2**20
            tables = tuple(
                blocks.make_blocks(
                    item.split.episodes,
                    item.frames.episode[item.frames.valid],
                    int(config.block_mib * 2**20),
                    share * window,
                )
                for item, share in zip(self.sources, shares)
            )
        self.order = order.Order(sizes, shares, seed, config.shuffle, tables)
        self._plan: tuple[int, tuple[np.ndarray, ...]] = (-1, ())
        self._files, self._memory = frame_reader.ShardFiles(), batch_memory.BatchMemory()
        self._cache = blocks.BlockCache(self._files.read, blocks.memory(tables)) if tables else None
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decode")
        shapes = {
            view: batch_keys.image_shape(view, config, self.sources, self._files)
            for view in config.views
            if f"image_{view}" in self.features or f"goal_{view}" in self.features
        }
        depth_shape = batch_keys.depth_shape(self.sources) if "depth" in self.features else ()
        tokens = batch_keys.token_count(self.sources) if "depth_tokens" in self.features else 0
        self._layout = batch_keys.layout(
            len(self._rows), self.features, config, self.sources, shapes, depth_shape, tokens
        )
        self._texts, self._text_identity = [], ""
        if "text" in self.features:
            self._tokenizer = tokenizer = text.TextTokenizer(config.text_tokenizer)
            self._text_identity = tokenizer.identity
            self._texts = [
                batch_keys.text_tables(item, tokenizer, config.max_text_tokens, config.text_rule)
                for item in self.sources
            ]

    def __reduce__(self):
        """Pickled as its arguments: another process opens its own files and threads (Grain's worker processes)."""
        return self._anew, ()

    # ---- what it is ----

    @property
    def frames(self) -> int:
        """Frames that may be sampled, over all data sets."""
        return sum(self.order.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the frames (a mix visits its data sets by share)."""
        return self.frames // self.batch_size

    @property
    def normalisers(self) -> dict[str, dict[str, normalise.Normaliser]]:
        """Data set name -> {"action", "proprio"}: what a checkpoint must carry to undo normalisation."""
        return {item.definition.name: {"action": item.action, "proprio": item.proprio} for item in self.sources}

    @property
    def picture_sizes(self) -> dict[str, list[int]]:
        """View -> [height, width] of its pictures before the device resizes them."""
        views = [view for view in self.config.views if f"image_{view}" in self._layout]
        return {view: [int(side) for side in self._layout[f"image_{view}"][0][-3:-1]] for view in views}

    @property
    def depth_kind(self) -> str:
        """ "metric" or "relative", of the depth this loader reads."""
        return batch_keys.depth_kind(self.sources)

    @property
    def depth_tokens(self) -> sidecar.Metadata | None:
        """What the depth tokens are (identity of the tokenizer, grid, codes); None if the mix has none."""
        found = self.sources[0].depth_tokens
        return None if found is None else found.metadata

    def identity(self) -> dict[str, Any]:
        """Json-able; equal identity and position mean equal samples, so a resume compares it."""
        c = self.config
        sampling = (
            "horizon",
            "chunk_end",
            "proprio_steps",
            "image_steps",
            "goal",
            "goal_max_steps",
            "instructions",
            "swap_views",
            "views",
            "missing_views",
            "image_size",
            "proprio_dim",
            "depth_offset",
        )
        read = {"read": c.read} | ({"block": [c.block_mib, c.block_window_mib]} if c.read == "blocks" else {})
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "shuffle": c.shuffle,
            "shares": list(self.order.shares),
            "datasets": [item.identity for item in self.sources],
            "text_tokenizer": self._text_identity,
            "max_text_tokens": c.max_text_tokens,
            "normalisation": {
                name: {key: value.to_json() for key, value in pair.items()} for name, pair in self.normalisers.items()
            },
            **{name: list(value) if isinstance(value := getattr(c, name), tuple) else value for name in sampling},
            **read,
            # Only where it differs: runs before this choice existed wrote "raw".
            **({} if c.text_rule == "raw" else {"text_rule": c.text_rule}),
        }

    def summary(self) -> list[str]:
        """A line for each data set: frames, share, what is left out and why."""
        lines = []
        for number, (item, share) in enumerate(zip(self.sources, self.order.shares)):
            left = ", ".join(f"{count:,} {reason}" for reason, count in item.frames.dropped.items())
            line = (
                f"{item.definition.name} {item.split.name}: {len(item.frames.valid):,} frames, {share:.1%} of the mix"
            )
            if self.order.blocks:
                line += f", shuffled among {self.order.blocks[number].window_frames:,.0f}"
            lines.append(line + (f"; left out: {left}" if left else ""))
        return lines

    def shapes(self) -> batch_keys.Layout:
        """Key -> (shape, dtype) of a batch of this host."""
        return dict(self._layout)

    # ---- batches ----

    def batch(self, step: int) -> HostBatch:
        """This host's part of global batch number `step` (>= 0); the same arrays for the same step, always.

        Raises:
          UserError: an image cannot be read (names data set, shard, record and step).
        """
        if not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"batch {step!r}: a whole number from 0 on is needed")
        if os.getpid() != self._process:
            raise RuntimeError(
                "this loader was opened before a fork, and threads do not survive one: open it afterwards"
            )
        position = step * self.batch_size + self._rows
        which, sample, index = self._planned(step)
        if self._cache is not None:
            self._request_blocks(which, sample)
        out = self._allocate()
        jobs: list[Job] = []
        for number, item in enumerate(self.sources):
            rows = np.flatnonzero(which == number)
            if len(rows):
                frames, epoch = item.frames.valid[index[rows]], sample[rows] // self.order.sizes[number]
                part = samples.Part(number, item, rows, frames, position[rows], epoch)
                samples.fill_vectors(out, part, self.config)
                if "text" in out:
                    out["text"][rows] = samples.texts(
                        part, self._texts[number], self.config, self.seed, self._tokenizer
                    )
                if "frame" in out:
                    out["frame"][rows] = frames
                pictures = samples.images(out, part, self.config, self.seed) + samples.depth(out, part, self.config)
                jobs += [job for group in pictures for job in self._read_jobs(part, group)]
        if "position" in out:
            out["position"][:] = position % 2**32
        if "dataset" in out:
            out["dataset"][:] = which
        self._run(jobs)
        return out

    def _planned(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(data set, sample, index into its sampled frames) of this host's rows, computed for PLANNED steps at once."""
        turn, place = divmod(step, PLANNED)
        plan = self._plan
        if plan[0] != turn:
            steps = np.arange(turn * PLANNED, (turn + 1) * PLANNED)
            which, sample = self.order.samples((steps[:, None] * self.batch_size + self._rows).reshape(-1))
            arrays = (which, sample, self.order.locate(which, sample))
            # One assignment: another thread sees the old plan or the new one.
            plan = self._plan = (turn, tuple(array.reshape(PLANNED, -1) for array in arrays))
        which, sample, index = plan[1]
        return which[place], sample[place], index[place]

    def _allocate(self) -> HostBatch:
        """Arrays of a batch; pictures are filled completely, everything else may keep zeros."""
        return {
            name: self._memory.empty(shape, dtype) if name.startswith(("image_", "goal_")) else np.zeros(shape, dtype)
            for name, (shape, dtype) in self._layout.items()
        }

    def iterate(self, step: int = 0, prefetch: int = 2) -> Iterator[HostBatch]:
        """Endless batches from `step` on, prepared by one background thread.

        At most `prefetch` finished or running batches are held besides the one handed out.
        """
        worker = concurrent.futures.ThreadPoolExecutor(1, "batch")
        ahead: collections.deque[concurrent.futures.Future[HostBatch]] = collections.deque()
        try:
            while True:
                while len(ahead) < max(1, prefetch):
                    ahead.append(worker.submit(self.batch, step))
                    step += 1
                yield ahead.popleft().result()
        finally:
            worker.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Stops the threads and closes the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._cache is not None:
            self._cache.close()
        self._files.close()
        self._memory.clear()

    # ---- reading ----

    def _read_jobs(self, part: samples.Part, pictures: samples.Pictures) -> list[Job]:
        """One job for each picture: fetch its bytes, decode them into their row."""
        item, frames = part.item, pictures.frames
        episodes = item.frames.episode[frames]
        paths = [item.paths[shard] for shard in item.split.episodes["shard"][episodes].tolist()]
        spans = item.spans(pictures.feature)[frames].tolist()
        if self._cache is None:
            fetches = [self._files.start(path, *span) for path, span in zip(paths, spans)]
        else:
            table = self.order.blocks[part.number]
            fetches = [
                functools.partial(self._cache.bytes_at, path, int(table.low[k]), int(table.high[k]), *span)
                for path, k, span in zip(paths, table.of_episode[episodes], spans)
            ]
        return [
            functools.partial(self._decode, pictures.out[row], pictures.decode, fetch, item, frame, span)
            for row, fetch, frame, span in zip(pictures.rows.tolist(), fetches, frames.tolist(), spans)
        ]

    def _decode(
        self,
        out: np.ndarray,
        decode: Callable[[bytes, np.ndarray], None],
        fetch: Callable[[], bytes],
        item: source.Source,
        frame: int,
        span: tuple[int, int],
    ) -> None:
        try:
            decode(fetch(), out)
        except errors.UserError:
            raise  # the file or its store cannot be read: that is no fault of the image
        except (ValueError, OSError) as error:
            path = item.split.shard_path(int(item.split.episodes["shard"][item.frames.episode[frame]]))
            if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have none
                raise file_faults.of(path, error) from error
            where = f" --index_dir={self.config.index_dir}" if self.config.index_dir else ""
            command = f"python tools/index_rlds.py {item.index.dataset.directory}{where}"
            raise errors.UserError(
                f"{path}: {item.split.where(frame)}, {span[1]} bytes at {span[0]} give no image: {error}. "
                f"`{command} --verify` tells whether the file is still the one that was indexed; `{command} --rebuild "
                "--quarantine --check_images` leaves out images that are damaged in it"
            ) from error

    def _run(self, jobs: list[Job]) -> None:
        """Runs jobs in the pool in a few equal parts: one future per image would cost more than a small image."""
        parts = min(len(jobs), 4 * self._threads)
        futures = [self._pool.submit(_run_all, jobs[part::parts]) for part in range(parts)]
        for future in futures:
            future.result()

    @property
    def _threads(self) -> int:
        return self.config.threads or os.cpu_count() or 1

    def _request_blocks(self, which: np.ndarray, sample: np.ndarray) -> None:
        """Starts reading the windows that this batch and the next ones come from."""
        wanted = []
        for number, (item, table) in enumerate(zip(self.sources, self.order.blocks)):
            mine = sample[which == number]
            if len(mine):
                ahead = self.order.blocks_ahead(number, int(mine[0]))
                wanted += [table.place(k, item.split.shard_path) for k in ahead]
        self._cache.request(wanted)


def _run_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()
