"""The optimiser: schedule, clipping, AdamW, learning-rate factors and freezing by path regex.

open-pi-zero trains two groups with AdamW at 5e-5, 200 warm-up steps, a cosine of 1e7 steps (in effect constant) and
a joint clip at norm 1; weight decay 0. DEVIATION: its AdamW keeps 8-bit moments and bf16 weights, ours are float32.
"""

import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qdepth_jax import config as config_lib
from qdepth_jax import errors, sharding

FROZEN_KINDS = ("all", "last_layer", "last_layer_value")
FrozenTable = tuple[tuple[str, str], ...]


def schedule(config: config_lib.OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by optimiser step: linear warm-up, then cosine or constant.

    Raises:
      UserError: unknown schedule name.
    """
    low, peak = config.min_learning_rate, config.learning_rate
    if config.schedule == "constant":
        body = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        steps = max(1, (config.cycle_steps or total_steps) - config.warmup_steps)
        body = optax.cosine_decay_schedule(peak, steps, alpha=low / peak if peak else 0.0)
    else:
        raise errors.UserError(f"optim.schedule={config.schedule!r} is unknown: use 'cosine' or 'constant'")
    if not config.warmup_steps:
        return body
    return optax.join_schedules([optax.linear_schedule(low, peak, config.warmup_steps), body], [config.warmup_steps])


def make(config: config_lib.OptimConfig, total_steps: int, frozen: FrozenTable = ()) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, learning-rate factors; frozen leaves hold no moments. Give it masked gradients.

    Args:
      config: see OptimConfig.
      total_steps: of the run, the default cosine length.
      frozen: rows of the model itself (e.g. the text embedding), applied before those of the config.
    """
    frozen = (*frozen, *config.frozen)
    for pattern, kind in frozen:
        if kind not in FROZEN_KINDS:
            raise errors.UserError(
                f"frozen row ({pattern!r}, {kind!r}): the second entry must be one of {FROZEN_KINDS}"
            )

    adamw = optax.adamw(
        schedule(config, total_steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform(
            {"trained": adamw, "frozen": optax.set_to_zero()},
            lambda params: _labels(params, frozen, config.scale),
        ),
        optax.stateless(lambda updates, params: _scale(updates, config.scale, frozen)),
    )


def frozen_kind(path: str, frozen: FrozenTable) -> str | None:
    """A kind of FROZEN_KINDS or None for a parameter path; full match, first row wins."""
    return next((kind for pattern, kind in frozen if re.fullmatch(pattern, path)), None)


def mask_gradients(grads: Any, frozen: FrozenTable) -> Any:
    """Zero the gradient of frozen parts: see `zero_part`."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, g: zero_part(g, frozen_kind(sharding.path_of(key_path), frozen)), grads
    )


def zero_part(x: Array, kind: str | None) -> Array:
    """Zero `all`, the `last_layer` of a scanned stack ([-1]), or of a kv_einsum its `last_layer_value` ([-1, 1])."""
    if kind == "all":
        return jnp.zeros_like(x)
    if kind == "last_layer":
        return x.at[-1].set(0.0)
    if kind == "last_layer_value":
        return x.at[-1, 1].set(0.0)
    return x


def _labels(params: Any, frozen: FrozenTable, scale: tuple[tuple[str, float], ...]) -> Any:
    paths = [sharding.path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name, rows in (("frozen", frozen), ("scale", scale)):
        for pattern, _ in rows:
            if not any(re.fullmatch(pattern, path) for path in paths):
                near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
                raise errors.UserError(
                    f"optim.{name} row {pattern!r} matches no parameter (the whole path must match); "
                    f"the nearest is {near!r}"
                )

    def label(key_path, _):
        return "frozen" if frozen_kind(sharding.path_of(key_path), frozen) == "all" else "trained"

    return jax.tree_util.tree_map_with_path(label, params)


def _scale(updates: Any, rows: tuple[tuple[str, float], ...], frozen: FrozenTable) -> Any:
    """Learning-rate factors; and frozen parts get no weight decay either."""

    def scale(key_path, u):
        path = sharding.path_of(key_path)
        u = u * next((factor for pattern, factor in rows if re.fullmatch(pattern, path)), 1.0)
        return zero_part(u, frozen_kind(path, frozen))

    return jax.tree_util.tree_map_with_path(scale, updates)
