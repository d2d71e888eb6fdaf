"""The process of one contestant of benchmarks/video_depth.py: builds itself, then takes orders of one line each.

python -m benchmarks.video_depth_child '{"contestant": "ours", ...}'

stdin: a number of forward passes per line; stdout: one JSON line after building ({"facts": ...}) and one per order
({"wall_s", "cpu_s", "peak_mb"}), or {"error": ...} and the end.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback

from benchmarks import video_depth_order

MODULES = {"ours": "video_depth_ours", "original": "video_depth_torch"}


def main(order: video_depth_order.Order) -> None:
    """Serves until stdin ends."""
    # What libraries print goes to stderr; stdout is for our lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**line) -> None:
        print(json.dumps(line), file=out, flush=True)

    if order.device == "cpu":
        # Before any import that starts a thread pool: both contestants get the same cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: order.threads])
    try:
        started = time.perf_counter()
        run, facts = importlib.import_module(f"benchmarks.{MODULES[order.contestant]}").build(order)
        say(facts=facts, build_s=time.perf_counter() - started)
        for line in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            run(int(line))
            say(
                wall_s=time.perf_counter() - wall,
                cpu_s=time.process_time() - cpu,
                peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            )
    except Exception as error:  # told to the parent, which says it and stops
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(video_depth_order.Order(**json.loads(sys.argv[1])))
