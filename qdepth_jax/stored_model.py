"""A model as it lies on disk, read leaf by leaf: a run's checkpoint, imported weights, or an export of any format.

Runs, imports and Orbax exports are checkpoints (checkpoint.py). An export in safetensors is a folder with `model.json`
that says what `meta` and the leaves of a checkpoint say: shapes, types and sums, so it is checked the same way.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from qdepth_jax import checkpoint, checkpoint_read, checkpoint_sum, errors, model_kinds, sharding, workdirs
from qdepth_jax.models import paligemma
from qdepth_jax.weights import hf_paligemma, open_pi_zero, safetensors_files, source, table, torch_pt

MANIFEST = "model.json"
FILES = ("safetensors", "hf_paligemma", "open_pi_zero", "open_pi_zero_pt")  # exports that are no Orbax checkpoints
AT_ONCE = 1 << 26  # bytes of small leaves that are read together


class Stored(NamedTuple):
    """Attributes:
    path: as the user gave it. folder: of the checkpoint's step, or of the export.
    form: "orbax" or one of FILES.
    meta: what stands beside a checkpoint: step, config, data, ...
    leaves: item -> path -> {"shape", "dtype", "sum"}; `params` always, `ema`, `state`, `train` where they are there.
    manifest: model.json of an export, {} where this is none.
    """

    path: str
    folder: epath.Path
    form: str
    meta: dict[str, Any]
    leaves: dict[str, dict[str, dict[str, Any]]]
    manifest: dict[str, Any]


def find(path: str, step: int | None = None) -> Stored:
    """What lies in a folder; no array is read.

    Args:
      path: workdir of a run, imported checkpoint or export; local or a bucket.
      step: of a checkpoint; default the newest whose `meta` is good.

    Raises:
      UserError: nothing of the kind is there, or it is damaged.
    """
    folder = workdirs.folder(path)
    manifest = read_manifest(path) if (folder / MANIFEST).exists() else {}
    form = manifest["weights"]["format"] if manifest else "orbax"
    if form != "orbax":
        if step not in (None, manifest["meta"]["step"]):
            raise errors.UserError(f"{path!r} is an export of step {manifest['meta']['step']}, there is no step {step}")
        return Stored(path, folder, form, manifest["meta"], manifest["weights"]["leaves"], manifest)
    if step is None:
        meta = checkpoint.read_meta(path)
    else:
        there = checkpoint_read.steps(folder / checkpoint.FOLDER)
        if step not in there:
            raise errors.UserError(f"{path!r} has no complete checkpoint of step {step}; there are {there or 'none'}")
        meta, cause = checkpoint_read.together(
            lambda ok: ok,
            folder / checkpoint.FOLDER / str(step),
            lambda: checkpoint_read.read_meta(folder / checkpoint.FOLDER / str(step)),
        )
        if cause:
            raise errors.UserError(f"the checkpoint of step {step} in {path!r} is damaged: {cause}")
    leaves = meta.pop("leaves")
    return Stored(path, folder / checkpoint.FOLDER / str(meta["step"]), form, meta, leaves, manifest)


def read_manifest(path: str) -> dict[str, Any]:
    """The checked model.json of an export.

    Raises:
      UserError: absent, no JSON, or other content than was written.
    """
    file = workdirs.folder(path) / MANIFEST
    try:
        content = json.loads(file.read_text())
        crc = content.pop("crc32")
    except FileNotFoundError:
        raise errors.UserError(f"{path!r} is no export: it has no {MANIFEST}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise errors.UserError(f"{file} is damaged ({error}): export again") from error
    if checkpoint_read.sealed(content)["crc32"] != crc:
        raise errors.UserError(f"{file} is not what was written (CRC): export again")
    return content


@functools.lru_cache(maxsize=8)
def shapes(kind: str, model: Any) -> dict[str, Any]:
    """{"params", "state"} of ShapeDtypeStructs of a model config; nothing is allocated."""
    if kind == "paligemma":  # not trained by the loop
        init = functools.partial(paligemma.init, model)
    else:
        init = model_kinds.MAKE_OBJECTIVE[kind](model).init
    return jax.eval_shape(init, jax.random.key(0))


def parameters_of(stored: Stored, average: bool = True) -> str:
    """The item that holds the parameters: `ema` where they were averaged and that is wanted."""
    return "ema" if average and "ema" in stored.leaves else "params"


def read_leaves(
    stored: Stored,
    item: str,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    agree: Callable[[bool], bool] = lambda ok: ok,
) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of leaves in the given order, each compared with its sum; a few small ones or one large at a time.

    Args:
      stored: from `find`.
      item: "params", "ema", "state" or "train".
      wanted: path -> ShapeDtypeStruct of the shape there; a sharding (None = this process's first device) and a dtype
        to which the array is cast after it was checked.
      agree: see checkpoint.restore_latest.

    Raises:
      UserError: a leaf is damaged or missing, or cannot be read now; on all processes, if on one.
    """
    read = _orbax_reader(stored, item) if stored.form == "orbax" else _file_reader(stored, item)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    saved = {
        path: jax.ShapeDtypeStruct(
            tuple(there["shape"]), jnp.dtype(there["dtype"]), sharding=wanted[path].sharding or device
        )
        for path, there in stored.leaves.get(item, {}).items()
        if path in wanted
    }
    for group in _groups({path: saved[path] for path in wanted}):
        # Sums wait for all processes: only when it is settled that each of them has its part.
        arrays, cause = checkpoint_read.together(agree, stored.folder, lambda group=group: read(group))
        if not cause:
            found = checkpoint_sum.sums(arrays)
            changed = [path for path in group if found[path] != stored.leaves[item][path]["sum"]]
            cause = f"other numbers than were saved in {item}/{changed[0]}" if changed else ""
        if not agree(not cause):
            cause = cause or "another process read other numbers"
            raise errors.UserError(f"{stored.path!r} is damaged ({stored.folder}): {cause}")
        for path in group:
            # No name here keeps the array while the next one is read.
            yield path, _cast(arrays.pop(path), wanted[path].dtype)


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    """On the CPU by NumPy (the same rounding, to nearest even): a program for every shape would take longer."""
    if array.dtype == dtype:
        return array
    if array.is_fully_addressable and checkpoint_sum.on_host({"": array}):
        value = np.asarray(array).astype(dtype)
        return jax.make_array_from_callback(value.shape, array.sharding, lambda index: value[index])
    return array.astype(dtype)


