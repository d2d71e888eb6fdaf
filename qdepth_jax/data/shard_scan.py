"""One pass over one shard: where every image lies, every low-dimensional column, every text. No image is decoded.

This is the unit of work of an index build: a pure function of (spec, split, shard), so shards can be scanned in any
order and in parallel. Everything that does not fit features.json is an error that names shard, record and feature.
"""

import dataclasses
import os
import zlib

import google_crc32c
import numpy as np

from qdepth_jax.data import example, spec, tfrecord

# Wider per-step tensors (sentence embeddings, point clouds) are left out of the columns, and the index says so:
# 2.2 M frames x 512 floats would be twenty times the size of everything else in the index.
MAX_COLUMN_VALUES = 64

EPISODE = np.dtype([("shard", "<i4"), ("record", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("length", "<i4")])
SPAN = np.dtype([("offset", "<u8"), ("size", "<u4")])


@dataclasses.dataclass
class ShardTables:
    """What one shard holds (E episodes, F frames; episode features have E rows instead of F).

    Attributes:
      episodes: EPISODE [E]; `offset` and `size` of the record's payload in the file, `length` in steps.
      columns: name -> array [F, ...] of tensor features, in the dtype of features.json (float64 as float32).
      spans: name -> SPAN [F]: byte place in the file of one image or one wide encoded tensor.
      texts: name -> (ids i32 [F], table of distinct bytes in order of first use).
      extra: features found in records that features.json does not list (they are not read).
      size: file size in bytes.
      crc: crc32c over the checksums of all payloads: the identity of the content.
    """

    episodes: np.ndarray
    columns: dict[str, np.ndarray]
    spans: dict[str, np.ndarray]
    texts: dict[str, tuple[np.ndarray, list[bytes]]]
    extra: set[str]
    size: int
    crc: int


def storage(feature: spec.FeatureSpec) -> str:
    """How the index keeps a feature: "column", "span", "text", or "" (left out)."""
    if feature.kind == "text":
        return "text"
    if feature.kind == "image":
        return "span" if feature.per_step else ""
    if feature.kind != "tensor":
        return ""
    if int(np.prod(feature.shape, dtype=np.int64)) <= MAX_COLUMN_VALUES:
        return "column"
    return "span" if feature.encoding in ("zlib", "bytes") and feature.per_step else ""


def scan_shard(dataset: spec.DatasetSpec, split: str, shard: int) -> ShardTables:
    """Scans shard number `shard` of `split`.

    Raises:
      ValueError: damaged record, an episode without steps, a feature that is missing or does not fit its spec.
    """
    path = dataset.shard_path(dataset.splits[split].shards[shard])
    kept = {name: feature for name, feature in dataset.features.items() if storage(feature)}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in kept}
    tables: dict[str, dict[bytes, int]] = {name: {} for name, feature in kept.items() if storage(feature) == "text"}
    episodes, extra, crc = [], set(), 0
    for record in tfrecord.scan_records(path):
        crc = google_crc32c.extend(crc, tfrecord.masked_crc(record.payload).to_bytes(4, "little"))
        try:
            features = example.scan(record.payload)
            length = _steps(dataset, features)
            for name, feature in kept.items():
                if name not in features:
                    raise ValueError(f"feature {name!r} is missing")
                count = length if feature.per_step else 1
                rows[name].append(_rows(feature, features[name], count, record, tables.get(name)))
        except ValueError as error:
            raise ValueError(f"{path}: record {record.number} (payload at byte {record.offset}): {error}") from error
        extra |= {name for name in features if not _listed(dataset, name)}
        episodes.append((shard, record.number, record.offset, record.length, length))
    tables_out = {name: list(table) for name, table in tables.items()}
    joined = {name: _join(kept[name], parts) for name, parts in rows.items()}
    return ShardTables(
        episodes=np.array(episodes, EPISODE),
        columns={name: joined[name] for name in kept if storage(kept[name]) == "column"},
        spans={name: joined[name] for name in kept if storage(kept[name]) == "span"},
        texts={name: (joined[name], tables_out[name]) for name in tables_out},
        extra=extra,
        size=os.path.getsize(path),
        crc=crc,
    )


