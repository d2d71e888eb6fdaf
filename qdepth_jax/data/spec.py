"""What a TFDS data set on disk says about itself: features.json and dataset_info.json as plain tables.

A data set version is a folder with those two files and shards `NAME-SPLIT.tfrecord-XXXXX-of-YYYYY`; one record is
one episode. Feature names are the slash-joined keys that TFDS writes into the records (`steps/observation/image`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from qdepth_jax import errors

STEPS = "steps"
_REQUIRED = ("features.json", "dataset_info.json")


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """One leaf of the feature tree.

    Attributes:
      name: slash-joined key in the record.
      kind: "image", "tensor" (scalars too), "text", or "unsupported".
      dtype: numpy name of the decoded values ("uint8", "float32", "bool", ...; "string" for text).
      shape: per-step shape (per-episode shape outside `steps`); -1 where the file leaves a size open.
      encoding: "jpeg", "png" or "" for images; "none", "zlib" or "bytes" for tensors.
      per_step: True below `steps`.
      reason: why an unsupported feature is not read; empty otherwise.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    per_step: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: shard file names in order, and the number of episodes each is declared to hold (() = unknown)."""

    name: str
    shards: tuple[str, ...]
    declared: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A data set version on disk. `directory` is where it lies now and is no part of its identity."""

    directory: str
    name: str
    version: str
    features: Mapping[str, FeatureSpec]
    splits: Mapping[str, Split]

    def shard_path(self, shard: str) -> str:
        return os.path.join(self.directory, shard)

    def feature(self, name: str) -> FeatureSpec:
        """The feature called `name`; a missing one is an error that lists what there is."""
        if name not in self.features:
            have = ", ".join(sorted(self.features))
            raise errors.UserError(
                f"data set {self.name!r} in {self.directory} has no feature {name!r}; it has: {have}"
            )
        return self.features[name]


def find_version(directory: str | os.PathLike) -> str:
    """The folder that holds the two json files: `directory` itself, or its only version folder.

    Raises:
      UserError: nothing there; names the path and what it holds.
    """
    directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    if not os.path.isdir(directory):
        near = directory
        while not os.path.isdir(near):
            near = os.path.dirname(near)
        raise errors.UserError(
            f"no data set folder {directory}: the path ends at {near}, which holds {_listing(near)}. "
            "Give the folder with features.json and dataset_info.json."
        )

    def complete(folder: str) -> bool:
        return all(os.path.isfile(os.path.join(folder, name)) for name in _REQUIRED)

    if complete(directory):
        return directory
    versions = [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    versions = [path for path in versions if os.path.isdir(path) and complete(path)]
    if len(versions) == 1:
        return versions[0]
    if versions:
        names = ", ".join(os.path.basename(path) for path in versions)
        raise errors.UserError(f"{directory} holds several data set versions ({names}): name one of them")
    missing = [name for name in _REQUIRED if not os.path.isfile(os.path.join(directory, name))]
    raise errors.UserError(
        f"{directory} is no TFDS data set version: {' and '.join(missing)} missing; it holds {_listing(directory)}"
    )


def read_spec(directory: str | os.PathLike) -> DatasetSpec:
    """Reads both json files; every declared shard must exist.

    Raises:
      UserError: missing folder or files, unreadable json, a file format other than tfrecord, missing shards.
    """
    directory = find_version(directory)
    tree, info = (_load_json(os.path.join(directory, name)) for name in _REQUIRED)
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise errors.UserError(
            f"{directory} is stored as {file_format!r}; only 'tfrecord' can be read. Convert it with tfds first."
        )
    try:
        name, version = str(info["name"]), str(info.get("version", ""))
        features = {feature.name: feature for feature in _flatten(tree, "", False)}
        splits = {str(item["name"]): _split(name, item) for item in info.get("splits", [])}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise errors.UserError(
            f"{directory}: features.json or dataset_info.json is not in the form TFDS 4 writes ({error!r}); "
            "rewrite the metadata with a current tensorflow-datasets"
        ) from error
    spec = DatasetSpec(directory, name, version, features, splits)
    if not splits:
        raise errors.UserError(f"{directory}/dataset_info.json lists no split; rewrite the metadata with tfds")
    if not any(feature.per_step for feature in features.values()):
        raise errors.UserError(f"{directory} is no RLDS data set: no feature lies below {STEPS!r}")
    gone = [shard for split in splits.values() for shard in split.shards if not os.path.isfile(spec.shard_path(shard))]
    if gone:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise errors.UserError(
            f"{directory}: {len(gone)} shards missing: {', '.join(gone[:3])}{more}. Copy them again."
        )
    return spec


def _listing(directory: str) -> str:
    names = sorted(os.listdir(directory))
    if not names:
        return "nothing"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _load_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} is not valid json ({error}); copy it again") from error


def _split(dataset: str, item: Mapping[str, Any]) -> Split:
    declared = tuple(int(length) for length in item.get("shardLengths", []))
    template = item.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    count = len(declared)
    shards = tuple(
        template.format(
            DATASET=dataset,
            SPLIT=item["name"],
            FILEFORMAT="tfrecord",
            SHARD_X_OF_Y=f"{shard:05d}-of-{count:05d}",
            SHARD_INDEX=f"{shard:05d}",
            NUM_SHARDS=f"{count:05d}",
        )
        for shard in range(count)
    )
    return Split(str(item["name"]), shards, declared)


def _flatten(node: Mapping[str, Any], prefix: str, per_step: bool) -> list[FeatureSpec]:
    if "featuresDict" in node:
        children = node["featuresDict"].get("features", {})
        joined = (
            _flatten(child, f"{prefix}/{key}" if prefix else key, per_step) for key, child in sorted(children.items())
        )
        return [feature for group in joined for feature in group]
    if "sequence" in node:
        # The outer `steps` is the sequence of time steps; a sequence inside a step has no fixed place per step.
        if prefix == STEPS and not per_step:
            return _flatten(node["sequence"]["feature"], prefix, True)
        return [FeatureSpec(prefix, "unsupported", "", (), "", per_step, "a sequence inside a step")]
    if "image" in node:
        image = node["image"]
        encoding = image.get("encodingFormat", "")
        return [FeatureSpec(prefix, "image", image.get("dtype", "uint8"), _shape(image), encoding, per_step)]
    if "text" in node:
        return [FeatureSpec(prefix, "text", "string", (), "none", per_step)]
    if "tensor" in node:
        tensor = node["tensor"]
        dtype, shape = tensor["dtype"], _shape(tensor)
        encoding = tensor.get("encoding", "none")
        if dtype in ("string", "object"):
            reason = "" if not shape else "an array of strings"
            return [FeatureSpec(prefix, "unsupported" if shape else "text", "string", shape, "none", per_step, reason)]
        if dtype == "bfloat16" or -1 in shape:
            return [FeatureSpec(prefix, "unsupported", dtype, shape, encoding, per_step, f"{dtype} {shape}")]
        return [FeatureSpec(prefix, "tensor", dtype, shape, encoding, per_step)]
    if "classLabel" in node:
        return [FeatureSpec(prefix, "tensor", "int64", (), "none", per_step)]
    known = sorted(set(node) - {"pythonClassName", "description"})
    return [FeatureSpec(prefix, "unsupported", "", (), "", per_step, f"feature type {known}")]


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in node.get("shape", {}).get("dimensions", []))
