"""What there is to say about a data set without decoding more than a few images: columns, statistics, instructions.

Everything that depends on how a definition is written is read in `open_subject` alone.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import (
    data_config,
    definitions,
    depth_images,
    frame_reader,
    index,
    normalise,
    shard_scan,
    sidecar,
    source,
    spec,
)

CHUNK = 1 << 16  # rows of a column held at a time
RAW_COLUMNS = 16  # columns without a definition that are wider get no statistics


@dataclasses.dataclass(frozen=True)
class Subject:
    """One split of a data set and what is known about it.

    Attributes:
      item: standardised columns and normalisers; None where no definition fits.
      problem: why `item` is None or incomplete, in words; else empty.
      defined: whether the data set has a definition; if not, views, languages and depth are guesses by dtype and name.
      views: view name -> image feature. bgr: views stored with blue first.
      languages: text features with the instruction, the first one first.
      depth: view name -> u16 depth image feature. metres: depth feature -> metres per unit of it.
      rate_hz: control rate, 0 = unknown.
    """

    opened: index.Index
    split: index.SplitIndex
    item: source.Source | None
    problem: str
    defined: bool
    views: dict[str, str]
    bgr: tuple[str, ...]
    languages: tuple[str, ...]
    depth: dict[str, str]
    metres: dict[str, float]
    rate_hz: float

    @property
    def main(self) -> str:
        """Name of the main view, "" where there is no image at all."""
        return "main" if "main" in self.views else next(iter(self.views), "")


def open_subject(
    directory: str,
    *,
    split: str = "",
    name: str = "",
    index_dir: str = "",
    on_shard: Callable[[str, int], None] | None = None,
) -> Subject:
    """Opens (indexing first where needed) a data set for inspection.

    Args:
      directory: folder of the data set version.
      split: its name; empty = "train", or the first one.
      name: row of definitions.py; empty = the name in dataset_info.json.
      index_dir, on_shard: as in `index.open_index`.

    Raises:
      UserError: no such folder, split or definition; damaged shards.
    """
    try:
        opened = index.open_index(directory, index_dir, on_shard=on_shard)
    except ValueError as error:
        raise errors.UserError(str(error)) from error
    table = opened.split(split or ("train" if "train" in opened.splits else next(iter(opened.splits))))
    if not len(table.episodes):
        raise errors.UserError(f"split {table.name!r} of {opened.dataset.name} has no episode: choose another --split")
    features = opened.dataset.features
    known = name or opened.dataset.name
    definition = definitions.find(known) if name else definitions.DEFINITIONS.get(known)
    if definition is None:
        images = [f for f in features.values() if f.kind == "image" and f.per_step]
        return Subject(
            opened=opened,
            split=table,
            item=None,
            problem=f"no definition for {known!r}: raw columns are shown, nothing is standardised. Add a row in "
            "qdepth_jax/data/definitions.py",
            defined=False,
            views={f.name.removeprefix("steps/observation/"): f.name for f in images if f.dtype == "uint8"},
            bgr=(),
            languages=tuple(f.name for f in features.values() if f.kind == "text" and _sounds_like_language(f.name)),
            depth={f.name.removeprefix("steps/observation/"): f.name for f in images if f.dtype == "uint16"},
            metres={f.name: 0.001 for f in images if f.dtype == "uint16"},
            rate_hz=0.0,
        )
    item, problem = _source(directory, known, table.name, index_dir)
    views = {view: f"steps/{feature}" for view, feature in definition.views.items()}
    depth = {view: definitions.depth_of(definition, opened.dataset, view) for view in views}
    gone = [f"{view} ({feature})" for view, feature in views.items() if feature not in features]
    if gone:
        problem = f"{problem}; " * bool(problem) + f"this copy lacks views of its definition: {', '.join(gone)}"
    return Subject(
        opened=opened,
        split=table,
        item=item,
        problem=problem,
        defined=True,
        views={view: feature for view, feature in views.items() if feature in features},
        bgr=definitions.swapped_channels(definition, opened.dataset),
        languages=tuple(n for n in (f"steps/{text}" for text in definition.language) if n in features),
        depth={view: feature for view, (feature, _) in depth.items() if feature in features},
        metres=dict(depth.values()),
        rate_hz=definition.rate_hz,
    )


def _source(directory: str, name: str, split: str, index_dir: str) -> tuple[source.Source | None, str]:
    """The data set as training would read it: labelled frames, or all frames where that leaves none."""
    problem, entry = "", data_config.DatasetConfig(path=directory, name=name)
    for skip in (True, False):
        config = data_config.DataConfig(
            datasets=(entry,), split=split, horizon=1, skip_unlabelled=skip, index_dir=index_dir
        )
        try:
            return source.open_source(entry, config), problem
        except errors.UserError as error:
            problem = problem or str(error)
    return None, problem


def _sounds_like_language(name: str) -> bool:
    return any(word in name for word in ("language", "instruction", "task"))


# ---- columns ----


def columns(subject: Subject) -> list[spec.FeatureSpec]:
    """Per-step features that the index keeps as columns."""
    features = subject.opened.dataset.features.values()
    return [f for f in features if f.per_step and shard_scan.storage(f) == "column"]


def chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a memory-mapped column, f32 [n, D]."""
    for start in range(0, len(array), CHUNK):
        part = np.asarray(array[start : start + CHUNK])
        yield start, part.reshape(len(part), -1).astype(np.float32)