def _groups(leaves: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Small leaves together: a request for each would take longer than the reading."""
    group, size = {}, 0
    for path, leaf in leaves.items():
        bytes_ = math.prod(leaf.shape) * leaf.dtype.itemsize
        if group and size + bytes_ > AT_ONCE:
            yield group
            group, size = {}, 0
        group[path], size = leaf, size + bytes_
    if group:
        yield group


def whole(stored: Stored, item: str, dtype: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """`wanted` for all leaves of an item: as they are, or with floating-point numbers as `dtype`."""
    out = {}
    for path, leaf in stored.leaves.get(item, {}).items():
        floating = jnp.issubdtype(jnp.dtype(leaf["dtype"]), jnp.floating)
        out[path] = jax.ShapeDtypeStruct(
            tuple(leaf["shape"]), jnp.dtype(dtype if dtype and floating else leaf["dtype"])
        )
    return out


def restore_leaves(
    path: str,
    choose: Callable[[dict[str, Any]], dict[str, jax.ShapeDtypeStruct]],
    average: bool = True,
    agree: Callable[[bool], bool] = lambda ok: ok,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """checkpoint.restore_leaves for every kind of folder; there the arguments are explained."""
    if not (workdirs.folder(path) / MANIFEST).exists() or read_manifest(path)["weights"]["format"] == "orbax":
        return checkpoint.restore_leaves(path, choose, average, agree)
    stored = find(path)
    return dict(read_leaves(stored, "params", choose(stored.leaves["params"]), agree)), stored.meta


def restore_model(path: str, target: dict[str, Any], average: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """checkpoint.restore_model for every kind of folder: ({"params", "state"} as `target` says, meta).

    Parameters are cast to the target's types: an export in bfloat16 becomes float32 again.
    """
    stored = find(path)
    source, out = parameters_of(stored, average), {}
    for name, item in (("params", source), ("state", "state")):
        wanted = checkpoint_read.by_path(target[name])
        there = {p: leaf | {"dtype": str(wanted[p].dtype) if p in wanted else leaf["dtype"]} for p, leaf in
                 stored.leaves.get(item, {}).items()}  # fmt: skip
        checkpoint_read.check_fits(stored.folder, {"leaves": {item: there}}, {item: target[name]})
        found = dict(read_leaves(stored, item, wanted)) if wanted else {}
        out[name] = jax.tree.unflatten(jax.tree.structure(target[name]), [found[p] for p in wanted])
    return out, stored.meta


def shardings(stored: Stored) -> dict[str, dict[str, str]]:
    """item -> path -> how each leaf was split when it was saved, "" where the files do not say."""
    if stored.form != "orbax":
        return {}
    out: dict[str, dict[str, str]] = {}
    for item in stored.leaves:
        found = checkpoint_read.by_path(ocp.PyTreeCheckpointHandler().metadata(stored.folder / item).tree)
        out[item] = {}
        for path, leaf in found.items():
            how = getattr(leaf, "sharding", None)
            split = getattr(how, "partition_spec", None)
            out[item][path] = "" if how is None else _spec(split, how) if split is not None else "one device"
    return out


def _spec(spec: Any, how: Any) -> str:
    """("fsdp", None) on a mesh of 8 -> "fsdp,- on replica=1 fsdp=8 tensor=1"."""
    axes = [part if part is None or isinstance(part, str) else "+".join(part) for part in spec]
    shape = dict(zip(np.asarray(how.axis_names).tolist(), np.asarray(how.shape).tolist()))
    mesh = " ".join(f"{axis}={size}" for axis, size in shape.items())
    return f"({', '.join(axis or '-' for axis in axes)}) on {mesh}"


# ---- readers: {path: ShapeDtypeStruct as saved, with a sharding} -> {path: array} ----


def _orbax_reader(stored: Stored, item: str):
    handler = ocp.PyTreeCheckpointHandler()
    # Paths to key paths: a flat dict (the optimiser's) has keys that hold slashes.
    tree = handler.metadata(stored.folder / item).tree
    keys = {sharding.path_of(at): [entry.key for entry in at] for at, _ in jax.tree_util.tree_leaves_with_path(tree)}

    def read(group: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        asked: dict[str, Any] = {}
        for path, leaf in group.items():
            node = asked
            for key in keys[path][:-1]:
                node = node.setdefault(key, {})
            node[keys[path][-1]] = leaf
        how = jax.tree.map(
            lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), asked
        )
        out = handler.restore(
            stored.folder / item, args=ocp.args.PyTreeRestore(asked, restore_args=how, partial_restore=True)
        )
        found = checkpoint_read.by_path(out)
        return {path: found[path] for path in group}

    return read


def _file_reader(stored: Stored, item: str):
    weights, places = open_files(stored), {}
    if stored.form != "safetensors" and item == "params":
        model = model_kinds.model_config(ml_collections.ConfigDict(stored.meta["config"]))
        places = slices(stored.form, model, {path: leaf["shape"] for path, leaf in stored.leaves[item].items()})

    def one(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path not in places:
            value = weights.read(key_of(item, path))
        else:
            value = np.zeros(leaf.shape, leaf.dtype)
            for keys, index, row in places[path]:
                part = weights.read(keys[0])
                value[index] = part if row.load is None else row.load(part, leaf.shape[len(index) :])
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise checkpoint_read.Damaged(f"{item}/{path} is {value.dtype}{list(value.shape)}, not as {MANIFEST} says")
        return value

    def read(group: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        out = {}
        for path, leaf in group.items():
            value = one(path, leaf)
            out[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, v=value: v[index])
        return out

    return read


def check_files(stored: Stored) -> None:
    """Whether the weight files of an export are there and as long as they were written; none is opened.

    Raises:
      UserError: one is missing or has another size.
    """
    for name, size in stored.manifest["weights"]["files"].items():
        path = stored.folder / name
        if not path.exists():
            raise errors.UserError(f"{stored.path!r} is damaged: {name} is missing")
        if (found := path.stat().length) != size:
            raise errors.UserError(f"{stored.path!r} is damaged: {name} has {found} bytes, {size} were written")


def open_files(stored: Stored) -> source.Source:
    """The weight files of an export, after `check_files`."""
    check_files(stored)
    if stored.form == "open_pi_zero_pt":
        return torch_pt.open_source(str(stored.folder / "model.pt"))
    return safetensors_files.open_source(str(stored.folder))


def key_of(item: str, path: str) -> str:
    """Name of a leaf in a safetensors file: "params.llm.embedder.input_embedding"."""
    return f"{item}/{path}".replace("/", ".")


def slices(
    form: str, model: Any, shapes: Mapping[str, Any]
) -> dict[str, list[tuple[list[str], tuple[int, ...], table.Row]]]:
    """Our path -> [(their keys, index in our leaf, row)] of the leaves that the table of a format names.

    Several keys hold the same weight where that code base saves it so.
    """
    copies, rename = (lambda row: row.copies[:1]), (lambda key: key)
    if form == "hf_paligemma":
        rows, rename = hf_paligemma.rows(model), hf_paligemma.published
    else:
        rows, copies = open_pi_zero.TABLE, open_pi_zero.copies_of()
    out: dict[str, list[Any]] = {}
    for row in rows:
        if row.target in shapes:
            for layer in row.layers(tuple(shapes[row.target])):
                keys = [rename(row.key(layer, copy)) for copy in copies(row) or ("",)]
                out.setdefault(row.target, []).append((keys, layer + row.part, row))
    return out
