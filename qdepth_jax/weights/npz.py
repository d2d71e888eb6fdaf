"""Reads .npz files array by array, each in pieces, whatever their size; checks what they declare before believing it.

NumPy's own reader takes an array at a time, and believes its header. Pickled (object) arrays are refused. big_vision
writes bfloat16 as two bytes without a type ("V2").
"""

import math
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from qdepth_jax import errors
from qdepth_jax.weights import ranges, source

# Deflate stores no more than 1032 bytes in one (its longest match, 258 bytes, in two bits).
DEFLATE_RATIO = 1032
HEADER_BYTES = 1 << 16  # NumPy's own limit is 10,000


def open_source(path: str) -> source.Source:
    """A .npz file, local or gs://.

    Raises:
      UserError: no such file, no zip, arrays that are pickled, of an unknown form or declared larger than they are.
    """
    return NpzSource(path)


class NpzSource(source.Source):
    """An open .npz."""

    def __init__(self, path: str):
        self._file = ranges.File(path)
        self._path = path
        if self._file.size < 22:  # an empty zip file
            self.close()
            raise errors.UserError(f"{path} has {self._file.size} bytes: it was truncated or is no .npz file")
        try:
            self._zip = zipfile.ZipFile(ranges.Stream(self._file))
            members = [info for info in self._zip.infolist() if not info.is_dir()]
            self._check(members)
            found = {info: self._header(info) for info in members}
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
            self.close()
            raise errors.UserError(
                f"{path} is no whole .npz file ({error}): it was truncated or is of another format"
            ) from error
        except errors.UserError:
            self.close()
            raise
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        if len(self._members) < len(members):
            self.close()
            raise errors.UserError(f"{path} holds two arrays of one name")
        self.specs = {name: found[info][0] for name, info in self._members.items()}
        self._fortran = {name: found[info][1] for name, info in self._members.items()}
        self.files = {path.rstrip("/").rpartition("/")[2]: self._file.size}

    def _check(self, members: list[zipfile.ZipInfo]) -> None:
        """Sizes that cannot be: a bomb, or a damaged directory."""
        if (stored := sum(info.compress_size for info in members)) > self._file.size:
            raise errors.UserError(
                f"{self._path} has {self._file.size} bytes and declares {stored}: its members overlap or it was cut"
            )
        for info in members:
            ratio = 1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise errors.UserError(f"{self._path}: {info.filename} is neither stored nor deflated")
            if info.file_size > ratio * max(info.compress_size, 16):
                raise errors.UserError(
                    f"{self._path}: {info.filename} declares {info.file_size} bytes in {info.compress_size}: no array "
                    "packs so small, the file is damaged or made to fill memory"
                )
        packed = sum(info.file_size for info in members if info.compress_type != zipfile.ZIP_STORED)
        if packed > (room := memory_bytes()):
            raise errors.UserError(
                f"{self._path} has {self._file.size} bytes and unpacks to {packed}, more than the {room} bytes of "
                "memory here: refused; store it without compression (numpy.savez) if it is what it should be"
            )

    def _header(self, info: zipfile.ZipInfo) -> tuple[source.Spec, bool]:
        """The spec an array declares and whether it is in Fortran order; no more is read than its header."""
        name = f"{self._path}: {info.filename}"
        with self._zip.open(info) as file:
            try:
                shape, fortran, dtype = _read_header(file)
            except ValueError as error:
                raise errors.UserError(f"{name} is no array: {error}") from error
            length = file.tell()
        if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
            dtype = source.BFLOAT16
        if dtype.hasobject:
            raise errors.UserError(f"{name} holds pickled Python objects, which are never loaded")
        if (declared := math.prod(shape) * dtype.itemsize) != info.file_size - length:
            raise errors.UserError(
                f"{name} declares shape {shape} of {dtype}, {declared} bytes, but holds {info.file_size - length}"
            )
        return source.Spec(tuple(shape), dtype.newbyteorder("=") if dtype.kind in "fiuc" else dtype), fortran

    def pieces(self, key: str, elements: int) -> Iterator[source.Block]:
        spec, info = self.specs[key], self._members[key]
        stored = spec
        if self._fortran[key]:  # nobody writes large ones; turned in memory
            stored, elements = source.Spec(spec.shape[::-1], spec.dtype), max(spec.size, 1)
        try:
            with self._zip.open(info) as file:
                _, _, dtype = _read_header(file)
                for block in source.blocks(stored, elements):
                    shape = tuple(s.stop - s.start for s in block)
                    data = _read_exactly(file, math.prod(shape) * spec.dtype.itemsize)
                    array = np.frombuffer(data, dtype if dtype.kind != "V" else spec.dtype).reshape(shape)
                    yield tuple(s.start for s in block), array.T if self._fortran[key] else array
                if file.read(1):
                    raise errors.UserError(f"{self._path}: {info.filename} is longer than it declares")
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise errors.UserError(
                f"{self._path}: {info.filename} is damaged ({error}); copy the file again"
            ) from error

    def close(self) -> None:
        self._file.close()


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file, max_header_size=HEADER_BYTES)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file, max_header_size=HEADER_BYTES)
    raise ValueError(f"version {version} of the format")


def _read_exactly(file, size: int) -> bytes:
    data = file.read(size)
    if len(data) == size:
        return data
    out = bytearray(data)
    while len(out) < size:
        more = file.read(size - len(out))
        if not more:
            raise EOFError(f"{size - len(out)} bytes are missing")
        out += more
    return bytes(out)


def memory_bytes() -> int:
    """Bytes of host memory that are free or can be freed."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError("no MemAvailable in /proc/meminfo")
