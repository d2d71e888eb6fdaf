"""Dynamic batching: requests of several robots that come close together share one run of the program.

A batch starts as soon as it is full, as soon as everybody who is connected is in it, or when its oldest request has
waited for the deadline; whatever came while the program ran is in the next one. One thread runs the program, so the
event loop always answers.
"""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qdepth_jax.serve import metrics as metrics_lib


class Done(NamedTuple):
    """result: of the item. batch: items that shared the run. queue_s: until it started. infer_s: the run."""

    result: Any
    batch: int
    queue_s: float
    infer_s: float


class _Waiting(NamedTuple):
    item: Any
    answer: asyncio.Future
    since: float


class Batcher:
    """Runs items in batches.

    Args:
      run: (items, size of the program) -> as many results; called in a thread of its own, one at a time.
      sizes: of the programs, rising. deadline_s: an item waits no longer for company.
      expected: how many items could come at most, the number of connected robots.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any], int], Sequence[Any]],
        sizes: Sequence[int],
        deadline_s: float,
        expected: Callable[[], int],
        metrics: metrics_lib.Metrics,
    ):
        self._run, self._sizes, self._deadline, self._expected = run, tuple(sizes), deadline_s, expected
        self._metrics = metrics
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._unanswered: set[asyncio.Future] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "plan")
        self._task: asyncio.Task | None = None
        self._closed = False

    async def submit(self, item: Any) -> Done:
        """The item's result. Raises what `run` raised for a batch of this item alone; CancelledError after `close`."""
        if self._closed:
            raise asyncio.CancelledError
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._unanswered.add(answer)
        answer.add_done_callback(self._unanswered.discard)
        self._queue.put_nowait(_Waiting(item, answer, time.monotonic()))
        return await answer

    def start(self) -> None:
        """Begins to work, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Ends; whoever still waits is told by CancelledError."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for answer in list(self._unanswered):
            answer.cancel()
        # A program that runs cannot be stopped; the event loop tells the robots meanwhile.
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            batch = [w for w in await self._gather() if not w.answer.done()]  # a robot may have gone meanwhile
            if batch:
                await self._serve(batch)

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        while len(batch) < self._sizes[-1]:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            left = batch[0].since + self._deadline - time.monotonic()
            if left <= 0 or len(batch) >= self._expected():
                break
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), left))
            except TimeoutError:
                break
        return batch

    async def _serve(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        try:
            results, infer_s = await self._call([w.item for w in batch])
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            # One item may have spoiled it for all: each on its own, so that only that one fails.
            self._metrics.add("retried_batches_total")
            for waiting in batch:
                await self._serve([waiting])
            return
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(Done(result, len(batch), started - waiting.since, infer_s))
            self._metrics.observe("queue_seconds", started - waiting.since)

    async def _call(self, items: list[Any]) -> tuple[Sequence[Any], float]:
        size = next(size for size in self._sizes if size >= len(items))

        def timed() -> tuple[Sequence[Any], float]:
            began = time.monotonic()
            return self._run(items, size), time.monotonic() - began

        results, infer_s = await asyncio.get_running_loop().run_in_executor(self._thread, timed)
        self._metrics.add("batches_total", label=str(size))
        self._metrics.add("rows_total", len(items), "planned")
        self._metrics.add("rows_total", size - len(items), "fill")
        self._metrics.observe("infer_seconds", infer_s)
        return results, infer_s

    @staticmethod
    def _fail(waiting: _Waiting, error: Exception) -> None:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
