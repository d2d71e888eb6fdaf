"""TFRecord framing: equal to TensorFlow's own, and every damaged byte is noticed."""

import io

import pytest

from qdepth_jax.data import tfrecord

PAYLOADS = [b"", b"one", bytes(range(256)) * 5]


def _write(path, payloads=PAYLOADS):
    with open(path, "wb") as file:
        for payload in payloads:
            tfrecord.write_record(file, payload)
    return path


def test_known_masked_crc():
    # crc32c("123456789") = 0xE3069283 (RFC 3720); masked by rotation and constant.
    assert tfrecord.masked_crc(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_roundtrip_and_offsets(tmp_path):
    path = _write(tmp_path / "shard")
    data = path.read_bytes()
    records = list(tfrecord.scan_records(path))
    assert [record.payload for record in records] == PAYLOADS
    assert [record.number for record in records] == [0, 1, 2]
    for record in records:
        assert data[record.offset : record.offset + record.length] == record.payload


def test_same_bytes_as_tensorflow(tmp_path):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for payload in PAYLOADS:
            writer.write(payload)
    assert _write(tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    buffer = io.BytesIO()
    tfrecord.write_record(buffer, b"an episode")
    first = len(buffer.getvalue())
    tfrecord.write_record(buffer, b"another one")
    good = buffer.getvalue()
    path = tmp_path / "shard"
    for at in range(len(good)):
        for bit in (0, 7):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=f"record {int(at >= first)} at byte"):
                list(tfrecord.scan_records(path))
    for cut in range(1, len(good)):
        path.write_bytes(good[:cut])
        if cut == first:
            assert len(list(tfrecord.scan_records(path))) == 1
            continue
        with pytest.raises(ValueError, match="truncated"):
            list(tfrecord.scan_records(path))
