"""The sharding table applied to a train state, as a page to read: leaf, split, MiB per device, totals."""

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from qdepth_jax import sharding

COLUMNS = ("params", "moments", "ema")
PARTS = (*COLUMNS, "state", "counters")


def report(name: str, sizes: Mapping[str, int], slices: int, abstract: Any) -> tuple[list[str], dict[str, Any]]:
    """The page, and its summary as JSON types with sizes in bytes.

    Args:
      name: of the experiment.
      sizes: mesh axis -> devices along it; see sharding.mesh_sizes.
      slices: that the devices are in.
      abstract: eval_shape of a train state.

    Raises:
      UserError: the state does not fit the mesh.
    """
    rows = sharding.place(sizes, abstract, slices=slices)
    devices = math.prod(sizes.values())
    parameters: dict[tuple, dict[str, int]] = {}
    others, total = [], dict.fromkeys(PARTS, 0)
    for row in rows:
        part, leaf = sharding.part_of(row.path)
        total[part] += row.bytes
        if part in COLUMNS:
            # Moments and averages are split as their parameter is; if a row ever says otherwise, it shows as a line.
            line = parameters.setdefault((leaf, row.shape, _spec(row.spec)), dict.fromkeys(COLUMNS, 0))
            line[part] += row.bytes
        else:
            others.append(row)
    whole = {sharding.part_of(r.path)[1]: r for r in reversed(rows) if r.bytes == r.whole and r.bytes > 2**20}
    state, ways = sum(row.whole for row in rows), sizes["fsdp"] * sizes["tensor"]
    everything = sum(total.values())

    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = [f"{name}: {shown} = {devices} devices, slices: {slices}; MiB per device", ""]
    lines.append(f"{'parameter':<70} {'shape':<21} {'split':<20}" + "".join(f"{part:>10}" for part in COLUMNS))
    for (leaf, shape, spec), line in parameters.items():
        lines.append(f"{leaf:<70} {_shape(shape):<21} {spec:<20}" + "".join(_mib(line[part]) for part in COLUMNS))
    lines += ["", "not a parameter"]
    lines += [f"{row.path:<70} {_shape(row.shape):<21} {_spec(row.spec):<20}{_mib(row.bytes)}" for row in others]
    lines += ["", f"above 1 MiB and held whole by every device: {len(whole) or 'none'}"]
    lines += [f"{leaf:<70} {_shape(row.shape):<21} by the row {row.pattern}" for leaf, row in sorted(whole.items())]
    lines += ["", "MiB per device: " + ", ".join(f"{part} {total[part] / 2**20:.3f}" for part in PARTS)]
    lines.append(
        f"state: {everything / 2**20:.3f} MiB per device of {state / 2**20:.1f} MiB; an even split over fsdp x tensor "
        f"would be {state / ways / 2**20:.3f}"
    )
    summary = {
        "experiment": name,
        "devices": devices,
        "slices": slices,
        "mesh": dict(sizes),
        "bytes_per_device": total | {"total": everything},
        "state_bytes": state,
        "leaves": len(rows),
        "whole_above_1_mib": sorted(whole),
    }
    return lines, summary


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _spec(spec: PartitionSpec) -> str:
    """One word for each dimension: a mesh axis, or - where it is not split."""
    return (
        " ".join("-" if axes is None else axes if isinstance(axes, str) else "*".join(axes) for axes in spec) or "whole"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:10.3f}" if size else f"{'-':>10}"
