"""The train step: one pure function on one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from qdepth_jax import optim
from qdepth_jax.models import objective as objective_lib


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    `step` i32 scalar; `params` trained by gradient; `state` the rest of the model (codebooks); `opt_state` of optax;
    `ema` averaged params or None.
    """

    step: Array
    params: Any
    state: Any
    opt_state: Any
    ema: Any


def init_state(
    key: Array, objective: objective_lib.Objective, tx: optax.GradientTransformation, ema: bool
) -> TrainState:
    """A fresh state; run it under `jax.jit` with out_shardings, or `jax.eval_shape`."""
    variables = objective.init(jax.random.fold_in(key, 0))
    params = variables["params"]
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables["state"], tx.init(params), average)


def train_step(
    train_state: TrainState,
    batch: objective_lib.Batch,
    key: Array,
    *,
    objective: objective_lib.Objective,
    tx: optax.GradientTransformation,
    frozen: optim.FrozenTable,
    micro_batches: int,
    ema_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on a global batch: scan over micro-batches, mean gradient, update, average.

    Args:
      train_state: the state (donate it).
      batch: arrays with leading axis B; micro_batches must divide B.
      key: the run's key, the same at every step: randomness comes from batch["position"] and the step.
      objective, tx, frozen, micro_batches, ema_decay: static.

    Returns:
      The new state and named f32 scalars: the objective's own, grad_norm, param_norm.
    """
    # 0 was taken by the initialisation, 2 by validation.
    augment_key, key, step = jax.random.fold_in(key, 3), jax.random.fold_in(key, 1), train_state.step

    def micro_step(carry, micro_batch):
        model_state, total = carry
        if objective.augment is not None:
            micro_batch = objective.augment(micro_batch, augment_key)

        def loss(params):
            out = objective.loss(params, model_state, micro_batch, key, step)
            return out.loss, out

        grads, out = jax.grad(loss, has_aux=True)(train_state.params)
        total = jax.tree.map(jnp.add, total, (grads, out.metrics))
        return (out.state, total), None

    # Micro-batch m takes the examples j = m, m + M, ...: each device splits its own part, nothing moves.
    split = {k: jnp.moveaxis(v.reshape(-1, micro_batches, *v.shape[1:]), 1, 0) for k, v in batch.items()}
    first = {k: v[0] for k, v in split.items()}
    metric_shapes = jax.eval_shape(lambda b: objective.loss(train_state.params, train_state.state, b, key, step), first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (train_state.params, metric_shapes.metrics))
    if micro_batches == 1:
        (model_state, total), _ = micro_step((train_state.state, zeros), first)
    else:
        (model_state, total), _ = jax.lax.scan(micro_step, (train_state.state, zeros), split)
    grads, metrics = jax.tree.map(lambda x: x / micro_batches, total)
    grads = optim.mask_gradients(grads, frozen)

    updates, opt_state = tx.update(grads, train_state.opt_state, train_state.params)
    params = optax.apply_updates(train_state.params, updates)
    ema = train_state.ema
    if ema is not None:
        ema = jax.tree.map(lambda a, p: ema_decay * a + (1.0 - ema_decay) * p, ema, params)
    metrics = metrics | {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
    return TrainState(step + 1, params, model_state, opt_state, ema), metrics
