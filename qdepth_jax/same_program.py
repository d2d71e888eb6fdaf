"""Before the first step: all hosts run the same program on one plan of batches, and together read all of it."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qdepth_jax import distributed, errors, sharding


def check(lowered: jax.stages.Lowered, plan: Any, rows: np.ndarray, mesh: Mesh, batch_size: int) -> None:
    """All hosts are about to run the same step on one global batch.

    Args:
      lowered: `jax.jit(step).lower(...)`; compared as StableHLO text without source locations.
      plan: JSON identity of the data order, e.g. Loader.identity().
      rows: of the global batch that this host reads.
      mesh, batch_size: where they go.

    Raises:
      UserError: naming the hosts whose program, plan or rows are not what they must be.
    """
    if jax.process_count() != distributed.process()[1]:
        raise errors.UserError(
            f"JAX sees {jax.process_count()} processes, but this one was started alone: give --coordinator, "
            "--num_processes and --process_id"
        )
    text = lowered.as_text(debug_info=False)
    distributed.same_everywhere("compiled program", {"sha256": _digest(text), "characters": len(text)})
    distributed.same_everywhere("batch plan", plan)
    spans = distributed.gather(_spans(rows), "rows of the batch")
    wrong = [
        f"host {host} reads rows {found}, its devices hold {expected}"
        for host, found in enumerate(spans)
        if found != (expected := _spans(sharding.batch_rows(mesh, batch_size, host)))
    ]
    times = np.zeros(batch_size, np.int64)
    for start, end in (span for found in spans for span in found):
        times[start:end] += 1
    if wrong or not times.all():
        unread = f"; rows {_spans(np.flatnonzero(times == 0))} are read by nobody" if not times.all() else ""
        raise errors.UserError(f"the batch is split wrongly: {'; '.join(wrong)}{unread}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _spans(rows: np.ndarray) -> list[list[int]]:
    """Ascending row numbers as [first, end) spans."""
    out: list[list[int]] = []
    for row in map(int, rows):
        if out and out[-1][1] == row:
            out[-1][1] = row + 1
        else:
            out.append([row, row + 1])
    return out
