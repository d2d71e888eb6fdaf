"""The `tf.train.Example` wire format, written and scanned by hand so that training needs no TensorFlow.

    Example  { Features features = 1 }
    Features { map<string, Feature> feature = 1 }         an entry: key = 1, value = 2
    Feature  { oneof: BytesList = 1 | FloatList = 2 | Int64List = 3 }    each list: repeated value = 1

`scan` hands back where every bytes entry lies instead of the bytes: that is what an index of images needs.

Anything that the schema above does not know is an error, never skipped: a damaged message must not read as a
shorter good one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTES_ENTRY = 1 << 3 | _BYTES
_KINDS = {1: "bytes", 2: "float", 3: "int"}


class Feature(NamedTuple):
    """One scanned feature.

    Attributes:
      kind: "bytes", "float", "int", or "empty" (present, but no list is set).
      value: bytes -> int64 [n, 2] of (offset, length) inside the payload; float -> f32 [n] (a view of the
        payload where it lies in one packed run); int -> int64 [n]; empty -> f32 [0].
      start: payload offset of the numbers where they lie in one packed run, else -1.
    """

    kind: str
    value: np.ndarray
    start: int = -1


# ---- writing ----


def encode(features: Mapping[str, np.ndarray | Sequence[bytes] | Sequence[float] | Sequence[int]]) -> bytes:
    """Serialises features into one Example; equal input gives equal bytes (keys are sorted).

    Args:
      features: name -> integers or bools (int64_list), floats of any width (float_list, stored as f32), or a
        list of `bytes` (bytes_list). Arrays are flattened in C order.

    Raises:
      ValueError: a value of another type, or an unsigned integer beyond int64.
    """
    return join([encode_entry(name, features[name]) for name in sorted(features)])


def encode_entry(name: str, value: Any) -> bytes:
    """One feature as a map entry, for `join`; `value` as in `encode`."""
    return _delimited(1, name.encode()) + _delimited(2, _encode_feature(name, value))


def join(entries: Sequence[bytes]) -> bytes:
    """Map entries (of `encode_entry` or cut out at the places that `entries` names) as one Example, in this order."""
    return _delimited(1, b"".join(_delimited(1, entry) for entry in entries))


def _encode_feature(name: str, value: Any) -> bytes:
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, bytes) for item in value):
        return _delimited(1, b"".join(_delimited(1, item) for item in value))
    if isinstance(value, (str, bytes)):
        raise ValueError(f"feature {name!r}: got a bare {type(value).__name__}; wrap it: [value] as bytes")
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return _delimited(2, _delimited(1, array.astype("<f4").tobytes()))
    if array.dtype.kind in "iub":
        if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"feature {name!r}: {int(array.max())} does not fit int64, the only integer of Examples")
        return _delimited(3, _delimited(1, _encode_varints(array.astype(np.int64).reshape(-1))))
    raise ValueError(f"feature {name!r} has dtype {array.dtype}: use integers, bools, floats or a list of bytes")


def _delimited(field: int, payload: bytes) -> bytes:
    return bytes([field << 3 | _BYTES]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _encode_varints(values: np.ndarray) -> bytes:
    """int64 [n] -> concatenated varints. Vectorised: a row of depth tokens is thousands of them."""
    unsigned = values.astype(np.uint64)
    groups = unsigned[:, None] >> (np.arange(10, dtype=np.uint64) * np.uint64(7))[None, :]
    keep = groups != 0
    keep[:, 0] = True
    groups = (groups & np.uint64(0x7F)).astype(np.uint8)
    groups[:, :-1] |= np.where(keep[:, 1:], np.uint8(0x80), np.uint8(0))
    return groups[keep].tobytes()


# ---- scanning ----


def scan(payload: bytes) -> dict[str, Feature]:
    """Reads one serialised Example without copying its bytes entries.

    Raises:
      ValueError: not a well-formed Example (names the byte offset), a feature name twice, or unknown fields.
    """
    features: dict[str, Feature] = {}
    for field, start, end in _messages(payload, 0, len(payload), "Example"):
        if field != 1:
            raise _error(start, f"unknown field {field} in Example")
        for entry_field, entry_start, entry_end in _messages(payload, start, end, "Features"):
            if entry_field != 1:
                raise _error(entry_start, f"unknown field {entry_field} in Features")
            name, feature = _scan_entry(payload, entry_start, entry_end)
            if name in features:
                raise _error(entry_start, f"feature {name!r} appears twice")
            features[name] = feature
    return features


def entries(payload: bytes) -> dict[str, tuple[int, int]]:
    """Feature name -> (start, end) of its serialised map entry, in the order of the payload: values stay unread.

    Raises:
      ValueError: as `scan`.
    """
    places: dict[str, tuple[int, int]] = {}
    for field, start, end in _messages(payload, 0, len(payload), "Example"):
        if field != 1:
            raise _error(start, f"unknown field {field} in Example")
        for entry_field, low, high in _messages(payload, start, end, "Features"):
            keys = [part for part in _messages(payload, low, high, "feature entry") if part[0] == 1]
            if entry_field != 1 or len(keys) != 1:
                raise _error(low, "not one named feature entry")
            name = payload[keys[0][1] : keys[0][2]].decode()
            if name in places:
                raise _error(low, f"feature {name!r} appears twice")
            places[name] = (low, high)
    return places


def _scan_entry(payload: bytes, start: int, end: int) -> tuple[str, Feature]:
    name = value = None
    for field, low, high in _messages(payload, start, end, "feature entry"):
        if field == 1 and name is None:
            try:
                name = payload[low:high].decode()
            except UnicodeDecodeError as error:
                raise _error(low, f"feature name is not UTF-8 ({error.reason})") from None
        elif field == 2 and value is None:
            value = (low, high)
        else:
            raise _error(low, f"unknown or repeated field {field} in a feature entry")
    if name is None or value is None:
        raise _error(start, "feature entry without a name or without a value")
    lists = list(_messages(payload, *value, f"feature {name!r}"))
    if not lists:
        return name, Feature("empty", np.zeros(0, np.float32))
    if len(lists) > 1 or lists[0][0] not in _KINDS:
        raise _error(value[0], f"feature {name!r} must hold one list, fields {[item[0] for item in lists]} found")
    field, low, high = lists[0]
    kind = _KINDS[field]
    if kind == "bytes":
        return name, Feature(kind, _scan_bytes(payload, low, high, name))
    scan_numbers = _scan_floats if kind == "float" else _scan_ints
    return name, Feature(kind, *scan_numbers(payload, low, high, name))


def _scan_bytes(payload: bytes, start: int, end: int, name: str) -> np.ndarray:
    """The usual entry, tag byte 0x0A and a length, is read in place: an episode holds hundreds of them."""
    spans, at, what = [], start, f"bytes_list {name!r}"
    while at < end:
        if payload[at] != _BYTES_ENTRY:
            # Another spelling of the tag, or an error: the general reader knows.
            for field, low, high in _messages(payload, at, end, what):
                if field != 1:
                    raise _error(low, f"unknown field {field} in {what}")
                spans.append((low, high - low))
            break
        at += 1
        size = shift = 0
        byte = 0x80
        while byte > 0x7F:  # `_read_varint`, without a call for each image
            if at == end or shift > 28:
                _read_varint(payload, at - shift // 7, end, what)  # an error, or a length that no payload has
                raise _error(at, f"impossible length in {what}")
            byte = payload[at]
            size |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
        spans.append((at, size))
        at += size
        if at > end:
            raise _error(at - size, f"field 1 of {what} reaches {at - end} bytes past its end")
    return np.array(spans, np.int64).reshape(-1, 2)


def _scan_floats(payload: bytes, start: int, end: int, name: str) -> tuple[np.ndarray, int]:
    runs = []
    packed = -1
    for wire, low, high in _values(payload, start, end, f"float_list {name!r}", _FIXED32):
        if (high - low) % 4:
            raise _error(low, f"float_list {name!r} has {high - low} bytes, not a multiple of 4")
        runs.append(np.frombuffer(payload, "<f4", (high - low) // 4, low))
        packed = low if wire == _BYTES else -1
    if len(runs) == 1:
        return runs[0], packed
    return np.concatenate([*runs, np.zeros(0, np.float32)]), -1


def _scan_ints(payload: bytes, start: int, end: int, name: str) -> tuple[np.ndarray, int]:
    runs = []
    packed = -1
    for wire, low, high in _values(payload, start, end, f"int64_list {name!r}", _VARINT):
        runs.append(decode_varints(payload, low, high, name))
        packed = low if wire == _BYTES else -1
    if len(runs) == 1:
        return runs[0], packed
    return np.concatenate([*runs, np.zeros(0, np.int64)]), -1


def decode_varints(payload: bytes, start: int, end: int, name: str) -> np.ndarray:
    """Packed varints between two offsets -> int64 [n]; most are one byte (booleans), so that case costs one cast.

    Raises:
      ValueError: a number without an end, or of more than 64 bits; `name` is the feature's, for the message.
    """
    data = np.frombuffer(payload, np.uint8, end - start, start)
    last = data < 0x80
    if last.all():
        return data.astype(np.int64)
    if not last[-1]:
        raise _error(end, f"int64_list {name!r} ends inside a number")
    ends = np.flatnonzero(last)
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    # Ten bytes carry 70 bits: the tenth may hold only the top one.
    if lengths.max() > 10 or (data[ends[lengths == 10]] > 1).any():
        raise _error(start, f"int64_list {name!r} holds a number of more than 64 bits")
    place = np.arange(data.size) - np.repeat(begins, lengths)
    parts = (data & 0x7F).astype(np.uint64) << (place * 7).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, begins).view(np.int64)


def varint_ends(payload: bytes, start: int, count: int) -> np.ndarray:
    """i64 [count]: one past the last byte of each of `count` varints from `start` on, which `scan` has accepted."""
    # A varint has ten bytes at most.
    data = np.frombuffer(payload, np.uint8, min(10 * count, len(payload) - start), start)
    return start + 1 + np.flatnonzero(data < 0x80)[:count]


def _values(payload: bytes, start: int, end: int, what: str, single: int) -> Iterator[tuple[int, int, int]]:
    """(wire type, start, end) of each run of a repeated numeric field: packed, or single values (legal but rare)."""
    for field, wire, low, high in _fields(payload, start, end, what):
        if field != 1 or wire not in (_BYTES, single):
            raise _error(low, f"unknown field {field} of wire type {wire} in {what}")
        yield wire, low, high


def _messages(payload: bytes, start: int, end: int, what: str) -> Iterator[tuple[int, int, int]]:
    for field, wire, low, high in _fields(payload, start, end, what):
        if wire != _BYTES:
            raise _error(low, f"field {field} of {what} has wire type {wire}, expected {_BYTES}")
        yield field, low, high


def _fields(payload: bytes, start: int, end: int, what: str) -> Iterable[tuple[int, int, int, int]]:
    """(field number, wire type, start, end) of each field. Most messages here are one field, which needs no loop."""
    if start < end and payload[start] & 7 == _BYTES and 7 < payload[start] < 0x80:
        length, low = _read_varint(payload, start + 1, end, what)
        if low + length == end:
            return ((payload[start] >> 3, _BYTES, low, end),)
    return _each_field(payload, start, end, what)


def _each_field(payload: bytes, start: int, end: int, what: str) -> Iterator[tuple[int, int, int, int]]:
    """Every step moves forward, so it always ends."""
    at = start
    while at < end:
        tag, low = _read_varint(payload, at, end, what)
        field, wire = tag >> 3, tag & 7
        if not 0 < field < 1 << 29:
            raise _error(at, f"impossible field number {field} in {what}")
        if wire == _BYTES:
            length, low = _read_varint(payload, low, end, what)
            high = low + length
        elif wire == _VARINT:
            _, high = _read_varint(payload, low, end, what)
        elif wire == _FIXED32:
            high = low + 4
        elif wire == _FIXED64:
            high = low + 8
        else:
            raise _error(at, f"impossible wire type {wire} in {what}")
        if high > end:
            raise _error(at, f"field {field} of {what} reaches {high - end} bytes past its end")
        yield field, wire, low, high
        at = high


def _read_varint(payload: bytes, at: int, end: int, what: str) -> tuple[int, int]:
    if at < end and payload[at] < 0x80:
        return payload[at], at + 1
    value = shift = 0
    while at < end:
        byte = payload[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise _error(at, f"number of more than 64 bits in {what}")
            return value, at
        shift += 7
        if shift > 63:
            raise _error(at, f"number of more than ten bytes in {what}")
    raise _error(at, f"{what} ends inside a number")


def _error(offset: int, what: str) -> ValueError:
    return ValueError(f"not a valid tf.train.Example: {what} (byte {offset})")
