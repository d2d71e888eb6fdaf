"""Builds the files of an index: shards are scanned in parallel into parts, the parts are joined.

A part is everything one shard contributes, kept in `<target>.building/` under a name that holds the identity of the
shard and of the checks. A build that was killed finds the parts of the shards it had finished and goes on with the
rest; two builds at the same time write equal parts over each other. The join appends part after part to the tables, so
memory is one part, whatever the size of the data set. The result appears under its name by one rename.
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import file_faults, process_pool, quarantine, shard_scan, spec, storage, tfrecord

# Of the files; another one is built anew.
FORMAT = 2
# Of the fingerprint: raised only when equal data would give other frame ids or values than before.
IDENTITY = 1
# One process reads this much in about a second; worker processes take part of that to start.
SMALL_BYTES = 1 << 30

# `start` is the id of the episode's first frame; ids run through the split in record order.
EPISODE = np.dtype([*shard_scan.EPISODE.descr, ("start", "<i8")])

OnShard = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One shard of a build: where its part lies, and what the shard was when the build began."""

    split: str
    number: int
    shard: str
    path: str
    version: str


def build(
    dataset: spec.DatasetSpec,
    target: str,
    checks: shard_scan.Checks,
    on_shard: OnShard | None = None,
    workers: int = 0,
    replace: str = "",
) -> None:
    """Builds the index `target`; with `replace`, moves what is there to that name first.

    Args:
      workers: processes; 0 = one per core, one alone for small data.

    Raises:
      UserError: a problem in the data that `checks` does not tolerate, or a folder that cannot be written. The parts
        of good shards are kept for the next try.
    """
    scratch = f"{target}.building"
    try:
        os.makedirs(scratch, exist_ok=True)
        parts = list(_parts(dataset, scratch, checks))
        _scan(dataset, parts, checks, on_shard, workers or auto_workers(dataset))
        joined = tempfile.mkdtemp(prefix="join-", dir=scratch)
        os.chmod(joined, 0o755)
        _join(dataset, joined, parts, checks)
        if replace and os.path.exists(target):
            os.rename(target, replace)
        os.rename(joined, target)
    except OSError as error:
        # Another process may have finished first and cleared the scratch folder: its index is as good as ours.
        overtaken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
        if not (overtaken and os.path.exists(f"{target}/index.json")):
            raise cannot_write(target, error) from error
        if replace:
            raise errors.UserError(f"another process rebuilds {target} at the same time: wait for it") from error
    shutil.rmtree(scratch, ignore_errors=True)


def auto_workers(dataset: spec.DatasetSpec) -> int:
    return process_pool.cpus() if total_bytes(dataset) > SMALL_BYTES else 1


def total_bytes(dataset: spec.DatasetSpec) -> int:
    """Size of all shards; of objects, what dataset_info.json declares."""
    if storage.is_remote(dataset.directory):
        framing = tfrecord.HEADER_BYTES + tfrecord.FOOTER_BYTES
        return sum(split.num_bytes + framing * sum(split.declared) for split in dataset.splits.values())
    return sum(stat.size for split in dataset.splits.values() for stat in shard_stats(dataset, split))


def shard_stats(dataset: spec.DatasetSpec, split: spec.Split) -> list[storage.Stat]:
    """What the store says of each shard now."""
    found = storage.stats(dataset.shard_path(shard) for shard in split.shards)
    for shard, stat in zip(split.shards, found):
        if stat is None:
            raise errors.UserError(f"{dataset.shard_path(shard)} is gone; copy it again")
    return found


