"""The host loop around the train step. It knows no model: only an Objective, batches and a sharding table."""

import collections
import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import (
    checkpoint,
    chips,
    distributed,
    errors,
    metrics,
    optim,
    profiler,
    progress,
    run_logs,
    same_experiment,
    same_program,
    sharding,
    stop_signal,
    train_step,
    watch,
    workdirs,
)
from qdepth_jax import config as config_lib
from qdepth_jax.models import objective as objective_lib

HostBatch = dict[str, np.ndarray]

AHEAD = 2  # steps in flight: they hide the copy of a batch; more would only fill device memory with waiting batches
SHARED_SECONDS = 10.0  # for a file of one host to appear on the others; network disks list with a delay


class Run(NamedTuple):
    """Everything the loop needs, assembled by qdepth_jax/experiment.py.

    Attributes:
      objective, tx, frozen, learning_rate: the model and its optimiser.
      mesh: (replica, fsdp, tensor).
      config: the whole experiment as JSON types; `train` and `ema_decay`, `seed` are read from their dataclasses.
      rows: of the global batch that this host reads (sharding.batch_rows).
      batches: first step -> iterator of this host's rows of the batches, the step that comes next first.
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
    rows: np.ndarray
    batches: Callable[[int], Iterator[HostBatch]]
    eval_batches: Callable[[], Iterable[HostBatch]] | None
    initialise: Callable[[train_step.TrainState], train_step.TrainState]
    meta: dict[str, Any]


class Extras(NamedTuple):
    """What a start may ask for beside training.

    Attributes:
      command: what the user typed; one line per start in WORKDIR/command.txt.
      tensorboard: write event files.
      wandb: project of Weights & Biases, "" = none.
      profile_steps: (first, last + 1) of the steps whose profile goes to WORKDIR/profile; None = none.
    """

    command: str = ""
    tensorboard: bool = False
    wandb: str = ""
    profile_steps: tuple[int, int] | None = None


def abstract_state(run: Run) -> tuple[train_step.TrainState, train_step.TrainState]:
    """(ShapeDtypeStructs with shardings, the shardings alone) of the run's train state; nothing is allocated."""
    shapes = train_step.abstract_state(run.objective, run.tx, run.ema_decay > 0)
    placed = sharding.state_shardings(run.mesh, shapes, slices=run.config.get("mesh", {}).get("slices", 0))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
    return target, placed


def run_training(run: Run, workdir: str, extras: Extras | None = None) -> tuple[dict[str, float], bool]:
    """Train until total_steps; resumes when `workdir` holds a checkpoint.

    Returns:
      The last metrics row, and whether the run is finished: False after SIGTERM, which saves at the next step boundary
      (of all hosts the same) and stops.

    Order inside an iteration, and why: the step is dispatched first; then the metrics of the step before are read (the
    devices stay busy); then validation; the checkpoint comes last and only after the rows up to it were written, so
    that a checkpoint always holds the step it is named after and no row before it can be lost.
    """
    c, folder, extras = run.train, workdirs.folder(workdir), extras or Extras()
    sharding.check_batch(c, run.mesh.shape)
    distributed.together(lambda: _make_folder(folder))
    _check_shared(folder)
    target, placed = abstract_state(run)
    distributed.together(lambda: same_experiment.check_same_experiment(workdir, run.config))

    with (
        workdirs.full_disk(workdir),
        _alone(folder),
        jax.set_mesh(run.mesh),
        checkpoint.open_manager(workdir, c) as manager,
        stop_signal.StopSignal() as stop,
    ):
        state, start, key, kept = _first_state(run, manager, target, placed, workdir)
        log = distributed.together(lambda: _start_logs(run, workdir, start, extras))
        try:
            meta = run.meta | kept | {"experiment_id": distributed.from_main(log.experiment_id)}
            run = run._replace(meta=meta)
            last, finished = _loop(run, state, key, start, manager, log, workdir, extras, stop)
        finally:
            gc.unfreeze()
            log.close()
        manager.wait_until_finished()
    return last, finished


def _first_state(run, manager, target, placed, workdir) -> tuple[train_step.TrainState, int, jax.Array, dict[str, Any]]:
    """Fresh or from the newest good checkpoint: the state, its step, the run's key, what its first start knew of it.

    Before anything is written: what does not fit is refused.
    """
    c, found = run.train, manager.latest_step()
    distributed.same_everywhere("list of checkpoints", sorted(manager.all_steps()))
    if (found or 0) < c.total_steps:
        room = functools.partial(workdirs.check_room, workdir, target, c, len(manager.all_steps()))
        distributed.together(room)
    if found is None:
        init = functools.partial(train_step.init_state, objective=run.objective, tx=run.tx, ema=run.ema_decay > 0)
        key = jax.random.key(run.seed)
        return run.initialise(jax.jit(init, out_shardings=placed)(key)), 0, key, {}
    state, meta, start = checkpoint.restore_latest(
        manager,
        target,
        agree=distributed.all_agree,
        barrier=distributed.barrier,
        is_main=distributed.is_main(),
        check=lambda meta: same_experiment.check_checkpoint(meta, run.config, run.meta, workdir, c.batch_size),
    )
    kept = {"origin": meta["origin"]} if "origin" in meta else {}
    return state, start, checkpoint.random_key_of(meta), kept


