"""Writes safetensors files one array at a time: never more than one array in memory, the same bytes every time.

Format (github.com/huggingface/safetensors, README "Format"): u64 length of the header, little-endian; the header, JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}} padded with spaces to 8 bytes; the arrays, row-major and
little-endian, back to back. Names of files as transformers writes them: `model.safetensors`, or
`model-00001-of-00003.safetensors`, ... beside `model.safetensors.index.json`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32", "uint32": "U32", "int64": "I64"}
_BLOCK = 1 << 26  # bytes handed to the file at a time: a bucket client copies what it is given


class Entry(NamedTuple):
    """One array to come: its name in the file, shape, dtype by NumPy's name."""

    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(getattr(ml_dtypes, self.dtype, self.dtype)).itemsize


def write(
    folder: epath.Path,
    entries: Sequence[Entry],
    arrays: Iterable[np.ndarray],
    shard_bytes: int,
    metadata: dict[str, str] | None = None,
) -> dict[str, int]:
    """Writes arrays in the given order into files of at most `shard_bytes` (a larger array gets a file of its own).

    Args:
      folder: exists; local or in a bucket.
      entries: names, shapes and types.
      arrays: the arrays, in the same order.
      shard_bytes: of the arrays of one file.
      metadata: strings for the header's `__metadata__`.

    Returns:
      File name -> bytes, the index included.

    Raises:
      ValueError: an array is not what its entry says, or a name stands twice.
    """
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError("an array name stands twice")
    groups, files, places = split(entries, shard_bytes), {}, {}
    source = iter(arrays)
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files[name] = _write_file(folder / name, group, source, metadata or {})
        places |= {entry.key: name for entry in group}
    if next(source, None) is not None:
        raise ValueError(f"more arrays than the {len(entries)} entries")
    if len(groups) > 1:
        content = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": places}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
        files["model.safetensors.index.json"] = len(text.encode())
    return files


def split(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """The entries of each file, in order."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    return groups


def _write_file(path: epath.Path, entries: Sequence[Entry], arrays: Iterable[np.ndarray], metadata) -> int:
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for entry in entries:
        place = [offset, offset + entry.bytes]
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            array = np.asarray(next(arrays), order="C")  # not ascontiguousarray: that makes a scalar a vector
            if (array.shape, str(array.dtype)) != (entry.shape, entry.dtype):
                raise ValueError(f"{entry.key}: {array.dtype}{list(array.shape)} given, {entry} announced")
            content = memoryview(array.reshape(-1).view(np.uint8))
            for begin in range(0, len(content), _BLOCK):
                file.write(content[begin : begin + _BLOCK])
            del array, content  # before the next one is read
    return 8 + len(text) + offset
