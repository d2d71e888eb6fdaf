"""Frames that no honest client sends, from a seed: what the policy server's fuzz tests and benchmark throw at it."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np


def array(data: bytes, dtype: Any, shape: Any, **more: Any) -> dict[bytes, Any]:
    """An array as openpi-client writes it, from whatever it is given."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape} | more


def _encoded(value: Any) -> Any:
    return array(value.tobytes(), value.dtype.str, value.shape) if isinstance(value, np.ndarray) else value


def _packed(message: Any) -> bytes:
    return msgpack.packb(message, default=_encoded)


def _noise(rng: np.random.Generator, good: dict) -> bytes:
    return rng.bytes(int(rng.integers(0, 400)))


def _cut(rng: np.random.Generator, good: dict) -> bytes:
    frame = _packed(good)
    return frame[: int(rng.integers(0, len(frame)))]


def _flipped(rng: np.random.Generator, good: dict) -> bytes:
    # In the head of the frame: a flipped bit of a picture is a picture.
    frame = bytearray(_packed(good))
    for at in rng.integers(0, 20, 3):
        frame[at] ^= 0x80
    return bytes(frame)


def _trailing(rng: np.random.Generator, good: dict) -> bytes:
    return _packed(good) + b"\x00" * int(rng.integers(1, 9))


def _declares_much(rng: np.random.Generator, good: dict) -> bytes:
    size = int(rng.integers(1 << 20, 1 << 32))
    heads = (b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")  # bin32, str32, array32, map32, ext32
    head = heads[rng.integers(len(heads))] + struct.pack(">I", size)
    return (b"\x81\xa1k" if rng.random() < 0.5 else b"") + head + rng.bytes(int(rng.integers(0, 64)))


def _nested(rng: np.random.Generator, good: dict) -> bytes:
    one = (b"\x91", b"\x81\xa1k", b"\xdd\x00\x01\x00\x00")[rng.integers(3)]
    return one * int(rng.integers(600, 20_000)) + b"\xc0"


def _many_small(rng: np.random.Generator, good: dict) -> bytes:
    return b"\x81\xa1k" + (b"\xdc\x03\xe8" + b"\x90" * 1000) if rng.random() < 0.5 else _packed({"k": [[0]] * 900})


def _wrong_array(rng: np.random.Generator, good: dict) -> bytes:
    rows = (
        array(b"\x00" * 12, "|u1", [1 << 39, 1 << 39, 3]),
        array(b"\x00" * 12, "|u1", [-1, 4, 3]),
        array(b"", "<f4", [1 << 39, 0]),
        array(b"\x00" * 12, "|u1", [2, 2, 4]),
        array(b"\x00" * 12, "|u1", [2.0, 2, 3]),
        array(b"\x00" * 12, "|u1", [True, 4, 3]),
        array(b"\x00" * 12, "|u1", "2,2,3"),
        array(b"\x00" * 12, "|u1", [1] * 40),
        array(b"\x00" * 12, "|u1", None),
        array("text", "|u1", [4]),
        array(7, "|u1", [4]),
        array(b"\x00" * 16, "|O", [2]),
        array(b"cos\nsystem\n(S'id'\ntR.", "O", [1]),
        array(b"\x00" * 16, "<c16", [1]),
        array(b"\x00" * 16, "<U4", [1]),
        array(b"\x00" * 16, "|V16", [1]),
        array(b"\x00" * 16, "<M8[ns]", [2]),
        array(b"\x00" * 16, "<f4,<f4", [2]),
        array(b"\x00" * 16, [["a", "<f4"]], [4]),
        array(b"\x00" * 16, {"names": 1}, [4]),
        array(b"\x00" * 16, "f" * 1000, [4]),
        {b"__ndarray__": True},
        {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": 1 << 63, b"dtype": "|u1"},
        {b"__npgeneric__": True, b"data": 1.5, b"dtype": "|O"},
    )
    keys = sorted(good)
    return _packed(good | {keys[rng.integers(len(keys))]: rows[rng.integers(len(rows))]})


def _wrong_value(rng: np.random.Generator, good: dict) -> bytes:
    rows = (None, True, -1, 1.5, b"bytes", [], {}, [[1], [2, 3]], ["a"], "", float("nan"), 2**64 - 1,
            np.zeros((0, 0, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((3, 30, 30), np.uint8),
            [["x" * 60_000] + [""] * 999] * 8, np.zeros((1000, 0)), np.full(8, 3e38, np.float32),
            np.zeros((30, 30, 3), np.float32), np.full(99, np.nan, np.float32), np.zeros((2, 2, 2, 2, 2)))  # fmt: skip
    keys = sorted(good)
    return _packed(good | {keys[rng.integers(len(keys))]: rows[rng.integers(len(rows))]})


def _wrong_keys(rng: np.random.Generator, good: dict) -> bytes:
    dropped = [key for key in sorted(good) if key != "seed"][rng.integers(sum(key != "seed" for key in good))]
    kept = {key: good[key] for key in good if key != dropped}
    wrong = (kept, good | {"another": 1}, good | {b"prompt": 1}, good | {7: 1}, [good], "prompt", 3, None, {})
    return _packed(wrong[rng.integers(len(wrong))])


def _extension(rng: np.random.Generator, good: dict) -> bytes:
    return _packed(good | {"prompt": msgpack.ExtType(int(rng.integers(0, 128)), rng.bytes(8))})


def _not_text(rng: np.random.Generator, good: dict) -> bytes:
    return _packed({k: v for k, v in good.items() if k != "prompt"})[:1].replace(b"\x82", b"\x83") + b"\xa2\xff\xfe\xc0"


KINDS: tuple[Callable[[np.random.Generator, dict], bytes], ...] = (
    _noise, _cut, _flipped, _trailing, _declares_much, _nested, _many_small, _wrong_array, _wrong_value, _wrong_keys,
    _extension, _not_text,
)  # fmt: skip


def frames(count: int, seed: int, good: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """`count` frames, each with the name of its kind; the same for the same arguments.

    Args:
      good: an observation that the server accepts, with the keys `prompt` and pictures and numbers under others.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        kind = KINDS[number % len(KINDS)]
        yield kind.__name__.lstrip("_"), kind(rng, good)
