"""Frames of openpi's policy servers: msgpack maps with NumPy arrays in them, and nothing that could run code.

An array is a map with four keys of bytes: `__ndarray__` (true), `data` (C order), `dtype` (a string as `<f4`), `shape`;
a NumPy scalar one with `__npgeneric__`, `data`, `dtype` (github.com/Physical-Intelligence/openpi, openpi-client's
msgpack_numpy.py). Frames come from the network, so every size is checked before anything of that size is allocated.
"""

import math
from typing import Any

import msgpack
import numpy as np

from qdepth_jax import errors

# Booleans, integers and floats of any byte order. No objects (they would need pickle), no records, no text, no complex.
_KINDS = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
DTYPES = {(found := np.dtype(order + kind)).str: found for kind in _KINDS for order in "<>"}
MAX_DIMS = 8
# An observation is a flat map of a dozen entries. msgpack itself would let one byte become an empty list of 64.
MAX_ITEMS = 1024  # of one list or map
MAX_CONTAINERS = 512
MAX_TEXT = 1 << 16  # bytes of one string

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


def pack(message: dict[str, Any]) -> bytes:
    """A frame. Arrays and NumPy scalars anywhere in it; jax arrays must have been fetched.

    Raises:
      ValueError: an array of objects, records, text or complex numbers.
    """
    return msgpack.packb(message, default=_encoded)


def _encoded(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"cannot send a {type(value).__name__}")
    if value.dtype.str not in DTYPES:
        raise ValueError(f"cannot send an array of {value.dtype}")
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}


def unpack(frame: bytes) -> dict[str, Any]:
    """The map in a frame; arrays are read-only views of its bytes, in the byte order of this machine where it differs.

    Raises:
      UserError: no msgpack, no map with text keys, sizes that do not fit, or more than the limits above.
    """
    try:
        message = msgpack.unpackb(
            frame,
            # The hooks see every list and map as it closes: their number bounds what a frame can make of its bytes.
            object_hook=(closed := _Closed()).map,
            list_hook=closed.list,
            ext_hook=_no_extension,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_TEXT,
            max_bin_len=len(frame),
            max_ext_len=0,
        )
    except errors.UserError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise errors.UserError(f"the frame of {len(frame)} bytes is no msgpack message: {reason[:200]}") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise errors.UserError(f"a frame must be a map with text keys, this one holds {described(message)}")
    return message


class _Closed:
    """Counts the containers of one frame."""

    def __init__(self):
        self.count = 0

    def _another(self) -> None:
        self.count += 1
        if self.count > MAX_CONTAINERS:
            raise errors.UserError(f"the frame holds more than {MAX_CONTAINERS} lists and maps")

    def list(self, value: list) -> list:
        self._another()
        return value

    def map(self, value: dict) -> Any:
        self._another()
        if _ARRAY in value:
            return _array(value)
        if _SCALAR in value:
            return _scalar(value)
        return value


def _no_extension(code: int, data: bytes) -> Any:
    raise errors.UserError(f"the frame holds a msgpack extension (type {code}), which no observation needs")


def _dtype(value: dict) -> np.dtype:
    name = value.get(b"dtype")
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    if not isinstance(name, str) or name not in DTYPES:
        raise errors.UserError(
            f"the frame holds an array of dtype {str(name)[:40]!r}: booleans, integers and floats can be sent"
        )
    return DTYPES[name]


def _array(value: dict) -> np.ndarray:
    dtype, data, shape = _dtype(value), value.get(b"data"), value.get(b"shape")
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if not whole or len(shape) > MAX_DIMS:
        raise errors.UserError(
            f"the frame holds an array of shape {str(shape)[:80]}: up to {MAX_DIMS} sides below 2^40"
        )
    if 0 in shape and max(shape) > MAX_ITEMS:  # no byte of it comes, and as lists it would fill the memory
        raise errors.UserError(f"the frame holds an array {shape}, which is empty: sides of at most {MAX_ITEMS}")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        there = f"{len(data)} bytes" if isinstance(data, bytes) else described(data)
        raise errors.UserError(f"the frame holds {there} for an array {dtype} {shape}")
    array = np.ndarray(shape, dtype, data)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _scalar(value: dict) -> np.generic:
    dtype, data = _dtype(value), value.get(b"data")
    if not isinstance(data, bool | int | float):
        raise errors.UserError(f"the frame holds {described(data)} for a number of {dtype}")
    try:
        return dtype.newbyteorder("=").type(data)
    except (OverflowError, ValueError) as error:
        raise errors.UserError(f"the frame holds {data} for a number of {dtype}") from error


def described(value: Any) -> str:
    """What a value is, for messages: never its whole content."""
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {list(value.shape)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if isinstance(value, bytes | list | tuple | dict):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]}"
