"""The process of one contestant of benchmarks/train_step.py, see contestant.py.

python -m benchmarks.train_step_child '{"contestant": "ours", ...}'

An order is a number of steps; its answer has "rows": [[loss, gradient norm], ...].
"""

import importlib
import json
import sys

from benchmarks import contestant
from benchmarks import train_step_sizes as sizes

MODULES = {"ours": "train_step_ours", "eager": "train_step_torch", "compile": "train_step_torch"}


def main(order: sizes.Order) -> None:
    """Serves until stdin ends."""

    def build():
        run, facts = importlib.import_module(f"benchmarks.{MODULES[order.contestant]}").build(order)
        return lambda steps: {"rows": run(steps)}, facts

    contestant.serve(build, order.threads if order.device == "cpu" else 0)


if __name__ == "__main__":
    main(sizes.Order(**json.loads(sys.argv[1])))
