"""Runs a conversion: claims the output folder, converts shards in a local process pool, publishes the result.

plan = convert.plan(directory, output, convert.Options(resize=(224, 224)))
with convert_run.claimed(plan) as finished:
    results = convert_run.run_local(plan, workers=4)      # or convert_beam.run
    counts = convert_run.finish(plan, results)

OUTPUT/convert_state/plan.json     what is being made; a restart with other options is refused
OUTPUT/convert_state/done/*.json   one per finished shard
OUTPUT/dataset_info.json           last of all, then convert_state goes
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qdepth_jax import errors
from qdepth_jax.data import convert, convert_shard, write_rlds

PROVENANCE = "qdepth_convert"  # key in metadata.json


@contextlib.contextmanager
def claimed(plan: convert.Plan) -> Iterator[bool]:
    """Holds the output folder for one command; True if the conversion is finished already.

    Raises:
      UserError: the folder holds something else, another command writes it, or the disk is too small.
    """
    if _finished(plan):
        shutil.rmtree(os.path.join(plan.output, convert.STATE), ignore_errors=True)
        yield True
        return
    state = Path(plan.output, convert.STATE)
    strange = sorted(set(os.listdir(plan.output)) - {convert.STATE}) if os.path.isdir(plan.output) else []
    if strange and not state.is_dir():
        raise errors.UserError(
            f"--output={plan.output} is not empty ({', '.join(strange[:5])}) and is no conversion: choose another "
            "folder"
        )
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = open(state / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise convert_shard.cannot_write(plan.output, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(f"another command is writing {plan.output}: wait for it or stop it") from None
        if (state / "plan.json").exists():
            _check_same(json.loads((state / "plan.json").read_text()), plan)
        for partial in Path(plan.output).rglob("*.partial.*"):  # of a run that was killed
            partial.unlink()
        _check_space(plan)
        try:
            write_rlds.write_json(state / "plan.json", {"digest": plan.digest, **plan.provenance})
        except OSError as error:
            raise convert_shard.cannot_write(plan.output, error) from error
        yield False


def run_local(plan: convert.Plan, workers: int, on_bytes: Callable[[int], None] | None = None) -> list[dict]:
    """Converts all shards with `workers` processes (1 = in this one); results in the order of `plan.tasks`.

    Raises:
      UserError, ValueError: of the first shard that failed; shards under way are finished, the others not begun.
    """
    if workers <= 1:
        return [convert_shard.convert_shard(task, on_bytes) for task in plan.tasks]
    # spawn: a fork would copy the threads' locks of whatever the parent has imported.
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(plan.tasks)), mp_context=context, initializer=_start_worker, initargs=(done,)
    )
    with pool:
        futures = [pool.submit(_convert_in_worker, task) for task in plan.tasks]
        pending, reported = set(futures), 0
        try:
            while pending:
                finished, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if on_bytes and done.value > reported:
                    now = done.value
                    on_bytes(now - reported)
                    reported = now
        except concurrent.futures.process.BrokenProcessPool as error:
            raise errors.UserError(
                "a worker process was killed, perhaps for want of memory: run the same command again with fewer "
                "--workers (finished shards are kept)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


_done = None  # of a worker process: bytes of all workers


def _start_worker(done) -> None:
    global _done
    _done = done

    def follow_parent() -> None:
        # A parent that is killed cannot stop its pool; a worker that lived on would wait for work for ever.
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _convert_in_worker(task: convert_shard.ShardTask) -> dict:
    def on_bytes(count: int) -> None:
        with _done.get_lock():
            _done.value += count

    return convert_shard.convert_shard(task, on_bytes)


def finish(plan: convert.Plan, results: Sequence[dict]) -> dict[str, Any]:
    """Writes the metadata (dataset_info.json last), removes the state and returns the summary.

    Raises:
      ValueError: a shard is missing from `results` or is not as its result says.
    """
    by_name = {result["shard"]: result for result in results}
    ordered = []
    for task in plan.tasks:
        result = by_name.get(os.path.basename(task.output))
        there = os.path.getsize(task.output) if os.path.exists(task.output) else None
        if result is None or (result["digest"], result["file_bytes"]) != (plan.digest, there):
            raise ValueError(f"{task.output} is not finished (result {result}, size on disk {there}): run again")
        ordered.append(result)
    splits = [
        write_rlds.Split(
            name,
            tuple(result["episodes"] for result in ordered if result["split"] == name),
            sum(result["bytes_out"] for result in ordered if result["split"] == name),
        )
        for name in plan.splits
    ]
    output = Path(plan.output)
    try:
        for name, path in plan.carried.items():
            shutil.copyfile(path, output / name)
        for partial in output.glob("*.partial.*"):
            partial.unlink()
        counts = count(plan, ordered)
        notes = {PROVENANCE: {"digest": plan.digest, **plan.provenance, "counts": counts}}
        write_rlds.write_json(output / "features.json", plan.features)
        write_rlds.write_json(output / "metadata.json", notes)
        write_rlds.write_json(output / "dataset_info.json", {**plan.info, "splits": write_rlds.splits_json(splits)})
    except OSError as error:
        raise convert_shard.cannot_write(plan.output, error) from error
    shutil.rmtree(output / convert.STATE, ignore_errors=True)
    return counts


def counts_of_finished(plan: convert.Plan) -> dict[str, Any]:
    """What `finish` returned when the conversion ended."""
    return json.loads(Path(plan.output, "metadata.json").read_text())[PROVENANCE]["counts"]


def count(plan: convert.Plan, results: Sequence[dict]) -> dict[str, Any]:
    """Counts of everything, by split; the same however often the conversion was interrupted."""
    fields = ("episodes", "frames", "bytes_in", "bytes_out", "file_bytes")
    more = ("images_resized", "images_untouched", "depth_maps", "token_rows")
    splits = {}
    for name in plan.splits:
        rows = [result for result in results if result["split"] == name]
        total = {field: sum(row[field] for row in rows) for field in fields + more}
        splits[name] = {**total, "shards": len(rows), "dropped": plan.dropped[name]}
    return {
        **{field: sum(split[field] for split in splits.values()) for field in (*fields, *more, "shards")},
        "dropped": dict(
            sum((collections.Counter(reasons) for reasons in plan.dropped.values()), collections.Counter())
        ),
        "splits": splits,
        "not_carried": list(plan.left_out),
    }


def _finished(plan: convert.Plan) -> bool:
    """True if the output is this conversion, complete."""
    if not os.path.exists(os.path.join(plan.output, "dataset_info.json")):
        return False
    try:
        found = json.loads(Path(plan.output, "metadata.json").read_text())[PROVENANCE]
    except (OSError, ValueError, KeyError, TypeError):
        raise errors.UserError(
            f"--output={plan.output} holds a data set that was not made by this command: choose another folder"
        ) from None
    _check_same(found, plan)
    missing = [task.output for task in plan.tasks if not os.path.exists(task.output)]
    if missing:
        raise errors.UserError(
            f"{plan.output} is finished but {missing[0]} is missing: delete the folder and run again"
        )
    return True


def _check_same(found: dict[str, Any], plan: convert.Plan) -> None:
    if found.get("digest") == plan.digest:
        return
    odd = [
        f"{key} was {json.dumps(found.get(key))}, is {json.dumps(value)}"
        for key, value in plan.provenance.items()
        if found.get(key) != value
    ]
    raise errors.UserError(
        f"{plan.output} holds a conversion with other options ({'; '.join(odd)}): choose another --output, or delete it"
    )


def _check_space(plan: convert.Plan) -> None:
    there = sum(os.path.getsize(task.output) for task in plan.tasks if os.path.exists(task.output))
    free = shutil.disk_usage(plan.output).free
    if plan.bytes_out - there > free:
        raise errors.UserError(
            f"--output={plan.output}: about {(plan.bytes_out - there) / 1e9:.3f} GB are needed (by a sample), "
            f"{free / 1e9:.3f} GB are free: free space or choose another disk"
        )
