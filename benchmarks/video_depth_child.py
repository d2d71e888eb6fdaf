"""The process of one contestant of benchmarks/video_depth.py, see contestant.py.

python -m benchmarks.video_depth_child '{"contestant": "ours", ...}'

An order is a number of forward passes; the depth of the first lies in the order's folder.
"""

import importlib
import json
import sys

from benchmarks import contestant, video_depth_order

MODULES = {"ours": "video_depth_ours", "original": "video_depth_torch"}


def main(order: video_depth_order.Order) -> None:
    """Serves until stdin ends."""

    def build():
        run, facts = importlib.import_module(f"benchmarks.{MODULES[order.contestant]}").build(order)

        def turn(passes: int):
            run(passes)
            return {}

        return turn, facts

    contestant.serve(build, order.threads if order.device == "cpu" else 0)


if __name__ == "__main__":
    main(video_depth_order.Order(**json.loads(sys.argv[1])))
