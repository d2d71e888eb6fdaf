"""The plan of one experiment on one topology, as JSON types; `report.text` makes it readable."""

from collections.abc import Callable
from typing import Any

import ml_collections

from qdepth_jax import chips, sharding
from qdepth_jax.models import flops
from qdepth_jax.plan import collectives, estimate, hlo, program, roofline, state, topology, traffic

# Other chips that the roofline is given for, at the same number of them and the same layout.
OTHERS = ("v4", "v5e", "v5p", "v6e", "h100", "h200")


def plan(
    config: ml_collections.ConfigDict,
    where: topology.Topology,
    compiles: bool,
    cache: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Everything that tools/plan_pod.py prints.

    Args:
      config: an experiment; mesh, micro_batches and remat are its own fields.
      where: the chips.
      compiles: compile the step with libtpu, or estimate.
      cache: folder of compiled results, "" = none.
      progress: told what is being done.

    Returns:
      JSON types; "text" holds the compiled program ("" if there is none).

    Raises:
      UserError: a config, mesh or batch that does not fit the topology.
    """
    made = program.plan_of(config)
    slices = where.slices
    sizes = sharding.mesh_sizes(made.mesh, where.chips, slices)
    sharding.check_batch(made.train, sizes)
    on_chip = state.of(sizes, made.state, slices)
    progress(f"state {on_chip.total / 2**30:.3f} GiB on each of {where.chips} chips, mesh {sizes}")

    devices, compiled, found, unknown = None, None, estimate.network(made, sizes, slices), []
    formula_sent = sum(item.count * item.sent for item in found)
    if compiles:
        devices, compiled = _compile(made, where, cache, progress)
    readable = compiled is not None and compiled.text != ""
    if readable:
        module = hlo.parse(compiled.text)
        found, unknown = collectives.find(module, sizes, slices)
        traffic_bytes = traffic.hbm_bytes(module, found)
    else:
        traffic_bytes = estimate.hbm_bytes(made, sizes, slices)
    return {
        "experiment": config.name,
        "topology": where.name,
        "chips": where.chips,
        "hosts": where.hosts,
        "slices": slices,
        "mesh": dict(sizes),
        "remat": made.remat,
        "batch": {
            "global": made.train.batch_size,
            "micro_batches": made.train.micro_batches,
            "ways": sizes["replica"] * sizes["fsdp"],
            "per_chip": made.train.batch_size // (made.train.micro_batches * sizes["replica"] * sizes["fsdp"]),
        },
        "total_steps": made.train.total_steps,
        "state": {
            "bytes": on_chip.total,
            "whole_bytes": on_chip.whole,
            "parts": on_chip.purposes,
            "by_fsdp": state.by_fsdp(made.state, sizes["tensor"]),
            "copied": [list(row) for row in on_chip.copied],
        },
        "memory": _memory(made, where, sizes, compiled),
        "flops": _flops(made),
        "collectives": {
            "compiled": readable,
            "rows": _network_rows(where, found, devices),
            "sent": sum(item.count * item.sent for item in found),
            "formula_sent": formula_sent,
            "unknown_loops": unknown,
        },
        "hbm_bytes": traffic_bytes,
        "compile_seconds": compiled.seconds if compiled else 0.0,
        "roofline": _rooflines(made, where, found, devices, traffic_bytes),
        "text": compiled.text if compiled else "",
    }


def _compile(made, where, cache, progress):
    progress(f"descriptors of {where.name}")
    mesh = sharding.make_mesh(made.mesh, topology.devices(where))
    progress("tracing and lowering the train step")
    lowered = program.lower(made, mesh)
    progress("compiling (minutes at full size; the compiler uses one core)")
    compiled = program.compile_step(lowered, where.name, cache)
    progress(f"compiled in {compiled.seconds:.0f} s" + (" (from the cache)" if compiled.cached else ""))
    if not compiled.text:
        progress("COLLECTIVES ARE ESTIMATED: the compiler left no text of the program")
    return list(mesh.devices.flat), compiled


def _memory(made, where, sizes, compiled) -> dict[str, Any]:
    limit = where.chip.usable_bytes
    if compiled is None:
        parts = estimate.memory(made, sizes, where.slices)
        fits = parts.total <= limit
        return {"compiled": False, "fits": fits, "needed": parts.total, "limit": limit, **parts._asdict()}
    return {
        "compiled": True,
        "fits": compiled.fits,
        "needed": compiled.needed,
        "limit": compiled.limit or limit,
        "arguments": compiled.arguments,
        "new_outputs": compiled.outputs - compiled.aliased,
        "temporary": compiled.temporary,
        "code": compiled.code,
        "message": compiled.message[:4000],
        "estimate": estimate.memory(made, sizes, where.slices)._asdict(),
    }


def _flops(made) -> dict[str, Any]:
    model, batch = flops.model_flops(made.parts), made.train.batch_size
    again, unread = flops.recomputed(made.parts, made.remat), flops.unread(made.parts, made.remat)
    return {
        "parts": {name: {"forward": part.forward, "backward": part.backward} for name, part in made.parts.items()},
        "model_per_example": model,
        "recomputed_per_example": again,
        "unread_per_example": unread,
        "model_per_step": model * batch,
        "executed_per_step": (model + again + unread) * batch,
    }


def _network_rows(where, found, devices) -> list[dict[str, Any]]:
    rows = collectives.summary(found)
    for row in rows:
        same = [c for c in found if (c.kind, c.dtype, c.axes) == (row["kind"], row["dtype"], row["axes"])]
        inside, outside = roofline.network_seconds(where, same, devices)
        row["network"] = "+".join(name for name, seconds in (("ICI", inside), ("DCN", outside)) if seconds) or "-"
        row["seconds"] = inside + outside
    return rows


def _rooflines(made, where, found, devices, traffic_bytes) -> list[dict[str, Any]]:
    """The topology first, then other chips with the same number of chips in one slice."""
    rows = [_row(made, where, found, devices, traffic_bytes, "")]
    for name in OTHERS:
        if name == where.chip.name:
            continue
        other = same_size(chips.CHIPS[name], where)
        if other is not None:
            note = "same program assumed" + ("" if other.shape else "; GPUs are not compiled for")
            rows.append(_row(made, other, found, None, traffic_bytes, note))
    return rows


def same_size(chip: chips.Chip, where: topology.Topology) -> topology.Topology | None:
    """As many chips of another type in as many slices, if there is such a slice."""
    if chip.kind == "gpu":
        return topology.Topology(chip, (), 1, where.chips)
    shape = topology.SHAPES[chip.dimensions].get(where.chips_per_slice)
    return topology.Topology(chip, shape, where.slices, where.chips_per_slice) if shape else None


def _row(made, where, found, devices, traffic_bytes, note) -> dict[str, Any]:
    counts = _flops(made)
    line = roofline.roofline(
        where,
        counts["model_per_step"],
        counts["executed_per_step"],
        traffic_bytes,
        roofline.network_seconds(where, found, devices),
    )
    hours = line.bound * made.train.total_steps / 3600
    return {
        "chips": f"{where.chips} {where.chip.name}" + (f" in {where.slices} slices" if where.slices > 1 else ""),
        "compute": line.compute,
        "hbm": line.hbm,
        "ici": line.ici,
        "dcn": line.dcn,
        "best": line.bound,
        "worst": line.sum,
        "limit": line.limit,
        "mfu_best": line.mfu_bound,
        "mfu_worst": line.mfu_sum,
        "samples_per_second": made.train.batch_size / line.bound,
        "tokens_per_second": made.train.batch_size * made.tokens / line.bound,
        "hours": hours,
        "chip_hours": hours * where.chips,
        "note": note,
    }
