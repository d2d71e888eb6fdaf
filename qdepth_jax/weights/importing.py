"""From a file of weights to placed parameters: which reader and table belong to a format, and the model they give.

Used by tools/import_weights.py, which writes the result as a checkpoint.
"""

import ast
import functools
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qdepth_jax import config as config_lib
from qdepth_jax import errors, progress, sharding
from qdepth_jax.models import paligemma, policy, policy_config
from qdepth_jax.weights import (
    big_vision,
    hf_paligemma,
    lerobot_pi0,
    npz,
    open_pi_zero,
    openpi,
    orbax_params,
    resample,
    safetensors_files,
    source,
    table,
    torch_pt,
)


class Format(NamedTuple):
    """reader: path -> Source. names: the module with TITLE, clean, rows and config_of. with_config: weights of it lie
    beside a config.json."""

    reader: Callable[[str], source.Source]
    names: ModuleType
    with_config: bool = False


def _state_dict(path: str) -> source.Source:
    """A torch checkpoint, or the same names in safetensors, as tools/export_checkpoint.py writes them."""
    torch_file = path.rstrip("/").endswith((".pt", ".pth", ".bin"))
    return torch_pt.open_source(path) if torch_file else safetensors_files.open_source(path)


FORMATS: dict[str, Format] = {
    "big_vision": Format(npz.open_source, big_vision),
    "hf_paligemma": Format(safetensors_files.open_source, hf_paligemma, with_config=True),
    "open_pi_zero": Format(_state_dict, open_pi_zero),
    "openpi": Format(orbax_params.open_source, openpi),
    "lerobot_pi0": Format(safetensors_files.open_source, lerobot_pi0, with_config=True),
}
# Model config -> model_kind of experiments, init(config, key) -> {"params", "state"}.
MODELS = {
    policy_config.PolicyConfig: ("policy", policy.init),
    paligemma.PaligemmaConfig: ("paligemma", paligemma.init),
}
# Formats whose shapes show the heads; of the others, fields that are not shown and that other sizes follow from.
LINEN = ("big_vision", "openpi")
HEADS = {"head_dim": "head_dim", "siglip.heads": "vision_heads"}


class Opened(NamedTuple):
    """Weights whose every key has its place in `shapes` (ShapeDtypeStructs of the model's parameters)."""

    form: str
    weights: source.Source
    config: Any
    kind: str
    shapes: Any


def open_weights(form: str, path: str, image_size: int = 0, changes: list[str] | tuple[str, ...] = ()) -> Opened:
    """Opens a file and finds its model; reads names and shapes alone.

    Args:
      form: a key of FORMATS. path: what its reader takes.
      image_size: pixels for which to resample the positions of the vision tower; 0 = as they are.
      changes: FIELD=VALUE of the model config, FIELD with dots.

    Raises:
      UserError: see the reader and table.match.
    """
    if form not in FORMATS:
        raise errors.UserError(f"format {form!r} is unknown: use one of {', '.join(FORMATS)}")
    reader, names, with_config = FORMATS[form]
    weights = reader(path)
    try:
        about = hf_paligemma.read_about(path) if with_config else None
        given = dict(_change(text) for text in changes)
        heads = {HEADS[field]: given.pop(field) for field in HEADS if field in given and form not in LINEN}
        arguments: dict[str, Any] = heads | ({"about": about} if with_config else {})
        config = _config_of(names, path, weights, arguments)
        if image_size and image_size != config.siglip.image_size:
            weights = resample.Resampled(weights, image_size, config.siglip.patch)
            config = _config_of(names, path, weights, arguments)
        config = changed(config, given)
        kind, shapes = MODELS[type(config)][0], shapes_of(config)
        table.match(weights.specs, names.rows(config), shapes, names.TITLE, names.clean)
    except BaseException:
        weights.close()
        raise
    return Opened(form, weights, config, kind, shapes)


