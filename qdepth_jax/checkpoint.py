"""Checkpoints: Orbax, asynchronous, atomic; restored straight to the target sharding on any number of devices.

One folder per step under WORKDIR/checkpoints with these items, so that a reader takes only what it needs:
  params     trained parameters                    state  codebooks and counts
  ema        averaged parameters (absent if none)   train  optimiser state and step
  meta       JSON: step, data position and fingerprint, experiment config, statistics, tokenizer identity
"""

import json
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from qdepth_jax import errors, train_step

FOLDER = "checkpoints"


def open_manager(workdir: str, keep: int = 1, read_only: bool = False) -> ocp.CheckpointManager:
    """The checkpoint manager of a run; keeps the newest `keep` checkpoints.

    Raises:
      UserError: read_only and the folder does not exist.
    """
    path = pathlib.Path(workdir).absolute() / FOLDER
    if read_only and not path.is_dir():
        raise errors.UserError(
            f"no checkpoints in {workdir!r}: {path} does not exist (is this the --workdir of a run?)"
        )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep, create=not read_only, read_only=read_only
    )
    # Named up front, so that a reader can ask what a checkpoint holds before it restores anything.
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "state", "ema", "train")}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: train_step.TrainState, meta: dict[str, Any], step: int) -> None:
    """Start an asynchronous save; device arrays are copied to the host before this returns."""
    items = {
        "params": ocp.args.StandardSave(state.params),
        "train": ocp.args.StandardSave(_train_item(state)),
        "meta": ocp.args.JsonSave(meta),
    }
    if jax.tree.leaves(state.state):
        items["state"] = ocp.args.StandardSave(state.state)
    if state.ema is not None:
        items["ema"] = ocp.args.StandardSave(state.ema)
    manager.save(step, args=ocp.args.Composite(**items))


def restore(manager: ocp.CheckpointManager, step: int, target: train_step.TrainState) -> train_step.TrainState:
    """The whole train state of a checkpoint, placed as `target` (ShapeDtypeStructs with shardings) says."""
    items = {
        "params": ocp.args.StandardRestore(target.params),
        "train": ocp.args.StandardRestore(_train_item(target)),
    }
    if jax.tree.leaves(target.state):
        items["state"] = ocp.args.StandardRestore(target.state)
    if target.ema is not None:
        items["ema"] = ocp.args.StandardRestore(target.ema)
    try:
        out = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # whatever a damaged file makes Orbax raise
        folder = epath.Path(manager.directory) / str(step)
        older = [s for s in manager.all_steps() if s < step]
        go_on = f"delete {folder} to continue from step {max(older)}" if older else "there is no older one"
        raise errors.UserError(f"checkpoint {folder} cannot be restored; {go_on}. Cause: {_short(error)}") from error
    leaves = jax.tree.leaves(out["train"]["opt_state"])
    opt_state = jax.tree.unflatten(jax.tree.structure(target.opt_state), leaves)
    return train_step.TrainState(
        out["train"]["step"],
        out["params"],
        out["state"] if "state" in items else target.state,
        opt_state,
        out["ema"] if "ema" in items else None,
        out["train"]["skipped"],
        out["train"]["skipped_in_row"],
    )


def restore_model(workdir: str, target: dict[str, Any], average: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and model state of a run's last checkpoint, without its optimiser.

    Args:
      workdir: of the run.
      target: {"params", "state"} of ShapeDtypeStructs with shardings.
      average: take the averaged parameters where the run kept them.

    Returns:
      ({"params", "state"}, meta).
    """
    with open_manager(workdir, read_only=True) as manager:
        step = last_step(manager, workdir)
        kept_average = (epath.Path(manager.directory) / str(step) / "ema").exists()
        source = "ema" if average and kept_average else "params"
        items = {source: ocp.args.StandardRestore(target["params"]), "meta": ocp.args.JsonRestore()}
        if jax.tree.leaves(target["state"]):
            items["state"] = ocp.args.StandardRestore(target["state"])
        out = manager.restore(step, args=ocp.args.Composite(**items))
        return {"params": out[source], "state": out["state"] if "state" in items else {}}, out["meta"]


def read_meta(workdir: str) -> dict[str, Any]:
    """The `meta` item of a run's last checkpoint."""
    with open_manager(workdir, read_only=True) as manager:
        step = last_step(manager, workdir)
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def last_step(manager: ocp.CheckpointManager, workdir: str) -> int:
    """Step of the newest complete checkpoint.

    Raises:
      UserError: there is none.
    """
    step = manager.latest_step()
    if step is None:
        raise errors.UserError(f"no complete checkpoint in {workdir!r}: train it first, or name another workdir")
    return step


ALLOWANCE = 4 * 2**20  # bytes per checkpoint beside its arrays: Orbax writes some dozen small files


def check_disk(workdir: str, abstract: Any, keep: int, existing: int = 0) -> None:
    """Refuse to start a run whose checkpoints cannot fit.

    Raises:
      UserError: less free space than keep + 1 checkpoints of this state, the `existing` ones counted in.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)) + ALLOWANCE
    need, free = max(1, keep + 1 - existing) * size, shutil.disk_usage(workdir).free
    if need > free:
        raise errors.UserError(
            f"{workdir!r} has {free / 2**20:.0f} MiB free, but {keep} checkpoints and one being written need "
            f"{need / 2**20:.0f} MiB: free space, choose another --workdir or lower train.keep_checkpoints"
        )


# Config keys that change no value of the run.
_MAY_CHANGE = re.compile(
    r"train\.(log_every|eval_every|eval_batches|checkpoint_every|keep_checkpoints|total_steps|prefetch)|mesh\..*"
    r"|data\.(threads|index_dir|text_tokenizer)|datasets\.[^.]+\.(path|depth|depth_tokens)|tokenizer"
)


def check_same_experiment(workdir: str, config: dict[str, Any]) -> None:
    """Refuse a workdir that holds another experiment; writes nothing.

    Run lengths, intervals, the mesh and where things lie may change between starts, everything else may not. What lies
    there is compared by content: see Loader.identity.

    Raises:
      UserError: listing the keys that differ.
    """
    from qdepth_jax import config as config_lib

    path = pathlib.Path(workdir) / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise errors.UserError(f"{path} is damaged ({error}): restore it, or choose another --workdir") from error
        found = config_lib.differences(before, config)
        found = [line for line in found if not _MAY_CHANGE.fullmatch(line.split(":")[0])]
        if found:
            raise errors.UserError(
                f"{workdir!r} belongs to another experiment; choose another --workdir. Differences:\n  "
                + "\n  ".join(found)
            )


def write_config(workdir: str, config: dict[str, Any]) -> None:
    """config.json of a run, atomically."""
    path = pathlib.Path(workdir) / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=1))
    temporary.rename(path)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _train_item(state: train_step.TrainState) -> dict[str, Any]:
    scalars = {name: getattr(state, name) for name in ("step", "skipped", "skipped_in_row")}
    return scalars | {"opt_state": _saveable(state.opt_state)}


def _saveable(opt_state: Any) -> dict[str, Any]:
    """Optimiser state as a flat dict: optax's nested tuples hold empty nodes that change with optax versions."""
    from qdepth_jax import sharding

    return {sharding.path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(opt_state)}
