"""Experiment configuration: small frozen dataclasses, ConfigDicts on the command line, one strict conversion between.

An experiment file (`experiments/NAME.py`) has `get_config(arg)`; it starts from `default()` and names only what
differs. `--config.a.b=value` overrides any field; `build` turns a section into its dataclass and refuses
unknown keys.
No JAX here: configs load in milliseconds.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

from qdepth_jax import errors
from qdepth_jax.data import data_config
from qdepth_jax.models import augment_config

T = TypeVar("T")

_MAY_BE_ZERO = ("eval_every", "keep_every", "keep_best", "max_skipped")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The host loop.

    Attributes:
      total_steps: optimiser steps.
      batch_size: global batch in examples, over all hosts and micro-batches.
      micro_batches: the step scans over this many equal parts of the batch and adds up gradients.
      log_every, eval_every, checkpoint_every: steps between metric lines, validations (eval_every 0 = never),
        checkpoints.
      eval_batches: batches of held-out data per validation.
      keep_checkpoints: how many of the newest checkpoints stay on disk.
      keep_every: checkpoints of every multiple of this step stay for good; 0 = none.
      keep_best: so many checkpoints with the best `best_metric` stay too; 0 = none.
      best_metric, best_mode: a metric of a validation, and whether "min" or "max" of it is best; "val/loss" is refused
        where the weight of the depth loss in it decays: "val/flow_loss".
      max_skipped: the run stops when more than so many steps in a row had a gradient that is not finite (each of them
        changes nothing and is counted).
      prefetch: batches prepared ahead of the step; bounds the loader's memory.
    """

    total_steps: int = 1000
    batch_size: int = 32
    micro_batches: int = 1
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 4
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "val/loss"
    best_mode: str = "min"
    max_skipped: int = 10
    prefetch: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and value < least:
                raise errors.UserError(f"train.{field.name}={value} must be at least {least}")
        if self.best_mode not in ("min", "max"):
            raise errors.UserError(f"train.best_mode={self.best_mode!r}: use 'min' or 'max'")
        if self.keep_best and not self.eval_every:
            raise errors.UserError(
                f"train.keep_best={self.keep_best} needs validations to tell the best: set train.eval_every"
            )
        if self.keep_best and self.checkpoint_every % self.eval_every:
            raise errors.UserError(
                f"train.keep_best={self.keep_best}: each checkpoint needs a validation of its own step, so "
                f"train.checkpoint_every={self.checkpoint_every} must be a multiple of "
                f"train.eval_every={self.eval_every}"
            )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping; path tables select by full-match regex over "img/...", "llm/...".

    Attributes:
      learning_rate: peak, after warm-up.
      schedule: "cosine" (from the peak down to min_learning_rate over cycle_steps, then constant) | "constant" |
        "rsqrt" (the peak times sqrt(rsqrt_steps / (rsqrt_steps + steps after warm-up))).
      warmup_steps: linear, from min_learning_rate.
      cycle_steps: length of the cosine; 0 = total_steps of the run.
      rsqrt_steps: time scale of "rsqrt".
      moment_dtype: "float32" or "bfloat16", how both of Adam's moments are stored; they are computed in float32.
      clip_norm: global L2 norm of the trained gradients.
      frozen: (path regex, kind) rows (optim.FROZEN_KINDS) beside those of the model itself.
      scale: (path regex, factor) rows on the learning rate, first match wins, 1 where none matches.
      ema_decay: decay of the averaged parameters; 0 = keep none.
    """

    learning_rate: float = 5e-5
    schedule: str = "cosine"
    warmup_steps: int = 200
    cycle_steps: int = 0
    rsqrt_steps: int = 10_000
    moment_dtype: str = "float32"
    min_learning_rate: float = 1e-8
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    frozen: tuple[tuple[str, str], ...] = ()
    scale: tuple[tuple[str, float], ...] = ()
    ema_decay: float = 0.0

    def __post_init__(self):
        for name in ("learning_rate", "min_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise errors.UserError(f"optim.{name}={value} must be a number >= 0")
        # Clipping to 0 would train nothing, and without eps a parameter whose gradient is 0 becomes 0/0.
        for name, hint in (("clip_norm", "1e9 clips nothing"), ("eps", "1e-8 is usual")):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise errors.UserError(f"optim.{name}={value} must be a number > 0 ({hint})")
        for name in ("b1", "b2", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise errors.UserError(f"optim.{name}={getattr(self, name)} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most one) takes all that remain. The batch is split over replica x fsdp.

    Attributes:
      replica: copies of the model; the only axis that may cross slices, so the number of slices must divide it.
      fsdp: ways to split parameters, gradients and moments; 128 at most for SigLIP's width.
      tensor: ways to split heads and mlp width; 8 at most for Gemma's heads.
      slices: groups of devices with a fast network inside and a slow one between; 0 = what the devices say (on
        anything but TPUs: one), n = the device list cut into n equal parts (GPU islands, simulated devices).
    """

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 0


