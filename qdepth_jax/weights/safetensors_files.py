"""Reads safetensors: one file, or shards with their index. By positioned reads, from disks and buckets.

Format: github.com/huggingface/safetensors, "Format": 8 bytes with the header's length (little-endian), a JSON header
name -> {dtype, shape, data_offsets}, the data. As that library does, files are refused whose arrays overlap, leave
holes or do not fill the file. (The library itself maps whole local files, reads no bucket, and has no bfloat16 for
NumPy.)
"""

import json
import math
import os
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from etils import epath

from qdepth_jax import errors
from qdepth_jax.data import storage
from qdepth_jax.weights import ranges, source

INDEX = "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # the library's own limit

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": source.BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def open_source(path: str) -> source.Source:
    """A .safetensors file, an index.json of shards, or a folder that holds either (named as transformers names them).

    Raises:
      UserError: nothing there, a shard is missing, truncated or contradicts the index, or a header is impossible.
    """
    path = storage.absolute(path)
    if path.endswith(".json"):
        return _sharded(path)
    if path.endswith(".safetensors"):
        return SafetensorsSource({os.path.basename(path): path})
    folder = epath.Path(path)
    if (folder / INDEX).exists():
        return _sharded(storage.join(path, INDEX))
    names = sorted(p.name for p in folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(names) != 1:
        raise errors.UserError(
            f"{path} holds {len(names)} .safetensors files ({', '.join(names[:4])}) and no {INDEX}: name the file, or "
            "copy the index that belongs to the shards"
        )
    return SafetensorsSource({names[0]: storage.join(path, names[0])})


def _sharded(index: str) -> source.Source:
    folder, _, _ = index.rpartition("/")
    try:
        where = json.loads(epath.Path(index).read_text())["weight_map"]
        shards = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(f"{index} is no index of safetensors shards: {error}") from error
    if odd := [name for name in shards if "/" in name or name in ("", "..")]:
        raise errors.UserError(f"{index} names shards outside its folder: {odd[:3]}")
    if absent := [name for name in shards if not epath.Path(storage.join(folder, name)).exists()]:
        raise errors.UserError(f"{index} names {len(shards)} shards; {len(absent)} are missing: {', '.join(absent)}")
    found = SafetensorsSource({name: storage.join(folder, name) for name in shards})
    problems = [f"{key}: named by the index, not in {name}" for key, name in where.items() if found.home(key) != name]
    problems += [f"{key}: in {found.home(key)}, not named by the index" for key in found.specs if key not in where]
    if problems:
        found.close()
        raise errors.UserError(f"{index} contradicts its shards:\n  " + "\n  ".join(problems[:20]))
    return found


class SafetensorsSource(source.Source):
    """Open safetensors files. paths: name -> path."""

    def __init__(self, paths: dict[str, str]):
        self.specs, self.files, self._at, self._open = {}, {}, {}, {}
        problems = []
        for name, path in paths.items():
            try:
                file = ranges.File(path)
                self._open[name], self.files[name] = file, file.size
                for key, (spec, offset) in read_header(file).items():
                    if key in self._at:
                        problems.append(f"{key} is in {self._at[key][0]} and in {name}")
                    self.specs[key], self._at[key] = spec, (name, offset)
            except errors.UserError as error:
                problems.append(str(error))
        if problems:
            self.close()
            raise errors.UserError("\n  ".join(problems))

    def home(self, key: str) -> str:
        """The file that holds a key; empty if none does."""
        return self._at.get(key, ("", 0))[0]

    def pieces(self, key: str, elements: int) -> Iterator[source.Block]:
        spec, (name, offset) = self.specs[key], self._at[key]
        for block in source.blocks(spec, elements):
            shape = tuple(s.stop - s.start for s in block)
            size = math.prod(shape) * spec.dtype.itemsize
            array = np.frombuffer(self._open[name].read(offset, size), spec.dtype).reshape(shape)
            offset += size  # blocks follow each other in C order
            yield tuple(s.start for s in block), array

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def read_header(file: ranges.File) -> dict[str, tuple[source.Spec, int]]:
    """Key -> (spec, offset in the file).

    Raises:
      UserError: the header is impossible, or the arrays do not fill the file exactly.
    """
    what = f"{file.path} is no whole safetensors file"
    if file.size < 8:
        raise errors.UserError(f"{what}: it has {file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, HEADER_BYTES):
        raise errors.UserError(f"{what}: its header should have {length} bytes, the file has {file.size}")
    try:
        header = json.loads(bytes(file.read(8, length)), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        spans = {key: _entry(key, entry) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(f"{what}: bad header ({error})") from error
    at, out = 0, {}
    for key, (spec, first, last) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if first != at:
            raise errors.UserError(f"{what}: {key} starts at byte {first} of the data, the array before ends at {at}")
        if last - first != spec.nbytes:
            raise errors.UserError(f"{what}: {key} is {spec.dtype}{list(spec.shape)} and has {last - first} bytes")
        out[key], at = (spec, 8 + length + first), last
    if 8 + length + at != file.size:
        raise errors.UserError(
            f"{what}: its arrays end at byte {8 + length + at}, the file at {file.size}: truncated, or written over"
        )
    return out


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _entry(key: str, entry: dict) -> tuple[source.Spec, int, int]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key} has the unknown dtype {entry['dtype']!r}")
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"{key} has shape {shape} at {entry['data_offsets']}")
    return source.Spec(shape, DTYPES[entry["dtype"]]), first, last
