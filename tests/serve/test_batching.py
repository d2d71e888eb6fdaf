"""Which requests share a run, and what a failing one does to the others."""

import asyncio
import threading

import pytest

from qdepth_jax.serve import batching, metrics


class Program:
    """Doubles numbers; records its runs; can be held."""

    def __init__(self):
        self.runs, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, items, size):
        self.go.wait(20)
        self.runs.append((list(items), size))
        if "bad" in items:
            raise ValueError("bad item")
        return [2 * item for item in items]


def run(scenario, expected=lambda: 99, sizes=(1, 2, 4), deadline=10.0):
    program = Program()

    async def everything():
        batcher = batching.Batcher(program, sizes, deadline, expected, metrics.Metrics())
        batcher.start()
        try:
            return await asyncio.wait_for(scenario(batcher, program), 30)
        finally:
            program.go.set()
            await batcher.close()

    return asyncio.run(everything()), program.runs


def test_a_full_batch_does_not_wait():
    async def scenario(batcher, program):
        return await asyncio.gather(*(batcher.submit(i) for i in range(8)))

    done, runs = run(scenario)
    assert [d.result for d in done] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert runs == [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)] and done[0].batch == 4


def test_nobody_waits_for_robots_that_are_not_there():
    async def scenario(batcher, program):
        return await asyncio.gather(*(batcher.submit(i) for i in range(3)))

    _, runs = run(scenario, expected=lambda: 3)
    assert runs == [([0, 1, 2], 4)]


def test_the_deadline_ends_the_waiting():
    async def scenario(batcher, program):
        return await batcher.submit(7)

    done, runs = run(scenario, deadline=0.05)
    assert runs == [([7], 1)] and done.queue_s >= 0.05


def test_what_comes_during_a_run_is_the_next_batch():
    async def scenario(batcher, program):
        program.go.clear()
        first = asyncio.ensure_future(batcher.submit(0))
        await asyncio.sleep(0.1)  # with no deadline it runs alone, and is held
        others = [asyncio.ensure_future(batcher.submit(i)) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        program.go.set()
        return await asyncio.gather(first, *others)

    done, runs = run(scenario, deadline=0.0)
    assert runs == [([0], 1), ([1, 2, 3], 4)] and [d.batch for d in done] == [1, 3, 3, 3]


def test_a_bad_item_fails_alone():
    async def scenario(batcher, program):
        items = (batcher.submit(item) for item in (1, "bad", 3))
        return await asyncio.gather(*items, return_exceptions=True)

    done, runs = run(scenario, expected=lambda: 3)
    assert (done[0].result, done[2].result) == (2, 6)
    assert isinstance(done[1], ValueError)
    assert runs == [([1, "bad", 3], 4), ([1], 1), (["bad"], 1), ([3], 1)]


def test_whoever_has_gone_takes_no_place():
    async def scenario(batcher, program):
        program.go.clear()
        first = asyncio.ensure_future(batcher.submit(0))
        await asyncio.sleep(0.1)
        gone, stays = (asyncio.ensure_future(batcher.submit(i)) for i in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        program.go.set()
        return await asyncio.gather(first, stays)

    _, runs = run(scenario, deadline=0.0)
    assert runs == [([0], 1), ([2], 1)]


def test_the_end_tells_who_waits():
    async def scenario(batcher, program):
        program.go.clear()
        waiting = [asyncio.ensure_future(batcher.submit(i)) for i in range(6)]
        await asyncio.sleep(0.1)
        program.go.set()
        await batcher.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    done, _ = run(scenario)
    assert isinstance(done[-1], asyncio.CancelledError)


def test_after_the_end_nobody_waits():
    async def scenario(batcher, program):
        await batcher.close()
        return await asyncio.wait_for(asyncio.gather(batcher.submit(1), return_exceptions=True), 5)

    (done,), runs = run(scenario)
    assert isinstance(done, asyncio.CancelledError) and not runs


def test_metrics_are_prometheus_text():
    found = metrics.Metrics()
    found.add("requests_total", label="ok")
    found.add("requests_total", 2, "ok")
    found.observe("infer_seconds", 0.003)
    found.observe("infer_seconds", 99.0)
    found.add("rows_total", 123_456_789, "planned")  # no digit is rounded away
    text = found.text()
    assert 'qdepth_rows_total{kind="planned"} 123456789\n' in text
    assert 'qdepth_requests_total{outcome="ok"} 3\n' in text and "# TYPE qdepth_connections gauge\n" in text
    assert 'qdepth_infer_seconds_bucket{le="0.0025"} 0\n' in text
    assert 'qdepth_infer_seconds_bucket{le="0.005"} 1\n' in text
    assert 'qdepth_infer_seconds_bucket{le="+Inf"} 2\n' in text
    assert "qdepth_infer_seconds_sum 99.003\n" in text and "qdepth_infer_seconds_count 2\n" in text
    with pytest.raises(KeyError):
        found.add("unknown_total")