def raw_statistics(array: np.ndarray) -> normalise.Statistics:
    """Statistics of a column [F, ...] one dimension at a time, so that memory is one dimension; NaN is left out."""
    flat = array.reshape(len(array), -1)
    rows = []
    for dim in range(flat.shape[1]):
        values = np.asarray(flat[:, dim], np.float64)
        values = values[np.isfinite(values)]
        values = values if len(values) else np.full((1,), np.nan)
        q01, q99 = np.quantile(values, [0.01, 0.99])
        rows.append((values.mean(), values.std(), values.min(), values.max(), q01, q99))
    return normalise.Statistics(*(tuple(float(v) for v in row) for row in zip(*rows)), count=len(array))


def histogram(
    parts: Iterator[np.ndarray], low: np.ndarray, high: np.ndarray, bins: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Counts i64 [D, bins] of f32 [n, D] parts between low and high [D], and the share [D] that lies outside."""
    dims = len(low)
    counts, outside, total = np.zeros((dims, bins), np.int64), np.zeros(dims, np.int64), 0
    for part in parts:
        total += len(part)
        for dim in range(dims):
            counts[dim] += np.histogram(part[:, dim], bins, (low[dim], high[dim]))[0]
            outside[dim] += int(((part[:, dim] < low[dim]) | (part[:, dim] > high[dim])).sum())
    return counts, outside / max(total, 1)


def clipped_share(values: np.ndarray, frames: np.ndarray, normaliser: normalise.Normaliser) -> np.ndarray:
    """Share [D] of values f32 [F, D] at `frames` that normalisation cuts off; 0 where it cuts nothing."""
    s = normaliser.statistics
    bounds = {"bounds": (s.q01, s.q99), "minmax": (s.low, s.high)}.get(normaliser.kind)
    cut = np.zeros(s.dims)
    if bounds is None:
        return cut
    for start in range(0, len(frames), CHUNK):
        part = values[frames[start : start + CHUNK]]
        cut += ((part < np.float32(bounds[0])) | (part > np.float32(bounds[1]))).sum(0)
    cut[list(normaliser.raw_dims)] = 0
    return cut / max(len(frames), 1)


def pairs(subject: Subject) -> list[tuple[str, np.ndarray, normalise.Normaliser]]:
    """("action", f32 [F, A], its normaliser) and ("proprio", ...)."""
    item = subject.item
    return [("action", item.frames.action, item.action), ("proprio", item.frames.proprio, item.proprio)]


def constant_dims(normaliser: normalise.Normaliser) -> list[int]:
    """Dimensions that hardly move; raw ones (a gripper) are left out."""
    s = normaliser.statistics
    width = np.array(s.q99) - np.array(s.q01)
    return [d for d in np.flatnonzero(width < 2 * normaliser.floor).tolist() if d not in normaliser.raw_dims]


# ---- instructions ----


def texts(subject: Subject) -> list[tuple[np.ndarray, list[str]]]:
    """For each language feature the ids i32 [F] of its texts, and the texts without blanks around them."""
    split, out = subject.split, []
    for name in subject.languages:
        ids, strings = split.texts(name)
        ids = np.asarray(ids).reshape(len(ids), -1)[:, 0]  # of several strings in a step, the first
        if len(ids) != split.frames:  # one for the whole episode
            ids = np.repeat(ids, split.episodes["length"].astype(np.int64))
        out.append((ids, [text.strip() for text in strings]))
    return out


def instructions(subject: Subject) -> tuple[list[tuple[str, int, int]], np.ndarray]:
    """Rows (text, frames, episodes), most frames first, blank ones left out; and bool [F]: frame has an instruction."""
    split = subject.split
    labelled = np.zeros(split.frames, bool)
    frames: collections.Counter[str] = collections.Counter()
    episodes: collections.Counter[str] = collections.Counter()
    for ids, strings in texts(subject):
        labelled |= np.array([bool(text) for text in strings])[ids]
        count = np.bincount(ids, minlength=len(strings))
        first = np.bincount(ids[split.episodes["start"]], minlength=len(strings))
        for text, n, m in zip(strings, count.tolist(), first.tolist()):
            if text:
                frames[text] += n
                episodes[text] += m
    return [(text, n, episodes[text]) for text, n in frames.most_common()], labelled


# ---- images ----


class Images:
    """Single frames of a split, decoded; what cannot be decoded is named in `damaged` and comes out as None."""

    def __init__(self, split: index.SplitIndex):
        self._split, self._files = split, frame_reader.ShardFiles()
        self.damaged: list[str] = []

    def encoded(self, feature: str, frame: int) -> bytes:
        offset, size = self._split.spans(feature)[frame].tolist()
        shard = int(self._split.episodes["shard"][int(self._split.episode_of(np.int64(frame)))])
        return self._files.read(self._split.shard_path(shard), offset, size)

    def rgb(self, feature: str, frame: int, bgr: bool = False) -> np.ndarray | None:
        """u8 [H, W, 3] at its native size."""
        picture = self._decode(feature, frame, frame_reader.decode_rgb, np.uint8, (3,))
        return picture[..., ::-1] if bgr and picture is not None else picture

    def depth(self, feature: str, metres: float, frame: int) -> tuple[np.ndarray, float] | None:
        """u16 [H, W] (0 = invalid) and metres per unit of it; `metres` per stored unit."""
        declared = self._split.dataset.feature(feature)
        decode, scale = depth_images.decoder(declared, metres)
        shape = declared.shape[:2] if min(declared.shape[:2]) > 0 else None
        raw = self._decode(feature, frame, decode, np.uint16, (), shape)
        return None if raw is None else (raw, scale)

    def size(self, feature: str, frame: int) -> tuple[int, int] | None:
        """(height, width) from the header."""
        return self._guard(feature, frame, lambda data: frame_reader.image_size(data))

    def close(self) -> None:
        self._files.close()

    def _decode(self, feature: str, frame: int, decode: Callable, dtype: type, tail: tuple[int, ...], shape=None):
        def run(data: bytes) -> np.ndarray:
            out = np.empty((*(shape or frame_reader.image_size(data)), *tail), dtype)
            decode(data, out)
            return out

        return self._guard(feature, frame, run)

    def _guard(self, feature: str, frame: int, run: Callable):
        try:
            return run(self.encoded(feature, frame))
        except errors.UserError:
            raise  # the file cannot be read: that is no fault of the image
        except ValueError as error:
            self.damaged.append(f"{feature} of {self._split.where(frame)}: {error}")
            return None


# ---- depth ----


def code_counts(tokens: sidecar.Sidecar, codes: int) -> np.ndarray:
    """How often each code occurs in a token sidecar, i64 [codes], invalid tokens left out; read in chunks."""
    out, step = np.zeros(codes, np.int64), max(1, 16 * CHUNK // tokens.values.shape[1])
    for start in range(0, len(tokens.values), step):
        part = np.asarray(tokens.values[start : start + step])
        out += np.bincount(part[part != sidecar.INVALID_TOKEN], minlength=codes)
    return out
