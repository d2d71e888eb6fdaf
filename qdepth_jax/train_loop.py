"""The host loop around the train step. It knows no model: only an Objective, batches and a sharding table."""

import collections
import contextlib
import errno
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from qdepth_jax import checkpoint, errors, metrics, optim, progress, sharding, train_step
from qdepth_jax import config as config_lib
from qdepth_jax.models import objective as objective_lib

HostBatch = dict[str, np.ndarray]


class Run(NamedTuple):
    """Everything the loop needs, assembled by qdepth_jax/experiment.py.

    Attributes:
      objective, tx, frozen, learning_rate: the model and its optimiser.
      mesh: (replica, fsdp, tensor).
      config: the whole experiment as JSON types; `train` and `ema_decay`, `seed` are read from their dataclasses.
      batches: first step -> iterator of this process's batches, the step that comes next first.
      eval_batches: () -> the batches of held-out data, or None.
      initialise: fresh state -> state with what earlier stages provide (pretrained parameters, a codebook).
      meta: JSON stored beside every checkpoint; meta["data"] must be equal on resume.
    """

    objective: objective_lib.Objective
    tx: optax.GradientTransformation
    frozen: optim.FrozenTable
    learning_rate: optax.Schedule
    mesh: Mesh
    config: dict[str, Any]
    train: config_lib.TrainConfig
    ema_decay: float
    seed: int
    batches: Callable[[int], Iterator[HostBatch]]
    eval_batches: Callable[[], Iterable[HostBatch]] | None
    initialise: Callable[[train_step.TrainState], train_step.TrainState]
    meta: dict[str, Any]


def abstract_state(run: Run) -> tuple[train_step.TrainState, train_step.TrainState]:
    """(ShapeDtypeStructs with shardings, the shardings alone) of the run's train state; nothing is allocated."""
    init = functools.partial(train_step.init_state, objective=run.objective, tx=run.tx, ema=run.ema_decay > 0)
    shapes = jax.eval_shape(init, jax.random.key(run.seed))
    placed = sharding.state_shardings(run.mesh, shapes)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
    return target, placed


def run_training(run: Run, workdir: str, command: str = "") -> dict[str, float]:
    """Train until total_steps; resumes when `workdir` holds a checkpoint. Returns the last metrics row.

    `command` is what the user typed: one line per start in WORKDIR/command.txt.

    Order inside an iteration, and why: the step is dispatched first; then the metrics of the step before are read (the
    device stays busy); then validation; the checkpoint comes last and only after its own metrics were read and found
    finite, so a checkpoint never holds a broken state and always holds the step it is named after.
    """
    c = run.train
    _check(run)
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(f"--workdir={workdir} cannot be made ({error}): choose another") from error
    target, placed = abstract_state(run)
    checkpoint.check_same_experiment(workdir, run.config)
    key = jax.random.key(run.seed)

    with _full_disk(workdir), jax.set_mesh(run.mesh), checkpoint.open_manager(workdir, c.keep_checkpoints) as manager:
        start = manager.latest_step() or 0
        if start < c.total_steps:
            checkpoint.check_disk(workdir, target, c.keep_checkpoints, len(manager.all_steps()))
        if manager.latest_step() is None:
            init = functools.partial(train_step.init_state, objective=run.objective, tx=run.tx, ema=run.ema_decay > 0)
            state = run.initialise(jax.jit(init, out_shardings=placed)(key))
        else:
            _check_data(checkpoint.read_meta(workdir), run.meta, workdir, start * c.batch_size)
            state = checkpoint.restore(manager, start, target)
        # Nothing has been written so far: what does not fit was refused above.
        _say_changed_length(folder / "config.json", c.total_steps)
        checkpoint.write_config(workdir, run.config)
        if command:
            with (folder / "command.txt").open("a") as file:
                file.write(command + "\n")
        log = metrics.MetricsFile(folder / "metrics.jsonl", start)
        if start or log.dropped:
            moved = f"; {log.dropped} metric rows after it moved to metrics.dropped.jsonl" if log.dropped else ""
            say(f"resumed {workdir} at step {start}{moved}")
        last = _loop(run, state, placed, key, start, manager, log, workdir)
        manager.wait_until_finished()
        log.close()
    return last