def fingerprint(dataset: spec.DatasetSpec, shards: dict[str, list[list]]) -> str:
    """Identity of the content: name, version, features, and of each shard (name, size, crc). Never a path."""
    identity = {
        "format": IDENTITY,
        "name": dataset.name,
        "version": dataset.version,
        "features": feature_rows(dataset),
        "shards": shards,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def feature_rows(dataset: spec.DatasetSpec) -> list[list[Any]]:
    rows = [dataclasses.astuple(feature) for _, feature in sorted(dataset.features.items())]
    return json.loads(json.dumps(rows))


def file_name(feature: str) -> str:
    # Readable and without collisions: "steps/observation/state" -> "steps.observation.state".
    return feature.replace("%", "%25").replace(".", "%2E").replace("/", ".")


# ---- content of shards, without their tables ----


def content_crcs(
    dataset: spec.DatasetSpec, shards: Sequence[tuple[str, int]], workers: int = 0, on_shard: OnShard | None = None
) -> dict[tuple[str, int], tuple[int, int, str]]:
    """Reads shards (split, number) again: (size, crc) as `shard_scan` gives them, and the first damage ("" = none)."""
    items = [(dataset, split, number) for split, number in shards]
    found = {}
    for (_, split, number), result in process_pool.each(_content_crc, items, workers or auto_workers(dataset)):
        found[split, number] = result
        if on_shard:
            on_shard(dataset.splits[split].shards[number], result[0])
    return found


def _content_crc(dataset: spec.DatasetSpec, split: str, number: int) -> tuple[int, int, str]:
    size, crc, damage = 0, 0, ""
    path = dataset.shard_path(dataset.splits[split].shards[number])
    with file_faults.named(path):
        for found in tfrecord.read_records(path):
            if isinstance(found, tfrecord.Damage):
                crc, size = google_crc32c.extend(crc, found.mark), found.end
                damage = damage or f"record {found.number} {found.what}"
            else:
                crc = google_crc32c.extend(crc, found.crc.to_bytes(4, "little"))
                size = found.offset + found.length + tfrecord.FOOTER_BYTES
    return size, crc, damage


# ---- scanning into parts ----


def _parts(dataset: spec.DatasetSpec, scratch: str, checks: shard_scan.Checks) -> Iterator[_Part]:
    common = [FORMAT, dataset.name, dataset.version, feature_rows(dataset), dataclasses.astuple(checks)]
    for name, split in dataset.splits.items():
        for number, (shard, stat) in enumerate(zip(split.shards, shard_stats(dataset, split))):
            key = json.dumps([common, name, number, shard, split.declared[number], *stat])
            digest = hashlib.sha256(key.encode()).hexdigest()[:16]
            path = os.path.join(scratch, f"{file_name(name)}-{number:05d}-{digest}.npz")
            yield _Part(name, number, shard, path, stat.version)


def _scan(
    dataset: spec.DatasetSpec,
    parts: Sequence[_Part],
    checks: shard_scan.Checks,
    on_shard: OnShard | None,
    workers: int,
) -> None:
    def tell(part: _Part, size: int) -> None:
        if on_shard:
            on_shard(part.shard, size)

    left = []
    for part in parts:
        if os.path.exists(part.path):
            tell(part, _load_meta(part.path)["size"])
        else:
            left.append(part)
    items = [(dataset, part, checks) for part in left]
    for (_, part, _), size in process_pool.each(_scan_part, items, workers):
        tell(part, size)


def _scan_part(dataset: spec.DatasetSpec, part: _Part, checks: shard_scan.Checks) -> int:
    if os.path.exists(part.path):  # of another build that runs at the same time
        return _load_meta(part.path)["size"]
    with file_faults.named(dataset.shard_path(part.shard)):
        tables = shard_scan.scan_shard(dataset, part.split, part.number, checks)
    meta = {
        "episodes": len(tables.episodes),
        "frames": int(tables.episodes["length"].sum()),
        "size": tables.size,
        "crc": tables.crc,
        "extra": sorted(tables.extra),
        "non_finite": tables.non_finite,
        "problems": quarantine.to_json(tables.problems),
    }
    arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8), "episodes": tables.episodes}
    for kind, group in (("column", tables.columns), ("span", tables.spans)):
        arrays |= {f"{kind}:{file_name(name)}": array for name, array in group.items()}
    for name, (ids, table) in tables.texts.items():
        arrays[f"text:{file_name(name)}"] = ids
        arrays[f"table:{file_name(name)}"] = np.frombuffer(b"".join(table), np.uint8)
        arrays[f"sizes:{file_name(name)}"] = np.array([len(text) for text in table], np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    partial = f"{part.path}.{uuid.uuid4().hex}.tmp"  # hosts that share the disk may have equal process numbers
    with open(partial, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, part.path)
    return tables.size


def _load_meta(path: str) -> dict[str, Any]:
    with np.load(path) as part:
        return json.loads(part["meta"].tobytes())


# ---- joining ----


class _Table:
    """A .npy file that grows by rows; its crc is computed on the way."""

    def __init__(self, root: str, name: str, empty: np.ndarray, rows: int):
        self.name, self._left = name, rows
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close()
        header = io.BytesIO()
        shape = (rows, *empty.shape[1:])
        np.lib.format.write_array_header_2_0(
            header, {"descr": np.lib.format.dtype_to_descr(empty.dtype), "fortran_order": False, "shape": shape}
        )
        self._dtype, self._row = empty.dtype, empty.shape[1:]
        self._file.write(header.getvalue())
        self.size, self.crc = header.tell(), google_crc32c.value(header.getvalue())

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self._row, (self.name, rows.shape, self._row)
        data = np.ascontiguousarray(rows, self._dtype).tobytes()
        self._file.write(data)
        self._left -= len(rows)
        self.size, self.crc = self.size + len(data), google_crc32c.extend(self.crc, data)

    def close(self) -> list[int]:
        self._file.close()
        assert not self._left, (self.name, self._left)
        return [self.size, self.crc]


def _join(dataset: spec.DatasetSpec, root: str, parts: Sequence[_Part], checks: shard_scan.Checks) -> None:
    """Writes all files of an index into the empty folder `root`."""
    splits, warnings, files, rows = {}, [], {}, []
    for name in dataset.splits:
        mine = [part for part in parts if part.split == name]
        metas = [_load_meta(part.path) for part in mine]
        files |= _join_tables(dataset, root, name, mine, metas)
        before = 0
        for meta in metas:
            for row in quarantine.from_json(meta["problems"]):
                rows.append(row._replace(episode=None if row.episode is None else row.episode + before))
            before += meta["episodes"]
        warnings += _warnings(dataset.splits[name], metas, rows)
        splits[name] = {
            "episodes": before,
            "frames": sum(meta["frames"] for meta in metas),
            "shards": [[part.shard, meta["size"], meta["crc"]] for part, meta in zip(mine, metas)],
            "versions": [part.version for part in mine],
        }
        if not before and any(meta["size"] for meta in metas):
            raise errors.UserError(
                f"{dataset.directory}: none of the records of split {name} is an episode that fits features.json; the "
                f"first: {rows[-1].detail if rows else 'none found'}. Check that features.json belongs to these shards."
            )
    files["quarantine.json"] = _save_json(root, "quarantine.json", quarantine.to_json(rows))
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint(dataset, {name: split["shards"] for name, split in splits.items()}),
        "name": dataset.name,
        "version": dataset.version,
        "features": feature_rows(dataset),
        "splits": splits,
        "left_out": {f.name: f.reason for f in dataset.features.values() if not shard_scan.storage(f)},
        "warnings": warnings,
        "checks": dataclasses.asdict(checks),
        "files": files,
    }
    _save_json(root, "index.json", content)


