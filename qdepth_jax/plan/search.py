"""Layouts worth compiling: every (mesh, micro-batches, remat) by formula, best first, with the reason against it."""

import copy
from typing import Any

import ml_collections

from qdepth_jax import errors, sharding
from qdepth_jax.models import flops
from qdepth_jax.plan import estimate, program, roofline, state, topology

REMAT = ("full", "attention", "dots")
MOST_TENSOR = 8  # Gemma's query heads
# An estimate may be wrong by so much; candidates in between are compiled rather than thrown away.
DOUBT = 1.15


def candidates(config: ml_collections.ConfigDict, where: topology.Topology) -> list[dict[str, Any]]:
    """One row for each layout, those that may fit first, fastest first; "best" is 0 where it cannot be used."""
    made, rows = program.plan_of(config), []
    for sizes in sharding.layouts(where.chips, where.slices):
        if sizes["tensor"] > MOST_TENSOR:
            continue
        for remat in REMAT if made.remat in REMAT else (made.remat,):
            row = {**sizes, "remat": remat, "micro_batches": 0, "per_chip": 0, "needed": 0.0, "best": 0.0, "worst": 0.0}
            rows += [row | found for found in _micro_batches(made, where, sizes, remat)]
    return sorted(rows, key=lambda row: (row["best"] == 0, row["best"], row["worst"], row["needed"]))


def _micro_batches(
    made: program.Plan, where: topology.Topology, sizes: dict[str, int], remat: str
) -> list[dict[str, Any]]:
    ways, batch, out = sizes["replica"] * sizes["fsdp"], made.train.batch_size, []
    if batch % ways:
        return [{"verdict": f"batch {batch} does not divide over {ways} ways"}]
    try:
        state.of(sizes, made.state, where.slices)
    except errors.UserError as error:
        return [{"verdict": "does not divide: " + str(error).splitlines()[1].strip()}]
    per_chip = batch // ways
    for micro in (2**n for n in range(per_chip.bit_length()) if per_chip % 2**n == 0):
        candidate = {"micro_batches": micro, "per_chip": per_chip // micro}
        plan = program.with_layout(made, micro, remat)
        candidate["needed"] = needed = estimate.memory(plan, sizes, where.slices).total
        if needed > DOUBT * where.chip.usable_bytes:
            over = (needed - where.chip.usable_bytes) / 2**30
            out.append(candidate | {"verdict": f"too large by {over:.1f} GiB (estimate)"})
            continue
        model = flops.model_flops(plan.parts)
        line = roofline.roofline(
            where,
            model * batch,
            (model + flops.recomputed(plan.parts, remat) + flops.unread(plan.parts, remat)) * batch,
            estimate.hbm_bytes(plan, sizes, where.slices),
            roofline.network_seconds(where, estimate.network(plan, sizes, where.slices)),
        )
        out.append(candidate | {"best": line.bound, "worst": line.sum, "verdict": f"by formula, limit {line.limit}"})
    return out


def with_layout(config: ml_collections.ConfigDict, row: dict[str, Any]) -> ml_collections.ConfigDict:
    """The experiment with a candidate's mesh, micro-batches and remat."""
    changed = copy.deepcopy(config)
    changed.mesh.replica, changed.mesh.fsdp, changed.mesh.tensor = row["replica"], row["fsdp"], row["tensor"]
    changed.train.micro_batches = row["micro_batches"]
    if row["remat"]:
        changed.model.remat = row["remat"]
    return changed


def take_compiled(row: dict[str, Any], result: dict[str, Any]) -> None:
    """Puts what the compiler says in place of the estimate."""
    memory, line = result["memory"], result["roofline"][0]
    row["needed"] = memory["needed"]
    if memory["fits"]:
        row |= {"best": line["best"], "worst": line["worst"], "verdict": f"compiled, limit {line['limit']}"}
    else:
        row |= {"verdict": f"compiled: too large by {(memory['needed'] - memory['limit']) / 2**30:.2f} GiB"}


def describe(row: dict[str, Any]) -> str:
    """The flags of a candidate."""
    flags = " ".join(f"--config.mesh.{axis}={row[axis]}" for axis in sharding.AXES)
    remat = f" --config.model.remat={row['remat']}" if row["remat"] else ""
    return f"{flags} --config.train.micro_batches={row['micro_batches']}{remat}"
