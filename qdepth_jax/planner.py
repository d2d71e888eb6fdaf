"""A trained policy that plans for robots: observations in their own units -> chunks of actions in their own units.

Closed-loop evaluation (eval/robot.py) and the policy server (serve/) are the two users; what a number means on the
robot's side is decided here once. A batch has one of a few fixed sizes, so that nothing compiles while robots wait.

Noise of a plan depends on (seed, call) of its observation alone, never on its place in a batch.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax import depth as depth_values
from qdepth_jax import earlier_stages, errors, exported
from qdepth_jax.data import normalise, text
from qdepth_jax.models import depth_expert, flow, images, inference, policy, real_time, sampling, tokenizer


class Planner(NamedTuple):
    """Attributes:
    config, variables: of the policy, its parameters packed (inference.py). solver: of its flow.
    found: where it came from (exported.load); its parameters are gone.
    dataset: whose statistics are used. action, proprio: these.
    words: the text tokenizer.
    decoder: config and variables of the depth tokenizer, None = predicted depth is not decoded.
    """

    config: policy.PolicyConfig
    variables: dict[str, Any]
    found: exported.Exported
    dataset: str
    action: normalise.Normaliser
    proprio: normalise.Normaliser
    words: text.TextTokenizer
    decoder: tuple[tokenizer.TokenizerConfig, dict[str, Any]] | None
    solver: str = "euler"


class Row(NamedTuple):
    """One observation as the network takes it.

    Attributes:
      batch: image_{view} u8 [S, S, 3], text i32 [L], proprio f32 [1, Dp], view_mask bool [views]; as the config asks.
      noise: seed and call, u32 [2].
      previous, weights: f32 [Z, robot_action_dim] normalised, f32 [Z], see real_time.py; None = a chunk of its own.
    """

    batch: dict[str, np.ndarray]
    noise: np.ndarray
    previous: np.ndarray | None = None
    weights: np.ndarray | None = None


def load(
    path: str,
    dataset: str = "",
    decode_depth: bool = False,
    options: inference.Inference | None = None,
) -> Planner:
    """The policy of a run or an export, with the statistics of one data set.

    Args:
      dataset: name of one it was trained on, or a variant of that (libero_object_swap); "" where there is only one.
      decode_depth: also load the depth tokenizer that turns predicted codes into depth.
      options: steps and solver of the flow, and how weights are held.

    Raises:
      UserError: no policy there, one that needs a history, or none that was trained on this data set.
    """
    found = exported.load(path)
    config, stored = found.model, found.statistics
    if found.kind != "policy":
        raise errors.UserError(f"{path!r} holds a {found.kind}, not a policy")
    if config.proprio_steps > 1 or config.image_steps > 1:
        raise errors.UserError(
            f"the policy in {path!r} observes {config.proprio_steps} steps of proprioception and "
            f"{config.image_steps} images; closed loop keeps no history yet: train with one of each"
        )
    if not dataset and len(stored) > 1:
        raise errors.UserError(
            f"the policy in {path!r} was trained on {sorted(stored)}: say whose robot it drives with --dataset=NAME"
        )
    base = _whose(stored, dataset, f"the policy in {path!r}")
    if stored[base]["action"].kind == "normal" and config.flow.clip:
        logging.warning(
            "the policy in %r cuts its actions off %g standard deviations from their mean: it was trained with "
            "data.normalisation=normal and model.flow.clip=%g; train with model.flow.clip=0",
            path, config.flow.clip, config.flow.clip,
        )  # fmt: skip
    decoder = _decoder(path, found) if decode_depth else None
    options = options or inference.Inference()
    config = inference.configured(config, options)
    variables = found.variables | {"params": inference.pack(config, found.variables["params"], options.weights, True)}
    return Planner(
        config,
        variables,
        found._replace(variables={}),
        base,
        stored[base]["action"],
        stored[base]["proprio"],
        text.TextTokenizer(found.text_tokenizer),
        decoder,
        options.solver,
    )


def of_dataset(planner: Planner, dataset: str) -> Planner:
    """The same policy, nothing of it twice, with the statistics of another data set, named as for `load`.

    Raises:
      UserError: it was not trained on this data set.
    """
    base = _whose(planner.found.statistics, dataset, "the policy")
    return planner._replace(dataset=base, **planner.found.statistics[base])


def with_decoder(planner: Planner, path: str) -> Planner:
    """The same policy, loaded from `path`, with the tokenizer that turns its predicted codes into depth.

    Raises:
      UserError: it predicts no depth, or its tokenizer is missing or no longer the one that it learnt.
    """
    return planner._replace(decoder=_decoder(path, planner.found))


def _whose(stored: Collection[str], dataset: str, who: str) -> str:
    """The name of `stored` that is meant: that very one, or else the longest of which `dataset` is a variant."""
    named = [name for name in stored if not dataset or f"{dataset}_".startswith(f"{name}_")]
    if not named:
        raise errors.UserError(
            f"{who} was trained on {sorted(stored)}, not on {dataset!r}: --dataset=NAME says whose robot it drives"
        )
    return max(named, key=len)


def _decoder(path: str, found: exported.Exported) -> tuple[tokenizer.TokenizerConfig, dict[str, Any]] | None:
    """Of predicted codes; None for a head that predicts pixels."""
    if found.model.depth is None:
        raise errors.UserError(f"the policy in {path!r} has no depth expert: it cannot say depth")
    if found.model.depth_labels is None:
        raise errors.UserError(f"the depth expert of the policy in {path!r} was never trained to say depth")
    if found.model.depth.head == "pixels":
        return None
    if not found.depth_tokenizer:
        raise errors.UserError(f"{path!r} carries no depth tokenizer: export it again with one (--tokenizer=...)")
    coder, variables, _ = earlier_stages.load_tokenizer(found.depth_tokenizer)
    if found.codes not in ("", here := tokenizer.identity(coder, variables["params"], variables["state"])):
        raise errors.UserError(
            f"the policy in {path!r} learnt the codes of depth tokenizer {found.codes}, what lies at "
            f"{found.depth_tokenizer!r} now is {here}: each code means another depth. Put that one back, or use an "
            "export: tools/export_checkpoint.py --tokenizer=ITS_WORKDIR"
        )
    return coder, variables


def identity(planner: Planner) -> str:
    """16 hex digits of weights, statistics, words and sampler: what the answers depend on besides the observation."""
    words = planner.words.identity, planner.found.text_rule
    digest = hashlib.sha256(repr((planner.config, planner.action, planner.proprio, planner.solver, *words)).encode())
    leaves = jax.tree_util.tree_leaves_with_path(planner.variables, is_leaf=inference.is_layers)
    for path, leaf in leaves:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(inference.on_host(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def make_row(
    planner: Planner,
    pictures: dict[str, np.ndarray],
    state: np.ndarray,
    instruction: str,
    seed: int,
    call: int,
    previous: np.ndarray | None = None,
    frozen: int = 0,
) -> Row:
    """One observation, checked only where the model cannot take it.

    Args:
      pictures: view -> u8 [H, W, 3], resized on the device as in training.
      state: f32 [proprio dims of the data set], the robot's units.
      seed, call: of the noise, each in [0, 2^32).
      previous: standardised actions f32 [k <= Z, A] left of the chunk being executed, of which `frozen` will have been
        executed when the new one arrives.

    Raises:
      UserError: a state of another size, an instruction that is too long; `frozen` and `previous` that do not fit.
    """
    config, dims = planner.config, planner.proprio.statistics.dims
    if np.shape(state) != (dims,):
        raise errors.UserError(f"states of {planner.dataset} have {dims} numbers, got {list(np.shape(state))}")
    state = normalise.normalise(np.asarray(state, np.float32)[None], planner.proprio)
    batch = {"text": _text_ids(planner, instruction, state[0])}
    if config.proprio_steps:
        fill = max(0, planner.found.proprio_dim - state.shape[1])
        batch["proprio"] = np.pad(state, ((0, 0), (0, fill)))
    side = config.siglip.image_size
    for view in config.views:
        batch[f"image_{view}"] = (
            _resized(pictures[view], side) if view in pictures else np.zeros((side, side, 3), np.uint8)
        )
    if config.missing_views:
        batch["view_mask"] = np.asarray([view in pictures for view in config.views])
    row = Row(batch, np.asarray([seed, call], np.uint32))
    if previous is None:
        return row
    weights = real_time.soft_weights(frozen, len(previous), config.horizon)
    old = np.zeros((config.horizon, config.robot_action_dim), np.float32)
    old[: len(previous)] = normalise.normalise(previous, planner.action)
    return row._replace(previous=old, weights=weights)


def _text_ids(planner: Planner, instruction: str, state: np.ndarray) -> np.ndarray:
    """i32 [L]; state: f32 [D] normalised."""
    ids, most = planner.words.encode(instruction, planner.found.text_rule, state), planner.found.max_text_tokens
    if len(ids) > most:
        state_too = ", the state among them" if planner.found.text_rule == "openpi_state" else ""
        raise errors.UserError(
            f"the instruction comes to {len(ids)} tokens{state_too}, this policy takes {most}: shorten "
            f"{instruction[:60]!r}{'...' if len(instruction) > 60 else ''}"
        )
    return np.pad(np.asarray(ids, np.int32), (0, most - len(ids)), constant_values=text.PAD)


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    """u8 [H, W, 3] -> u8 [S, S, 3]: what images.prepare makes of it, which rounds to whole grey values.

    Compiled once per size, of which an evaluation has one; the server's pictures come resized (serve/observation.py).
    """
    if picture.shape[:2] == (side, side):
        return np.asarray(picture)
    return np.asarray(_resize_program(picture.shape[0], picture.shape[1], side)(np.asarray(picture)))


@functools.cache
def _resize_program(height: int, width: int, side: int) -> Callable[[np.ndarray], jax.Array]:
    shape = jax.ShapeDtypeStruct((height, width, 3), jnp.uint8)
    return jax.jit(lambda x: images.resize(x[None], side)[0].astype(jnp.uint8)).lower(shape).compile()


def plan(planner: Planner, rows: Sequence[Row], size: int = 0, variant: str = "inpaint") -> np.ndarray:
    """Standardised actions of each row, in the robot's units: f32 [rows, Z, robot_action_dim]. Waits for the device.

    Args:
      size: rows of the program, 0 = as many as there are; the first row fills up what is missing.
      variant: of real-time chunking, for rows that have an old chunk.
    """
    return _run(planner, rows, size, variant, depth=False)[0]


def plan_with_depth(
    planner: Planner, rows: Sequence[Row], size: int = 0, variant: str = "inpaint"
) -> tuple[np.ndarray, np.ndarray]:
    """`plan` and `predict_depth` by one program, which sees the pictures once. Equal to both but for rounding."""
    _check_depth(planner)
    return _run(planner, rows, size, variant, depth=True)


def predict_depth(planner: Planner, rows: Sequence[Row], size: int = 0) -> np.ndarray:
    """Depth of the main view that the policy believes in: f32 [rows, R, R], metres or relative inverse depth."""
    _check_depth(planner)
    coder, variables = planner.decoder or (None, None)
    batch = _stack(rows, size)
    return np.asarray(_depth(planner.config, coder, planner.variables, variables, batch))[: len(rows)]


def _check_depth(planner: Planner) -> None:
    if planner.config.depth is None:
        raise errors.UserError("this policy has no depth expert")
    if planner.config.depth.head == "codes" and planner.decoder is None:
        raise errors.UserError("predicted depth codes need the depth tokenizer: load with decode_depth=True")


def _run(planner: Planner, rows: Sequence[Row], size: int, variant: str, depth: bool):
    """Actions in the robot's units, and depth or None."""
    batch = _stack(rows, size)
    noise = np.stack([row.noise for row in _filled(rows, size)])
    old = None
    if any(row.previous is not None for row in rows):
        old = tuple(np.stack(x) for x in zip(*(_old(planner.config, row) for row in _filled(rows, size))))
    coder, coder_variables = (planner.decoder or (None, None)) if depth else (None, None)
    asked = _Asked(planner.config, planner.solver, variant if old else "", depth, coder)
    chunk, found = _plan(asked, planner.variables, coder_variables, batch, noise, old)
    actions = normalise.unnormalise(np.asarray(chunk)[: len(rows)], planner.action)
    return actions, np.asarray(found)[: len(rows)] if depth else None


