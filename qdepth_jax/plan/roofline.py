"""How fast a step can be at best: arithmetic, memory and network, each at its data sheet's peak.

`bound` is the largest of them (all overlap perfectly), `sum` adds them up (nothing overlaps). A real step lies between
them or above: peaks are never reached, and small operations do not fill a chip.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qdepth_jax.plan import collectives, topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one chip.

    Attributes:
      model: model FLOPs at peak: what a step would take at 100 % MFU.
      compute: all FLOPs at peak, recomputation included. hbm: memory traffic. ici, dcn: network within and between
        slices (GPUs: within and between hosts).
    """

    model: float
    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def sum(self) -> float:
        return self.compute + self.hbm + self.ici + self.dcn

    @property
    def limit(self) -> str:
        """Name of the largest term."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))

    @property
    def mfu_bound(self) -> float:
        """Model FLOP utilisation if everything overlaps."""
        return self.model / self.bound

    @property
    def mfu_sum(self) -> float:
        """The same if nothing overlaps."""
        return self.model / self.sum


def roofline(
    where: topology.Topology,
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    network: tuple[float, float],
) -> Roofline:
    """Args: FLOPs of the whole step over all chips; hbm_bytes of one chip; (ici, dcn) seconds of `network_seconds`."""
    peak = where.chips * where.chip.peak_flops
    return Roofline(model_flops / peak, executed_flops / peak, hbm_bytes / where.chip.hbm_bandwidth, *network)


def network_seconds(
    where: topology.Topology, found: Sequence[collectives.Collective], devices: Sequence[Any] | None = None
) -> tuple[float, float]:
    """(seconds within slices, seconds between slices) of all collectives of a step, at the peak of the links.

    A group over several slices (GPUs: hosts) does its work inside each slice first: what crosses is cut by the members
    that a slice has, and every chip's share of the network carries its part.

    Args:
      devices: those of the mesh in order; without them, position i is taken for chip i in row-major order.
    """
    inside = outside = 0.0
    for item in found:
        size, group = len(item.group), [_place(where, position, devices) for position in item.group]
        if size < 2:
            continue
        parts = sorted({part for part, _ in group})
        members = [place for part, place in group if part == parts[0]]
        if len(members) > 1:
            share = item.sent if len(parts) == 1 else item.sent * (len(members) - 1) / len(members) * size / (size - 1)
            inside += item.count * share / topology.link_bandwidth(where, members)
        if len(parts) > 1:
            crossing = item.sent * size / (size - 1) * (len(parts) - 1) / len(parts) / len(members)
            outside += item.count * crossing / where.chip.dcn_bandwidth
    return inside, outside


def _place(where: topology.Topology, position: int, devices: Sequence[Any] | None) -> tuple[int, tuple[int, ...]]:
    """(slice or host, coordinates) of the device at a position of the mesh."""
    if devices is not None:
        device = devices[position]
        return getattr(device, "slice_index", 0) or 0, tuple(device.coords)
    if not where.shape:
        return position // where.chip.chips_per_host, (position,)
    part, rest = divmod(position, where.chips_per_slice)
    place = []
    for size in reversed(where.shape):
        rest, at = divmod(rest, size)
        place.append(at)
    return part, tuple(reversed(place))
