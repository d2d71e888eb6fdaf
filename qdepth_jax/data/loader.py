"""Batches as a pure function of (config, seed, step), and an iterator that prepares them ahead.

A batch is planned at once (which frames, which byte ranges), then a thread pool reads and decodes every image straight
into its place in the batch array. The state of the iterator is one integer, the step; any number of hosts sees the
same global batch, each its own contiguous part of it.
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
    blocks,
    data_config,
    frame_reader,
    normalise,
    order,
    sidecar,
    source,
    text,
    windows,
)

HostBatch = dict[str, np.ndarray]
Job = Callable[[], None]

# Bumped when equal configs would give other batches than before, so that no run resumes on a different order.
ORDER_VERSION = 1
# Steps whose order is computed at once: for the rows of one batch numpy's cost is that of its calls.
_PLANNED = 16
# Streams of random choices, see order.draw.
GOAL, INSTRUCTION, SWAP = 1, 2, 3


class Loader:
    """Reads batches; safe to call from several threads.

    Args:
      config: the data section.
      features: batch keys to produce, see batch_keys.py.
      batch_size: global batch.
      seed: of the order.
      process_index, process_count: this host; it gets rows [i * B / n, (i + 1) * B / n) of the global batch.
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
        normalisers: Mapping[str, Mapping[str, normalise.Normaliser]] | None = None,
        on_shard: Callable[[str, int], None] | None = None,
    ):
        if batch_size % process_count:
            raise errors.UserError(f"batch size {batch_size} does not divide over {process_count} hosts")
        if not config.datasets:
            raise errors.UserError("data.datasets is empty: name at least one data set folder")
        self.config, self.features, self.batch_size, self.seed = config, tuple(features), batch_size, seed
        part = batch_size // process_count
        self._rows = np.arange(process_index * part, (process_index + 1) * part)
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
        shares = order.shares([item.weight for item in self.sources], sizes, config.balance)
        in_blocks = config.read == "blocks"
        self.order = order.Order(
            sizes,
            shares,
            seed,
            config.shuffle,
            tuple(self._blocks(item, share) for item, share in zip(self.sources, shares)) if in_blocks else (),
        )
        self._plan: tuple[int, np.ndarray, np.ndarray] = (-1, *np.zeros((2, 0), np.int64))
        self._files = frame_reader.ShardFiles()
        self._cache = blocks.BlockCache(self._files.read, 2 * config.block_window_mib << 20) if in_blocks else None
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decode")
        shapes = {
            view: batch_keys.image_shape(view, config, self.sources, self._files)
            for view in config.views
            if f"image_{view}" in self.features or f"goal_{view}" in self.features
        }
        depth_shape = batch_keys.depth_shape(self.sources) if "depth" in self.features else ()
        if "depth" in self.features:
            _ = self.depth_kind
        tokens = batch_keys.token_count(self.sources) if "depth_tokens" in self.features else 0
        self._layout = batch_keys.layout(part, self.features, config, self.sources, shapes, depth_shape, tokens)
        self._texts = []
        if "text" in self.features:
            tokenizer = text.TextTokenizer(config.text_tokenizer)
            self._texts = [batch_keys.text_tables(item, tokenizer, config.max_text_tokens) for item in self.sources]

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
    def depth_kind(self) -> str:
        """ "metric" or "relative", of the depth this loader reads."""
        kinds = {
            item.depth.metadata.details["depth_kind"] if item.depth is not None else "metric" for item in self.sources
        }
        if len(kinds) > 1:
            raise errors.UserError(f"the data sets of the mix have depth of different kinds {sorted(kinds)}")
        return kinds.pop()

    @property
    def depth_tokens(self) -> sidecar.Metadata | None:
        """What the depth tokens are (identity of the tokenizer, grid, codes); None if the mix has none."""
        found = self.sources[0].depth_tokens
        return None if found is None else found.metadata

    def identity(self) -> dict[str, Any]:
        """Json-able; equal identity and position mean equal samples, so a resume compares it."""
        c = self.config
        sampling = ("horizon", "chunk_end", "proprio_steps", "image_steps", "goal", "goal_max_steps", "instructions")
        read = {"read": c.read} | ({"block": [c.block_mib, c.block_window_mib]} if c.read == "blocks" else {})
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "shuffle": c.shuffle,
            "shares": list(self.order.shares),
            "datasets": [item.identity for item in self.sources],
            "normalisation": {
                name: {key: value.to_json() for key, value in pair.items()} for name, pair in self.normalisers.items()
            },
            **{name: getattr(c, name) for name in sampling},
            **read,
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
          ValueError: an image cannot be read (names data set, shard, record and step).
        """
        position = step * self.batch_size + self._rows
        which, index = self._locate(step)
        if self._cache is not None:
            self._request_blocks(position)
        out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._layout.items()}
        jobs: list[Job] = []
        for number, item in enumerate(self.sources):
            rows = np.flatnonzero(which == number)
            if len(rows):
                frames = item.frames.valid[index[rows]]
                self._fill_vectors(out, item, rows, frames)
                if "text" in out:
                    out["text"][rows] = self._text(number, frames, position[rows])
                jobs += self._image_jobs(out, item, rows, frames, position[rows])
                jobs += self._fill_depth(out, item, rows, frames)
                if "frame" in out:
                    out["frame"][rows] = frames
        if "position" in out:
            out["position"][:] = position % 2**32
        if "dataset" in out:
            out["dataset"][:] = which
        self._run(jobs)
        return out

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

    def _locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(data set i32 [n], index into its sampled frames i64 [n]) of this host's rows of a batch."""
        first = step - step % _PLANNED
        plan = self._plan
        if plan[0] != first:
            steps = np.arange(first, first + _PLANNED)
            which, index = self.order.locate((steps[:, None] * self.batch_size + self._rows).reshape(-1))
            # One assignment: another thread sees the old plan or the new one.
            plan = self._plan = (first, which.reshape(_PLANNED, -1), index.reshape(_PLANNED, -1))
        return plan[1][step - first], plan[2][step - first]

    # ---- filling: rows i64 [n] of the batch are frames i64 [n] of one data set ----

    def _fill_vectors(self, out: HostBatch, item: source.Source, rows: np.ndarray, frames: np.ndarray) -> None:
        data = item.frames
        if "proprio" in out or "proprio_mask" in out:
            seen, mask = windows.observed(frames, item.frames.start[frames], self.config.proprio_steps)
            if "proprio" in out:
                width = out["proprio"].shape[-1]
                out["proprio"][rows] = batch_keys.normalised(data.proprio[seen], item.proprio, width)
            if "proprio_mask" in out:
                out["proprio_mask"][rows] = mask
        if "action" in out or "action_mask" in out:
            chunk, mask = windows.chunk(
                data.action,
                frames,
                data.end[frames],
                self.config.horizon,
                self.config.chunk_end,
                item.definition.absolute_action_dims,
            )
            if "action" in out:
                out["action"][rows] = normalise.normalise(chunk, item.action)
            if "action_mask" in out:
                out["action_mask"][rows] = mask
        if "view_mask" in out:
            out["view_mask"][rows] = [view in item.definition.views for view in self.config.views]

    def _text(self, number: int, frames: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Token rows i32 [n, L] of the instruction of each frame, one of several by config."""
        tables = self._texts[number]
        said = np.stack([full[ids[frames]] for ids, _, full in tables])
        if self.config.instructions == "random":
            nth = order.draw_below(self.seed, position, INSTRUCTION, np.maximum(said.sum(0), 1))
        else:
            nth = np.zeros(len(frames), np.int64)
        # The nth of the variants that say something; where none does, the first, which is empty.
        chosen = np.argmax(np.cumsum(said, 0) == nth + 1, axis=0)
        out = np.empty((len(frames), self.config.max_text_tokens), np.int32)
        for variant, (ids, table, _) in enumerate(tables):
            mine = chosen == variant
            out[mine] = table[ids[frames[mine]]]
        return out

    def _image_jobs(
        self, out: HostBatch, item: source.Source, rows: np.ndarray, frames: np.ndarray, position: np.ndarray
    ) -> list[Job]:
        c, jobs, feature_of = self.config, [], {}
        for view in c.views:
            if view in item.definition.views:
                feature_of[view] = [view] * len(rows)
        if item.definition.swap and all(view in feature_of for view in item.definition.swap):
            a, b = item.definition.swap
            swapped = (order.draw(self.seed, position, SWAP) & np.uint64(1)).astype(bool)
            feature_of[a] = np.where(swapped, b, a).tolist()
            feature_of[b] = np.where(swapped, a, b).tolist()
        if c.goal:
            last = item.end(frames) - 1
            goal = last
            if c.goal == "uniform":
                room = last - frames if not c.goal_max_steps else np.minimum(last - frames, c.goal_max_steps)
                goal = frames + order.draw_below(self.seed, position, GOAL, room + 1)
        seen, _ = windows.observed(frames, item.frames.start[frames], c.image_steps)
        for view, features in feature_of.items():
            if (array := out.get(f"image_{view}")) is not None:
                flat = array.reshape(-1, *array.shape[-3:])
                places = (rows[:, None] * c.image_steps + np.arange(c.image_steps)).reshape(-1)
                repeated = [name for name in features for _ in range(c.image_steps)]
                jobs += self._decode_jobs(flat, item, repeated, places, seen.reshape(-1))
            if (array := out.get(f"goal_{view}")) is not None:
                jobs += self._decode_jobs(array, item, features, rows, goal)
        return jobs

    def _decode_jobs(
        self, out: np.ndarray, item: source.Source, views: Sequence[str], rows: np.ndarray, frames: np.ndarray
    ) -> list[Job]:
        jobs = []
        for view in sorted(set(views)):
            mine = np.array([name == view for name in views])
            decode = frame_reader.decode_bgr if view in item.swapped_channels else frame_reader.decode_rgb
            jobs += self._read_jobs(out, item, item.image_feature(view), decode, rows[mine], frames[mine])
        return jobs

    def _fill_depth(self, out: HostBatch, item: source.Source, rows: np.ndarray, frames: np.ndarray) -> list[Job]:
        # Depth of a later frame, for predicting it; past the true end of the episode there is nothing to predict.
        later = frames + self.config.depth_offset
        end = item.end(frames)
        inside, later = later < end, np.minimum(later, end - 1)
        episode = item.frames.episode[frames]
        if "depth_tokens" in out:
            out["depth_tokens"][rows] = item.depth_tokens.values[later]
        if "depth_tokens_mask" in out:
            out["depth_tokens_mask"][rows] = inside[:, None]
        if "depth_scale" in out:
            out["depth_scale"][rows] = item.own_depth()[1] if item.depth is None else item.depth.scale[episode]
        if "depth_offset" in out:
            out["depth_offset"][rows] = 0.0 if item.depth is None else item.depth.offset[episode]
        if "depth" not in out:
            return []
        if item.depth is not None:
            out["depth"][rows[inside]] = item.depth.values[later[inside]]
            return []
        decode, _ = item.own_depth()
        return self._read_jobs(out["depth"], item, item.depth_feature(), decode, rows[inside], later[inside])

    # ---- reading ----

    def _read_jobs(
        self,
        out: np.ndarray,
        item: source.Source,
        feature: str,
        decode: Callable[[bytes, np.ndarray], None],
        rows: np.ndarray,
        frames: np.ndarray,
    ) -> list[Job]:
        """One job for each row: fetch the encoded image of a frame, decode it into its row."""
        episodes = item.frames.episode[frames]
        shards = item.split.episodes["shard"][episodes].tolist()
        spans = item.spans(feature)[frames].tolist()
        if self._cache is None:
            fetches = [
                self._files.start(item.split.shard_path(shard), offset, size)
                for shard, (offset, size) in zip(shards, spans)
            ]
        else:
            table = next(made for made, other in zip(self.order.blocks, self.sources) if other is item)
            fetches = [
                functools.partial(
                    self._cache.bytes_at, item.split.shard_path(shard), int(table.low[k]), int(table.high[k]), *span
                )
                for shard, k, span in zip(shards, table.of_episode[episodes], spans)
            ]
        return [
            functools.partial(self._decode, out[row], decode, fetch, item, frame, span)
            for row, fetch, frame, span in zip(rows.tolist(), fetches, frames.tolist(), spans)
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
            raise  # the store does not answer: that is no fault of the image
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{item.split.where(frame)}, {span[1]} bytes at {span[0]}: {error}. The shard changed since it was "
                "indexed or the image is damaged: find out with "
                f"`python tools/index_rlds.py {item.index.dataset.directory} --verify`, leave damaged images out with "
                "`--rebuild --quarantine --check_images`"
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

    # ---- block mode ----

    def _blocks(self, item: source.Source, share: float) -> blocks.Blocks:
        return blocks.make_blocks(
            item.split.episodes,
            item.frames.episode[item.frames.valid],
            self.config.block_mib << 20,
            share * (self.config.block_window_mib << 20),
        )

    def _request_blocks(self, position: np.ndarray) -> None:
        """Starts reading the windows that this batch and the next ones come from."""
        which, sample = self.order.samples(position)
        wanted = []
        for number, item in enumerate(self.sources):
            mine = sample[which == number]
            if len(mine):
                table = self.order.blocks[number]
                for k in self.order.blocks_ahead(number, int(mine[0])):
                    wanted.append((item.split.shard_path(int(table.shard[k])), int(table.low[k]), int(table.high[k])))
        self._cache.request(wanted)


def _run_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()