def _filled(rows: Sequence[Row], size: int) -> list[Row]:
    return [*rows, *[rows[0]] * (size - len(rows))] if size else list(rows)


def _stack(rows: Sequence[Row], size: int) -> dict[str, np.ndarray]:
    return {key: np.stack([row.batch[key] for row in _filled(rows, size)]) for key in rows[0].batch}


def _old(config: policy.PolicyConfig, row: Row) -> tuple[np.ndarray, np.ndarray]:
    if row.previous is not None:
        return row.previous, row.weights
    return np.zeros((config.horizon, config.robot_action_dim), np.float32), np.zeros(config.horizon, np.float32)


def _noise(config: policy.PolicyConfig, noise: jax.Array) -> jax.Array:
    """u32 [B, 2] -> f32 [B, Z, A]."""
    keys = jax.vmap(lambda pair: jax.random.split(jax.random.fold_in(jax.random.key(pair[0]), pair[1]), 1)[0])(noise)
    return flow.sample_noise(keys, (config.horizon, config.action_dim))


class _Asked(NamedTuple):
    """What makes one program differ from another. variant: of real-time chunking, "" = no old chunk."""

    config: policy.PolicyConfig
    solver: str
    variant: str
    depth: bool
    coder: tokenizer.TokenizerConfig | None


