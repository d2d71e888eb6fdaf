"""A model as it lies on disk, read leaf by leaf: a run's checkpoint, imported weights, or an export of any format.

Runs, imports and Orbax exports are checkpoints (checkpoint.py). An export in safetensors is a folder with `model.json`
that says what `meta` and the leaves of a checkpoint say: shapes, types and sums, so it is checked the same way.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from qdepth_jax import checkpoint, checkpoint_read, checkpoint_sum, errors, workdirs
from qdepth_jax.weights import open_pi_zero, safetensors_write

MANIFEST = "model.json"
FILES = ("safetensors", "open_pi_zero", "open_pi_zero_pt")  # export formats that are no Orbax checkpoints


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


def parameters_of(stored: Stored, average: bool = True) -> str:
    """The item that holds the parameters: `ema` where they were averaged and that is wanted."""
    return "ema" if average and "ema" in stored.leaves else "params"


def read_leaves(
    stored: Stored, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of leaves, one at a time, each compared with its sum.

    Args:
      stored: from `find`.
      item: "params", "ema", "state" or "train".
      wanted: path -> ShapeDtypeStruct of the shape there; a sharding (None = this process's first device) and a dtype
        to which the array is cast after it was checked.

    Raises:
      UserError: a leaf is damaged or missing, or cannot be read now.
    """
    read = _orbax_reader(stored, item) if stored.form == "orbax" else _file_reader(stored, item)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for path, leaf in wanted.items():
        saved = stored.leaves[item][path]
        sharding = leaf.sharding or device

        def one(path=path, saved=saved, sharding=sharding):
            array = read(path, saved, sharding)
            if checkpoint_sum.sums({path: array})[path] != saved["sum"]:
                raise checkpoint_read.Damaged(f"other numbers than were saved in {item}/{path}")
            return array

        array, cause = checkpoint_read.together(lambda ok: ok, stored.folder, one)
        if cause:
            raise errors.UserError(f"{stored.path!r} is damaged ({stored.folder}): {cause}")
        yield path, array if array.dtype == leaf.dtype else array.astype(leaf.dtype)


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
    # One leaf at a time; that all processes could read theirs is settled once, at the end.
    found, failure = {}, None
    try:
        found = dict(read_leaves(stored, "params", choose(stored.leaves["params"])))
    except errors.UserError as error:
        failure = error
    if not agree(failure is None):
        raise failure or errors.UserError(f"another process could not read {path!r} and says why")
    return found, stored.meta


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
            spec = getattr(how, "partition_spec", None)
            out[item][path] = "" if how is None else _spec(spec, how) if spec is not None else "one device"
    return out


def _spec(spec: Any, how: Any) -> str:
    """("fsdp", None) on a mesh of 8 -> "fsdp,- on replica=1 fsdp=8 tensor=1"."""
    axes = [part if part is None or isinstance(part, str) else "+".join(part) for part in spec]
    shape = dict(zip(np.asarray(how.axis_names).tolist(), np.asarray(how.shape).tolist()))
    mesh = " ".join(f"{axis}={size}" for axis, size in shape.items())
    return f"({', '.join(axis or '-' for axis in axes)}) on {mesh}"


# ---- readers: (path, saved leaf, sharding) -> array, as it was saved ----


def _orbax_reader(stored: Stored, item: str):
    handler = ocp.PyTreeCheckpointHandler()
    # Paths to key paths: a flat dict (the optimiser's) has keys that hold slashes.
    tree = ocp.PyTreeCheckpointHandler().metadata(stored.folder / item).tree
    keys = {}
    for key_path, _ in jax.tree_util.tree_leaves_with_path(tree):
        keys[checkpoint_read.sharding.path_of(key_path)] = [entry.key for entry in key_path]

    def read(path: str, saved: dict[str, Any], sharding: jax.sharding.Sharding) -> jax.Array:
        shape, dtype = tuple(saved["shape"]), jnp.dtype(saved["dtype"])
        leaf: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        asked: Any = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype)
        for key in reversed(keys[path]):
            leaf, asked = {key: leaf}, {key: asked}
        out = handler.restore(
            stored.folder / item, args=ocp.args.PyTreeRestore(leaf, restore_args=asked, partial_restore=True)
        )
        return jax.tree.leaves(out)[0]

    return read


def _file_reader(stored: Stored, item: str):
    place = _in_files(stored)
    slices = open_pi_zero_slices(stored.leaves["params"]) if stored.form != "safetensors" else {}

    def read(path: str, saved: dict[str, Any], sharding: jax.sharding.Sharding) -> jax.Array:
        shape, dtype = tuple(saved["shape"]), jnp.dtype(saved["dtype"])
        if item == "params" and slices:
            value = np.zeros(shape, dtype)
            for key, index, row in slices[path]:
                value[index] = row.load(place(key), shape[len(index) :])
        else:
            value = place(key_of(item, path))
        if (value.shape, value.dtype) != (shape, dtype):
            raise checkpoint_read.Damaged(f"{item}/{path} is {value.dtype}{list(value.shape)}, not as {MANIFEST} says")
        return jax.make_array_from_callback(shape, sharding, lambda index: value[index])

    return read


def key_of(item: str, path: str) -> str:
    """Name of a leaf in a safetensors file: "params.llm.embedder.input_embedding"."""
    return f"{item}/{path}".replace("/", ".")


def open_pi_zero_slices(leaves: Mapping[str, Any]) -> dict[str, list[tuple[str, tuple[int, ...], open_pi_zero.Row]]]:
    """Our path -> (open-pi-zero key, index in our leaf, row) of what its table has; one copy of the expert."""
    out: dict[str, list[Any]] = {}
    for row in open_pi_zero.TABLE:
        if row.target in leaves:
            layers = [(i,) for i in range(leaves[row.target]["shape"][0])] if "{i}" in row.source else [()]
            for layer in layers:
                key = open_pi_zero._source_key(row, layer)
                out.setdefault(row.target, []).append((key, layer + row.part, row))
    return out


def _in_files(stored: Stored) -> Callable[[str], np.ndarray]:
    """key -> array, from all weight files of an export; sizes are checked before anything is read."""
    for name, size in stored.manifest["weights"]["files"].items():
        path = stored.folder / name
        if not path.exists():
            raise errors.UserError(f"{stored.path!r} is damaged: {name} is missing")
        if (found := path.stat().length) != size:
            raise errors.UserError(f"{stored.path!r} is damaged: {name} has {found} bytes, {size} were written")
    return _safetensors(stored)


def _safetensors(stored: Stored) -> Callable[[str], np.ndarray]:
    places, names = {}, {text: name for name, text in safetensors_write.DTYPES.items()}
    for name in stored.manifest["weights"]["files"]:
        if name.endswith(".safetensors"):
            with (stored.folder / name).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            places |= {key: (name, 8 + size, leaf) for key, leaf in header.items()}

    def read(key: str) -> np.ndarray:
        if key not in places:
            raise checkpoint_read.Damaged(f"{key} is in none of the files")
        name, start, leaf = places[key]
        begin, end = leaf["data_offsets"]
        with (stored.folder / name).open("rb") as file:
            file.seek(start + begin)
            content = file.read(end - begin)
        dtype, shape = jnp.dtype(names[leaf["dtype"]]), tuple(leaf["shape"])
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise checkpoint_read.Damaged(f"{name} ends within {key}")
        return np.frombuffer(content, dtype).reshape(shape)

    return read
