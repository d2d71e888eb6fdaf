"""What a TFDS data set on disk says about itself: features.json and dataset_info.json as plain tables.

A data set version is a folder with those two files and shards `NAME-SPLIT.tfrecord-XXXXX-of-YYYYY`; one record is
one episode. Feature names are the slash-joined keys that TFDS writes into the records (`steps/observation/image`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qdepth_jax import errors
from qdepth_jax.data import storage

STEPS = "steps"
_REQUIRED = ("features.json", "dataset_info.json")


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """One leaf of the feature tree.

    Attributes:
      name: slash-joined key in the record.
      kind: "image", "tensor" (scalars, class labels and boxes too), "text" (arrays of strings too), or "unsupported".
      dtype: numpy name of the decoded values ("uint8", "float32", "bool", ...; "string" for text).
      shape: per-step shape (per-episode shape outside `steps`), the lengths of sequences inside a step leading; -1
        where the file leaves a size open.
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
    """One split: shard file names in order, the number of episodes each is declared to hold (() = unknown), and the
    declared bytes of all payloads (0 = unknown)."""

    name: str
    shards: tuple[str, ...]
    declared: tuple[int, ...]
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A data set version. `directory` (local or gs://) is where it lies now and is no part of its identity."""

    directory: str
    name: str
    version: str
    features: Mapping[str, FeatureSpec]
    splits: Mapping[str, Split]

    def shard_path(self, shard: str) -> str:
        return storage.join(self.directory, shard)

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
    directory = storage.absolute(directory)
    remote = storage.is_remote(directory)
    if not remote and not os.path.isdir(directory):
        near = directory
        while not os.path.isdir(near):
            near = os.path.dirname(near)
        raise errors.UserError(
            f"no data set folder {directory}: the path ends at {near}, which holds {_listing(near)}. "
            "Give the folder with features.json and dataset_info.json."
        )
    (missing,) = _missing([directory])
    if not missing:
        return directory
    inside = [storage.join(directory, name) for name in storage.names(directory)]
    if not remote:
        inside = [path for path in inside if os.path.isdir(path)]
    versions = [path for path, lacks in zip(inside, _missing(inside)) if not lacks]
    if len(versions) == 1:
        return versions[0]
    if versions:
        names = ", ".join(os.path.basename(path) for path in versions)
        raise errors.UserError(f"{directory} holds several data set versions ({names}): name one of them")
    hint = " (or the bucket does not exist, or may not be listed: check its name and your credentials)"
    raise errors.UserError(
        f"{directory} is no TFDS data set version: {' and '.join(missing)} missing; it holds {_listing(directory)}"
        + (hint if remote else "")
    )


def _missing(directories: Sequence[str]) -> list[list[str]]:
    """Of each folder, which of the two files it lacks; all are asked for at once."""
    found = storage.stats(storage.join(directory, name) for directory in directories for name in _REQUIRED)
    pairs = zip(found[::2], found[1::2])
    return [[name for name, stat in zip(_REQUIRED, pair) if stat is None] for pair in pairs]


def read_spec(directory: str | os.PathLike) -> DatasetSpec:
    """Reads both json files; every declared shard must exist.

    Raises:
      UserError: missing folder or files, unreadable json, a file format other than tfrecord, missing shards, a store
        that refuses.
    """
    directory = find_version(directory)
    tree, info = (_load_json(storage.join(directory, name)) for name in _REQUIRED)
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
    shards = [shard for split in splits.values() for shard in split.shards]
    found = storage.stats(spec.shard_path(shard) for shard in shards)
    gone = [shard for shard, stat in zip(shards, found) if stat is None]
    if gone:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise errors.UserError(
            f"{directory}: {len(gone)} shards missing: {', '.join(gone[:3])}{more}. Copy them again."
        )
    return spec


def _listing(directory: str) -> str:
    names = storage.names(directory)
    if not names:
        return "nothing"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _load_json(path: str) -> Any:
    try:
        return json.loads(storage.read(path).decode())
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
    return Split(str(item["name"]), shards, declared, int(item.get("numBytes", 0)))


def _flatten(node: Mapping[str, Any], prefix: str, per_step: bool, outer: tuple[int, ...] = ()) -> list[FeatureSpec]:
    """The leaves below a node; `outer` are the fixed lengths of the sequences around it, inside of a step."""

    def leaf(kind: str, dtype: str, shape: tuple[int, ...], encoding: str = "none", reason: str = "") -> FeatureSpec:
        return FeatureSpec(prefix, kind, dtype, outer + shape, encoding, per_step, reason)

    if "featuresDict" in node:
        children = node["featuresDict"].get("features", {})
        joined = (
            _flatten(child, f"{prefix}/{key}" if prefix else key, per_step, outer)
            for key, child in sorted(children.items())
        )
        return [feature for group in joined for feature in group]
    if "sequence" in node:
        sequence = node["sequence"]
        # The outer `steps` is the sequence of time steps.
        if prefix == STEPS and not per_step:
            return _flatten(sequence["feature"], prefix, True)
        # Of any other, the elements lie at computable places only where each holds the same number.
        length = int(sequence.get("length", -1))
        if length >= 1:
            return _flatten(sequence["feature"], prefix, per_step, (*outer, length))
        return [FeatureSpec(prefix, "unsupported", "", (), "", per_step, "a sequence of no fixed length")]
    if "image" in node:
        image = node["image"]
        if outer:
            return [leaf("unsupported", "uint8", (), "", "a sequence of images inside a step")]
        return [leaf("image", image.get("dtype", "uint8"), _shape(image), image.get("encodingFormat", ""))]
    if "text" in node:
        return [leaf("text", "string", ())]
    if "tensor" in node:
        tensor = node["tensor"]
        dtype, shape, encoding = tensor["dtype"], _shape(tensor), tensor.get("encoding", "none")
        if dtype == "bfloat16" or -1 in shape:
            return [leaf("unsupported", dtype, shape, encoding, f"{dtype} {shape}")]
        if dtype in ("string", "object"):
            return [leaf("text", "string", shape)]
        if encoding != "none" and outer:
            return [leaf("unsupported", dtype, shape, encoding, f"a sequence of {encoding} tensors inside a step")]
        return [leaf("tensor", dtype, shape, encoding)]
    if "classLabel" in node:
        return [leaf("tensor", "int64", ())]
    if "boundingBox" in node:
        return [leaf("tensor", "float32", (4,))]
    known = sorted(set(node) - {"pythonClassName", "description"})
    return [leaf("unsupported", "", (), "", f"feature type {known}")]


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in node.get("shape", {}).get("dimensions", []))
