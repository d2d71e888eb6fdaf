"""Writes RLDS data sets that plain `tfds.builder_from_directory` opens, without TensorFlow.

A version directory holds features.json (the tree of features), dataset_info.json (splits and their shard lengths)
and the shards NAME-SPLIT.tfrecord-XXXXX-of-YYYYY. A record is one episode, one tf.train.Example, whose keys are
slash-joined paths. Shards appear under their final name only when complete, dataset_info.json comes last: a directory
that has it is whole.

  features = {
      "steps": {"observation": {"image": Image((128, 128, 3)), "state": Tensor((8,))}, "action": Tensor((7,)), ...},
      "episode_metadata": {"file_path": Text(), "seed": Tensor((), "int64")},
  }
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qdepth_jax.data import example, tfrecord

_FEATURES = "tensorflow_datasets.core.features."
_STEPS = "steps"


@dataclasses.dataclass(frozen=True)
class Image:
    """Encoded image bytes, JPEG (u8, 3 channels) or PNG (u8 or u16)."""

    shape: tuple[int, int, int]
    encoding: str = "jpeg"
    dtype: str = "uint8"

    def spec(self) -> dict[str, Any]:
        return {
            "pythonClassName": _FEATURES + "image_feature.Image",
            "image": {"shape": _dimensions(self.shape), "dtype": self.dtype, "encodingFormat": self.encoding},
        }


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Numbers; at most the first dimension may be None (of any length).

    encoding: "none" (a list of numbers) or "bytes" (each step's values as little-endian bytes).
    """

    shape: tuple[int | None, ...] = ()
    dtype: str = "float32"
    encoding: str = "none"

    def spec(self) -> dict[str, Any]:
        kind = "tensor_feature.Tensor" if self.shape else "scalar.Scalar"
        tensor = {"shape": _dimensions(self.shape), "dtype": self.dtype, "encoding": self.encoding}
        return {"pythonClassName": _FEATURES + kind, "tensor": tensor}


@dataclasses.dataclass(frozen=True)
class Text:
    """A UTF-8 string."""

    def spec(self) -> dict[str, Any]:
        return {"pythonClassName": _FEATURES + "text_feature.Text", "text": {}}


Feature = Image | Tensor | Text
Tree = Mapping[str, "Feature | Tree"]


@dataclasses.dataclass(frozen=True)
class Split:
    """What dataset_info.json says about one split: episodes per shard and bytes of all records' payloads."""

    name: str
    shard_lengths: tuple[int, ...]
    num_bytes: int