def _join_tables(
    dataset: spec.DatasetSpec, root: str, split: str, parts: Sequence[_Part], metas: Sequence[dict[str, Any]]
) -> dict[str, list[int]]:
    """Appends the parts of one split to its tables; returns file -> [size, crc]."""
    count = {True: sum(meta["frames"] for meta in metas), False: sum(meta["episodes"] for meta in metas)}
    features = [feature for feature in dataset.features.values() if shard_scan.storage(feature)]
    kinds = [(feature, shard_scan.storage(feature), file_name(feature.name)) for feature in features]
    episodes = _Table(root, f"{split}/episodes.npy", np.zeros(0, EPISODE), count[False])
    tables = [
        _Table(root, f"{split}/{kind}/{name}.npy", shard_scan.empty_rows(feature), count[feature.per_step])
        for feature, kind, name in kinds
    ]
    texts: dict[str, dict[bytes, int]] = {name: {} for _, kind, name in kinds if kind == "text"}
    frames = 0
    for part in parts:
        with np.load(part.path) as arrays:
            found = arrays["episodes"]
            rows = np.zeros(len(found), EPISODE)
            for field in shard_scan.EPISODE.names:
                rows[field] = found[field]
            rows["start"] = frames + np.cumsum(found["length"], dtype=np.int64) - found["length"]
            frames += int(found["length"].sum())
            episodes.append(rows)
            for table, (_, kind, name) in zip(tables, kinds):
                values = arrays[f"{kind}:{name}"]
                if kind == "text":
                    values = _renumbered(values, arrays[f"table:{name}"], arrays[f"sizes:{name}"], texts[name])
                table.append(values)
    files = {table.name: table.close() for table in (episodes, *tables)}
    for name, table in texts.items():
        # A text that is not UTF-8 stays readable and distinct instead of stopping the whole data set.
        strings = [text.decode(errors="backslashreplace") for text in table]
        files[f"{split}/text/{name}.json"] = _save_json(root, f"{split}/text/{name}.json", strings)
    return files