def empty_rows(feature: spec.FeatureSpec) -> np.ndarray:
    """A table of zero rows with the dtype and row shape that the feature has in the index."""
    kind = storage(feature)
    if kind == "column":
        return np.zeros((0, *feature.shape), column_dtype(feature))
    return np.zeros(0, SPAN if kind == "span" else np.int32)


def column_dtype(feature: spec.FeatureSpec) -> np.dtype:
    """The dtype of a column: records hold float64 features as float32, so the column does too."""
    dtype = np.dtype(feature.dtype)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def _join(feature: spec.FeatureSpec, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([empty_rows(feature), *parts])


def _listed(dataset: spec.DatasetSpec, name: str) -> bool:
    if name in dataset.features:
        return True
    unread = (feature.name for feature in dataset.features.values() if feature.kind == "unsupported")
    return any(name.startswith(prefix) for prefix in unread)


def _steps(dataset: spec.DatasetSpec, features: dict[str, example.Feature]) -> int:
    """Number of steps of an episode: the count of a per-step feature whose row size is known."""
    for name, feature in dataset.features.items():
        if not feature.per_step or name not in features or feature.kind == "unsupported":
            continue
        kind, value = features[name]
        row = 1 if kind == "bytes" else int(np.prod(feature.shape, dtype=np.int64))
        if kind != "empty" and row > 0:
            if len(value) == 0:
                break
            return len(value) // row
    raise ValueError("the episode has no steps; drop it from the data set")


def _rows(
    feature: spec.FeatureSpec,
    scanned: example.Feature,
    count: int,
    record: tfrecord.Record,
    table: dict[bytes, int] | None,
) -> np.ndarray:
    """The `count` rows of one feature of one episode, in the form the index keeps."""
    encoded = feature.kind in ("image", "text") or feature.encoding in ("zlib", "bytes")
    wanted = "bytes" if encoded else ("float" if np.dtype(feature.dtype).kind == "f" else "int")
    if scanned.kind != wanted:
        raise ValueError(f"feature {feature.name!r} is stored as {scanned.kind}, {wanted} expected")
    width = 1 if encoded else int(np.prod(feature.shape, dtype=np.int64))
    if len(scanned.value) != count * width:
        raise ValueError(f"feature {feature.name!r} has {len(scanned.value)} values, {count} steps x {width} expected")
    kind = storage(feature)
    if kind == "text":
        ids = np.empty(count, np.int32)
        for row, (offset, size) in enumerate(scanned.value.tolist()):
            text = record.payload[offset : offset + size]
            ids[row] = table.setdefault(text, len(table))
        return ids
    if kind == "span":
        spans = np.empty(count, SPAN)
        spans["offset"] = scanned.value[:, 0] + record.offset
        spans["size"] = scanned.value[:, 1]
        return spans
    dtype = column_dtype(feature)
    if encoded:
        pieces = (record.payload[offset : offset + size] for offset, size in scanned.value.tolist())
        return np.stack([decode_tensor(feature, piece) for piece in pieces]).astype(dtype)
    values = scanned.value.reshape(count, *feature.shape)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"feature {feature.name!r} holds {low}..{high}, which does not fit {dtype}")
    if dtype.kind == "b" and not np.isin(values, (0, 1)).all():
        raise ValueError(f"feature {feature.name!r} is bool but holds other values than 0 and 1")
    return values.astype(dtype)


def decode_tensor(feature: spec.FeatureSpec, data: bytes) -> np.ndarray:
    """Decodes one `Tensor(encoding="zlib" | "bytes")` entry to its shape and dtype."""
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    expected = int(np.prod(feature.shape, dtype=np.int64)) * dtype.itemsize
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
