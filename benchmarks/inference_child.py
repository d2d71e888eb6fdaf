"""The process of one contestant: builds itself, then takes orders of one line each. benchmarks/inference.py starts it.

python -m benchmarks.inference_child '{"contestant": "ours", ...}'

stdin: "FLOW_STEPS REPEATS" per line; stdout: one JSON line after building ({"facts": ...}) and one per order
({"wall_s", "cpu_s", "actions", "peak_mb"}, seconds of all repeats), or {"error": ...} and the end.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback

from benchmarks import inference_sizes as sizes


def main(order: sizes.Order) -> None:
    """Serves until stdin ends."""
    # What libraries print goes to stderr; stdout is for our lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**line) -> None:
        print(json.dumps(line), file=out, flush=True)

    if order.device == "cpu":
        # Before any import that starts a thread pool: all contestants get the same cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: order.threads])
    try:
        started = time.perf_counter()
        run, facts = importlib.import_module(f"benchmarks.{sizes.CONTESTANTS[order.contestant][0]}").build(order)
        say(facts=facts, build_s=time.perf_counter() - started)
        for line in sys.stdin:
            steps, repeats = map(int, line.split())
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                actions = run(steps)  # NumPy: the device is done
            say(
                wall_s=time.perf_counter() - wall,
                cpu_s=time.process_time() - cpu,
                actions=actions.astype(float).ravel().tolist(),
                peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            )
    except Exception as error:  # told to the parent, which says it and goes on or stops
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sizes.Order(**json.loads(sys.argv[1])))
