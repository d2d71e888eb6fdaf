"""Runs a planned conversion in a local process pool, and publishes the result.

    plan = rlds.plan(directory, output, rlds.Options(resize=(224, 224)))
    with rlds_claim.claimed(plan.target) as finished:
        results = rlds_run.run_local(plan, workers=4)      # or rlds_beam.run
        counts = rlds_run.finish(plan, results)

The pool serves other conversions too (`run_tasks`).
"""

import collections
import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qdepth_jax import errors
from qdepth_jax.convert import rlds, rlds_claim, rlds_shard
from qdepth_jax.data import storage, write_rlds


def run_local(plan: rlds.Plan, workers: int, on_bytes: Callable[[int], None] | None = None) -> list[dict]:
    """Converts all shards with `workers` processes; results in the order of `plan.tasks`."""
    return run_tasks(rlds_shard.convert_shard, plan.tasks, workers, on_bytes)


def run_tasks(
    function: Callable[[Any, Callable[[int], None] | None], dict],
    tasks: Sequence[Any],
    workers: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """[function(task, on_progress) for each task], with `workers` processes (1 = in this one).

    Raises:
      UserError, ValueError: of the first task that failed; tasks under way are finished, the others not begun.
    """
    if workers <= 1:
        return [function(task, on_progress) for task in tasks]
    # spawn: a fork would copy the threads' locks of whatever the parent has imported.
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(done,)
    )
    with pool:
        futures = [pool.submit(_call_in_worker, function, task) for task in tasks]
        pending, reported = set(futures), 0
        try:
            while pending:
                finished, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if on_progress and done.value > reported:
                    now = done.value
                    on_progress(now - reported)
                    reported = now
        except concurrent.futures.process.BrokenProcessPool as error:
            raise errors.UserError(
                "a worker process was killed, perhaps for want of memory: run the same command again with fewer "
                "--workers (finished files are kept)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


_done = None  # of a worker process: progress of all workers


def _start_worker(done) -> None:
    global _done
    _done = done

    def follow_parent() -> None:
        # A parent that is killed cannot stop its pool; a worker that lived on would wait for work for ever.
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _call_in_worker(function, task) -> dict:
    def on_progress(count: int) -> None:
        with _done.get_lock():
            _done.value += count

    return function(task, on_progress)


def finish(plan: rlds.Plan, results: Sequence[dict]) -> dict[str, Any]:
    """Writes the metadata (dataset_info.json last), removes the state and returns the summary.

    Raises:
      ValueError: a shard is missing from `results` or is not as its result says.
    """
    ordered = rlds_claim.in_order(plan.target, list(results))
    splits = rlds_claim.splits(plan.splits, ordered)
    output = Path(plan.output)
    try:
        for name, path in plan.carried.items():
            (output / name).write_bytes(storage.read(path))
        for partial in output.glob("*.partial.*"):
            partial.unlink()
        counts = count(plan, ordered)
        write_rlds.write_json(output / "features.json", plan.features)
        rlds_claim.write_notes(plan.target, counts)
        write_rlds.write_json(output / "dataset_info.json", {**plan.info, "splits": write_rlds.splits_json(splits)})
    except OSError as error:
        raise rlds_claim.cannot_write(plan.output, error) from error
    rlds_claim.close(plan.target)
    return counts


def count(plan: rlds.Plan, results: Sequence[dict]) -> dict[str, Any]:
    """Counts of everything, by split; the same however often the conversion was interrupted."""
    fields = ("episodes", "frames", "bytes_in", "bytes_out", "file_bytes")
    more = ("images_resized", "images_untouched", "depth_maps", "token_rows")
    splits = {}
    for name in plan.splits:
        rows = [result for result in results if result["split"] == name]
        total = {field: sum(row[field] for row in rows) for field in fields + more}
        more_of_split = {"dropped": plan.dropped[name], "not_indexed": plan.not_indexed[name]}
        splits[name] = {**total, "shards": len(rows), **more_of_split}
    return {
        **{field: sum(split[field] for split in splits.values()) for field in (*fields, *more, "shards")},
        "dropped": _over_splits(plan.dropped),
        "not_indexed": _over_splits(plan.not_indexed),
        "splits": splits,
        "not_carried": list(plan.left_out),
        "source_warnings": list(plan.warnings),
    }


def _over_splits(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    return dict(sum((collections.Counter(reasons) for reasons in counts.values()), collections.Counter()))
