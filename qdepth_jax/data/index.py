"""The sidecar index of an RLDS data set: built once, then any frame is one positioned read.

    <index_dir>/index.json                  identity, features, splits, shard sizes and checksums, warnings
    <index_dir>/<split>/episodes.npy        episode table (EPISODE, plus `start`: first frame id)
    <index_dir>/<split>/span/NAME.npy       byte place of every image, memory-mapped
    <index_dir>/<split>/column/NAME.npy     low-dimensional columns, memory-mapped
    <index_dir>/<split>/text/NAME.{npy,json}  string ids per row, and the table of distinct strings

The fingerprint covers name, version, features, and of every shard name, size and content checksum: never a path, so a
moved data set keeps its index, its statistics and its depth tokens. A folder is either a complete index or absent: the
build writes beside it and renames.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import shard_scan, spec

FORMAT = 1
DEFAULT_FOLDER = "qdepth_index"

# `start` is the id of the episode's first frame; ids run through the split in record order.
EPISODE = np.dtype([*shard_scan.EPISODE.descr, ("start", "<i8")])


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """One split, opened. Frame ids 0..frames-1 run through its episodes in record order."""

    dataset: spec.DatasetSpec
    name: str
    directory: str

    @functools.cached_property
    def episodes(self) -> np.ndarray:
        """EPISODE [E]."""
        return np.load(os.path.join(self.directory, "episodes.npy"))

    @functools.cached_property
    def frames(self) -> int:
        return int(self.episodes["length"].sum())

    def column(self, name: str) -> np.ndarray:
        """Values of a tensor feature, memory-mapped: [F, ...], or [E, ...] for an episode feature."""
        return self._table("column", name)

    def spans(self, name: str) -> np.ndarray:
        """SPAN [F]: where each encoded image (or wide tensor) lies in its shard."""
        return self._table("span", name)

    def texts(self, name: str) -> tuple[np.ndarray, list[str]]:
        """(ids i32 [F] or [E], table of distinct strings)."""
        ids = self._table("text", name)
        with open(self._path("text", name, ".json"), encoding="utf-8") as file:
            return ids, json.load(file)

    def episode_of(self, frames: np.ndarray) -> np.ndarray:
        """Episode number of each frame id."""
        return np.searchsorted(self.episodes["start"], frames, side="right") - 1

    def shard_path(self, shard: int) -> str:
        return self.dataset.shard_path(self.dataset.splits[self.name].shards[shard])

    def where(self, frame: int) -> str:
        """Names a frame for error messages: data set, split, shard, episode, step."""
        episode = int(self.episode_of(np.int64(frame)))
        row = self.episodes[episode]
        return (
            f"{self.dataset.name} {self.name}: shard {self.dataset.splits[self.name].shards[row['shard']]}, "
            f"record {row['record']} (episode {episode}), step {frame - int(row['start'])}"
        )

    def _table(self, kind: str, name: str) -> np.ndarray:
        feature = self.dataset.feature(name)
        if shard_scan.storage(feature) != kind:
            raise errors.UserError(
                f"feature {name!r} of {self.dataset.name} is {feature.kind} {feature.dtype}{list(feature.shape)}: "
                f"it cannot be read as {kind}"
            )
        return np.load(self._path(kind, name, ".npy"), mmap_mode="r")

    def _path(self, kind: str, name: str, suffix: str) -> str:
        return os.path.join(self.directory, kind, _file_name(name) + suffix)


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index.

    `warnings` are what the build found odd, in words; `left_out` feature -> why it cannot be read through the index.
    """

    dataset: spec.DatasetSpec
    directory: str
    fingerprint: str
    splits: Mapping[str, SplitIndex]
    warnings: tuple[str, ...]
    left_out: Mapping[str, str]
    shard_bytes: int

    def split(self, name: str) -> SplitIndex:
        if name not in self.splits:
            raise errors.UserError(
                f"data set {self.dataset.name!r} has no split {name!r}; it has: {', '.join(self.splits)}"
            )
        return self.splits[name]


def default_directory(dataset: spec.DatasetSpec, root: str = "") -> str:
    """Where the index of a data set lives: inside the data set, or below `root` under a name of its own."""
    if not root:
        return os.path.join(dataset.directory, DEFAULT_FOLDER)
    # Cheap identity, so that two data sets of one name can share a root: shard names and sizes, no content.
    shards = [[name, list(split.shards), _sizes(dataset, split)] for name, split in sorted(dataset.splits.items())]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:12]
    return os.path.join(os.path.abspath(os.path.expanduser(root)), f"{dataset.name}-{dataset.version}-{digest}")