def encode_episode(features: Tree, steps: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """One serialised episode.

    Args:
      features: the tree, with the branches "steps" and "episode_metadata".
      steps: flat, slash-joined names below steps -> T values: arrays [T, ...] for Tensor, T `bytes` for Image,
        T `str` for Text.
      metadata: flat names below episode_metadata -> one value each.

    Raises:
      ValueError: a name too many or missing, another shape or dtype than declared, steps of unequal number.
    """
    flat = flatten(features)
    given = {f"{_STEPS}/{k}": v for k, v in steps.items()}
    given |= {f"episode_metadata/{k}": v for k, v in metadata.items()}
    if set(given) != set(flat):
        missing, extra = sorted(set(flat) - set(given)), sorted(set(given) - set(flat))
        raise ValueError(f"episode does not fit its features: missing {missing}, not declared {extra}")
    lengths = {name: len(value) for name, value in given.items() if name.startswith(_STEPS + "/")}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 1:
        raise ValueError(f"all step features need the same number of steps, at least one; got {lengths}")
    count = next(iter(lengths.values()))
    encoded = {}
    for name, feature in flat.items():
        rows = (count,) if name.startswith(_STEPS + "/") else ()
        encoded[name] = _encode(name, feature, given[name], rows)
    return example.encode(encoded)


def _encode(name: str, feature: Feature, value: Any, rows: tuple[int, ...]) -> Any:
    if isinstance(feature, Tensor):
        array = np.asarray(value)
        shape = rows + feature.shape
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
        if array.dtype != np.dtype(feature.dtype) or not fits:
            raise ValueError(f"{name}: declared {feature.dtype} {shape}, got {array.dtype} {array.shape}")
        if feature.encoding == "bytes":
            data = array.astype(array.dtype.newbyteorder("<"))
            return [row.tobytes() for row in data] if rows else [data.tobytes()]
        return array
    values = list(value) if rows else [value]
    if isinstance(feature, Text):
        values = [v.encode() if isinstance(v, str) else v for v in values]
    if not all(isinstance(v, bytes) for v in values):
        raise ValueError(f"{name}: {type(feature).__name__} needs encoded bytes, got {type(values[0]).__name__}")
    return values


def flatten(features: Tree, prefix: str = "") -> dict[str, Feature]:
    """Slash-joined path -> feature, in the order of the tree."""
    flat: dict[str, Feature] = {}
    for name, feature in features.items():
        path = f"{prefix}/{name}" if prefix else name
        flat |= flatten(feature, path) if isinstance(feature, Mapping) else {path: feature}
    return flat


def shard_name(dataset: str, split: str, shard: int, shards: int) -> str:
    return f"{dataset}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"


def write_shard(path: str | os.PathLike, payloads: Iterable[bytes]) -> tuple[int, int]:
    """Writes one shard; it gets its name when complete. Returns (episodes, payload bytes)."""
    path = Path(path)
    # Not the process number: hosts that share the disk may have equal ones.
    partial = path.with_name(f"{path.name}.partial.{uuid.uuid4().hex}")
    episodes = size = 0
    try:
        with open(partial, "wb") as file:
            for payload in payloads:
                tfrecord.write_record(file, payload)
                episodes, size = episodes + 1, size + len(payload)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return episodes, size


def write_split(
    directory: str | os.PathLike, dataset: str, split: str, shards: list[list[Any]], read=lambda item: item
) -> Split:
    """Writes all shards of a split. `shards` lists the items of each shard; read(item) gives an episode's bytes."""
    lengths, total = [], 0
    for number, items in enumerate(shards):
        path = Path(directory) / shard_name(dataset, split, number, len(shards))
        episodes, size = write_shard(path, (read(item) for item in items))
        lengths.append(episodes)
        total += size
    return Split(split, tuple(lengths), total)


def write_metadata(
    directory: str | os.PathLike,
    dataset: str,
    version: str,
    features: Tree,
    splits: list[Split],
    description: str,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes features.json, then dataset_info.json: the last file of a data set.

    notes: anything JSON; kept in dataset_info.json under "metadataDict", which TFDS ignores when it is absent and
    keeps when it is there.
    """
    info = {
        "description": description,
        "fileFormat": "tfrecord",
        "name": dataset,
        "releaseNotes": {version: description.split("\n")[0]},
        "splits": splits_json(splits),
        "version": version,
    }
    directory = Path(directory)
    write_json(directory / "features.json", features_json(features))
    if notes is not None:
        write_json(directory / "metadata.json", notes)
    write_json(directory / "dataset_info.json", info)


def splits_json(splits: Iterable[Split]) -> list[dict[str, Any]]:
    """The splits as dataset_info.json lists them."""
    return [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split.name,
            "numBytes": str(split.num_bytes),
            "shardLengths": [str(n) for n in split.shard_lengths],
        }
        for split in splits
    ]


def features_json(features: Tree) -> dict[str, Any]:
    """The features.json of a tree whose branch "steps" is one row per step."""
    spec = dict_spec({name: f for name, f in features.items() if name != _STEPS})
    spec["featuresDict"]["features"][_STEPS] = {
        "pythonClassName": _FEATURES + "dataset_feature.Dataset",
        "sequence": {"feature": dict_spec(features[_STEPS]), "length": "-1"},
    }
    return spec


def dict_spec(features: Tree) -> dict[str, Any]:
    """A branch of features.json."""
    members = {
        name: dict_spec(feature) if isinstance(feature, Mapping) else feature.spec()
        for name, feature in sorted(features.items())
    }
    return {"pythonClassName": _FEATURES + "features_dict.FeaturesDict", "featuresDict": {"features": members}}


def _dimensions(shape: tuple[int | None, ...]) -> dict[str, Any]:
    return {"dimensions": [str(-1 if n is None else n) for n in shape]} if shape else {}


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a json file that is either complete and on the disk, or absent."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial.{uuid.uuid4().hex}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives a finished file its name, and puts the name on the disk too: a later file may rely on it."""
    os.replace(partial, path)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
