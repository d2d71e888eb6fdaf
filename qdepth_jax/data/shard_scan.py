"""One pass over one shard: where every image lies, every low-dimensional column, every text.

This is the unit of work of an index build: a pure function of (spec, split, shard, checks), so shards can be scanned in
any order and in parallel. Everything that does not fit features.json is an error that names shard, record and feature,
or a quarantine row where the caller asked for those. No image is decoded unless the caller asks for that.
"""

import dataclasses
import zlib
from typing import NamedTuple

import google_crc32c
import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import example, quarantine, spec, tfrecord

# Wider per-step tensors (sentence embeddings, point clouds) are no columns but byte places in their shard, like images:
# 2.2 M frames x 512 floats would be twenty times the size of everything else in the index.
MAX_COLUMN_VALUES = 64

EPISODE = np.dtype([("shard", "<i4"), ("record", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("length", "<i4")])
SPAN = np.dtype([("offset", "<u8"), ("size", "<u4")])

_RAGGED = "ragged_"


@dataclasses.dataclass(frozen=True)
class Checks:
    """What a scan looks at beyond structure, and what it does about problems.

    Attributes:
      tolerate: problems become quarantine rows; otherwise the first one is an error.
      images: decode every image (slow: a hundred times the CPU of a scan without).
      finite: per-step float columns in which NaN or infinity is a problem.
    """

    tolerate: bool = False
    images: bool = False
    finite: tuple[str, ...] = ()


NO_CHECKS = Checks()


@dataclasses.dataclass
class ShardTables:
    """What one shard holds (E episodes, F frames; episode features have E rows instead of F).

    Attributes:
      episodes: EPISODE [E]; `offset` and `size` of the record's payload in the file, `length` in steps.
      columns: name -> array [F, ...] of tensor features, in the dtype of features.json (float64 as float32).
      spans: name -> SPAN [F]: byte place in the file of one image or one wide tensor.
      texts: name -> (ids i32 [F, ...], table of distinct bytes in order of first use).
      extra: features found in records that features.json does not list (they are not read).
      non_finite: per-step float column -> values that are NaN or infinite.
      problems: quarantine rows; their `episode` counts within this shard.
      size: file size in bytes.
      crc: crc32c over the checksums of all payloads (and the marks of what is damaged): the identity of the content.
    """

    episodes: np.ndarray
    columns: dict[str, np.ndarray]
    spans: dict[str, np.ndarray]
    texts: dict[str, tuple[np.ndarray, list[bytes]]]
    extra: set[str]
    non_finite: dict[str, int]
    problems: list[quarantine.Row]
    size: int
    crc: int


def storage(feature: spec.FeatureSpec) -> str:
    """How the index keeps a feature: "column", "span", "text", or "" (left out)."""
    if feature.kind == "text" or _holds_code_units(feature):
        return "text"
    if feature.kind == "image":
        return "span"
    if feature.kind != "tensor":
        return ""
    return "column" if _width(feature) <= MAX_COLUMN_VALUES else "span"


def _holds_code_units(feature: spec.FeatureSpec) -> bool:
    """language_table keeps its instruction as int32[512]: UTF-8 code units, padded with zeros. The name decides."""
    return (
        feature.kind == "tensor"
        and feature.encoding == "none"
        and np.dtype(feature.dtype).kind in "iu"
        and len(feature.shape) == 1
        and _width(feature) > MAX_COLUMN_VALUES
        and "instruction" in feature.name.rsplit("/", 1)[-1]
    )


def _width(feature: spec.FeatureSpec) -> int:
    size = 1
    for dimension in feature.shape:
        size *= dimension
    return size


class _Plan(NamedTuple):
    """What reading one feature needs, worked out once per shard.

    kind: as `storage`; wanted: the list it must be stored as; width: entries of that list per row; dtype of the column.
    """

    feature: spec.FeatureSpec
    kind: str
    wanted: str
    width: int
    dtype: np.dtype


def _plan(feature: spec.FeatureSpec) -> _Plan:
    if _encoded(feature):
        wanted, width = "bytes", _width(feature) if feature.kind == "text" else 1
    else:
        wanted, width = "float" if np.dtype(feature.dtype).kind == "f" else "int", _width(feature)
    dtype = column_dtype(feature) if feature.kind == "tensor" else np.dtype(np.int32)
    return _Plan(feature, storage(feature), wanted, width, dtype)


class _ProblemError(ValueError):
    """A record that is to be set aside, or refused."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def scan_shard(dataset: spec.DatasetSpec, split: str, shard: int, checks: Checks = NO_CHECKS) -> ShardTables:
    """Scans shard number `shard` of `split`.

    Raises:
      UserError: a problem that is not tolerated; names data set, shard, record, step where there is one, and the fix.
    """
    name = dataset.splits[split].shards[shard]
    path = dataset.shard_path(name)
    kept = {feature.name: feature for feature in dataset.features.values() if storage(feature)}
    plans = {name: _plan(feature) for name, feature in kept.items()}
    rows: dict[str, list] = {name: [] for name in kept}
    tables: dict[str, dict[bytes, int]] = {name: {} for name, plan in plans.items() if plan.kind == "text"}
    episodes, extra, problems, crc, end, records = [], set(), [], 0, 0, 0

    def problem(reason: str, record: int, step: int | None, message: str, known: bool) -> None:
        if not checks.tolerate:
            at = "" if step is None else f", step {step}"
            raise errors.UserError(
                f"data set {dataset.name}, split {split}, {path}: record {record}{at} {message}. Repair or copy "
                f"the shard again, or set the bad parts aside with `python tools/index_rlds.py {dataset.directory} "
                f"--quarantine{' --check_images' if checks.images else ''}` (and your --index_dir, if you use one)"
            )
        episode = len(episodes) if known else None
        problems.append(quarantine.Row(split, name, record, episode, step, reason, message))

    for found in tfrecord.read_records(path):
        place = f"(payload at byte {found.offset})" if isinstance(found, tfrecord.Record) else ""
        records = found.number + 1
        if isinstance(found, tfrecord.Damage):
            crc = google_crc32c.extend(crc, found.mark)
            end = found.end
            problem(quarantine.LOST if found.length < 0 else quarantine.DAMAGED, found.number, None, found.what, False)
            continue
        crc = google_crc32c.extend(crc, found.crc.to_bytes(4, "little"))
        end = found.offset + found.length + tfrecord.FOOTER_BYTES
        try:
            features = example.scan(found.payload)
            length = _steps(dataset, features)
            new = {name: _rows(plan, features, length, found) for name, plan in plans.items()}
        except ValueError as error:
            reason = error.reason if isinstance(error, _ProblemError) else quarantine.MISFIT
            problem(reason, found.number, None, f"{place}: {error}", False)
            continue
        for feature in checks.finite:
            for step in np.flatnonzero(~np.isfinite(new[feature]).reshape(length, -1).all(1))[:1].tolist():
                step_or_all = step if not checks.tolerate else None
                what = f"{place}: {feature!r} holds {new[feature][step].tolist()} at step {step}"
                problem(quarantine.NON_FINITE, found.number, step_or_all, what, True)
        if checks.images:
            for feature, step, error in _undecodable(kept, new, found):
                problem(quarantine.IMAGE, found.number, step, f"{place}: {feature!r}: {error}", True)
        for feature, values in new.items():
            table = tables.get(feature)
            if table is not None:
                values = np.array([table.setdefault(text, len(table)) for text in values], np.int32)
                values = values.reshape(-1, *_text_shape(kept[feature]))
            rows[feature].append(values)
        extra |= {name for name in features if name not in dataset.features and not _listed(dataset, name)}
        episodes.append((shard, found.number, found.offset, found.length, length))

    declared = dataset.splits[split].declared[shard]
    if records < declared and not any(row.reason == quarantine.LOST for row in problems):
        # A file that was emptied, or cut between two records, shows no damage of its own.
        what = f"is missing: the file ends after {records} of the {declared} records that dataset_info.json declares"
        problem(quarantine.LOST, records, None, what, False)

    joined = {name: np.concatenate([empty_rows(kept[name]), *parts]) for name, parts in rows.items()}
    columns = {name: joined[name] for name in kept if plans[name].kind == "column"}
    floats = {name: column for name, column in columns.items() if column.dtype.kind == "f" and kept[name].per_step}
    non_finite = {name: int(column.size - np.isfinite(column).sum()) for name, column in floats.items()}
    return ShardTables(
        episodes=np.array(episodes, EPISODE),
        columns=columns,
        spans={name: joined[name] for name in kept if plans[name].kind == "span"},
        texts={name: (joined[name], list(table)) for name, table in tables.items()},
        extra=extra,
        non_finite={name: count for name, count in non_finite.items() if count},
        problems=problems,
        size=end,
        crc=crc,
    )


def empty_rows(feature: spec.FeatureSpec) -> np.ndarray:
    """A table of zero rows with the dtype and row shape that the feature has in the index."""
    kind = storage(feature)
    if kind == "column":
        return np.zeros((0, *feature.shape), column_dtype(feature))
    return np.zeros(0, SPAN) if kind == "span" else np.zeros((0, *_text_shape(feature)), np.int32)


def _text_shape(feature: spec.FeatureSpec) -> tuple[int, ...]:
    return feature.shape if feature.kind == "text" else ()


def column_dtype(feature: spec.FeatureSpec) -> np.dtype:
    """The dtype of a column: records hold float64 features as float32, so the column does too."""
    dtype = np.dtype(feature.dtype)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def _listed(dataset: spec.DatasetSpec, name: str) -> bool:
    if name.rpartition(f"/{_RAGGED}")[0] in dataset.features:
        return True
    unread = (feature.name for feature in dataset.features.values() if feature.kind == "unsupported")
    return any(name == prefix or name.startswith(prefix + "/") for prefix in unread)


def _steps(dataset: spec.DatasetSpec, features: dict[str, example.Feature]) -> int:
    """Number of steps of an episode: the count of a per-step feature whose row size is known."""
    for name, feature in dataset.features.items():
        if not feature.per_step or name not in features or feature.kind == "unsupported":
            continue
        kind, values = features[name].kind, len(features[name].value)
        row = 1 if _encoded(feature) and feature.kind != "text" else _width(feature)
        if kind != "empty" and row > 0:
            if values == 0:
                break
            return values // row
    raise _ProblemError(quarantine.EMPTY, "the episode has no steps")


def _find(feature: spec.FeatureSpec, features: dict[str, example.Feature]) -> example.Feature:
    """The feature in the record. Of any sequence inside a step, TFDS writes values and row lengths."""
    if feature.name in features:
        return features[feature.name]
    flat = features.get(f"{feature.name}/{_RAGGED}flat_values")
    if flat is None:
        raise ValueError(f"feature {feature.name!r} is missing")
    for level, expected in enumerate(feature.shape):
        lengths = features.get(f"{feature.name}/{_RAGGED}row_lengths_{level}")
        if lengths is not None and (lengths.value != expected).any():
            raise ValueError(f"feature {feature.name!r} is a sequence of {expected}, but not in every step")
    return flat


def _encoded(feature: spec.FeatureSpec) -> bool:
    return feature.kind in ("image", "text") or feature.encoding in ("zlib", "bytes")


def _rows(
    plan: _Plan, features: dict[str, example.Feature], steps: int, record: tfrecord.Record
) -> np.ndarray | list[bytes]:
    """The rows of one feature of one episode, in the form the index keeps; of texts, the bytes."""
    feature, scanned = plan.feature, _find(plan.feature, features)
    if scanned.kind != plan.wanted:
        raise ValueError(f"feature {feature.name!r} is stored as {scanned.kind}, {plan.wanted} expected")
    count = steps if feature.per_step else 1
    if len(scanned.value) != count * plan.width:
        raise ValueError(
            f"feature {feature.name!r} has {len(scanned.value)} values, {count} steps x {plan.width} expected"
        )
    if plan.wanted != "bytes":
        return _numeric_rows(plan, scanned, count, record)
    if plan.kind == "span":
        spans = np.empty(count, SPAN)
        spans["offset"] = scanned.value[:, 0] + record.offset
        spans["size"] = scanned.value[:, 1]
        return spans
    pieces = [record.payload[offset : offset + size] for offset, size in scanned.value.tolist()]
    if plan.kind == "text":
        return pieces
    return np.stack([decode_tensor(feature, piece) for piece in pieces]).astype(plan.dtype)


def _numeric_rows(
    plan: _Plan, scanned: example.Feature, count: int, record: tfrecord.Record
) -> np.ndarray | list[bytes]:
    feature, dtype, values = plan.feature, plan.dtype, scanned.value
    if dtype.kind in "iub" and dtype != np.int64 and values.size:
        lowest, highest = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        low, high = int(values.min()), int(values.max())
        if low < lowest or high > highest:
            raise ValueError(f"feature {feature.name!r} holds {low}..{high}, which does not fit {dtype}")
    if plan.kind == "column":
        return values.reshape(count, *feature.shape).astype(dtype)
    if plan.kind == "text":
        return [code_units(feature, row) for row in values.reshape(count, -1)]
    if scanned.start < 0:
        raise ValueError(f"feature {feature.name!r} is not one packed run: its steps have no place in the record")
    spans = np.empty(count, SPAN)
    if dtype.kind == "f":
        ends = scanned.start + 4 * plan.width * np.arange(1, count + 1)
    else:
        ends = example.varint_ends(record.payload, scanned.start, values.size)[plan.width - 1 :: plan.width]
    starts = np.concatenate([[scanned.start], ends[:-1]])
    spans["offset"] = starts + record.offset
    spans["size"] = ends - starts
    return spans


def code_units(feature: spec.FeatureSpec, row: np.ndarray) -> bytes:
    """The UTF-8 bytes of a text that is kept as numbers (`storage` "text" of a tensor), i64 [width], padded with zeros.

    Raises:
      ValueError: numbers that are no such text.
    """
    used = int(np.count_nonzero(row))
    if row[:used].astype(bool).sum() != used:
        raise ValueError(f"feature {feature.name!r} goes on after its first zero: it is no zero-padded text")
    if used and (row.min() < 0 or row.max() > 255):
        raise ValueError(f"feature {feature.name!r} holds {row.min()}..{row.max()}, bytes of UTF-8 expected")
    return row[:used].astype(np.uint8).tobytes()


def decode_tensor(feature: spec.FeatureSpec, data: bytes) -> np.ndarray:
    """The bytes of one span of a tensor feature, in its shape and dtype (float64 as float32 unless encoded).

    Raises:
      ValueError: broken or of another size.
    """
    if feature.encoding not in ("zlib", "bytes"):
        dtype = column_dtype(feature)
        if dtype.kind == "f":
            values = np.frombuffer(data, "<f4") if len(data) % 4 == 0 else np.zeros(0)
        else:
            values = example.decode_varints(data, 0, len(data), feature.name)
        if values.size != _width(feature):
            raise ValueError(f"feature {feature.name!r}: {len(data)} bytes hold {values.size} values")
        return values.reshape(feature.shape).astype(dtype)
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    expected = _width(feature) * dtype.itemsize
    if feature.encoding == "zlib":
        unpack = zlib.decompressobj()
        try:
            # Bounded: a damaged stream must not expand without limit.
            data = unpack.decompress(data, expected + 1)
        except zlib.error as error:
            raise ValueError(f"feature {feature.name!r}: broken zlib data ({error})") from error
    if len(data) != expected:
        raise ValueError(f"feature {feature.name!r}: {len(data)} bytes, {expected} expected")
    return np.frombuffer(data, dtype).reshape(feature.shape)


def _undecodable(
    kept: dict[str, spec.FeatureSpec], rows: dict[str, np.ndarray | list[bytes]], record: tfrecord.Record
) -> list[tuple[str, int | None, ValueError]]:
    """(feature, step, error) of each image that does not decode."""
    from qdepth_jax.data import frame_reader  # decoders are needed here alone

    found = []
    for feature in (feature for feature in kept.values() if feature.kind == "image"):
        for step, (offset, size) in enumerate(rows[feature.name].tolist()):
            data = record.payload[offset - record.offset : offset - record.offset + size]
            try:
                frame_reader.check(data, feature.dtype)
            except ValueError as error:
                found.append((feature.name, step if feature.per_step else None, error))
    return found
