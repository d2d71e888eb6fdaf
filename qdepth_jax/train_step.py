"""The train step: one pure function on one pytree."""

import functools
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
    `ema` averaged params or None; `skipped` and `skipped_in_row` i32 scalars: steps without an update because their
    loss or gradient was not finite, in the whole run and since the last good one. `step - skipped` updates were made.
    """

    step: Array
    params: Any
    state: Any
    opt_state: Any
    ema: Any
    skipped: Array
    skipped_in_row: Array


def init_state(
    key: Array, objective: objective_lib.Objective, tx: optax.GradientTransformation, ema: bool
) -> TrainState:
    """A fresh state; run it under `jax.jit` with out_shardings, or `jax.eval_shape`."""
    variables = objective.init(jax.random.fold_in(key, 0))
    params = variables["params"]
    average = jax.tree.map(jnp.copy, params) if ema else None
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, variables["state"], tx.init(params), average, skipped, in_row)


def abstract_state(objective: objective_lib.Objective, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """ShapeDtypeStructs of `init_state`; nothing is allocated."""
    init = functools.partial(init_state, objective=objective, tx=tx, ema=ema)
    return jax.eval_shape(init, jax.random.key(0))


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
    learning_rate: optax.Schedule | None = None,
    placed: Any = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on a global batch of leading axis B: scan over micro-batches, mean gradient, update, average.

    Where the loss or the gradient norm is not finite, only `step` and the counts change. One bad micro-batch spoils the
    whole step: in the sum its gradient cannot be told from the others'.

    Args:
      train_state: the state; donate it. The keywords are static.
      key: the run's key, the same at every step: randomness comes from batch["position"] and the step.
      micro_batches: divides B. learning_rate: of the update after so many, for the metric alone.
      placed: shardings of the params, in which gradients are summed too; None leaves that to the compiler.

    Returns:
      The new state and named scalars: loss, the objective's own, and those of `_norms_and_counts`.
    """
    # 0 was taken by the initialisation, 2 by validation.
    augment_key, key, step = jax.random.fold_in(key, 3), jax.random.fold_in(key, 1), train_state.step

    def micro_step(carry, micro_batch):
        model_state, total = carry
        if objective.augment is not None:
            micro_batch = objective.augment(micro_batch, augment_key)

        def loss(params):
            out = objective.loss(params, model_state, micro_batch, key, step)
            return out.loss, (out.state, out.metrics | {"loss": out.loss})

        grads, (model_state, metrics) = jax.grad(loss, has_aux=True)(train_state.params)
        return (model_state, jax.tree.map(jnp.add, total, _place(grads, placed))), metrics

    zeros = _place(jax.tree.map(jnp.zeros_like, train_state.params), placed)
    carry, micro = (train_state.state, zeros), _split(batch, micro_batches)
    if micro_batches == 1:
        # No scan of one, not even an unrolled one: XLA:CPU ran a tokenizer's convolutions 8 times slower in it.
        (model_state, total), metrics = micro_step(carry, jax.tree.map(lambda x: x[0], micro))
        metrics = jax.tree.map(lambda x: x[None], metrics)
    else:
        (model_state, total), metrics = jax.lax.scan(micro_step, carry, micro)
    grads = optim.mask_gradients(jax.tree.map(lambda x: x / micro_batches, total), frozen)
    metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)

    update = optax.with_extra_args_support(tx).update  # the key is for optim.scale_by_adam
    updates, opt_state = update(grads, train_state.opt_state, train_state.params, key=key)
    params = optax.apply_updates(train_state.params, updates)
    ema = train_state.ema
    if ema is not None:
        # Not decay * a + (1 - decay) * p: rounded, the two factors sum to less than 1, and what is frozen would shrink.
        ema = jax.tree.map(lambda a, p: a + (1.0 - ema_decay) * (p - a), ema, params)
    new = train_state.replace(params=params, state=model_state, opt_state=opt_state, ema=ema)
    new = _accept(jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads)), new, train_state)
    return new, metrics | _norms_and_counts(objective, grads, train_state, new, learning_rate)


def _place(tree: Any, placed: Any) -> Any:
    """Constraint on where a tree like the params lies, so that XLA reduce-scatters gradients, keeping no whole copy."""
    return tree if placed is None else jax.lax.with_sharding_constraint(tree, placed)


def _split(batch: objective_lib.Batch, micro_batches: int) -> objective_lib.Batch:
    """[B, ...] -> [M, B / M, ...]: part m takes examples m, m + M, ..: each device splits its own, nothing moves."""
    return {k: jnp.moveaxis(v.reshape(-1, micro_batches, *v.shape[1:]), 1, 0) for k, v in batch.items()}


def _accept(finite: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `finite`, else `old` to the bit; the counts of both.

    Chosen element by element, which XLA fuses into the update that reads the old values anyway. (Branches of a
    `lax.cond` would have to wait for the norm as a whole, and copy what was donated.)
    """
    new = new.replace(skipped_in_row=jnp.zeros_like(old.skipped_in_row))
    old = old.replace(skipped=old.skipped + 1, skipped_in_row=old.skipped_in_row + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old).replace(step=old.step + 1)


def _norms_and_counts(
    objective: objective_lib.Objective,
    grads: Any,
    old: TrainState,
    new: TrainState,
    learning_rate: optax.Schedule | None,
) -> dict[str, Array]:
    """Scalars: grad_norm and grad_norm/GROUP (of what is trained, before clipping), param_norm, learning_rate, skipped,
    skipped_in_row. The learning rate is that of the optimiser's own count of updates, which skipped steps do not
    advance.
    """
    out = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(new.params)}
    out |= {f"grad_norm/{name}": norm for name, norm in optim.group_norms(grads, objective.groups).items()}
    if learning_rate is not None:
        out["learning_rate"] = jnp.asarray(learning_rate(old.step - old.skipped), jnp.float32)
    return out | {"skipped": new.skipped, "skipped_in_row": new.skipped_in_row}
