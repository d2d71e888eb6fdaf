"""openpi's encoding against bytes that openpi-client 0.1.2 wrote, and against frames that nobody should send."""

import tracemalloc

import msgpack
import numpy as np
import pytest

from benchmarks import malformed_frames
from qdepth_jax import errors
from qdepth_jax.serve import protocol

# openpi_client.msgpack_numpy.packb(GOLDEN) of openpi-client 0.1.2 under NumPy 1.26, except that its last array is >f8.
FRAME = bytes.fromhex(
    "87a16184c40b5f5f6e6461727261795f5fc3c40464617461c40c000001000200030004000500c4056474797065a33c6932c4057368617065920203"
    "a17383c40d5f5f6e7067656e657269635f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634a16284c40b5f5f6e646172726179"
    "5f5fc3c40464617461c40101c4056474797065a37c6231c405736861706590a1789401cb4004000000000000a2c3a9c0a17584c40b5f5f6e646172"
    "7261795f5fc3c40464617461c406000000000000c4056474797065a37c7531c405736861706593010203a17483c40d5f5f6e7067656e657269635f"
    "5fc3c4046461746107c4056474797065a37c7531a362696784c40b5f5f6e6461727261795f5fc3c40464617461c4083ff0000000000000c4056474"
    "797065a33e6638c40573686170659101"
)
GOLDEN = {
    "a": np.arange(6, dtype=np.int16).reshape(2, 3),
    "s": np.float32(1.5),
    "b": np.array(True),
    "x": [1, 2.5, "é", None],
    "u": np.zeros((1, 2, 3), np.uint8),
    "t": np.uint8(7),
    "big": np.array([1.0], ">f8"),
}


def test_speaks_with_openpi_client_to_the_byte():
    assert protocol.pack(GOLDEN) == FRAME
    found = protocol.unpack(FRAME)
    assert found.keys() == GOLDEN.keys() and found["x"] == GOLDEN["x"]
    for key in "asbut":
        assert found[key].dtype == GOLDEN[key].dtype and type(found[key]) is type(GOLDEN[key])
        np.testing.assert_array_equal(found[key], GOLDEN[key])
    assert found["big"].dtype == np.float64 and found["big"] == [1.0]
    assert not found["a"].flags.writeable


@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_arrays_come_back(dtype):
    rng = np.random.default_rng(0)
    for shape in [(), (0, 3), (5,), (2, 3, 4)]:
        array = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
        found = protocol.unpack(protocol.pack({"x": array}))["x"]
        assert found.shape == shape and found.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("dtype", ["O", "c8", "U3", "S2", "V4", "M8[s]"])
def test_what_needs_pickle_is_not_sent(dtype):
    with pytest.raises(ValueError, match="cannot send an array of"):
        protocol.pack({"x": np.zeros(2, dtype)})
    with pytest.raises(TypeError, match="cannot send a object"):
        protocol.pack({"x": object()})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (malformed_frames.array(b"\0" * 12, "|u1", [1 << 20, 1 << 30]), "12 bytes for an array uint8"),
        (malformed_frames.array(b"\0" * 12, "|O", [1]), "dtype '|O'"),
        (malformed_frames.array(b"\0" * 12, "|u1", [-12]), "shape"),
        (malformed_frames.array(b"", "<f4", [1 << 32, 0]), "an array .4294967296, 0., which is empty"),
        (malformed_frames.array("text", "|u1", [4]), "the text 'text' for an array"),
        ({b"__npgeneric__": True, b"data": 256, b"dtype": "|u1"}, "256 for a number of uint8"),
        ([0] * (protocol.MAX_ITEMS + 1), "max_array_len"),
        ([[]] * (protocol.MAX_CONTAINERS + 1), "more than 512 lists"),
        ("x" * (protocol.MAX_TEXT + 1), "max_str_len"),
        (msgpack.ExtType(5, b"1"), "extension|max_ext_len"),
    ],
)
def test_says_what_is_wrong(value, message):
    with pytest.raises(errors.UserError, match=message.replace("|O", r"\|O")):
        protocol.unpack(msgpack.packb({"x": value}))


def test_malformed_frames_are_errors_and_cost_no_memory():
    good = {"observation/image": np.zeros((8, 8, 3), np.uint8), "observation/state": np.zeros(7), "prompt": "go"}
    kinds = {}
    tracemalloc.start()
    for kind, frame in malformed_frames.frames(1200, 0, good):
        try:
            protocol.unpack(frame)  # wrong values in a sound frame are for the reader of observations
        except errors.UserError as error:
            assert len(str(error)) < 500
            kinds[kind] = kinds.get(kind, 0) + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, f"{peak} bytes for frames that declare gigabytes"
    always = {
        "noise",
        "cut",
        "trailing",
        "declares_much",
        "nested",
        "many_small",
        "wrong_array",
        "extension",
        "not_text",
    }
    assert all(kinds[kind] == 100 for kind in always), kinds