def _config_of(names: ModuleType, path: str, weights: source.Source, arguments: dict[str, Any]) -> Any:
    try:
        return names.config_of(weights.specs, **arguments)
    except errors.UserError:
        raise
    except (ValueError, IndexError) as error:  # an array of another rank than its name promises
        raise errors.UserError(
            f"{path}: the shapes are not those of {names.TITLE} ({error}): is it a file of that code base?"
        ) from error


@functools.cache
def shapes_of(config: Any) -> Any:
    """ShapeDtypeStructs of a model's parameters. Tracing takes a second, so each config is traced once."""
    init = MODELS[type(config)][1]
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))["params"]


def place(
    opened: Opened, mesh: Mesh, dtype: str = "float32", on_block: Callable[[], None] = lambda: None
) -> table.Loaded:
    """Reads the weights into the shards of a mesh, with a progress bar.

    Args:
      opened: from `open_weights`.
      mesh: where they go. dtype: in which.
      on_block: called after each block.

    Raises:
      UserError: sizes that the mesh does not divide, no room on the devices, or what reading finds.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), opened.shapes)
    check_room(sharding.place(mesh.shape, shapes), mesh)
    placed = sharding.state_shardings(mesh, shapes)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
    names = FORMATS[opened.form].names
    total = sum(spec.nbytes for spec in opened.weights.specs.values())
    bar = progress.Progress(total, f"reading {names.TITLE}", unit="B")

    def on_read(path: str, size: int) -> None:
        bar.update(size, path)
        on_block()

    loaded = table.load(
        opened.weights,
        names.rows(opened.config),
        target,
        names.TITLE,
        names.clean,
        on_read,
    )
    bar.close()
    return loaded


def check_room(rows: list[sharding.Row], mesh: Mesh) -> None:
    """Refuses weights that the devices cannot hold, before anything is read.

    Raises:
      UserError: with what is needed and what there is.
    """
    need, local = sum(row.bytes for row in rows), mesh.local_devices
    room = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in local]
    if local[0].platform == "cpu":  # its devices share the host's memory
        room = [npz.memory_bytes() / len(local)]
    if need > min(room):
        raise errors.UserError(
            f"these weights need {need / 2**30:.2f} GiB on each of {mesh.size} devices, which have "
            f"{min(room) / 2**30:.2f} GiB: use more devices, more of them in `fsdp`, or --dtype=bfloat16"
        )


def experiment(opened: Opened) -> dict[str, Any]:
    """An experiment config, as JSON types, whose model the weights are."""
    config = config_lib.default()
    config.name = f"imported_{opened.form}"
    config.model_kind = opened.kind
    config.model = config_lib.section(opened.config)
    return config_lib.to_json(config)


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A frozen config with fields replaced; "flow.steps" names a field of a field.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    plain = config_lib.section(config)
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = plain
        for level, parent in enumerate(parents):
            if not hasattr(node, "keys") or parent not in node:
                raise errors.UserError(f"the model has no section {'.'.join(parents[: level + 1])}")
            node = node[parent]
        if not hasattr(node, "keys") or name not in node:
            known = list(node.keys()) if hasattr(node, "keys") else []
            raise errors.UserError(f"the model has no field {path}{config_lib.suggest(name, known)}")
        with node.unlocked(), node.ignore_type():
            node[name] = value
    return config_lib.build(type(config), plain, "model") if changes else config


def _change(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise errors.UserError(f"change {text!r} must be FIELD=VALUE")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def summary(opened: Opened, loaded: table.Loaded) -> dict[str, Any]:
    """What was read, in JSON types."""
    leaves = jax.tree.leaves(loaded.params)
    return {
        "format": opened.form,
        "model_kind": opened.kind,
        "parameters": sum(x.size for x in leaves),
        "leaves": len(leaves),
        "read": len(loaded.read),
        "unused": loaded.unused,
        "missing": loaded.missing,
        "image_size": opened.config.siglip.image_size,
        "dtypes": sorted({str(spec.dtype) for spec in opened.weights.specs.values()}),
        "files": opened.weights.files,
    }
