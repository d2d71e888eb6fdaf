"""The Example wire format against Google's own protobuf parser: roundtrips, and mutated messages."""

import random

import example_proto
import hypothesis
import numpy as np
import pytest
from google.protobuf import message as protobuf_message
from hypothesis import strategies as st

from qdepth_jax.data import example

FEATURES = st.dictionaries(
    st.text(max_size=12),
    st.one_of(
        st.lists(st.binary(max_size=300), min_size=1, max_size=5),
        st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(lambda x: np.array(x, np.float32)),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda x: np.array(x, np.int64)),
        st.lists(st.booleans(), max_size=9).map(lambda x: np.array(x, bool)),
    ),
    max_size=6,
)


def _plain(payload: bytes) -> dict:
    """Our scan as name -> list of Python values."""
    out = {}
    for name, (kind, value, _) in example.scan(payload).items():
        out[name] = [payload[a : a + n] for a, n in value.tolist()] if kind == "bytes" else value.tolist()
    return out


def _same(ours: dict, theirs: dict) -> bool:
    if set(ours) != set(theirs):
        return False
    for name in ours:
        a, b = ours[name], theirs[name]
        if len(a) != len(b) or not all(x == y or (x != x and y != y) for x, y in zip(a, b)):
            return False
    return True


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(FEATURES)
def test_roundtrip_and_protobuf_reads_the_same(features):
    payload = example.encode(features)
    expected = {name: list(value) if isinstance(value, list) else value.tolist() for name, value in features.items()}
    assert _same(_plain(payload), expected)
    assert _same(example_proto.read(payload), expected)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(1, 4))
def test_places_of_single_numbers(values, width):
    rows = len(values) // width
    hypothesis.assume(rows)
    array = np.array(values[: rows * width], np.int64)
    payload = example.encode({"a": [b"before"], "x": array, "z": array.astype(np.float32)})
    found = example.scan(payload)["x"]
    ends = example.varint_ends(payload, found.start, array.size)
    starts = [found.start, *ends[:-1].tolist()]
    for at, (start, end) in enumerate(zip(starts, ends.tolist())):
        assert example.decode_varints(payload, start, end, "x").tolist() == [array[at]]
    start = example.scan(payload)["z"].start
    assert np.frombuffer(payload, "<f4", array.size, start).tolist() == array.astype(np.float32).tolist()


def test_scans_what_protobuf_writes():
    message = example_proto.Example()
    message.features.feature["a/f"].floatlist.value.extend([1.5, -2.25, 3e38])
    message.features.feature["a/i"].int64list.value.extend([0, 1, 300, -1, 2**63 - 1, -(2**63)])
    message.features.feature["b"].byteslist.value.extend([b"", b"jpeg", b"x" * 200])
    message.features.feature["none"].SetInParent()
    payload = message.SerializeToString()
    assert _same(_plain(payload), example_proto.read(payload))
    assert example.scan(payload)["none"].kind == "empty"


def _message(*features: tuple[bytes, int, bytes]) -> bytes:
    entries = b""
    for name, field, body in features:
        feature = bytes([field << 3 | 2, len(body)]) + body
        entry = b"\x0a\x01" + name + b"\x12" + bytes([len(feature)]) + feature
        entries += b"\x0a" + bytes([len(entry)]) + entry
    return b"\x0a" + bytes([len(entries)]) + entries


def test_odd_spellings_are_legal():
    floats = b"\x0d\x00\x00\x80\x3f" + b"\x0d\x00\x00\x00\x40"
    # Unpacked numbers; and a tag and a length of more bytes than they need.
    payload = _message((b"f", 2, floats), (b"i", 3, b"\x08\x05\x08\x96\x01"), (b"b", 1, b"\x0a\x01a\x8a\x00\x82\x00xy"))
    assert _plain(payload) == {"f": [1.0, 2.0], "i": [5, 150], "b": [b"a", b"xy"]} == example_proto.read(payload)
    assert example.scan(payload)["f"].start == -1


def test_encode_refuses_what_examples_cannot_hold():
    for value in (np.array([2**64 - 1], np.uint64), "text", b"bare", np.array([1j]), [b"a", "b"]):
        with pytest.raises(ValueError):
            example.encode({"x": value})


def mutate(rng: random.Random, good: bytes) -> bytes:
    """One to three bytes or runs of bytes flipped, set, cut out, put in, or the end cut off."""
    bad = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        if not bad:
            break
        at, action = rng.randrange(len(bad)), rng.randrange(9)
        if action < 3:
            bad[at] ^= 1 << rng.randrange(8)
        elif action < 5:
            bad[at] = rng.randrange(256)
        elif action < 7:
            del bad[at : at + rng.randint(1, 8)]
        elif action < 8:
            bad[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        else:
            del bad[at:]
    return bytes(bad)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 1_000), pytest.param(1, 10_000, marks=pytest.mark.slow)], ids=["1000", "10000"]
)
def test_mutated_messages_give_an_error_or_exactly_what_protobuf_reads(seed, count):
    rng = random.Random(seed)
    good = example.encode(
        {
            "steps/action": np.arange(14, dtype=np.float32),
            "steps/is_last": np.array([0, 1]),
            "steps/observation/image": [b"\xff\xd8abc\xff\xd9", b"\xff\xd8" + b"x" * 200],
            "wide": np.array([-1, 2**40, 7]),
        }
    )
    refused = 0
    for _ in range(count):
        payload = mutate(rng, good)
        try:
            ours = _plain(payload)
        except ValueError:
            refused += 1
            continue
        try:
            theirs = example_proto.read(payload)
        except protobuf_message.DecodeError:
            pytest.fail(f"read a message that protobuf rejects: {payload!r}")
        assert _same(ours, theirs), payload
    assert 0.3 * count < refused < 0.9 * count  # the mutations bite, and reading is tested too
