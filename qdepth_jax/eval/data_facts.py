"""What there is to say about a data set without decoding more than a few images: statistics, labels, and what is odd.

Everything that depends on how a definition is written is read in `open_subject` alone.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from qdepth_jax import errors, progress
from qdepth_jax.data import data_config, definitions, frame_reader, index, normalise, shard_scan, sidecar, source, spec

CHUNK = 1 << 16  # rows of a column held at a time
FAR_OUT = 10.0  # an outlier lies more than this many q01..q99 widths outside of them
HEADERS = 200  # images whose size is looked at
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
      depth: view name -> u16 depth image feature. metres: per unit of it.
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
    metres: float
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
            metres=0.001,
            rate_hz=0.0,
        )
    kinds = {f.name: f.kind for f in features.values()}
    item, problem = _source(directory, known, table.name, index_dir)
    views = {view: f"steps/{feature}" for view, feature in definition.views.items()}
    gone = [f"{view} ({feature})" for view, feature in views.items() if feature not in features]
    if gone:
        problem = f"{problem}; " * bool(problem) + f"this copy lacks views of its definition: {', '.join(gone)}"
    # One feature or several; one depth feature of the main view or one for each view.
    languages = (definition.language,) if isinstance(definition.language, str) else tuple(definition.language)
    depth = {"main": definition.depth} if isinstance(definition.depth, str) else dict(definition.depth or {})
    return Subject(
        opened=opened,
        split=table,
        item=item,
        problem=problem,
        defined=True,
        views={view: feature for view, feature in views.items() if feature in features},
        bgr=tuple(getattr(definition, "bgr", ())),
        # Anything else than text or images (code points, compressed tensors) is not shown.
        languages=tuple(n for n in (f"steps/{text}" for text in languages) if kinds.get(n) == "text"),
        depth={view: f"steps/{feature}" for view, feature in depth.items() if kinds.get(f"steps/{feature}") == "image"},
        metres=definition.depth_metres,
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


# ---- instructions ----


def instructions(subject: Subject) -> tuple[list[tuple[str, int, int]], np.ndarray]:
    """Rows (text, frames, episodes), most frames first, blank ones left out; and bool [F]: frame has an instruction."""
    split = subject.split
    lengths = split.episodes["length"].astype(np.int64)
    labelled = np.zeros(split.frames, bool)
    frames: collections.Counter[str] = collections.Counter()
    episodes: collections.Counter[str] = collections.Counter()
    for name in subject.languages:
        ids, strings = split.texts(name)
        ids = np.asarray(ids) if len(ids) == split.frames else np.repeat(ids, lengths)
        texts = [text.strip() for text in strings]
        labelled |= np.array([bool(text) for text in texts])[ids]
        count = np.bincount(ids, minlength=len(texts))
        first = np.bincount(ids[split.episodes["start"]], minlength=len(texts))
        for text, n, m in zip(texts, count.tolist(), first.tolist()):
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

    def depth(self, feature: str, frame: int) -> np.ndarray | None:
        """u16 [H, W]; 0 = invalid."""
        return self._decode(feature, frame, frame_reader.decode_depth, np.uint16, ())

    def size(self, feature: str, frame: int) -> tuple[int, int] | None:
        """(height, width) from the header."""
        return self._guard(feature, frame, lambda data: frame_reader.image_size(data))

    def close(self) -> None:
        self._files.close()

    def _decode(self, feature: str, frame: int, decode: Callable, dtype: type, tail: tuple[int, ...]):
        def run(data: bytes) -> np.ndarray:
            out = np.empty((*frame_reader.image_size(data), *tail), dtype)
            decode(data, out)
            return out

        return self._guard(feature, frame, run)

    def _guard(self, feature: str, frame: int, run: Callable):
        try:
            return run(self.encoded(feature, frame))
        except ValueError as error:
            self.damaged.append(f"{feature} of {self._split.where(frame)}: {error}")
            return None


# ---- what is odd ----


def warnings(subject: Subject, horizon: int, images: Images) -> list[str]:
    """Everything a person should look at before training on this split, one sentence each."""
    split = subject.split
    out = [subject.problem] if subject.problem else []
    out += list(subject.opened.warnings)
    lengths = split.episodes["length"]
    for what, these in (
        ("have one single frame", lengths == 1),
        (f"have fewer frames than the horizon of {horizon}", lengths < horizon),
    ):
        if these.any():
            out.append(f"{int(these.sum())} of {len(lengths)} episodes {what}: {_some(np.flatnonzero(these))}")
    out += _label_warnings(subject)
    out += _non_finite(subject)
    if subject.item is not None:
        for name, values, normaliser in pairs(subject):
            out += _constant(name, normaliser) + _outliers(name, values, subject.item.frames.valid, split, normaliser)
    else:
        for feature in columns(subject):
            values = split.column(feature.name)
            if not feature.dtype.startswith("float") or len(feature.shape) != 1 or values.shape[1] > RAW_COLUMNS:
                continue
            normaliser = normalise.Normaliser(raw_statistics(values))
            out += _constant(feature.name, normaliser)
            out += _outliers(feature.name, values, np.arange(split.frames), split, normaliser)
    quarantined = getattr(split, "quarantined", None)
    if quarantined is not None and len(quarantined):
        out.append(f"{len(quarantined)} frames are quarantined and never sampled: {_some(quarantined)}")
    out += _duplicates(subject) + _sizes(subject, images)
    return out


def pairs(subject: Subject) -> list[tuple[str, np.ndarray, normalise.Normaliser]]:
    """("action", f32 [F, A], its normaliser) and ("proprio", ...)."""
    item = subject.item
    return [("action", item.frames.action, item.action), ("proprio", item.frames.proprio, item.proprio)]


def _some(items, count: int = 8) -> str:
    items = list(items)
    return ", ".join(str(i) for i in items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def _label_warnings(subject: Subject) -> list[str]:
    if not subject.languages:
        return ["no feature with an instruction was found"]
    _, labelled = instructions(subject)
    if labelled.all():
        return []
    by_episode = np.maximum.reduceat(labelled, subject.split.episodes["start"])
    return [
        f"{1 - labelled.mean():.1%} of the frames have no instruction ({int((~labelled).sum())} of {len(labelled)}; "
        f"{int((~by_episode).sum())} of {len(by_episode)} episodes have none at all); training leaves them out unless "
        "data.skip_unlabelled=False"
    ]


def _non_finite(subject: Subject) -> list[str]:
    out = []
    for feature in columns(subject):
        if not feature.dtype.startswith("float"):
            continue
        bad, first = 0, -1
        for start, part in chunks(subject.split.column(feature.name)):
            rows = np.flatnonzero(~np.isfinite(part).all(1))
            if len(rows) and first < 0:
                first = start + int(rows[0])
            bad += len(rows)
        if bad:
            out.append(f"{feature.name} is not finite in {bad} frames, first {subject.split.where(first)}")
    return out


def _constant(name: str, normaliser: normalise.Normaliser) -> list[str]:
    dims = constant_dims(normaliser)
    if not dims:
        return []
    return [f"{name}: dimensions {dims} are (nearly) constant, q01 to q99 spans less than {2 * normaliser.floor:g}"]


def constant_dims(normaliser: normalise.Normaliser) -> list[int]:
    """Dimensions that hardly move; raw ones (a gripper) are left out."""
    s = normaliser.statistics
    width = np.array(s.q99) - np.array(s.q01)
    return [d for d in np.flatnonzero(width < 2 * normaliser.floor).tolist() if d not in normaliser.raw_dims]


def _outliers(
    name: str, values: np.ndarray, frames: np.ndarray, split: index.SplitIndex, normaliser: normalise.Normaliser
) -> list[str]:
    """Values f32 [F, D] at `frames` that lie far outside of q01..q99; the farthest one is named."""
    s, out = normaliser.statistics, []
    for dim in range(s.dims):
        low, high = s.q01[dim], s.q99[dim]
        if dim in normaliser.raw_dims or not high - low >= 2 * normaliser.floor:
            continue
        x = np.asarray(values[:, dim])[frames]
        beyond = np.maximum(low - x, x - high) / (high - low)
        bad = np.flatnonzero(beyond > FAR_OUT)
        if len(bad):
            worst = bad[np.argmax(beyond[bad])]
            out.append(
                f"{name} dimension {dim}: {len(bad)} of {len(x)} values farther than {FAR_OUT:g} times the q01..q99 "
                f"width outside of {low:.4g}..{high:.4g}, the farthest {x[worst]:.4g} at "
                f"{split.where(int(frames[worst]))}; frames {_some(frames[bad].tolist(), 5)}"
            )
    return out


def _duplicates(subject: Subject) -> list[str]:
    """Groups of episodes with equal columns, texts and image sizes, byte for byte, in every step."""
    split, table = subject.split, subject.split.episodes
    features = [f for f in subject.opened.dataset.features.values() if f.per_step and shard_scan.storage(f)]
    spans = [split.spans(f.name)["size"] for f in features if shard_scan.storage(f) == "span"]
    # Only episodes of equal length and equal sums of image sizes can be equal: hashing is left to those.
    sums = [np.add.reduceat(sizes.astype(np.int64), table["start"]) for sizes in spans]
    keys = np.stack([table["length"].astype(np.int64), *sums], 1)
    _, group, count = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(count[group.reshape(-1)] > 1)
    arrays = [*spans, *(split.column(f.name) for f in features if shard_scan.storage(f) == "column")]
    arrays += [split.texts(f.name)[0] for f in features if shard_scan.storage(f) == "text"]
    found: dict[bytes, list[int]] = collections.defaultdict(list)
    for episode in progress.track(candidates.tolist(), len(candidates), "equal episodes", "episode"):
        start, digest = int(table["start"][episode]), hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(np.ascontiguousarray(array[start : start + int(table["length"][episode])]).tobytes())
        found[digest.digest()].append(episode)
    groups = [episodes for episodes in found.values() if len(episodes) > 1]
    if not groups:
        return []
    more = sum(len(g) - 1 for g in groups)
    return [f"{more} episodes repeat another one (equal columns, texts and image sizes): {_some(groups, 5)}"]


def _sizes(subject: Subject, images: Images) -> list[str]:
    """Image sizes of the first frame of up to HEADERS episodes, by view."""
    starts, out = subject.split.episodes["start"], []
    picks = np.unique(np.linspace(0, len(starts) - 1, min(HEADERS, len(starts))).astype(int))
    for view, feature in {**subject.views, **{f"depth {k}": v for k, v in subject.depth.items()}}.items():
        found = collections.Counter(images.size(feature, int(starts[e])) for e in picks)
        found.pop(None, None)
        if len(found) > 1:
            sizes = ", ".join(f"{h}x{w} ({n})" for (h, w), n in found.most_common())
            out.append(f"images of view {view} differ in size: {sizes}; set data.image_size to resize on the host")
    return out


# ---- depth ----


def code_counts(tokens: sidecar.Sidecar, codes: int) -> np.ndarray:
    """How often each code occurs in a token sidecar, i64 [codes]; read in chunks."""
    out, step = np.zeros(codes, np.int64), max(1, 16 * CHUNK // tokens.values.shape[1])
    for start in range(0, len(tokens.values), step):
        out += np.bincount(np.asarray(tokens.values[start : start + step]).reshape(-1), minlength=codes)
    return out
