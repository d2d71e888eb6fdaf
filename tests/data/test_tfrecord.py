"""TFRecord framing: equal to TensorFlow's own, and every damaged byte is noticed."""

import io
import random

import pytest
import test_example

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


@pytest.mark.slow  # imports TensorFlow
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


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 1_000), pytest.param(1, 10_000, marks=pytest.mark.slow)], ids=["1000", "10000"]
)
def test_mutated_shards_give_an_error_or_records_that_were_written(tmp_path, seed, count):
    rng, path = random.Random(seed), tmp_path / "shard"
    payloads = [bytes(rng.randrange(256) for _ in range(rng.randrange(60))) for _ in range(6)]
    good, ends = io.BytesIO(), set()
    for payload in payloads:
        tfrecord.write_record(good, payload)
        ends.add(good.tell())
    refused = survivors = 0
    for _ in range(count):
        bad = test_example.mutate(rng, good.getvalue())
        path.write_bytes(bad)
        try:
            strict = [record.payload for record in tfrecord.scan_records(path)]
        except ValueError as error:
            refused += 1
            assert "record" in str(error) and str(path) in str(error)
        else:
            # Nothing else than a cut between two records goes unnoticed (the index knows the size of a shard).
            assert bad == good.getvalue() or (bad == good.getvalue()[: len(bad)] and len(bad) in ends | {0})
            assert strict == payloads[: len(strict)]
        # The tolerant reader: every byte is accounted for, and what it calls good was written so.
        at = 0
        for number, found in enumerate(tfrecord.read_records(path)):
            assert found.number == number
            if isinstance(found, tfrecord.Record):
                assert found.payload in payloads and found.offset == at + tfrecord.HEADER_BYTES
                at = found.offset + found.length + tfrecord.FOOTER_BYTES
                survivors += 1
            else:
                assert found.start == at and found.end > at
                at = found.end
        assert at == len(bad)
    assert refused > 0.9 * count and survivors > count


def test_one_wrong_payload_costs_one_record(tmp_path):
    path = _write(tmp_path / "shard")
    first = next(tfrecord.scan_records(path))
    data = bytearray(path.read_bytes())
    for at, lost in ((len(data) - 5, [2]), (first.offset + first.length + tfrecord.FOOTER_BYTES + 12, [1])):
        bad = bytearray(data)
        bad[at] ^= 1
        path.write_bytes(bad)
        found = list(tfrecord.read_records(path))
        assert [item.number for item in found if isinstance(item, tfrecord.Damage)] == lost and len(found) == 3
    path.write_bytes(data[:-1])
    *good, tail = tfrecord.read_records(path)
    assert len(good) == 2 and (tail.length, tail.end) == (-1, len(data) - 1) and "truncated" in tail.what
    marks = set()
    places = [*range(len(data) - 5 - len(PAYLOADS[2]), len(data), 40), len(data) - 1]
    for at in places:  # every damage has a mark of its own
        bad = bytearray(data)
        bad[at] ^= 1
        path.write_bytes(bad)
        marks.add(list(tfrecord.read_records(path))[2].mark)
    assert len(marks) == len(places)
