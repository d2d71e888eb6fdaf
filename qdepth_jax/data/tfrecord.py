"""TFRecord framing: a file is a run of [u64 length][u32 crc of length][payload][u32 crc of payload].

All numbers are little-endian; the checksums are crc32c, masked so that a crc stored inside checksummed data
stays meaningful. One record of an RLDS data set holds one whole episode, so a payload is megabytes, never
gigabytes.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import google_crc32c

from qdepth_jax.data import storage

HEADER_BYTES = 12
FOOTER_BYTES = 4
_MASK_DELTA = 0xA282EAD8
_DRAIN_BYTES = 1 << 20


class Record(NamedTuple):
    """One record: `number` in the file, where its payload lies (`offset`, `length` in bytes), the payload, its crc."""

    number: int
    offset: int
    length: int
    payload: bytes
    crc: int


class Damage(NamedTuple):
    """Bytes that are no good record.

    Attributes:
      number: of the record in the file; start: byte at which its header lies.
      length: of the payload, -1 where everything from `start` to the end of the file is lost.
      end: byte after the damage.
      what: what is wrong at which byte, to stand behind the name of the shard and the number of the record.
      mark: tells this damage from any other content; part of the identity of a shard that is read in spite of it.
    """

    number: int
    start: int
    length: int
    end: int
    what: str
    mark: bytes


def masked_crc(payload: bytes) -> int:
    """The crc32c of `payload` in the rotated form that TFRecord stores."""
    crc = google_crc32c.value(payload)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def write_record(file: BinaryIO, payload: bytes) -> int:
    """Appends one record to a file opened for binary writing; returns the number of bytes written."""
    payload = bytes(payload)
    length = struct.pack("<Q", len(payload))
    file.write(length + struct.pack("<I", masked_crc(length)))
    file.write(payload)
    file.write(struct.pack("<I", masked_crc(payload)))
    return HEADER_BYTES + len(payload) + FOOTER_BYTES


def scan_records(path: str | os.PathLike) -> Iterator[Record]:
    """Yields the records of one shard in file order, every checksum verified.

    Memory is one payload at a time (and two chunks of `storage.CHUNK_BYTES` where the shard is an object). The length
    is trusted only after its own checksum matched and never allocated before the bytes are there, so a flipped bit can
    cause neither a huge allocation nor a silent resynchronisation.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: truncated file or checksum mismatch; names the shard, the record number and the byte offset.
    """
    for found in read_records(path):
        if isinstance(found, Damage):
            raise ValueError(
                f"{os.fspath(path)}: record {found.number} {found.what}. The file is damaged or not a TFRecord file: "
                "copy or download it again."
            )
        yield found


def read_records(path: str | os.PathLike) -> Iterator[Record | Damage]:
    """Like `scan_records`, but damage is an item of the stream instead of an error.

    After a payload whose checksum is wrong the next record follows, since the length has a checksum of its own. After a
    broken header or a truncation nothing can be trusted: that `Damage` (`length` -1) is the last item.
    """
    path = os.fspath(path)
    file = storage.open_sequential(path)
    of = f" (file of {file.size} bytes)" if file.size >= 0 else ""
    number, start = 0, 0

    def lost(what: str, *read: bytes) -> Damage:
        end, crc = start + sum(map(len, read)), _extend(0, *read)
        while part := file.read(_DRAIN_BYTES):
            end, crc = end + len(part), google_crc32c.extend(crc, part)
        return Damage(number, start, -1, end, f"at byte {start}{of}: {what}", _mark(crc))

    try:
        while header := file.read(HEADER_BYTES):
            if len(header) < HEADER_BYTES:
                yield lost(f"truncated header, {len(header)} of {HEADER_BYTES} bytes", header)
                return
            length, length_crc = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != length_crc:
                yield lost("checksum of the length does not match", header)
                return
            offset = start + HEADER_BYTES
            end = offset + length + FOOTER_BYTES
            if 0 <= file.size < end:
                yield lost(f"truncated payload, {file.size - offset} of {end - offset} bytes left", header)
                return
            payload, footer = file.read(length), file.read(FOOTER_BYTES)
            if len(footer) != FOOTER_BYTES:
                left = len(payload) + len(footer)
                yield lost(f"truncated payload, {left} of {end - offset} bytes left", header, payload, footer)
                return
            crc = masked_crc(payload)
            if crc == struct.unpack("<I", footer)[0]:
                yield Record(number, offset, length, payload, crc)
            else:
                what = f"at byte {start}{of}: checksum of the {length}-byte payload does not match"
                yield Damage(number, start, length, end, what, _mark(_extend(0, header, payload, footer)))
            number, start = number + 1, end
    finally:
        file.close()


def _extend(crc: int, *parts: bytes) -> int:
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    return crc


def _mark(crc: int) -> bytes:
    return b"damage" + crc.to_bytes(4, "little")