def compile_step(run: Run, state: train_step.TrainState, batch: dict[str, jax.Array], key: jax.Array) -> Callable:
    """The train step, compiled for this mesh: (state, batch, key) -> (state, metrics); the state is donated.

    Raises:
      UserError: the hosts would run different programs.
    """
    placed = jax.tree.map(lambda x: x.sharding, state)
    step = functools.partial(
        train_step.train_step,
        objective=run.objective,
        tx=run.tx,
        frozen=run.frozen,
        micro_batches=run.train.micro_batches,
        ema_decay=run.ema_decay,
        learning_rate=run.learning_rate,
        placed=placed.params,
    )
    everywhere = NamedSharding(run.mesh, P())
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere)).lower(state, batch, key)
    same_program.check(lowered, run.meta["data"], run.rows, run.mesh, run.train.batch_size)
    return lowered.compile()


def _loop(run, state, key, start, manager, log, workdir, extras, stop) -> tuple[dict[str, float], bool]:
    c, last, last_eval = run.train, {}, {}
    if start >= c.total_steps:
        say(f"{workdir} holds {start} steps, {c.total_steps} are asked: nothing to train")
        rows = metrics.read(workdirs.folder(workdir) / "metrics.jsonl")
        return functools.reduce(lambda a, b: a | b, rows, {}), True
    if stop.asked_before(start):
        say(f"stopped by a signal before step {start + 1}: the same command, given again, continues")
        return {}, False
    evaluate, pending, extra = None, None, {}
    devices = run.mesh.devices.size
    peak = chips.peak_flops(jax.local_devices()[0].device_kind)
    timer = watch.Watch(c.batch_size, run.objective.flops, devices, peak, AHEAD)
    name = run.config.get("name", "train")
    bar = progress.Progress(c.total_steps, name, initial=start, unit="step", shown=distributed.is_main())
    profile = profiler.Profiler(extras.profile_steps, workdir, start, say)
    batches, compiled, finished = run.batches(start), None, True

    def flush():
        nonlocal pending, last
        if pending is None:
            return
        step, values, measured = pending
        pending = None
        last = {"step": step} | {k: np.asarray(v).item() for k, v in jax.device_get(values).items()} | measured
        log.write(last)

    running: collections.deque[Any] = collections.deque()
    for step in range(start + 1, c.total_steps + 1):
        with timer.apart():
            profile.before(step)
        # Steps run behind the host: this batch is copied to the devices while the one before is computed.
        with timer.data():
            host_batch = next(batches)
        batch = put_batch(host_batch, run.mesh, c.batch_size)
        if compiled is None:
            with timer.apart():
                begin = time.perf_counter()
                _check_best(c, run.objective, state, batch, key)
                compiled = compile_step(run, state, batch, key)
                if run.eval_batches is not None and c.eval_every:
                    evaluate = make_evaluate(run, state, batch, key)
                checkpoint.warm_up(state)
                # What tracing left behind stays for good: without this, every full collection (0.1 s, often in the
                # middle of a save) walks through it again.
                gc.collect()
                gc.freeze()
                extra["compile_seconds"] = time.perf_counter() - begin
        state, values = compiled(state, batch, key)
        running.append((step, values))
        if len(running) > AHEAD:
            _count_skipped(*running.popleft(), c.max_skipped, workdir)
        timer.turn()
        flush()
        stops = stop.reached(step)
        saves = step % c.checkpoint_every == 0 or step == c.total_steps or stops
        validates = (
            run.eval_batches is not None and c.eval_every and (step % c.eval_every == 0 or step == c.total_steps)
        )
        if saves or validates or step % c.log_every == 0 or step == 1:
            pending, extra = (step, values, timer.row() | extra), {}
        if saves or validates:
            while running:
                _count_skipped(*running.popleft(), c.max_skipped, workdir)
            flush()
        if validates:
            with timer.apart():
                last_eval = evaluate(state, key)
                log.write({"step": step} | last_eval)
        if saves:
            with timer.checkpoint():
                log.flush()
                validated = last_eval if validates else None
                checkpoint.save(manager, state, _meta(run, step, key), step, validated, distributed.all_agree)
        bar.update(1, f"loss {last.get('loss', float('nan')):.4f}" if last else "")
        if stops:
            say(f"stopped by a signal at step {step}, which is saved: the same command, given again, continues")
            finished = step == c.total_steps
            break
    profile.close()
    bar.close()
    return last | last_eval, finished