def open_index(
    directory: str | os.PathLike,
    index_dir: str = "",
    *,
    build: bool = True,
    on_shard: Callable[[str, int], None] | None = None,
) -> Index:
    """Opens the index of the data set in `directory`; builds it first where there is none.

    Args:
      directory: the data set version folder (features.json).
      index_dir: root for indexes; empty = `qdepth_index` inside the data set.
      build: False makes a missing index an error.
      on_shard: called as (shard name, bytes) after each shard of a build, for progress.

    Raises:
      UserError: no data set, an index of other data, a folder that cannot be written.
      ValueError: damaged shards (names shard, record, byte).
    """
    dataset = spec.read_spec(directory)
    target = default_directory(dataset, index_dir)
    if not os.path.exists(os.path.join(target, "index.json")):
        if not build:
            raise errors.UserError(
                f"no index in {target}: run `python tools/index_rlds.py {dataset.directory}`"
                + (f" --index_dir={index_dir}" if index_dir else "")
            )
        logging.info("building the index of %s in %s", dataset.directory, target)
        _build(dataset, target, on_shard)
    return _open(dataset, target)


def rebuild(dataset: spec.DatasetSpec, index_dir: str = "", on_shard: Callable[[str, int], None] | None = None) -> None:
    """Builds an index anew and then puts it in the place of the one that is there (which may be of other data)."""
    target = default_directory(dataset, index_dir)
    if os.path.exists(target) and not os.path.exists(os.path.join(target, "index.json")):
        raise errors.UserError(f"{target} exists but is no index: remove it or choose another place with --index_dir")
    old = f"{target}.old-{os.getpid()}"
    _build(dataset, target, on_shard, replace=old)
    shutil.rmtree(old, ignore_errors=True)


def total_bytes(dataset: spec.DatasetSpec) -> int:
    """Size of all shards."""
    return sum(sum(_sizes(dataset, split)) for split in dataset.splits.values())


def scan_identity(
    dataset: spec.DatasetSpec, on_shard: Callable[[str, int], None] | None = None
) -> tuple[str, dict[str, list[shard_scan.ShardTables]]]:
    """Reads every shard completely (checksums verified); returns (fingerprint, split -> tables by shard)."""
    tables: dict[str, list[shard_scan.ShardTables]] = {}
    for name, split in dataset.splits.items():
        tables[name] = []
        for number, shard in enumerate(split.shards):
            tables[name].append(shard_scan.scan_shard(dataset, name, number))
            if on_shard:
                on_shard(shard, tables[name][-1].size)
    return _fingerprint(dataset, tables), tables


