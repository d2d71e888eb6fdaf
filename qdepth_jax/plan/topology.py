"""Names of slices, the devices behind them (descriptors, no hardware), and how fast a group of them can talk.

`v5e:4x4` says the shape. `v5e-16` is Google's name of it; for v4 and v5p that name counts TensorCores, two a chip:
v5p-64 has 32 chips in 2x4x4. `2xv5e-256` are two slices that meet over the data centre's network. `h100-64` are GPUs:
they cannot be compiled for here, only estimated.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from qdepth_jax import chips, errors

# Slice shapes on offer, by number of chips.
SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {
        4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
        512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of a chip type. shape: chips along each side of the torus, () for GPUs."""

    chip: chips.Chip
    shape: tuple[int, ...]
    slices: int
    chips_per_slice: int

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def chips_per_host(self) -> int:
        """A v5e or v6e board of eight is one host when rented alone, two hosts of four in a larger slice."""
        single = self.chip.dimensions == 2 and self.chips_per_slice in (1, 8)
        return self.chips_per_slice if single else self.chip.chips_per_host

    @property
    def hosts(self) -> int:
        return math.ceil(self.chips / self.chips_per_host)

    @property
    def name(self) -> str:
        """As one writes it to rent it: the shape, and in brackets the name that counts cores."""
        front = f"{self.slices} x " if self.slices > 1 else ""
        if not self.shape:
            return f"{self.chip.name}-{self.chips}"
        side = "x".join(str(n) for n in self.shape)
        return f"{front}{self.chip.name}:{side} ({self.chip.name}-{self.chips_per_slice * self.chip.cores})"

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each side of the torus whether its ends are connected."""
        return tuple(n % self.chip.wraps == 0 for n in self.shape)


def parse(text: str) -> Topology:
    """A topology by any of its names (see the module's docstring).

    Raises:
      UserError: unknown chip, size or form.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(v\d+[a-z]?|[a-z]+\d+)(?:([:-])([\dx]+))", text.strip().lower())
    if match is None or match.group(2) not in chips.CHIPS:
        raise errors.UserError(
            f"--topology={text} is unknown: write v5e:4x4, v5e-16, v5p-64 or 2xv5e-256; chips are {sorted(chips.CHIPS)}"
        )
    slices, chip = int(match.group(1) or 1), chips.CHIPS[match.group(2)]
    if slices < 1:
        raise errors.UserError(f"--topology={text}: at least one slice is needed")
    if match.group(3) == ":":
        shape = tuple(int(n) for n in match.group(4).split("x"))
        if len(shape) != chip.dimensions:
            raise errors.UserError(f"--topology={text}: a {chip.name} slice has {chip.dimensions} sides, got {shape}")
        return Topology(chip, shape, slices, math.prod(shape))
    count = int(match.group(4))
    if chip.kind == "gpu":
        return Topology(chip, (), slices, count)
    known = SHAPES[chip.dimensions]
    if count % chip.cores or count // chip.cores not in known:
        names = [f"{chip.name}-{n * chip.cores}" for n in known]
        raise errors.UserError(f"--topology={text}: slices on offer are {', '.join(names)}; or write the shape")
    return Topology(chip, known[count // chip.cores], slices, count // chip.cores)


def prepare_environment() -> None:
    """Call it before JAX is imported: the plan is made on the CPU, and libtpu looks for no chips and no cloud."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # several processes on one machine
        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)


def compiler_missing() -> str:
    """Why programs cannot be compiled for TPUs here, or "" if they can."""
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install -e '.[plan]'; it needs no TPU)"
    return ""


def devices(topology: Topology) -> list[Any]:
    """Descriptors of all devices, slice after slice; the TPU compiler accepts them, nothing can run on them.

    Raises:
      UserError: GPUs, no libtpu, or a shape that libtpu does not know.
    """
    if topology.chip.kind != "tpu":
        raise errors.UserError(f"{topology.name} cannot be compiled for ahead of time here: only estimated")
    if missing := compiler_missing():
        raise errors.UserError(missing)
    from jax.experimental import topologies

    side = "x".join(str(n) for n in topology.shape)
    extra: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.cores > 1:
        extra["chip_config_name"] = "megacore"  # both TensorCores of a chip as one device; v4's default is two
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip.name}:{side}",
            wrap=(*topology.rings, *(False,) * (3 - len(topology.shape))),
            **extra,
        )
    except Exception as error:
        raise errors.UserError(f"libtpu knows no {topology.name}: {str(error).splitlines()[0][:300]}") from error
    return list(found.devices)


def link_bandwidth(topology: Topology, places: Sequence[tuple[int, ...]]) -> float:
    """Bytes a second that each chip of a group can receive from the others of its own slice.

    Along each side of the torus on which the group extends, a chip has two links if the group fills a ring, else one.

    Args:
      places: coordinates of the group's members, one slice alone.
    """
    if not topology.shape:
        return topology.chip.link_bandwidth
    links = 0
    for side, (size, ring) in enumerate(zip(topology.shape, topology.rings)):
        extent = len({place[side] for place in places})
        if extent > 1:
            links += 2 if ring and extent == size and size > 2 else 1
    return max(links, 1) * topology.chip.link_bandwidth
