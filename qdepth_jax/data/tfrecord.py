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

HEADER_BYTES = 12
FOOTER_BYTES = 4
_MASK_DELTA = 0xA282EAD8


class Record(NamedTuple):
    """One record: `number` in the file, where its payload lies (`offset`, `length` in bytes), the payload."""

    number: int
    offset: int
    length: int
    payload: bytes


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

    Memory is one payload at a time. The length is trusted only after its own checksum matched and the file is
    long enough, so a flipped bit can cause neither a huge allocation nor a silent resynchronisation.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: truncated file or checksum mismatch; names the shard, the record number and the byte offset.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        number, start = 0, 0
        while start < size:

            def broken(what: str, number: int = number, start: int = start) -> ValueError:
                return ValueError(
                    f"{os.fspath(path)}: record {number} at byte {start} (file of {size} bytes): {what}. "
                    "The file is damaged or not a TFRecord file: copy or download it again."
                )

            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES:
                raise broken(f"truncated header, {len(header)} of {HEADER_BYTES} bytes")
            length, length_crc = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != length_crc:
                raise broken("checksum of the length does not match")
            offset = start + HEADER_BYTES
            if offset + length + FOOTER_BYTES > size:
                raise broken(f"truncated payload, {size - offset} of {length + FOOTER_BYTES} bytes left")
            payload, footer = file.read(length), file.read(FOOTER_BYTES)
            if len(payload) != length or len(footer) != FOOTER_BYTES:
                raise broken("the file shrank while it was read")
            if masked_crc(payload) != struct.unpack("<I", footer)[0]:
                raise broken(f"checksum of the {length}-byte payload does not match")
            yield Record(number, offset, length, payload)
            number, start = number + 1, offset + length + FOOTER_BYTES