def default() -> ml_collections.ConfigDict:
    """The sections every experiment has. `model` is set by the experiment with `section(...)`."""
    config = ml_collections.ConfigDict()
    config.name = "unnamed"
    config.seed = 0
    config.model_kind = "policy"  # module of qdepth_jax.models that offers Config and make_objective
    config.tokenizer = ""  # workdir of a trained depth tokenizer: the policy takes its codebook
    config.init_from = ""  # workdir of an earlier stage, imported weights or an export: parameters are taken from there
    config.init_depth_from = "fresh"  # a new depth expert starts at random, or as a copy of the "action" expert
    config.eval_split = ""  # split of the held-out episodes; empty = data.held_out_every decides
    config.train = section(TrainConfig())
    config.optim = section(OptimConfig())
    config.mesh = section(MeshConfig())
    config.augment = section(augment_config.AugmentConfig())  # of a policy's training images; the default is none
    config.data = section(data_config.DataConfig())
    del config.data["datasets"]  # the sources are named sections of their own: --config.datasets.NAME.path=...
    config.datasets = ml_collections.ConfigDict()
    return config


def dataset(path: str, **fields: Any) -> ml_collections.ConfigDict:
    """A source of the mix, for `config.datasets.NAME = dataset(...)`; see data_config.DatasetConfig."""
    source = section(data_config.DatasetConfig(path=path, **fields))
    del source["name"]  # the section's own name
    return source


def section(instance: Any) -> ml_collections.ConfigDict:
    """A frozen dataclass as a ConfigDict section, nested dataclasses included."""
    fields = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        fields[field.name] = section(value) if dataclasses.is_dataclass(value) else _plain(value)
    return ml_collections.ConfigDict(fields, convert_dict=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in value)
    return value


def build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """A ConfigDict section (or dict) as its dataclass; `path` names the section in messages.

    Raises:
      UserError: an unknown key, with the nearest known one, or a value of another type than the field's.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    out = {}
    for key in values:
        if key not in known:
            raise errors.UserError(f"unknown config key {path}.{key}{suggest(key, known)}")
        out[key] = _convert(hints[key], values[key], f"{path}.{key}")
    return cls(**out)


def suggest(key: str, known: typing.Iterable[str]) -> str:
    """': did you mean "x"?' with the nearest known name, or the list of names."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f': did you mean "{near[0]}"?' if near else f": known keys are {', '.join(sorted(known))}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        rest = [a for a in args if a is not type(None)]
        is_str = isinstance(value, str)
        return _convert(next((a for a in rest if (a is str) == is_str), rest[0]), value, path)
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise errors.UserError(f"{path} must be a section of keys, got {value!r}")
        return build(hint, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise errors.UserError(f"{path} must be a list, got {value!r}")
        item = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        if item is None and len(value) != len(args):
            raise errors.UserError(f"{path} must have {len(args)} entries, got {len(value)}: {value!r}")
        pairs = ((item, v) for v in value) if item else zip(args, value, strict=True)
        return tuple(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(pairs))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise errors.UserError(f"{path} must be {hint.__name__}, got {value!r}")
    return value


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A ConfigDict as plain JSON types (tuples become lists), stable under a round trip."""
    return json.loads(json.dumps(config.to_dict(), default=lambda o: o.to_dict()))


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Readable list of leaves in which two `to_json` trees differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        out = []
        for key in sorted(a.keys() | b.keys()):
            out += differences(a.get(key, "<absent>"), b.get(key, "<absent>"), f"{path}.{key}" if path else key)
        return out
    return [] if a == b else [f"{path}: {a!r} there, {b!r} here"]