def _fingerprint(dataset: spec.DatasetSpec, tables: Mapping[str, list[shard_scan.ShardTables]]) -> str:
    identity = {
        "format": FORMAT,
        "name": dataset.name,
        "version": dataset.version,
        "features": _feature_rows(dataset),
        "shards": {
            name: [[shard, table.size, table.crc] for shard, table in zip(split.shards, tables[name])]
            for name, split in dataset.splits.items()
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _feature_rows(dataset: spec.DatasetSpec) -> list[list[Any]]:
    rows = [dataclasses.astuple(feature) for _, feature in sorted(dataset.features.items())]
    return json.loads(json.dumps(rows))


def _build(
    dataset: spec.DatasetSpec, target: str, on_shard: Callable[[str, int], None] | None, replace: str = ""
) -> None:
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".building-", dir=os.path.dirname(target))
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        fingerprint, tables = scan_identity(dataset, on_shard)
        try:
            _write(dataset, scratch, fingerprint, tables)
            os.chmod(scratch, 0o755)
            if replace and os.path.exists(target):
                os.rename(target, replace)
            os.rename(scratch, target)
        except OSError as error:
            # Another process may have finished first: its index is as good as ours, if it is of the same data.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and os.path.exists(os.path.join(target, "index.json")):
                return
            raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cannot_write(target: str, error: OSError) -> errors.UserError:
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


def _write(
    dataset: spec.DatasetSpec,
    directory: str,
    fingerprint: str,
    tables: Mapping[str, list[shard_scan.ShardTables]],
) -> None:
    splits, warnings = {}, []
    for name, split in dataset.splits.items():
        folder = os.path.join(directory, name)
        for kind in ("span", "column", "text"):
            os.makedirs(os.path.join(folder, kind))
        found = [len(table.episodes) for table in tables[name]]
        if tuple(found) != split.declared:
            # Policy: what lies in the shards counts. The metadata of hand-cut data sets is often stale; a copy that
            # lost its tail ends inside a record and has been refused by then.
            odd = [i for i, (a, b) in enumerate(zip(found, split.declared)) if a != b]
            warnings.append(
                f"split {name}: dataset_info.json declares {sum(split.declared)} episodes, the shards hold "
                f"{sum(found)} (first difference in {split.shards[odd[0]]}); the shards count"
            )
        _save(os.path.join(folder, "episodes.npy"), _episode_table([table.episodes for table in tables[name]]))
        for feature in dataset.features.values():
            _write_feature(folder, feature, tables[name])
        extra = sorted(set().union(*(table.extra for table in tables[name])))
        if extra:
            warnings.append(f"split {name}: records hold features that features.json does not list: {', '.join(extra)}")
        splits[name] = {
            "episodes": sum(found),
            "frames": int(sum(table.episodes["length"].sum() for table in tables[name])),
            "shards": [[shard, table.size, table.crc] for shard, table in zip(split.shards, tables[name])],
        }
    left_out = {
        feature.name: feature.reason
        or (
            f"{feature.dtype}{list(feature.shape)} is wider than {shard_scan.MAX_COLUMN_VALUES} values"
            if feature.kind == "tensor"
            else f"{feature.kind} outside of the steps"
        )
        for feature in dataset.features.values()
        if not shard_scan.storage(feature)
    }
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "name": dataset.name,
        "version": dataset.version,
        "features": _feature_rows(dataset),
        "splits": splits,
        "left_out": left_out,
        "warnings": warnings,
    }
    with open(os.path.join(directory, "index.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def _episode_table(parts: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.zeros(0, shard_scan.EPISODE), *parts])
    table = np.zeros(len(joined), EPISODE)
    for field in shard_scan.EPISODE.names:
        table[field] = joined[field]
    table["start"] = np.cumsum(joined["length"], dtype=np.int64) - joined["length"]
    return table


def _write_feature(folder: str, feature: spec.FeatureSpec, tables: list[shard_scan.ShardTables]) -> None:
    kind = shard_scan.storage(feature)
    path = os.path.join(folder, kind, _file_name(feature.name))
    empty = shard_scan.empty_rows(feature)
    if kind == "column":
        _save(path + ".npy", np.concatenate([empty, *(table.columns[feature.name] for table in tables)]))
    elif kind == "span":
        _save(path + ".npy", np.concatenate([empty, *(table.spans[feature.name] for table in tables)]))
    elif kind == "text":
        merged: dict[bytes, int] = {}
        ids = [empty]
        for table in tables:
            local, strings = table.texts[feature.name]
            lookup = np.array([merged.setdefault(text, len(merged)) for text in strings], np.int32)
            ids.append(lookup[local] if len(local) else empty)
        _save(path + ".npy", np.concatenate(ids))
        # A text that is not UTF-8 stays readable and distinct instead of stopping the whole data set.
        with open(path + ".json", "w", encoding="utf-8") as file:
            json.dump([text.decode(errors="backslashreplace") for text in merged], file, ensure_ascii=False)


def _save(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _open(dataset: spec.DatasetSpec, directory: str) -> Index:
    path = os.path.join(directory, "index.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        found = content["format"], content["features"], {k: v["shards"] for k, v in content["splits"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} is damaged ({error!r}): delete {directory} and build it again") from error
    rebuild = f"run `python tools/index_rlds.py {dataset.directory} --rebuild` if the new data is what you want"
    if found[0] != FORMAT:
        raise errors.UserError(f"{path} has format {found[0]}, this code reads {FORMAT}: {rebuild}")
    if found[1] != _feature_rows(dataset) or (content["name"], content["version"]) != (dataset.name, dataset.version):
        raise errors.UserError(f"{path} describes other features than {dataset.directory}/features.json: {rebuild}")
    for name, split in dataset.splits.items():
        now = [list(item) for item in zip(split.shards, _sizes(dataset, split))]
        then = [item[:2] for item in found[2].get(name, [])]
        if now != then:
            first = next((pair for pair in zip(now, then) if pair[0] != pair[1]), (f"{len(now)} shards", len(then)))
            raise errors.UserError(
                f"{path} is of other data (split {name}: now {first[0]}, then {first[1]}): {rebuild}"
            )
    splits = {name: SplitIndex(dataset, name, os.path.join(directory, name)) for name in dataset.splits}
    size = sum(shard[1] for shards in found[2].values() for shard in shards)
    return Index(
        dataset, directory, content["fingerprint"], splits, tuple(content["warnings"]), content["left_out"], size
    )


def _sizes(dataset: spec.DatasetSpec, split: spec.Split) -> list[int]:
    return [os.path.getsize(dataset.shard_path(shard)) for shard in split.shards]


def _file_name(feature: str) -> str:
    # Readable and without collisions: "steps/observation/state" -> "steps.observation.state".
    return feature.replace("%", "%25").replace(".", "%2E").replace("/", ".")
