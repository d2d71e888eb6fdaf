"""The collectives of a compiled step: kind, size, how often, over which mesh axes, through which network.

Bytes are per chip and step. `payload` is the whole array: the result of an all-gather, the input of a reduce-scatter.
`sent` is what one chip must receive (and send) at least, n chips taking part:
all-gather and reduce-scatter (n-1)/n of the payload, all-reduce twice that, all-to-all (n-1)/n of a chip's own array,
permute all of it.

Several slices: XLA makes one program for a slice. What crosses is left to the runtime (Megascale): the program hands it
an array (`send` to the host) and says what is to be done with those of the other slices.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.plan import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one program.

    Attributes:
      kind: one of KINDS. dtype, payload: as above, bytes of one run.
      count: runs in one step. group: chips that take part, as positions in the mesh (the first of all groups).
      axes: mesh axes over which it runs, e.g. "fsdp" or "replica+fsdp"; "slices" for the part between slices.
      where: op_name of the JAX program.
    """

    kind: str
    dtype: str
    payload: float
    count: int
    group: tuple[int, ...]
    axes: str
    where: str

    @property
    def sent(self) -> float:
        """Bytes that one chip receives in one run."""
        n = len(self.group)
        if n < 2:
            return 0.0
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return factor * self.payload


def find(module: hlo.Module, mesh_shape: dict[str, int], slices: int = 1) -> tuple[list[Collective], list[str]]:
    """(collectives, loops whose trip count is unknown and counted once) of a compiled module.

    Args:
      module: from hlo.parse; partition i of the program is the device at position i of the mesh.
      mesh_shape: axis -> size, major first.
      slices: equal parts of the mesh's devices, in order.
    """
    devices = math.prod(mesh_shape.values()) // slices
    same_chip = tuple(part * devices for part in range(slices))
    counts, unknown = hlo.run_counts(module)
    found: list[Collective] = []
    chains: set[str] = set()
    for name, times in counts.items():
        for instruction in module.computations[name].values():
            if kind := _between_slices(instruction):
                sent = instruction.shape[0]
                found.append(Collective(kind, sent.dtype, sent.bytes, times, same_chip, "slices", _where(instruction)))
                continue
            kind = kind_of(instruction.opcode)
            if kind is None:
                continue
            # The TPU compiler writes an overlapped collective once into every fusion it overlaps with.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if "chain_id" in instruction.attributes and channel:
                if channel.group(1) in chains:
                    continue
                chains.add(channel.group(1))
            group = first_group(instruction.attributes, devices)
            payload, dtype = _payload(instruction, kind, len(group))
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"  # on TPU a fusion of an all-reduce and a slice
            found.append(
                Collective(kind, dtype, payload, times, group, axes_of(group, mesh_shape), _where(instruction))
            )
    return found, unknown


def kind_of(opcode: str) -> str | None:
    """The kind of KINDS that an operation is or starts, or None."""
    if opcode.endswith("-done"):
        return None
    return next((kind for kind in KINDS if opcode in (kind, f"{kind}-start")), None)


def _between_slices(instruction: hlo.Instruction) -> str | None:
    """The kind of a transfer through the data centre's network, or None."""
    if instruction.opcode != "send" or "xla_megascale_runtime" not in instruction.attributes:
        return None
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = named.group(1).lower().replace("_", "-") if named else ""
    return kind if kind in KINDS else "collective-permute"


def _payload(instruction: hlo.Instruction, kind: str, members: int) -> tuple[float, str]:
    shape = instruction.shape
    if instruction.opcode == "all-gather-start":
        shape = shape[len(shape) // 2 :]  # (operands, results)
    if instruction.opcode == "collective-permute-start":
        shape = shape[1:2]  # operand, result, counters
    size = sum(array.bytes for array in shape)
    if kind == "reduce-scatter":
        size *= members
    return size, max(shape, key=lambda array: array.bytes).dtype


def _where(instruction: hlo.Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return name.group(1) if name else ""


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Positions of the first group of chips, in any of the forms in which XLA writes groups.

    `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4] {'b'}`, pairs of a permute; no groups = all devices.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return (int(pairs.group(1)), int(pairs.group(2)))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(n) for n in iota.group(3).split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(4):
            ids = ids.transpose([int(n) for n in iota.group(4).split(",")])
        return tuple(ids.reshape(int(iota.group(1)), int(iota.group(2)))[0].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed.group(1).split(","))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", attributes):
        return _mesh_group(named.group(1), named.group(2), named.group(3))
    return tuple(range(devices))


def _mesh_group(mesh: str, order: str, axes: str) -> tuple[int, ...]:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if order.strip(" ,"):
        iota = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order)
        if iota is None:
            raise errors.UserError(f"replica groups of the compiled program are not understood: mesh[{mesh}]{order}")
        ids = ids.reshape([int(n) for n in iota.group(1).split(",")])
        if iota.group(2):
            ids = ids.transpose([int(n) for n in iota.group(2).split(",")])
    ids = ids.reshape(list(sizes.values()))
    # An axis may be split: 'a':(pre)size is the part of `a` behind `pre` major entries.
    dims, taken = [], []
    for name, size in sizes.items():
        part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", axes)
        if part is None:
            dims, taken = [*dims, size], [*taken, False]
        elif part.group(1):
            pre, mid = int(part.group(1)), int(part.group(2))
            dims, taken = [*dims, pre, mid, size // pre // mid], [*taken, False, True, False]
        else:
            dims, taken = [*dims, size], [*taken, True]
    ids = ids.reshape(dims)
    picked = ids[tuple(slice(None) if take else 0 for take in taken)]
    return tuple(picked.reshape(-1).tolist())


def axes_of(group: Sequence[int], mesh_shape: dict[str, int]) -> str:
    """Mesh axes along which the members of a group differ, "fsdp" or "replica+fsdp"; "" for a group of one."""
    places = np.stack(np.unravel_index(list(group), list(mesh_shape.values())))
    return "+".join(name for name, row in zip(mesh_shape, places) if len(set(row.tolist())) > 1)


def summary(found: Sequence[Collective]) -> list[dict]:
    """One row for each (kind, dtype, axes), the largest traffic first: count, payload and sent bytes of a step."""
    key = lambda c: (c.kind, c.dtype, c.axes)  # noqa: E731
    rows = []
    for (kind, dtype, axes), members in itertools.groupby(sorted(found, key=key), key):
        members = list(members)
        rows.append(
            {
                "kind": kind,
                "dtype": dtype,
                "axes": axes,
                "count": sum(c.count for c in members),
                "payload": sum(c.count * c.payload for c in members),
                "sent": sum(c.count * c.sent for c in members),
            }
        )
    return sorted(rows, key=lambda row: -row["sent"])