def _loop(run, state, placed, key, start, manager, log, workdir) -> dict[str, float]:
    c, last, last_eval = run.train, {}, {}
    step_fn = jax.jit(
        functools.partial(
            train_step.train_step,
            objective=run.objective,
            tx=run.tx,
            frozen=run.frozen,
            micro_batches=c.micro_batches,
            ema_decay=run.ema_decay,
            learning_rate=run.learning_rate,
            placed=placed.params,
        ),
        donate_argnums=0,
        out_shardings=(placed, None),
    )
    evaluate = make_evaluate(run)
    pending, clock, clock_step = None, time.monotonic(), start
    bar = progress.Progress(c.total_steps, run.config.get("name", "train"), initial=start, unit="step")
    batches = run.batches(start) if start < c.total_steps else iter(())

    def flush():
        nonlocal pending, last, clock, clock_step
        if pending is None:
            return
        step, values = pending
        pending = None
        row = {"step": step} | {k: float(v) for k, v in jax.device_get(values).items()}
        now = time.monotonic()
        row["steps_per_second"] = (step - clock_step) / max(now - clock, 1e-9)
        clock, clock_step = now, step
        log.write(row)
        last = row

    running: collections.deque[Any] = collections.deque()
    for step in range(start + 1, c.total_steps + 1):
        # Steps run behind the host: this batch is copied to the devices while the one before is computed. Two steps in
        # flight hide the copy; more would only fill device memory with waiting batches.
        batch = put_batch(next(batches), run.mesh)
        state, values = step_fn(state, batch, key)
        running.append(values)
        if len(running) > 2:
            jax.block_until_ready(running.popleft())
        flush()
        if step % c.log_every == 0 or step in (1, c.total_steps):
            pending = (step, values)
        saves = step % c.checkpoint_every == 0 or step == c.total_steps
        validates = (
            run.eval_batches is not None and c.eval_every and (step % c.eval_every == 0 or step == c.total_steps)
        )
        if saves or validates:
            pending = (step, values)
            flush()
        if validates:
            last_eval = evaluate(state, key)
            log.write({"step": step} | last_eval)
            clock, clock_step = time.monotonic(), step
        if saves:
            checkpoint.save(manager, state, _meta(run, step), step)
        bar.update(1, f"loss {last.get('loss', float('nan')):.4f}" if last else "")
    flush()
    bar.close()
    if not last:
        say(f"{workdir} holds {start} steps, {c.total_steps} are asked: nothing to train")
        rows = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
        last = functools.reduce(lambda a, b: a | b, rows, {})
    return last | last_eval


def make_evaluate(run: Run) -> Callable[[train_step.TrainState, jax.Array], dict[str, float]]:
    """Mean of the objective's metrics over the held-out batches, names prefixed "val/"; averaged params if kept."""

    @jax.jit
    def eval_step(params, model_state, batch, key, step):
        return run.objective.loss(params, model_state, batch, jax.random.fold_in(key, 2), step).metrics

    def evaluate(state: train_step.TrainState, key: jax.Array) -> dict[str, float]:
        params, rows = state.params if state.ema is None else state.ema, []
        for batch in run.eval_batches():
            rows.append(jax.device_get(eval_step(params, state.state, put_batch(batch, run.mesh), key, state.step)))
        if not rows:
            raise errors.UserError("the held-out split has fewer frames than one batch: lower train.batch_size")
        return {f"val/{k}": float(np.mean([row[k] for row in rows])) for k in rows[0]}

    return evaluate


def put_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch as global arrays, split over (replica, fsdp)."""
    placed = NamedSharding(mesh, sharding.BATCH)
    return {k: jax.make_array_from_process_local_data(placed, v) for k, v in batch.items()}


@contextlib.contextmanager
def _full_disk(workdir: str) -> Iterator[None]:
    """A disk that fills during the run is a message, not a page of tracebacks; finished checkpoints are whole."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC:
            raise errors.UserError(
                f"the disk of {workdir!r} is full; earlier checkpoints are complete. Free space and give the "
                "same command again"
            ) from error
        raise


def _say_changed_length(config_path: pathlib.Path, total_steps: int) -> None:
    """A longer or shorter run also stretches a cosine schedule: say it."""
    if config_path.exists():
        before = json.loads(config_path.read_text())["train"]["total_steps"]
        if before != total_steps:
            say(
                f"train.total_steps changed from {before} to {total_steps}: a cosine schedule without "
                "optim.cycle_steps changes with it"
            )


def _check(run: Run) -> None:
    c, ways = run.train, run.mesh.shape["replica"] * run.mesh.shape["fsdp"]
    if c.batch_size % (c.micro_batches * ways):
        raise errors.UserError(
            f"train.batch_size={c.batch_size} must be a multiple of micro_batches x replica x fsdp = "
            f"{c.micro_batches} x {ways}: use {-(-c.batch_size // (c.micro_batches * ways)) * c.micro_batches * ways}"
        )


def _check_data(saved: dict[str, Any], meta: dict[str, Any], workdir: str, position: int) -> None:
    """Refuses to go on with other samples than those the run would have seen.

    Args:
      saved: what stands beside the checkpoint; `meta`: the same of this start, without a position.
      position: samples that this start takes as seen: step times batch size.
    """
    before = dict(saved["data"])
    seen = before.pop("position")
    found = config_lib.differences(_by_data_set(before), _by_data_set(meta["data"]))
    if found:
        raise errors.UserError(
            f"the data changed since {workdir!r} was trained, so its position means nothing now; restore the data or "
            "start a new --workdir:\n  " + "\n  ".join(_short(line) for line in found)
        )
    if seen != position:
        raise errors.UserError(
            f"{workdir!r} had seen {seen} samples at its last checkpoint, with this train.batch_size the same step "
            f"stands for {position}: restore train.batch_size or start a new --workdir"
        )


def _short(line: str) -> str:
    """Statistics of a data set fill pages; that they differ is enough beside the fingerprint."""
    return line if len(line) < 300 else f"{line.partition(':')[0]}: other values there than here"


def _by_data_set(data: dict[str, Any]) -> dict[str, Any]:
    """The list of data sets as a table, so that a difference is told by data set and field."""
    return data | {"datasets": {f"{n} {item['name']}": item for n, item in enumerate(data["datasets"])}}


def _meta(run: Run, step: int) -> dict[str, Any]:
    position = step * run.train.batch_size
    return run.meta | {"step": step, "config": run.config, "data": run.meta["data"] | {"position": position}}


def say(message: str) -> None:
    """A line to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)