def make_evaluate(
    run: Run, state: train_step.TrainState, batch: dict[str, jax.Array], key: jax.Array
) -> Callable[[train_step.TrainState, jax.Array], dict[str, float]]:
    """Mean of the objective's metrics over the held-out batches, names prefixed "val/"; averaged params if kept.

    Compiled here, for batches like `batch`: what does not fit the devices shows before the first step.
    """

    size = run.train.batch_size

    def eval_step(params, model_state, batch, key, step):
        return run.objective.loss(params, model_state, batch, jax.random.fold_in(key, 2), step).metrics

    def averaged(state):
        return state.params if state.ema is None else state.ema

    jitted = jax.jit(eval_step, out_shardings=NamedSharding(run.mesh, P()))
    compiled = jitted.lower(averaged(state), state.state, batch, key, state.step).compile()

    def evaluate(state: train_step.TrainState, key: jax.Array) -> dict[str, float]:
        params, rows = averaged(state), []
        for batch in run.eval_batches():
            rows.append(
                jax.device_get(compiled(params, state.state, put_batch(batch, run.mesh, size), key, state.step))
            )
        if not rows:
            raise errors.UserError("the held-out split has fewer frames than one batch: lower train.batch_size")
        return {f"val/{k}": float(np.mean([row[k] for row in rows])) for k in rows[0]}

    return evaluate


def put_batch(batch: HostBatch, mesh: Mesh, batch_size: int | None = None) -> dict[str, jax.Array]:
    """This process's rows of a batch (sharding.batch_rows) as global arrays, split over (replica, fsdp)."""
    placed, out = NamedSharding(mesh, sharding.BATCH), {}
    for name, value in batch.items():
        shape = None if batch_size is None else (batch_size, *value.shape[1:])
        out[name] = jax.make_array_from_process_local_data(placed, value, shape)
    return out


def _count_skipped(step: int, values: dict[str, jax.Array], most: int, workdir: str) -> None:
    """Says that a step was skipped; waits for the step.

    Raises:
      UserError: more than `most` in a row.
    """
    in_row, total = (int(x) for x in jax.device_get((values["skipped_in_row"], values["skipped"])))
    if not in_row:
        return
    loss, norm = (float(x) for x in jax.device_get((values["loss"], values["grad_norm"])))
    say(f"step {step} skipped: loss {loss}, gradient norm {norm}; {in_row} in a row, {total} in all")
    if in_row > most:
        raise errors.UserError(
            f"{in_row} steps in a row, up to step {step}, had no finite gradient (loss {loss}, max_skipped {most}). "
            f"Checkpoints in {workdir!r} hold nothing of these steps. Look at the data with tools/inspect_dataset.py, "
            "or start in another --workdir with a lower optim.learning_rate"
        )


def _start_logs(run: Run, workdir: str, start: int, extras: Extras) -> run_logs.Logs:
    """The main host's logs; others get one that writes nothing."""
    if not distributed.is_main():
        return run_logs.Logs()
    same_experiment.say_changed_length(workdir, run.train.total_steps, say)
    log = run_logs.start(workdir, run.config, start, extras.command, extras.tensorboard, extras.wandb)
    if start or log.file.dropped:
        moved = f"; {log.file.dropped} metric rows after it moved to metrics.dropped.jsonl" if log.file.dropped else ""
        say(f"resumed {workdir} at step {start}{moved}")
    return log


def _check_shared(folder: epath.Path) -> None:
    """The hosts must see one workdir, not each its own: the first save would fail, or hosts would resume differently.

    Raises:
      UserError: naming the hosts that do not see what the main host wrote.
    """
    if distributed.process()[1] == 1:
        return
    path = folder / f"seen.{distributed.from_main(distributed.new_id())}"
    distributed.together(lambda: path.write_text("one workdir for all hosts") if distributed.is_main() else None)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [host for host, ok in enumerate(distributed.gather(seen, "shared workdir")) if not ok]
    if distributed.is_main():
        path.unlink()
    if blind:
        raise errors.UserError(
            f"--workdir={folder} is not one place for all hosts: hosts {blind} do not see what host 0 wrote there. Use "
            "a shared disk or a bucket, and the same --workdir everywhere"
        )


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Nobody else trains in this workdir; all hosts hear of it if somebody does."""
    with contextlib.ExitStack() as held:
        lock = workdirs.only_one(folder, say)
        distributed.together(lambda: held.enter_context(lock) if distributed.is_main() else None)
        yield


def _check_best(c: config_lib.TrainConfig, objective: objective_lib.Objective, state, batch, key) -> None:
    """A metric that decides which checkpoints stay must exist, before a step is spent."""
    if not c.keep_best:
        return
    out = jax.eval_shape(objective.loss, state.params, state.state, batch, key, state.step)
    names = sorted(f"val/{name}" for name in out.metrics)
    if c.best_metric not in names:
        raise errors.UserError(f"train.best_metric={c.best_metric!r} is no metric of a validation: use one of {names}")


def _make_folder(folder: epath.Path) -> None:
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.UserError(f"--workdir={folder} cannot be made ({error}): choose another") from error


def _meta(run: Run, step: int, key: jax.Array) -> dict[str, Any]:
    position = step * run.train.batch_size
    return run.meta | {
        "step": step,
        "config": run.config,
        "random_key": checkpoint.random_key_meta(key),
        "data": run.meta["data"] | {"position": position},
    }


def say(message: str) -> None:
    """A line to stderr, from the main host; stdout is for results."""
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)
