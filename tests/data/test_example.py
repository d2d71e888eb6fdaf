"""The Example wire format against TensorFlow's own parser: roundtrips, and mutated messages."""

import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qdepth_jax.data import example

FEATURES = st.dictionaries(
    st.text(max_size=12),
    st.one_of(
        st.lists(st.binary(max_size=40), min_size=1, max_size=5),
        st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(lambda x: np.array(x, np.float32)),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda x: np.array(x, np.int64)),
        st.lists(st.booleans(), max_size=9).map(lambda x: np.array(x, bool)),
    ),
    max_size=6,
)


def _plain(payload: bytes) -> dict:
    """Our scan as name -> list of Python values."""
    out = {}
    for name, (kind, value) in example.scan(payload).items():
        out[name] = [payload[a : a + n] for a, n in value.tolist()] if kind == "bytes" else value.tolist()
    return out


def _theirs(payload: bytes) -> dict:
    tf = pytest.importorskip("tensorflow")
    message = tf.train.Example.FromString(payload)
    out = {}
    for name, feature in message.features.feature.items():
        kind = feature.WhichOneof("kind")
        out[name] = list(getattr(feature, kind).value) if kind else []
    return out


def _same(ours: dict, theirs: dict) -> bool:
    if set(ours) != set(theirs):
        return False
    for name in ours:
        a, b = ours[name], theirs[name]
        if len(a) != len(b) or not all(x == y or (x != x and y != y) for x, y in zip(a, b)):
            return False
    return True


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(FEATURES)
def test_roundtrip_and_tensorflow_reads_the_same(features):
    payload = example.encode(features)
    expected = {
        name: [x for x in value] if isinstance(value, list) else value.tolist() for name, value in features.items()
    }
    assert _same(_plain(payload), expected)
    assert _same(_theirs(payload), expected)


def test_scans_what_tensorflow_writes():
    tf = pytest.importorskip("tensorflow")
    message = tf.train.Example()
    message.features.feature["a/f"].float_list.value.extend([1.5, -2.25, 3e38])
    message.features.feature["a/i"].int64_list.value.extend([0, 1, 300, -1, 2**63 - 1, -(2**63)])
    message.features.feature["b"].bytes_list.value.extend([b"", b"jpeg"])
    message.features.feature["none"].SetInParent()
    payload = message.SerializeToString()
    assert _same(_plain(payload), _theirs(payload))
    assert example.scan(payload)["none"].kind == "empty"


def test_unpacked_numbers_are_legal():
    floats = b"\x0d\x00\x00\x80\x3f" + b"\x0d\x00\x00\x00\x40"
    ints = b"\x08\x05" + b"\x08\x96\x01"
    entries = b""
    for name, field, body in ((b"f", 2, floats), (b"i", 3, ints)):
        feature = bytes([field << 3 | 2, len(body)]) + body
        entry = b"\x0a\x01" + name + b"\x12" + bytes([len(feature)]) + feature
        entries += b"\x0a" + bytes([len(entry)]) + entry
    payload = b"\x0a" + bytes([len(entries)]) + entries
    assert _plain(payload) == {"f": [1.0, 2.0], "i": [5, 150]} == _theirs(payload)


def test_encode_refuses_what_examples_cannot_hold():
    for value in (np.array([2**64 - 1], np.uint64), "text", b"bare", np.array([1j]), [b"a", "b"]):
        with pytest.raises(ValueError):
            example.encode({"x": value})


def test_mutated_messages_give_an_error_or_exactly_what_tensorflow_reads():
    rng = random.Random(0)
    good = example.encode(
        {
            "steps/action": np.arange(14, dtype=np.float32),
            "steps/is_last": np.array([0, 1]),
            "steps/observation/image": [b"\xff\xd8abc\xff\xd9", b"\xff\xd8" + b"x" * 200],
            "wide": np.array([-1, 2**40, 7]),
        }
    )
    from google.protobuf import message as protobuf_message

    errors = 0
    for _ in range(10_000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at, action = rng.randrange(len(bad)), rng.randrange(4)
            if action == 0:
                bad[at] ^= 1 << rng.randrange(8)
            elif action == 1:
                bad[at] = rng.randrange(256)
            elif action == 2:
                del bad[at : at + rng.randint(1, 8)]
            else:
                bad[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        payload = bytes(bad)
        try:
            ours = _plain(payload)
        except ValueError:
            errors += 1
            continue
        try:
            theirs = _theirs(payload)
        except protobuf_message.DecodeError:
            pytest.fail(f"read a message that TensorFlow rejects: {payload!r}")
        assert _same(ours, theirs), payload
    assert errors > 2000  # the mutations do bite
