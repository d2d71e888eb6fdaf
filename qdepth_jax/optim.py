"""The optimiser: schedule, clipping, AdamW, learning-rate factors and freezing by path regex.

open-pi-zero trains two groups with AdamW at 5e-5, 200 warm-up steps, a cosine of 1e7 steps (in effect constant) and
a joint clip at norm 1; weight decay 0. DEVIATION: its AdamW keeps 8-bit moments and bf16 weights, our weights are
float32 and our moments float32 or, by `moment_dtype`, bfloat16.
"""

import difflib
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qdepth_jax import config as config_lib
from qdepth_jax import errors, sharding

FROZEN_KINDS = ("all", "last_layer", "last_layer_value")
MOMENT_DTYPES = ("float32", "bfloat16")
FrozenTable = tuple[tuple[str, str], ...]


def schedule(config: config_lib.OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by number of updates made before: linear warm-up, then cosine, constant or rsqrt.

    "rsqrt" falls with the inverse square root of the steps after warm-up, on a time scale of `rsqrt_steps` (the form of
    big_vision): it needs no total length, so a run can be prolonged.

    Raises:
      UserError: unknown schedule name, or a time scale below one step.
    """
    low, peak = config.min_learning_rate, config.learning_rate
    if config.schedule == "constant":
        body = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        steps = max(1, (config.cycle_steps or total_steps) - config.warmup_steps)
        body = optax.cosine_decay_schedule(peak, steps, alpha=low / peak if peak else 0.0)
    elif config.schedule == "rsqrt":
        scale = config.rsqrt_steps
        if scale < 1:
            raise errors.UserError(f"optim.rsqrt_steps={scale} must be at least 1")
        body = lambda count: peak * jnp.sqrt(scale / (scale + count))  # noqa: E731
    else:
        raise errors.UserError(f"optim.schedule={config.schedule!r} is unknown: use 'cosine', 'constant' or 'rsqrt'")
    if not config.warmup_steps:
        return body
    return optax.join_schedules([optax.linear_schedule(low, peak, config.warmup_steps), body], [config.warmup_steps])


def make(config: config_lib.OptimConfig, total_steps: int, frozen: FrozenTable = ()) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, learning-rate factors; frozen leaves hold no moments. Give it masked gradients.

    Args:
      config: see OptimConfig.
      total_steps: of the run, the default cosine length.
      frozen: rows of the model itself (e.g. the text embedding), applied before those of the config.

    Raises:
      UserError: an unknown kind, dtype or schedule; at `init`, a row that matches no parameter.
    """
    frozen = (*frozen, *config.frozen)
    for pattern, kind in frozen:
        if kind not in FROZEN_KINDS:
            raise errors.UserError(
                f"frozen row ({pattern!r}, {kind!r}): the second entry must be one of {FROZEN_KINDS}"
            )

    # As optax.adamw, but for the moments' dtype.
    adamw = optax.chain(
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, total_steps)),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform(
            {"trained": adamw, "frozen": optax.set_to_zero()},
            lambda params: _labels(params, frozen, config.scale),
        ),
        optax.stateless(lambda updates, params: _scale(updates, config.scale, frozen)),
    )


def scale_by_adam(config: config_lib.OptimConfig) -> optax.GradientTransformation:
    """Adam's direction, moments stored in `config.moment_dtype` and computed in float32.

    With b2 = 0.999 the second moment falls by at most a thousandth of itself in a step, and bfloat16 has steps of 1/256
    to 1/128: rounded to nearest it never falls. Measured over 15000 steps of normal gradients: it stays 2.2 times too
    large, 157 times after gradients fell to a tenth. So it is rounded up or down at random (`round_at_random`): mean
    1.00 and scatter 4 % in both cases. The first moment, which moves by a tenth, is rounded to nearest.

    `update` of bfloat16 moments needs `key=`, the run's key.

    Raises:
      UserError: another dtype.
    """
    if config.moment_dtype not in MOMENT_DTYPES:
        raise errors.UserError(f"optim.moment_dtype={config.moment_dtype!r} is unknown: use one of {MOMENT_DTYPES}")
    exact = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.moment_dtype == "float32":
        return exact

    def store(state: optax.ScaleByAdamState, key: Array) -> optax.ScaleByAdamState:
        words = jax.random.bits(jax.random.fold_in(key, state.count), (2,), jnp.uint32)

        def second(key_path, x):
            name = zlib.crc32(sharding.path_of(key_path).encode())
            return round_at_random(x, _hash(words ^ jnp.uint32(name)))

        return state._replace(mu=_half(state.mu), nu=jax.tree_util.tree_map_with_path(second, state.nu))

    def init(params):
        state = exact.init(params)
        return state._replace(mu=_half(state.mu), nu=_half(state.nu))

    def update(updates, state, params=None, *, key: Array, **_):
        moments = jax.tree.map(lambda x: x.astype(jnp.float32), (state.mu, state.nu))
        updates, state = exact.update(updates, optax.ScaleByAdamState(state.count, *moments), params)
        return updates, store(state, key)

    return optax.GradientTransformationExtraArgs(init, update)


def round_at_random(x: Array, words: Array) -> Array:
    """f32 -> bf16, to one of both neighbours so that the mean is x. `words`: two random u32.

    A function of the words and an element's index, on any devices.
    The noise is a hash of the element's index, not jax.random.bits: element-wise integer work that XLA fuses into the
    update, where random bits of a whole leaf would be arrays of its size in memory.
    """
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = _hash(_hash(index + words[0]) ^ words[1])
    # A bfloat16 is the upper half of a float32: noise below it carries into it as often as the cut-off part is large.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _half(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def _hash(x: Array) -> Array:
    """u32 -> u32, one to one; "lowbias32" of C. Wellons, Prospecting for Hash Functions (2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def group_norms(grads: Any, groups: tuple[tuple[str, str], ...]) -> dict[str, Array]:
    """L2 norm f32 of the gradients of each (name, path regex) row; full match, first row wins.

    Raises:
      UserError: a row without any parameter.
    """
    members: dict[str, list[Array]] = {name: [] for name, _ in groups}
    for key_path, g in jax.tree_util.tree_leaves_with_path(grads):
        path = sharding.path_of(key_path)
        name = next((name for name, pattern in groups if re.fullmatch(pattern, path)), None)
        if name is not None:
            members[name].append(g)
    empty = [name for name, leaves in members.items() if not leaves]
    if empty:
        raise errors.UserError(
            f"gradient groups {empty} hold no parameter: correct their rows in the objective's groups"
        )
    return {name: optax.tree.norm(leaves) for name, leaves in members.items()}


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
    if kind not in ("last_layer", "last_layer_value"):
        return x
    # Chosen element by element, which XLA fuses into whatever reads the result; setting a slice copies the leaf.
    zeroed = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == x.shape[0] - 1
    if kind == "last_layer_value":
        zeroed &= jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == 1
    return jnp.where(zeroed, jnp.zeros((), x.dtype), x)


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
