"""Checkpoints: Orbax, asynchronous, atomic; verified, and restored straight to the target sharding on any devices.

One folder per step under WORKDIR/checkpoints with these items, so that a reader takes only what it needs:
  params     trained parameters                    state  codebooks and counts
  ema        averaged parameters (absent if none)   train  optimiser state, step and counters
  meta       JSON: step, random key, data position and fingerprint, experiment config, statistics, tokenizer identity;
             and of every array its shape, dtype and sum (checkpoint_sum.py), protected by a CRC of its own

A save that was interrupted is not there: Orbax renames a finished folder (or, in a bucket, writes a last marker). A
folder that is there but lacks a file, or holds other numbers than were saved, is found by the sums: `restore_latest`
then takes the checkpoint before, says so, and moves the damaged one aside. A checkpoint of another model is not
damaged: that is an error which lists the leaves that differ.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from qdepth_jax import checkpoint_read, checkpoint_sum, errors, train_step, workdirs
from qdepth_jax import config as config_lib

FOLDER = "checkpoints"


@dataclasses.dataclass
class Best:
    """Preserves the n checkpoints with the best metric (Orbax's policy protocol).

    Not Orbax's own BestN: that one keeps its metrics in a file which, damaged, stops a run from opening its folder, and
    sorts NaN anywhere. Here they stand in `meta`; a checkpoint without the metric is never among the best.
    """

    directory: epath.Path
    n: int
    metric: str
    mode: str
    known: dict[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        sign = 1.0 if self.mode == "max" else -1.0
        values = {info.step: sign * self._value(info) for info in checkpoints}
        ranked = sorted((step for step, v in values.items() if np.isfinite(v)), key=lambda s: (values[s], s))
        best = set(ranked[-self.n :])
        return [info.step in best for info in checkpoints]

    def _value(self, info) -> float:
        if info.metrics is not None:
            self.known[info.step] = float(info.metrics.get(self.metric, np.nan))
        elif info.step not in self.known:  # written by an earlier start
            try:
                metrics = checkpoint_read.read_meta(self.directory / str(info.step)).get("metrics") or {}
            except checkpoint_read.Damaged:
                metrics = {}
            self.known[info.step] = float(metrics.get(self.metric, np.nan))
        return self.known[info.step]


def open_manager(workdir: str, train: config_lib.TrainConfig | None = None) -> ocp.CheckpointManager:
    """The checkpoint manager of a run. Which checkpoints stay: train.keep_checkpoints, keep_every, keep_best.

    Remains of interrupted saves are removed: only one run may write to a workdir.
    """
    train = train or config_lib.TrainConfig()
    path = workdirs.folder(workdir) / FOLDER
    kept: list[Any] = [policies.LatestN(train.keep_checkpoints)]
    if train.keep_every:
        kept.append(policies.EveryNSteps(train.keep_every))
    if train.keep_best:
        kept.append(Best(path, train.keep_best, train.best_metric, train.best_mode))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept), create=True, cleanup_tmp_directories=True
    )
    handlers: dict[str, Any] = {name: ocp.PyTreeCheckpointHandler() for name in ("params", "state", "ema", "train")}
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()})


def save(
    manager: ocp.CheckpointManager,
    state: train_step.TrainState,
    meta: dict[str, Any],
    step: int,
    metrics: dict[str, float] | None = None,
    agree: Callable[[bool], bool] = lambda ok: ok,
) -> float:
    """Start an asynchronous save; device arrays are copied to the host before this returns.

    Args:
      manager: from `open_manager`.
      state: may be donated as soon as this returns.
      meta: JSON types, the same on all hosts.
      step: number of the checkpoint.
      metrics: of a validation at this very step; train.best_metric must be among them where train.keep_best is set.
      agree: see restore_latest.

    Returns:
      Seconds for which the caller was held up.

    Raises:
      UserError: no room for it on the disk, or the save before this one failed for lack of room; or `metrics` lacks
        the metric that decides which checkpoints stay.
      ValueError: there is a checkpoint of this or a later step.
    """
    start, workdir = time.monotonic(), str(manager.directory)
    _check_metrics(manager, metrics)
    with workdirs.full_disk(workdir):
        manager.wait_until_finished()  # and raises what went wrong in the save before
    _check_room_now(workdir, state, step, agree)
    _start_save(manager, checkpoint_read.items_of(state), meta | {"metrics": metrics}, step, metrics)
    return time.monotonic() - start


def save_params(workdir: str, params: Any, meta: dict[str, Any], state: Any = None, step: int = 0) -> None:
    """A model without an optimiser (imported or exported) as a checkpoint; returns when it is complete.

    Args:
      workdir: holds no checkpoint yet.
      params: arrays on devices, any sharding.
      meta: JSON types; with "config", an experiment whose model these are the parameters of.
      state: the rest of the model (a codebook).
      step: after which the parameters stand; 0 = not trained here.

    Raises:
      UserError: there are checkpoints in it already, or no room for this one.
    """
    with open_manager(workdir) as manager:
        if found := checkpoint_read.steps(manager.directory):
            raise errors.UserError(f"{workdir!r} holds checkpoints already (steps {found}): choose another folder")
        items = {"params": params} | ({"state": state} if jax.tree.leaves(state) else {})
        _start_save(manager, items, meta | {"step": step, "metrics": None}, step)
        manager.wait_until_finished()


def warm_up(state: train_step.TrainState) -> None:
    """Compiles what the first save would: on accelerators the sums, one small program for each shape of a leaf."""
    for tree in checkpoint_read.items_of(state).values():
        leaves = checkpoint_read.by_path(tree)
        if not checkpoint_sum.on_host(leaves):
            checkpoint_sum.sums(leaves)


def restore_latest(
    manager: ocp.CheckpointManager,
    target: train_step.TrainState,
    agree: Callable[[bool], bool] = lambda ok: ok,
    barrier: Callable[[str], None] = lambda name: None,
    is_main: bool = True,
    check: Callable[[dict[str, Any]], None] = lambda meta: None,
) -> tuple[train_step.TrainState, dict[str, Any], int]:
    """The newest good checkpoint of a run, placed as `target` says.

    A damaged one is named with the cause, moved to checkpoints/damaged.STEP.N once an older one has proved good, and
    never deleted. Where none is good nothing is moved: then the cause may lie elsewhere.

    Args:
      manager: from `open_manager`; holds at least one checkpoint.
      target: ShapeDtypeStructs with shardings.
      agree: True only if all processes say True; the same call on all of them.
      barrier: waits for all processes.
      is_main: this process moves files.
      check: raises where the meta of a good checkpoint does not suit this start; called before any array is read.

    Returns:
      (state, meta, step).

    Raises:
      UserError: the checkpoint is one of another model (the leaves that differ); it cannot be read at the moment; or
        all of them are damaged.
    """
    bad: dict[int, str] = {}
    wanted = checkpoint_read.items_of(target)
    for step in checkpoint_read.steps(manager.directory):
        folder = manager.directory / str(step)
        meta, cause = checkpoint_read.together(agree, folder, lambda folder=folder: checkpoint_read.read_meta(folder))
        if not cause:
            checkpoint_read.check_fits(folder, meta, wanted, whole=True)
            check(meta)
            items, cause = checkpoint_read.read_items(folder, meta, wanted, agree)
        if not cause:
            _move_aside(manager, bad, step, barrier, is_main)
            return _state_of(target, items), meta, step
        bad[step] = cause
        say(f"DAMAGED CHECKPOINT {folder}: {cause}. Trying the one before.")
    if not bad:
        raise errors.UserError(f"no complete checkpoint in {manager.directory}")
    raise errors.UserError(
        f"no checkpoint in {manager.directory} can be restored; nothing was moved or deleted. Start in a new "
        "--workdir, or repair:\n  " + "\n  ".join(f"step {step}: {cause}" for step, cause in bad.items())
    )


def restore_model(workdir: str, target: dict[str, Any], average: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and model state of a run's newest good checkpoint, without its optimiser; changes nothing there.

    Args:
      workdir: of the run.
      target: {"params", "state"} of ShapeDtypeStructs with shardings.
      average: take the averaged parameters where the run kept them.

    Returns:
      ({"params", "state"}, meta).

    Raises:
      UserError: no checkpoint, none that is good, or one of another model.
    """

    def read(folder, meta, agree):
        source = "ema" if average and "ema" in meta["leaves"] else "params"
        wanted = {source: target["params"]}
        if jax.tree.leaves(target["state"]):
            wanted["state"] = target["state"]
        checkpoint_read.check_fits(folder, meta, wanted)
        items, cause = checkpoint_read.read_items(folder, meta, wanted, agree)
        return None if cause else {"params": items[source], "state": items.get("state", {})}, cause

    return _newest(workdir, read)


def restore_leaves(
    workdir: str,
    choose: Callable[[dict[str, Any]], dict[str, jax.ShapeDtypeStruct]],
    average: bool = True,
    agree: Callable[[bool], bool] = lambda ok: ok,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Some parameters of a run's newest good checkpoint, each straight into the sharding asked for.

    Args:
      workdir: of the run.
      choose: {path: {"shape", "dtype", ...}} of the parameters there -> those wanted, by path, with dtype as there.
      average: take the averaged parameters where the run kept them.
      agree: see restore_latest.

    Returns:
      (path -> array, meta).
    """

    def read(folder, meta, agree):
        source = "ema" if average and "ema" in meta["leaves"] else "params"
        wanted = choose(meta["leaves"][source])
        items, cause = checkpoint_read.read_items(folder, meta, {source: wanted}, agree, partial=True)
        return None if cause else items[source], cause

    return _newest(workdir, read, agree)


def read_meta(workdir: str) -> dict[str, Any]:
    """The `meta` item of a run's newest checkpoint that has a good one."""
    return _newest(workdir, lambda folder, meta, agree: (True, ""))[1]


def random_key_meta(key: jax.Array) -> dict[str, Any]:
    """The run's random key as JSON, for meta["random_key"]: it does not depend on how a later JAX makes keys."""
    return {"implementation": str(jax.random.key_impl(key)), "data": np.asarray(jax.random.key_data(key)).tolist()}


def random_key_of(meta: dict[str, Any]) -> jax.Array:
    """The random key with which a checkpoint's run was started."""
    saved = meta["random_key"]
    return jax.random.wrap_key_data(np.asarray(saved["data"], np.uint32), impl=saved["implementation"])


def say(message: str) -> None:
    """A line to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def _newest(workdir, read, agree=lambda ok: ok) -> tuple[Any, dict[str, Any]]:
    """`read(folder, meta, agree) -> (value, cause)` on a run's checkpoints, newest first, until one has no cause."""
    directory = workdirs.folder(workdir) / FOLDER
    if not directory.exists():
        raise errors.UserError(
            f"no checkpoints in {workdir!r}: {directory} does not exist (is this the --workdir of a "
            "run? Weights of other code bases go through tools/import_weights.py first)"
        )
    bad = []
    for step in checkpoint_read.steps(directory):
        folder = directory / str(step)
        meta, cause = checkpoint_read.together(agree, folder, lambda folder=folder: checkpoint_read.read_meta(folder))
        if not cause:
            value, cause = read(folder, meta, agree)
            if not cause:
                return value, meta
        bad.append(f"{folder}: {cause}")
        say(f"DAMAGED CHECKPOINT {bad[-1]}. Trying the one before.")
    if bad:
        raise errors.UserError(f"no checkpoint in {workdir!r} can be read:\n  " + "\n  ".join(bad))
    raise errors.UserError(f"no complete checkpoint in {workdir!r}: train it first, or name another workdir")


def _move_aside(manager, bad: dict[int, str], good: int, barrier, is_main: bool) -> None:
    if not bad:
        return
    if is_main:
        for step in bad:
            number = 0
            while (aside := manager.directory / f"damaged.{step}.{number}").exists():
                number += 1
            (manager.directory / str(step)).rename(aside)
            say(f"moved {manager.directory / str(step)} to {aside}; nothing was deleted")
    barrier("damaged checkpoints moved")
    manager.reload()
    say(f"CONTINUING FROM STEP {good}: {len(bad)} newer checkpoint(s) were damaged ({', '.join(map(str, bad))})")


def _state_of(target: train_step.TrainState, items: dict[str, Any]) -> train_step.TrainState:
    """The inverse of checkpoint_read.items_of."""
    scalars = {name: value for name, value in items["train"].items() if name != "opt_state"}
    paths = checkpoint_read.by_path(target.opt_state)
    opt_state = jax.tree.unflatten(
        jax.tree.structure(target.opt_state), [items["train"]["opt_state"][path] for path in paths]
    )
    return target.replace(
        **scalars,
        params=items["params"],
        state=items.get("state", target.state),
        opt_state=opt_state,
        ema=items.get("ema"),
    )


def _start_save(manager, items: dict[str, Any], meta: dict[str, Any], step: int, metrics=None) -> None:
    workdir, leaves = str(manager.directory), checkpoint_read.table(items)
    saved: dict[str, Any] = {
        name: ocp.args.PyTreeSave(
            tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=checkpoint_read.CHUNK_BYTES), tree)
        )
        for name, tree in items.items()
    }
    meta = checkpoint_read.sealed(meta | {"leaves": leaves})
    with workdirs.full_disk(workdir):
        if not manager.save(step, args=ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta)), metrics=metrics):
            raise ValueError(f"{workdir} already holds step {manager.latest_step()}: step {step} cannot be saved")


def _check_metrics(manager, metrics: dict[str, float] | None) -> None:
    for policy in manager._options.preservation_policy.policies:  # as given in open_manager
        if isinstance(policy, Best) and metrics is not None and policy.metric not in metrics:
            raise errors.UserError(
                f"train.best_metric={policy.metric!r} is none of the metrics of a validation: use one of "
                f"{', '.join(sorted(metrics))}"
            )


def _check_room_now(workdir: str, state: Any, step: int, agree: Callable[[bool], bool]) -> None:
    """Before anything is written; and a warning one interval ahead, while there is still time to make room."""
    room, need = workdirs.free_bytes(workdir), workdirs.size_of(state)
    if room is None:
        return
    if not agree(room >= need):
        raise errors.UserError(
            f"no room for the checkpoint of step {step}: {workdir!r} has {room / 2**20:.0f} MiB free, it needs "
            f"{need / 2**20:.0f} MiB; earlier checkpoints are complete. Free space and give the same command again"
        )
    if room < 2 * need:
        say(
            f"DISK NEARLY FULL: {workdir} has {room / 2**20:.0f} MiB free; after the checkpoint of step {step} "
            f"there may be no room for the next one ({need / 2**20:.0f} MiB)"
        )
