"""The sidecar index of an RLDS data set: built once, then any frame is one positioned read.

    <index_dir>/index.json                  identity, features, splits, shard sizes and checksums, warnings
    <index_dir>/quarantine.json             what must not be sampled, each with its reason (see quarantine.py)
    <index_dir>/<split>/episodes.npy        episode table (EPISODE, plus `start`: first frame id)
    <index_dir>/<split>/span/NAME.npy       byte place of every image, memory-mapped
    <index_dir>/<split>/column/NAME.npy     low-dimensional columns, memory-mapped
    <index_dir>/<split>/text/NAME.{npy,json}  string ids per row, and the table of distinct strings

The fingerprint covers name, version, features, and of every shard name, size and content checksum: never a path, so a
moved data set keeps its index, its statistics and its depth tokens. A folder is either a complete index or absent: the
build writes beside it and renames.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import google_crc32c
import numpy as np

from qdepth_jax import errors, files
from qdepth_jax.data import index_build, quarantine, shard_scan, spec, storage

FORMAT = index_build.FORMAT
DEFAULT_FOLDER = "qdepth_index"
EPISODE = index_build.EPISODE


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """One split, opened. Frame ids 0..frames-1 run through its episodes in record order."""

    dataset: spec.DatasetSpec
    name: str
    directory: str

    @functools.cached_property
    def episodes(self) -> np.ndarray:
        """EPISODE [E]."""
        return _read(np.load, os.path.join(self.directory, "episodes.npy"))

    @functools.cached_property
    def frames(self) -> int:
        return int(self.episodes["length"].sum())

    def column(self, name: str) -> np.ndarray:
        """Values of a tensor feature, memory-mapped: [F, ...], or [E, ...] for an episode feature."""
        return self._table("column", name)

    def spans(self, name: str) -> np.ndarray:
        """SPAN [F] (or [E]): where each image or wide tensor lies in its shard; see `shard_scan.decode_tensor`."""
        return self._table("span", name)

    def texts(self, name: str) -> tuple[np.ndarray, list[str]]:
        """(ids i32 [F] or [E], table of distinct strings); of an array of strings, ids i32 [F, ...]."""
        ids = self._table("text", name)
        return ids, _read(_json, self._path("text", name, ".json"))

    @functools.cached_property
    def quarantine(self) -> tuple[quarantine.Row, ...]:
        """What of this split was set aside when the index was built."""
        path = os.path.join(os.path.dirname(self.directory), "quarantine.json")
        rows = _read(lambda path: quarantine.from_json(_json(path)), path)
        return tuple(row for row in rows if row.split == self.name)

    @functools.cached_property
    def quarantined_by_reason(self) -> dict[str, np.ndarray]:
        """Reason -> i64 [n] ascending frame ids that must not be sampled. Records that could not be read at all have no
        frames; `quarantine` counts them."""
        return quarantine.frames(self.quarantine, self.episodes["start"], self.episodes["length"])

    @functools.cached_property
    def quarantined(self) -> np.ndarray:
        """i64 [n]: ascending ids of all frames that must not be sampled."""
        parts = self.quarantined_by_reason.values()
        return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))

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
        return _read(functools.partial(np.load, mmap_mode="r"), self._path(kind, name, ".npy"))

    def _path(self, kind: str, name: str, suffix: str) -> str:
        return os.path.join(self.directory, kind, index_build.file_name(name) + suffix)


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index.

    `warnings` are what the build found odd, in words; `left_out` feature -> why it cannot be read through the index;
    `quarantine_digest` identity of what was set aside ("" = nothing), which `fingerprint` does not cover: equal data
    may be indexed with other `checks`.
    """

    dataset: spec.DatasetSpec
    directory: str
    fingerprint: str
    splits: Mapping[str, SplitIndex]
    warnings: tuple[str, ...]
    left_out: Mapping[str, str]
    shard_bytes: int
    quarantine_digest: str
    checks: shard_scan.Checks

    def split(self, name: str) -> SplitIndex:
        if name not in self.splits:
            raise errors.UserError(
                f"data set {self.dataset.name!r} has no split {name!r}; it has: {', '.join(self.splits)}"
            )
        return self.splits[name]


