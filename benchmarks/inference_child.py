"""The process of one contestant of benchmarks/inference.py, see contestant.py.

python -m benchmarks.inference_child '{"contestant": "ours", ...}'

An order is FLOW_STEPS REPEATS, its times are those of all repeats; its answer has "actions", flat, of the last chunk.
"""

import importlib
import json
import sys

from benchmarks import contestant
from benchmarks import inference_sizes as sizes


def main(order: sizes.Order) -> None:
    """Serves until stdin ends."""

    def build():
        module = importlib.import_module(f"benchmarks.{sizes.CONTESTANTS[order.contestant][0]}")
        run, facts = module.build(order)

        def turn(steps: int, repeats: int):
            for _ in range(repeats):
                actions = run(steps)  # NumPy: the device is done
            return {"actions": actions.astype(float).ravel().tolist()}

        return turn, facts

    contestant.serve(build, order.threads if order.device == "cpu" else 0)


if __name__ == "__main__":
    main(sizes.Order(**json.loads(sys.argv[1])))
