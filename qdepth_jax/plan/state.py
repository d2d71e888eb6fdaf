"""Bytes of the train state on each chip, from the sharding table alone: no device, no compiler."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qdepth_jax import errors, sharding

LARGE = 2**20  # a leaf of so many bytes that every chip holds whole must be named
# What a leaf is for -> substring of its path, first match wins.
PURPOSES: tuple[tuple[str, str], ...] = (
    ("first moment", "/mu/"),
    ("second moment", "/nu/"),
    ("averaged parameters", "ema/"),
    ("parameters", "params/"),
    ("codebook, counters", ""),
)


class State(NamedTuple):
    """Bytes on one chip.

    Attributes:
      total: all of it. purposes: name of PURPOSES -> bytes. whole: bytes over all chips of one replica.
      copied: (path, bytes, row of the table) of leaves above LARGE that lie whole on every chip.
    """

    total: int
    purposes: dict[str, int]
    whole: int
    copied: tuple[tuple[str, int, str], ...]


def of(sizes: Mapping[str, int], abstract: Any, slices: int = 1) -> State:
    """The state on a mesh of these sizes.

    Raises:
      UserError: a leaf without a row, or one that does not divide (see sharding.place).
    """
    rows = sharding.place(sizes, abstract, slices=slices)
    purposes = dict.fromkeys((name for name, _ in PURPOSES), 0)
    copied, whole = [], 0
    for row in rows:
        name = next(name for name, part in PURPOSES if part in row.path)
        purposes[name] += row.bytes
        size = row.dtype.itemsize
        for n in row.shape:
            size *= n
        whole += size
        if size >= LARGE and row.bytes == size and sizes["fsdp"] * sizes["tensor"] > 1:
            copied.append((row.path, size, row.pattern))
    return State(sum(purposes.values()), {name: size for name, size in purposes.items() if size}, whole, tuple(copied))


def by_fsdp(abstract: Any, tensor: int = 1, most: int = 1024) -> list[tuple[int, int]]:
    """(fsdp ways, bytes on one chip) for every power of two up to the first that does not divide."""
    out, ways = [], 1
    while ways <= most:
        try:
            out.append((ways, of({"replica": 1, "fsdp": ways, "tensor": tensor}, abstract).total))
        except errors.UserError:
            break
        ways *= 2
    return out