def _renumbered(ids: np.ndarray, blob: np.ndarray, sizes: np.ndarray, merged: dict[bytes, int]) -> np.ndarray:
    """Ids of a shard's own table of texts -> ids of the split's, which grows as texts are met."""
    data, ends = blob.tobytes(), np.cumsum(sizes).tolist()
    texts = [data[end - size : end] for size, end in zip(sizes.tolist(), ends)]
    lookup = np.array([merged.setdefault(text, len(merged)) for text in texts], np.int32)
    return lookup[ids] if len(ids) else ids


def _warnings(split: spec.Split, metas: Sequence[dict[str, Any]], rows: Sequence[quarantine.Row]) -> list[str]:
    warnings = []
    found = [meta["episodes"] for meta in metas]
    if tuple(found) != split.declared:
        # Policy: what lies in the shards counts, more than is declared too (the metadata of data sets that grew by hand
        # is often stale); records that are missing have been refused, or set aside, by then.
        odd = [i for i, (a, b) in enumerate(zip(found, split.declared)) if a != b]
        warnings.append(
            f"split {split.name}: dataset_info.json declares {sum(split.declared)} episodes, the shards hold "
            f"{sum(found)} (first difference in {split.shards[odd[0]]}); the shards count"
        )
    extra = sorted({name for meta in metas for name in meta["extra"]})
    if extra:
        warnings.append(
            f"split {split.name}: records hold features that features.json does not list: {', '.join(extra)}"
        )
    for name in sorted({name for meta in metas for name in meta["non_finite"]}):
        values = sum(meta["non_finite"].get(name, 0) for meta in metas)
        warnings.append(f"split {split.name}: {name} holds {values} values that are NaN or infinite")
    aside = [row for row in rows if row.split == split.name]
    return [*warnings, aside_warning(split.name, aside)] if aside else warnings


def aside_warning(split: str, rows: Sequence[quarantine.Row]) -> str:
    """What of a split was set aside, counted by reason."""
    counts = ", ".join(f"{number} x {reason}" for reason, number in quarantine.count(rows).items())
    return f"split {split}: set aside (quarantine.json): {counts}"


def _save_json(root: str, name: str, content: Any) -> list[int]:
    data = json.dumps(content, ensure_ascii=False, indent=1).encode()
    with open(os.path.join(root, name), "wb") as file:
        file.write(data)
    return [len(data), google_crc32c.value(data)]


def cannot_write(target: str, error: OSError) -> errors.UserError:
    """The message for an index folder that refuses a file."""
    what = {
        errno.ENOSPC: "the disk is full; free space or choose another place",
        errno.EDQUOT: "the quota is used up; free space or choose another place",
        errno.EROFS: "the folder is read-only; choose another place",
        errno.EACCES: "no permission to write there; choose another place",
        errno.EPERM: "no permission to write there; choose another place",
        errno.ENOTEMPTY: "the folder exists but holds no index.json; remove it or choose another place",
        errno.EEXIST: "the folder exists but holds no index.json; remove it or choose another place",
    }.get(error.errno, f"{error.strerror}; choose another place")
    return errors.UserError(f"cannot write the index {target}: {what} with --index_dir (config: data.index_dir)")
