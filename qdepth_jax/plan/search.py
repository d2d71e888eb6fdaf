"""Layouts worth compiling: every (mesh, micro-batches, remat) by formula, best first, with the reason against it."""

import copy
from typing import Any

import ml_collections

from qdepth_jax import errors, sharding
from qdepth_jax.models import flops
from qdepth_jax.plan import estimate, program, roofline, topology

REMAT = ("full", "attention", "dots")
MOST_TENSOR = 8  # Gemma's query heads
# An estimate may be wrong by so much; candidates in between are compiled rather than thrown away.
DOUBT = 1.15


def candidates(config: ml_collections.ConfigDict, where: topology.Topology) -> list[dict[str, Any]]:
    """One row for each layout, those that may fit first, fastest first; "best" is 0 where it cannot be used."""
    rows = []
    for sizes in sharding.layouts(where.chips, where.slices):
        if sizes["tensor"] > MOST_TENSOR or where.chips_per_slice % (sizes["fsdp"] * sizes["tensor"]):
            continue
        for remat in REMAT if "remat" in config.model else ("",):
            row = {**sizes, "remat": remat, "micro_batches": 0, "per_chip": 0, "needed": 0.0, "best": 0.0, "worst": 0.0}
            rows += _micro_batches(config, where, sizes, row)
    return sorted(rows, key=lambda row: (row["best"] == 0, row["best"], row["worst"], row["needed"]))


def _micro_batches(config, where, sizes, row) -> list[dict[str, Any]]:
    ways, batch, out = sizes["replica"] * sizes["fsdp"], config.train.batch_size, []
    if batch % ways:
        return [row | {"verdict": f"batch {batch} does not divide over {ways} ways"}]
    per_chip = batch // ways
    for micro in (n for n in range(1, per_chip + 1) if per_chip % n == 0 and (n & (n - 1)) == 0):
        candidate = row | {"micro_batches": micro, "per_chip": per_chip // micro}
        try:
            made = program.plan_of(with_layout(config, candidate))
            needed = estimate.memory(made, sizes, where.slices).total
        except errors.UserError as error:
            return [row | {"verdict": str(error).splitlines()[1 if "\n" in str(error) else 0].strip()[:100]}]
        candidate["needed"] = needed
        if needed > DOUBT * where.chip.usable_bytes:
            over = needed - where.chip.usable_bytes
            out.append(candidate | {"verdict": f"too large by {over / 2**30:.1f} GiB (estimate)"})
            continue
        executed = sum(
            (
                flops.model_flops(made.parts),
                flops.recomputed(made.parts, made.remat),
                flops.unread(made.parts, made.remat),
            )
        )
        line = roofline.roofline(
            where,
            flops.model_flops(made.parts) * batch,
            executed * batch,
            estimate.hbm_bytes(made, sizes, where.slices),
            roofline.network_seconds(where, estimate.network(made, sizes, where.slices)),
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