@functools.partial(jax.jit, static_argnums=0)
def _plan(asked: _Asked, variables, coder_variables, batch, noise, old):
    config, params, state = asked.config, variables["params"], variables["state"]
    prefix, noise = sampling.run_prefix(config, params, batch, asked.depth), _noise(config, noise)
    if asked.variant:
        chunk = real_time.continue_chunk(config, prefix.velocity, noise, *old, asked.variant, asked.solver)
    else:
        chunk = sampling.integrate(config, prefix.velocity, noise, asked.solver)
    if not asked.depth:
        return chunk, None
    return chunk, _decoded(config, asked.coder, coder_variables, sampling.depth_of(config, state, prefix.depth))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _depth(config, coder, variables, coder_variables, batch):
    found = sampling.predict_depth(config, variables["params"], variables["state"], batch)
    return _decoded(config, coder, coder_variables, found)


def _decoded(config, coder, coder_variables, found):
    """What `sampling.predict_depth` returns -> f32 [B, R, R], metres or relative inverse depth."""
    if config.depth.head == "pixels":
        x = depth_expert.pixel_map(found, config.depth)
        return depth_values.denormalise(jnp.clip(x, -1.0, 1.0), config.depth.range)
    codes = jnp.argmax(found, axis=-1)
    x = tokenizer.decode(coder, coder_variables["params"], coder_variables["state"], codes)
    return depth_values.denormalise(x, coder.range)
