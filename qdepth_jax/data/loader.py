"""Batches as a pure function of (config, seed, step), and an iterator that prepares them ahead.

A batch is planned at once (which frames, which byte ranges), then a thread pool reads and decodes every image straight
into its place in the batch array. The state of the iterator is one integer, the step; any number of hosts sees the
same global batch, each its own contiguous part of it.
"""

import collections
import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import data_config, frame_reader, normalise, order, sidecar, source, standardise, text

HostBatch = dict[str, np.ndarray]
Job = Callable[[], None]

_FEATURES = (
    "proprio", "action", "action_mask", "text", "depth", "depth_scale", "depth_offset", "depth_tokens",
    "depth_tokens_mask", "position", "frame", "dataset",
)  # fmt: skip
# Bumped when equal configs would give other batches than before, so that no run resumes on a different order.
ORDER_VERSION = 1


class Loader:
    """Reads batches; safe to call from several threads.

    Args:
      config: the data section.
      features: batch keys to produce: "image_main", "image_wrist", ... and any of the module's table.
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
            source.open_source(
                entry,
                config,
                seed=seed,
                normalisers=normalisers,
                on_shard=on_shard,
            )
            for entry in config.datasets
        ]
        names = [item.definition.name for item in self.sources]
        if len(set(names)) < len(names):
            # Normalisation is kept by name, and a name stands for one embodiment.
            raise errors.UserError(f"the mix names a data set twice: {names}; merge the copies or keep one")
        self._check_features()
        sizes = tuple(len(item.frames.valid) for item in self.sources)
        shares = order.shares([item.weight for item in self.sources], sizes, config.balance)
        self.order = order.Order(sizes, shares, seed, config.shuffle)
        self._files = frame_reader.ShardFiles()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decode")
        self._images = {
            view: self._image_shape(view)
            for view in (name.removeprefix("image_") for name in self.features if name.startswith("image_"))
        }
        self._texts = self._text_tables() if "text" in self.features else []
        self._depth_shape = self._check_depth() if "depth" in self.features else ()
        self._token_count = self._check_tokens() if "depth_tokens" in self.features else 0
        self._spans = [self._span_tables(item) for item in self.sources]

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
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "shuffle": self.config.shuffle,
            "shares": list(self.order.shares),
            "datasets": [item.identity for item in self.sources],
            "horizon": self.config.horizon,
            "normalisation": {
                name: {key: value.to_json() for key, value in pair.items()} for name, pair in self.normalisers.items()
            },
        }

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Key -> (shape, dtype) of a batch of this host."""
        return {name: (array.shape, array.dtype) for name, array in self._allocate().items()}

    # ---- batches ----

    def batch(self, step: int) -> HostBatch:
        """This host's part of global batch number `step` (>= 0); the same arrays for the same step, always.

        Raises:
          ValueError: an image cannot be read (names data set, shard, record and step).
        """
        position = step * self.batch_size + self._rows
        which, rank = self.order.locate(position)
        out = self._allocate()
        jobs: list[Job] = []
        for number, item in enumerate(self.sources):
            rows = np.flatnonzero(which == number)
            if len(rows):
                self._fill(out, number, item, rows, item.frames.valid[rank[rows]], jobs)
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
        self._files.close()

    # ---- filling ----

    def _allocate(self) -> HostBatch:
        b, c = len(self._rows), self.config
        shapes = {
            "proprio": ((b, 1, self.sources[0].frames.proprio.shape[1]), np.float32),
            "action": ((b, c.horizon, self.sources[0].frames.action.shape[1]), np.float32),
            "action_mask": ((b, c.horizon), np.bool_),
            "text": ((b, c.max_text_tokens), np.int32),
            "depth": ((b, *self._depth_shape), np.uint16),
            "depth_scale": ((b,), np.float32),
            "depth_offset": ((b,), np.float32),
            "depth_tokens": ((b, self._token_count), np.int32),
            "depth_tokens_mask": ((b, self._token_count), np.bool_),
            "position": ((b,), np.uint32),
            "frame": ((b,), np.int32),
            "dataset": ((b,), np.int32),
        } | {f"image_{view}": ((b, *shape), np.uint8) for view, shape in self._images.items()}
        return {name: np.zeros(*shapes[name]) for name in self.features}

    def _fill(
        self, out: HostBatch, number: int, item: source.Source, rows: np.ndarray, frames: np.ndarray, jobs: list[Job]
    ) -> None:
        """Everything of one data set: rows i64 [n] of the batch are frames i64 [n]."""
        data, table = item.frames, item.split.episodes
        episode = data.episode[frames]
        if "proprio" in out:
            out["proprio"][rows, 0] = normalise.normalise(data.proprio[frames], item.proprio)
        if "action" in out or "action_mask" in out:
            wanted = frames[:, None] + np.arange(self.config.horizon)[None, :]
            last = data.end[frames][:, None] - 1
            if "action" in out:
                # Past the end of the episode the last action is repeated, and the mask says so.
                out["action"][rows] = normalise.normalise(data.action[np.minimum(wanted, last)], item.action)
            if "action_mask" in out:
                out["action_mask"][rows] = wanted <= last
        if "text" in out:
            ids, tokens = self._texts[number]
            out["text"][rows] = tokens[ids[frames]]
        if "frame" in out:
            out["frame"][rows] = frames
        for view in self._images:
            self._image_jobs(out[f"image_{view}"], item, self._spans[number][view], rows, frames, jobs)
        # Depth of a later frame, for predicting it; past the true end of the episode there is nothing to predict.
        later = frames + self.config.depth_offset
        final = (table["start"] + table["length"])[episode] - 1
        inside, later = later <= final, np.minimum(later, final)
        if "depth_tokens" in out:
            out["depth_tokens"][rows] = item.depth_tokens.values[later]
        if "depth_tokens_mask" in out:
            out["depth_tokens_mask"][rows] = inside[:, None]
        if "depth_scale" in out:
            own = item.definition.depth_metres
            out["depth_scale"][rows] = own if item.depth is None else item.depth.scale[episode]
        if "depth_offset" in out:
            out["depth_offset"][rows] = 0.0 if item.depth is None else item.depth.offset[episode]
        if "depth" in out:
            if item.depth is not None:
                out["depth"][rows[inside]] = item.depth.values[later[inside]]
            else:
                spans = self._spans[number]["depth"]
                self._image_jobs(out["depth"], item, spans, rows[inside], later[inside], jobs)

    def _image_jobs(
        self,
        out: np.ndarray,
        item: source.Source,
        spans: np.ndarray,
        rows: np.ndarray,
        frames: np.ndarray,
        jobs: list[Job],
    ) -> None:
        shards = item.split.episodes["shard"][item.frames.episode[frames]]
        places = spans[frames]
        decode = frame_reader.decode_depth if out.dtype == np.uint16 else frame_reader.decode_rgb
        for row, frame, shard, (offset, size) in zip(rows.tolist(), frames.tolist(), shards.tolist(), places.tolist()):
            jobs.append(functools.partial(self._read, out[row], decode, item, frame, shard, offset, size))

    def _read(
        self,
        out: np.ndarray,
        decode: Callable[[bytes, np.ndarray], None],
        item: source.Source,
        frame: int,
        shard: int,
        offset: int,
        size: int,
    ) -> None:
        try:
            decode(self._files.read(item.split.shard_path(shard), offset, size), out)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{item.split.where(frame)}, {size} bytes at {offset}: {error}. The shard changed since it was indexed "
                f"or the image is damaged: run `python tools/index_rlds.py {item.index.dataset.directory} --verify`"
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

    # ---- checks and tables at the start ----

    def _check_features(self) -> None:
        known = (*(f"image_{view}" for view in self.config.views), *_FEATURES)
        unknown = [name for name in self.features if name not in known]
        if unknown:
            raise errors.UserError(
                f"the model asks for {unknown}; with data.views={self.config.views} there is {known}"
            )
        first = self.sources[0].frames
        normalise.check_dims("action", first.action.shape[1], [s.frames.action.shape[1] for s in self.sources[1:]])
        normalise.check_dims("proprio", first.proprio.shape[1], [s.frames.proprio.shape[1] for s in self.sources[1:]])

    def _image_shape(self, view: str) -> tuple[int, int, int]:
        if self.config.image_size:
            if len(self.config.image_size) != 2:
                raise errors.UserError(f"data.image_size={self.config.image_size} must be (height, width)")
            return (*self.config.image_size, 3)
        sizes = {}
        for item in self.sources:
            name = item.image_feature(view)
            shape = item.index.dataset.feature(name).shape
            if len(shape) != 3 or min(shape) < 1:
                frame = int(item.frames.valid[0])
                shape = (*frame_reader.image_size(self._bytes(item, name, frame)), 3)
            sizes[item.definition.name] = shape[:2]
        if len(set(sizes.values())) > 1:
            raise errors.UserError(
                f"images of view {view!r} differ in size: {sizes}; set data.image_size=(height, width) to resize them "
                "on the host"
            )
        return (*next(iter(sizes.values())), 3)

    def _bytes(self, item: source.Source, feature: str, frame: int) -> bytes:
        offset, size = item.split.spans(feature)[frame].tolist()
        shard = item.split.episodes["shard"][item.frames.episode[frame]]
        return self._files.read(item.split.shard_path(int(shard)), offset, size)

    def _text_tables(self) -> list[tuple[np.ndarray, np.ndarray]]:
        tokenizer = text.TextTokenizer(self.config.text_tokenizer)
        tables = []
        for item in self.sources:
            name = f"steps/{item.definition.language[0]}"
            ids, strings = standardise.texts(item.split, name, item.definition.language_kind)
            used = np.unique(ids[item.frames.valid])
            rows, unknown = tokenizer.encode_table([strings[i] for i in used], self.config.max_text_tokens)
            if unknown.any():
                logging.warning(
                    "%s: %d of %d instructions hold tokens that %s does not know, for instance %r",
                    item.definition.name, int((unknown > 0).sum()), len(used), tokenizer.path,
                    strings[used[int(np.argmax(unknown))]],
                )  # fmt: skip
            table = np.zeros((len(strings), self.config.max_text_tokens), np.int32)
            table[used] = rows
            tables.append((ids, table))
        return tables

    def _check_depth(self) -> tuple[int, int]:
        shapes = {}
        for item in self.sources:
            if item.depth is not None:
                shapes[item.definition.name] = item.depth.metadata.row_shape
            elif item.depth_feature():
                shapes[item.definition.name] = item.index.dataset.feature(item.depth_feature()).shape[:2]
            else:
                raise errors.UserError(
                    f"data set {item.definition.name} in {item.index.dataset.directory} has no depth "
                    f"(feature 'steps/{item.definition.main_depth}'): annotate it with tools/annotate_depth.py and set "
                    "the data set's `depth` to the result"
                )
        if len(set(shapes.values())) > 1:
            raise errors.UserError(f"depth maps of the mix differ in size: {shapes}; annotate them at one size")
        _ = self.depth_kind
        return next(iter(shapes.values()))

    def _check_tokens(self) -> int:
        identities = set()
        for item in self.sources:
            if item.depth_tokens is None:
                raise errors.UserError(
                    f"data set {item.definition.name} has no depth tokens: run tools/tokenize_depth.py and set the "
                    "data set's `depth_tokens` to the result"
                )
            identities.add((item.depth_tokens.metadata.identity, item.depth_tokens.metadata.row_shape))
        if len(identities) > 1:
            raise errors.UserError(f"depth tokens of the mix come from different tokenizers: {sorted(identities)}")
        return identities.pop()[1][0]

    def _span_tables(self, item: source.Source) -> dict[str, np.ndarray]:
        tables = {view: item.split.spans(item.image_feature(view)) for view in self._images}
        if "depth" in self.features and item.depth is None:
            tables["depth"] = item.split.spans(item.depth_feature())
        return tables


def _run_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()
