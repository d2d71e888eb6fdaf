"""A function over many arguments in fresh Python processes.

Plain child processes that are fed through pipes, instead of `multiprocessing`: nothing is forked (JAX and its threads
may live in the parent), and the caller's main module is not imported again, so this works from a training run, a
notebook and a script without a main guard alike.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(function: Callable[..., Any], items: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """Yields (arguments, function(*arguments)) as they are finished, in any order.

    Args:
      function: of a module; it, its arguments and its results travel by pickle.
      items: argument tuples.
      workers: processes; 1 (or a single item) runs here, in order.

    Raises:
      What the function raised, of the first item that failed; RuntimeError: a process died. The others are ended.
    """
    if workers <= 1 or len(items) <= 1:
        for item in items:
            yield item, function(*item)
        return
    waiting: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    finished: queue.SimpleQueue[tuple[bool, tuple, Any]] = queue.SimpleQueue()
    children = [_start() for _ in range(min(workers, len(items)))]
    threads = [threading.Thread(target=_feed, args=(c, function, waiting, finished), daemon=True) for c in children]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            good, item, value = finished.get()
            if not good:
                raise value
            yield item, value
    finally:
        for child in children:
            child.kill()
        for thread in threads:
            thread.join()
        for child in children:
            child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()


def _start() -> subprocess.Popen:
    # The copy of the package that runs here is the one that runs there.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "qdepth_jax.data.process_pool"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def _feed(child: subprocess.Popen, function: Callable, waiting: queue.SimpleQueue, finished: queue.SimpleQueue) -> None:
    while True:
        try:
            item = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            pickle.dump((function, item), child.stdin)
            child.stdin.flush()
            good, value = pickle.load(child.stdout)
        except (EOFError, OSError, pickle.PickleError) as error:
            # Killed for memory, most often; its message, if there was one, stands on stderr.
            code = child.wait()
            lost = RuntimeError(f"a worker process ended with code {code} ({error!r}); try fewer --workers")
            finished.put((False, item, lost))
            return
        finished.put((good, item, value))


def _serve(inbox: BinaryIO, outbox: BinaryIO) -> None:
    while True:
        try:
            function, item = pickle.load(inbox)
        except EOFError:
            return
        try:
            outcome = (True, function(*item))
        except Exception as error:  # carried to the parent, which raises it
            outcome = (False, error)
        pickle.dump(outcome, outbox)
        outbox.flush()


if __name__ == "__main__":
    # The parent decides about Ctrl-C; and what anything prints must not mix with the results.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, results)
