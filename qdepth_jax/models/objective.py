"""What the training loop knows of a model: how to initialise it and its loss. Nothing else.

A model module (`models/policy.py`, `models/tokenizer.py`) offers `make_objective(config) -> Objective`; the loop, the
sharding table, the checkpoint and the resume test work on any of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Tree = Any  # a dict pytree of arrays
Batch = Mapping[str, jax.Array]


class LossOutput(NamedTuple):
    """`loss` scalar f32; `metrics` name -> scalar f32 (loss terms included); `state` the new model state."""

    loss: jax.Array
    metrics: dict[str, jax.Array]
    state: Tree


class Objective(NamedTuple):
    """A trainable model as pure functions on dict pytrees.

    Attributes:
      init: `key -> {"params": tree, "state": tree}`; params are trained by gradient, state is not (codebooks, counts).
      loss: `(params, state, batch, key, step) -> LossOutput`. `key` is the run's key, constant over steps; per-example
        randomness folds in `batch["position"]`, so the result depends on no device, host or micro-batch number.
        A loss is a mean over the batch; `step` is the optimiser step (i32 scalar), for schedules inside the loss.
      features: batch keys the loss reads, without the leading batch axis.
      augment: `(batch, key) -> batch` on training batches alone, or None; the same rules for randomness as `loss`.
      groups: (name, path regex) rows, first full match wins: parts of the parameters whose gradient norms are reported.
      flops: model FLOPs of one example in one training step, forward and backward, without recomputation; 0 = unknown.
    """

    init: Callable[[jax.Array], dict[str, Tree]]
    loss: Callable[[Tree, Tree, Batch, jax.Array, jax.Array], LossOutput]
    features: tuple[str, ...]
    augment: Callable[[Batch, jax.Array], Batch] | None = None
    groups: tuple[tuple[str, str], ...] = ()
    flops: float = 0.0
