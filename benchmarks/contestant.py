"""A contestant of a race: a process of its own that builds itself, then takes orders of one line each.

The parent holds a `Contestant`; its child module calls `serve`. Lines to the child are numbers; lines from it are
JSON: {"facts": ..., "build_s"} once, then for each order {"wall_s", "cpu_s", "peak_mb"} and what the turn returns, or
{"error": ...} and the end.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Numbers of an order -> what to say of the turn beside its time.
Turn = Callable[..., dict[str, Any]]


class Contestant:
    """A living process.

    Attributes:
      start: its first answer, {} after an error. error: the last answer that was one, "" = none.
    """

    def __init__(self, module: str, order: Mapping[str, Any], environment: Mapping[str, str], python: str = ""):
        """module: of benchmarks/; order: its JSON argument; environment: beside this process's own."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [python or sys.executable, "-m", f"benchmarks.{module}", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | environment,
            cwd=ROOT,
        )
        self.error = ""
        self.start = self._answer()

    def run(self, *numbers: int) -> dict[str, Any]:
        """One order; {} after an error."""
        if self.error:
            return {}
        print(*numbers, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}
        self.error = answer.get("error", "")
        return {} if self.error else answer


def serve(build: Callable[[], tuple[Turn, dict[str, Any]]], cores: int) -> None:
    """The child's side: answers until stdin ends.

    Args:
      build: imports and builds; returns the turn, and facts. A turn returns when the device is done.
      cores: this process keeps to so many; 0 = all.
    """
    # What libraries print goes to stderr; stdout is for our lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    if cores:
        # Before any import that starts a thread pool: all contestants get the same cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    try:
        started = time.perf_counter()
        turn, facts = build()
        say(facts=facts, build_s=time.perf_counter() - started)
        for line in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            more = turn(*map(int, line.split()))
            times = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            say(**times, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **more)
    except Exception as error:  # told to the parent, which says it and goes on or stops
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")
