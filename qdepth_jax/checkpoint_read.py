"""Reading one checkpoint: what it should hold, does it fit, and is every array what was saved.

Orbax's own `restore` ends in a barrier: a process that fails to read leaves the others waiting in it. So the files are
read through its handlers, which wait for nobody, and the processes then agree on the outcome.
"""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from qdepth_jax import checkpoint_sum, errors, sharding, train_step

# Fields of TrainState that are items of their own; all others are scalars and lie in "train" beside the optimiser.
TREES = ("params", "state", "ema")

# Arrays lie on disk in pieces of at most this many bytes, whatever mesh saved them. A reader decodes whole pieces, so
# this bounds what another mesh reads in vain.
CHUNK_BYTES = 4 * 2**20

# What storage says when it cannot be read now, or not by us: no sign of damage. The first two stay until somebody acts.
_REFUSED = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED")
_UNAVAILABLE = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED"
)


class Damaged(Exception):
    """A checkpoint that is there but is not what was saved; the message says what is wrong."""


def items_of(state: train_step.TrainState) -> dict[str, Any]:
    """A TrainState (or its shapes) as the items of a checkpoint. Every field is in one of them."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    items = {name: fields.pop(name) for name in TREES}
    # As a flat dict: optax's nested tuples hold empty nodes that change with optax versions.
    items["train"] = fields | {"opt_state": by_path(fields.pop("opt_state"))}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def scalar_fields() -> list[str]:
    """Names of TrainState's scalar fields."""
    return [
        field.name for field in dataclasses.fields(train_step.TrainState) if field.name not in (*TREES, "opt_state")
    ]


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path, "img/head/kernel"."""
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def table(items: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """item -> path -> {"shape", "dtype", "sum"} of arrays on devices."""
    out = {}
    for name, tree in items.items():
        leaves = by_path(tree)
        found = checkpoint_sum.sums(leaves)
        out[name] = {
            path: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": found[path]} for path, x in leaves.items()
        }
    return out


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` as it will be read, with a CRC over the rest of it."""
    meta = json.loads(json.dumps(meta))
    return meta | {"crc32": _crc(meta)}