def default_directory(dataset: spec.DatasetSpec, root: str = "") -> str:
    """Where the index of a data set lives: inside the data set, or below `root` under a name of its own."""
    if storage.is_remote(root):
        raise errors.UserError(f"--index_dir={root}: an index is memory-mapped, so it needs a local folder")
    if not root:
        if storage.is_remote(dataset.directory):
            raise errors.UserError(
                f"the index of {dataset.directory} needs a local folder: give one with --index_dir (config: "
                "data.index_dir)"
            )
        return os.path.join(dataset.directory, DEFAULT_FOLDER)
    # Cheap identity, so that two data sets of one name can share a root: shard names and sizes, no content.
    shards = [[name, list(split.shards), _sizes(dataset, split)] for name, split in sorted(dataset.splits.items())]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:12]
    return os.path.join(os.path.abspath(os.path.expanduser(root)), f"{dataset.name}-{dataset.version}-{digest}")


def _sizes(dataset: spec.DatasetSpec, split: spec.Split) -> list[int]:
    if storage.is_remote(dataset.directory):  # which tells no sizes: what is declared instead
        return [*split.declared, split.num_bytes]
    return [stat.size for stat in index_build.shard_stats(dataset, split)]


def open_index(
    directory: str | os.PathLike,
    index_dir: str = "",
    *,
    build: bool = True,
    on_shard: Callable[[str, int], None] | None = None,
    workers: int = 0,
    checks: shard_scan.Checks = shard_scan.NO_CHECKS,
) -> Index:
    """Opens the index of the data set in `directory`; builds it first where there is none.

    A shard whose modification time (or object generation) is another than at the build is read again and must hold the
    same content; that is remembered where the index can be written.

    Args:
      directory: the data set version folder (features.json), local or gs://.
      index_dir: local root for indexes; empty = `qdepth_index` inside the data set.
      build: False makes a missing index an error.
      on_shard: called as (shard name, bytes) after each shard that was read, for progress.
      workers: processes of a build; 0 = one per core, one alone for small data.
      checks: of a build; an index that is there is opened as it is (`Index.checks` tells how it was built).

    Raises:
      UserError: no data set, damaged shards, an index of other data, a folder that cannot be written.
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
        index_build.build(dataset, target, checks, on_shard, workers)
    return _open(dataset, target, on_shard, workers)


def say_warnings(opened: Index) -> None:
    """Logs what the build found odd: for whatever makes something of the data."""
    for warning in opened.warnings:
        logging.warning("%s: %s", opened.dataset.directory, warning)


def rebuild(
    dataset: spec.DatasetSpec,
    index_dir: str = "",
    on_shard: Callable[[str, int], None] | None = None,
    workers: int = 0,
    checks: shard_scan.Checks = shard_scan.NO_CHECKS,
) -> None:
    """Builds an index anew and then puts it in the place of the one that is there (which may be of other data)."""
    target = default_directory(dataset, index_dir)
    if os.path.exists(target) and not os.path.exists(os.path.join(target, "index.json")):
        raise errors.UserError(f"{target} exists but is no index: remove it or choose another place with --index_dir")
    old = f"{target}.old-{uuid.uuid4().hex[:8]}"
    index_build.build(dataset, target, checks, on_shard, workers, replace=old)
    shutil.rmtree(old, ignore_errors=True)


def total_bytes(dataset: spec.DatasetSpec) -> int:
    """Size of all shards (of objects, as declared)."""
    return index_build.total_bytes(dataset)


def verify(opened: Index, on_shard: Callable[[str, int], None] | None = None, workers: int = 0) -> None:
    """Reads every shard and every file of the index again.

    Raises:
      UserError: names the shards whose content, or the files of the index that, are not what was indexed.
    """
    _check_content(opened.dataset, opened.directory, _load(opened.directory), None, on_shard, workers)
    for name, expected in sorted(_load(opened.directory)["files"].items()):
        size = crc = 0
        with open(os.path.join(opened.directory, name), "rb") as file:
            while part := file.read(1 << 20):
                size, crc = size + len(part), google_crc32c.extend(crc, part)
        if [size, crc] != expected:
            raise errors.UserError(
                f"{opened.directory}/{name} is damaged, the shards are good: "
                f"{_rebuild_hint(opened.dataset, opened.directory)}"
            )


def _load(directory: str) -> dict[str, Any]:
    path = os.path.join(directory, "index.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        missing = {"format", "features", "splits", "fingerprint", "name", "version", "warnings", "left_out"} - {
            *content
        }
        if missing or not all("shards" in split for split in content["splits"].values()):
            raise KeyError(*sorted(missing or {"shards"}))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} is damaged ({error!r}): delete {directory} and build it again") from error
    return content


def _rebuild_hint(dataset: spec.DatasetSpec, directory: str) -> str:
    inside = os.path.dirname(directory) == dataset.directory
    where = "" if inside else f" --index_dir={os.path.dirname(directory)}"
    return f"run `python tools/index_rlds.py {dataset.directory}{where} --rebuild`"


def _read(load: Callable[[str], Any], path: str) -> Any:
    """A file of an index; one that is gone or cut is an error with the fix."""
    try:
        return load(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise errors.UserError(
            f"{path} of the index is gone or damaged ({error}): delete the index folder, and it is built again"
        ) from error


def _json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _open(
    dataset: spec.DatasetSpec, directory: str, on_shard: Callable[[str, int], None] | None, workers: int
) -> Index:
    content, path = _load(directory), os.path.join(directory, "index.json")
    rebuild = f"{_rebuild_hint(dataset, directory)} if the new data is what you want"
    if content["format"] != FORMAT:
        raise errors.UserError(
            f"{path} has format {content['format']}, this code reads {FORMAT}: {_rebuild_hint(dataset, directory)}"
        )
    rows = index_build.feature_rows(dataset)
    if content["features"] != rows or (content["name"], content["version"]) != (dataset.name, dataset.version):
        raise errors.UserError(f"{path} describes other features than {dataset.directory}/features.json: {rebuild}")
    changed = []
    for name, split in dataset.splits.items():
        known = content["splits"].get(name, {"shards": [], "versions": []})
        now = index_build.shard_stats(dataset, split)
        # The size of an object is not told; its generation is.
        names = [[shard, stat.size if stat.size >= 0 else None] for shard, stat in zip(split.shards, now)]
        then = [[shard, size if of[1] is not None else None] for (shard, size, _), of in zip(known["shards"], names)]
        if names != then or len(known["shards"]) != len(names):
            first = next((pair for pair in zip(names, then) if pair[0] != pair[1]), None)
            first = first or (f"{len(names)} shards", f"{len(known['shards'])} shards")
            raise errors.UserError(
                f"{path} is of other data (split {name}: now {first[0]}, then {first[1]}): {rebuild}"
            )
        changed += [(name, i) for i, (stat, old) in enumerate(zip(now, known["versions"])) if stat.version != old]
        known["versions"] = [stat.version for stat in now]
    if changed:
        logging.warning(
            "%d shards of %s carry another time than when they were indexed; reading them again to see whether their "
            "content is the same",
            len(changed),
            dataset.directory,
        )
        _check_content(dataset, directory, content, changed, on_shard, workers)
        _remember(path, content)
    splits = {name: SplitIndex(dataset, name, os.path.join(directory, name)) for name in dataset.splits}
    quarantine_digest = _read(lambda path: _json(path)["digest"], os.path.join(directory, "quarantine.json"))
    return Index(
        dataset,
        directory,
        content["fingerprint"],
        splits,
        tuple(content["warnings"]),
        content["left_out"],
        sum(shard[1] for split in content["splits"].values() for shard in split["shards"]),
        quarantine_digest,
        shard_scan.Checks(**{**content["checks"], "finite": tuple(content["checks"]["finite"])}),
    )


def _check_content(
    dataset: spec.DatasetSpec,
    directory: str,
    content: dict[str, Any],
    shards: list[tuple[str, int]] | None,
    on_shard: Callable[[str, int], None] | None,
    workers: int,
) -> None:
    """Shards (split, number), None = all, must hold what the index was built from."""
    if shards is None:
        shards = [(name, number) for name, split in dataset.splits.items() for number in range(len(split.shards))]
    found = index_build.content_crcs(dataset, shards, workers, on_shard)
    bad = [
        f"{dataset.splits[name].shards[number]} ({found[name, number][2] or 'good records, but others'})"
        for name, number in shards
        if list(found[name, number][:2]) != content["splits"][name]["shards"][number][1:]
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise errors.UserError(
            f"{dataset.directory}: {len(bad)} shards changed since they were indexed in {directory}: "
            f"{', '.join(bad[:3])}{more}. Restore them, or {_rebuild_hint(dataset, directory)} if the new data is what "
            "you want (with --quarantine where it is damaged)"
        )


def _remember(path: str, content: dict[str, Any]) -> None:
    try:
        files.write_whole(path, json.dumps(content, ensure_ascii=False, indent=1))
    except OSError as error:
        logging.warning("%s cannot be written (%s): the shards are read again at every start", path, error.strerror)
