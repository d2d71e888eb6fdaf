"""The process of one cell: prints its result as one JSON line. benchmarks/loader.py starts these.

python -m benchmarks.loader_child '{"contender": "ours", "mode": "decode", "data": "DIR"}'
"""

import json
import os
import sys

from benchmarks import loader_cell, loader_gates

if __name__ == "__main__":
    asked = loader_cell.Cell(**json.loads(sys.argv[1]))
    result = loader_gates.check(asked) if asked.mode == "gates" else loader_cell.measure(asked)
    print(json.dumps(result), flush=True)
    # The threads of tf.data and grain have nothing left to say; waiting for them can take longer than the cell.
    os._exit(0)