def steps(directory: epath.Path) -> list[int]:
    """Numbers of the complete checkpoints, newest first."""
    return sorted(ocp.utils.checkpoint_steps(directory), reverse=True) if directory.exists() else []


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The checked `meta` of one checkpoint, without its CRC.

    Raises:
      Damaged: absent, no JSON, or other content than was written.
    """
    path = folder / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text())
        crc = meta.pop("crc32")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{path} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} is no sealed JSON ({short(error)})") from error
    if crc != _crc(meta):
        raise Damaged(f"{path} is not what was written (CRC)")
    return meta


def check_fits(folder: epath.Path, meta: dict[str, Any], wanted: dict[str, Any], whole: bool = False) -> None:
    """Compares what a checkpoint holds with what is wanted, before any array is read.

    `whole`: the checkpoint may hold no further items either.

    Raises:
      UserError: listing every leaf that is missing, surplus, or of another shape or type.
    """
    problems = []
    for item in sorted(wanted.keys() | (meta["leaves"].keys() if whole else set())):
        there, here = dict(meta["leaves"].get(item, {})), by_path(wanted.get(item, {}))
        for path, leaf in here.items():
            found = there.pop(path, None)
            if found is None:
                problems.append(f"{item}/{path}: not in the checkpoint, {_form(leaf.shape, leaf.dtype)} here")
            elif (tuple(found["shape"]), found["dtype"]) != (tuple(leaf.shape), str(leaf.dtype)):
                before = _form(found["shape"], found["dtype"])
                problems.append(f"{item}/{path}: {before} in the checkpoint, {_form(leaf.shape, leaf.dtype)} here")
        for path, found in there.items():
            problems.append(f"{item}/{path}: {_form(found['shape'], found['dtype'])} in the checkpoint, not here")
    if problems:
        raise errors.UserError(
            f"checkpoint {folder} is one of another model or optimiser; restore the config or choose another "
            f"--workdir. {len(problems)} leaves differ:\n  " + "\n  ".join(problems)
        )


def together(agree: Callable[[bool], bool], folder: epath.Path, read: Callable[[], Any]) -> tuple[Any, str]:
    """(`read()`, "") if it succeeds on all processes, else (None, what is damaged), on all of them alike.

    Raises:
      TryAgain: on all of them, where storage does not answer one of them. UserError: where it refuses one.
    """
    value, cause, unavailable, refused = None, "", "", False
    try:
        value = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever a damaged file makes Orbax raise
        if _is_unavailable(error):
            unavailable, refused = short(error), _is_refused(error)
        else:
            cause = str(error) if isinstance(error, Damaged) else short(error)
    if not agree(not unavailable):
        kind = errors.TryAgain if agree(not refused) else errors.UserError  # the same exit code on all of them
        raise kind(
            f"checkpoint {folder} cannot be read at the moment, which is no sign of damage: "
            + (unavailable or "another process says why")
        )
    if not agree(not cause):
        return None, cause or "another process could not read it and says why"
    return value, ""


def read_items(
    folder: epath.Path,
    meta: dict[str, Any],
    wanted: dict[str, Any],
    agree: Callable[[bool], bool] = lambda ok: ok,
    partial: bool = False,
) -> tuple[dict[str, Any], str]:
    """Arrays of a checkpoint in the shardings of `wanted`, each compared with its sum.

    Args:
      folder: of one step.
      meta: of that checkpoint.
      wanted: item -> tree of ShapeDtypeStructs with shardings; fits the checkpoint.
      agree: see checkpoint.restore_latest.
      partial: the items of `wanted` are flat, path -> ShapeDtypeStruct, and leave out leaves.

    Returns:
      (item -> tree, "") or ({}, what is damaged).
    """
    items, cause = together(agree, folder, lambda: {k: _read_item(folder / k, v, partial) for k, v in wanted.items()})
    if cause:
        return {}, cause
    changed = []
    for name, tree in items.items():
        expected = meta["leaves"][name]
        found = checkpoint_sum.sums(by_path(tree))
        changed += [f"{name}/{path}" for path, value in found.items() if value != expected[path]["sum"]]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        cause = f"other numbers than were saved in {', '.join(changed[:5])}{more}"
    return ({}, cause or "another process read other numbers") if not agree(not cause) else (items, "")


def _read_item(folder: epath.Path, tree: Any, partial: bool) -> Any:
    flat = dict(tree) if partial else None
    tree = _nested(tree) if partial else tree
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return {}
    chunks = by_path(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_bytes_at_once(by_path(tree), chunks) / 10**9)
    asked = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), tree)
    out = handler.restore(folder, args=ocp.args.PyTreeRestore(tree, restore_args=asked, partial_restore=partial))
    if flat is None:
        return out
    found = by_path(out)
    return {path: found[path] for path in flat}


def _bytes_at_once(leaves: dict[str, jax.ShapeDtypeStruct], chunks: dict[str, Any]) -> int:
    """How many bytes Orbax may read at a time. Unbounded it holds the whole state twice: each part passes through a
    host buffer (and, decoded, a second one) on its way to its device. Orbax wants more than the largest single read,
    which is a shard rounded up to the chunks that it touches; a few percent of all shards keep many reads in flight."""
    largest, total = 0, 0
    for path, leaf in leaves.items():
        shard = leaf.sharding.shard_shape(leaf.shape)
        chunk = chunks[path].storage.chunk_shape if chunks[path].storage else leaf.shape
        read = [min(size, (-(-n // c) + (n % c > 0)) * c) for n, c, size in zip(shard, chunk, leaf.shape, strict=True)]
        largest = max(largest, math.prod(read) * leaf.dtype.itemsize)
        total += math.prod(shard) * leaf.dtype.itemsize * len(leaf.sharding.addressable_devices)
    return max(largest + CHUNK_BYTES, 16 * CHUNK_BYTES, total // 32)


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, name = path.split("/")
        node = out
        for part in above:
            node = node.setdefault(part, {})
        node[name] = leaf
    return out


def _crc(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _form(shape: Any, dtype: Any) -> str:
    return f"{dtype}{list(shape)}"


def _is_unavailable(error: BaseException) -> bool:
    return any(
        (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | NotADirectoryError))
        or _UNAVAILABLE.search(str(cause))
        for cause in _causes(error)
    )


def _is_refused(error: BaseException) -> bool:
    """Whether a later start would be refused too. RESOURCE_EXHAUSTED and CANCELLED of a store pass; EACCES does not."""
    return any(
        _REFUSED.search(str(cause)) or (isinstance(cause, OSError) and not errors.is_transient(cause))
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
