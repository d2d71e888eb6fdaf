"""Shows what a checkpoint holds, or in what two differ: of runs, imported weights and exports; local or in a bucket.

  python tools/inspect_checkpoint.py PATH [--step=N] [--depth=2] [--items=params,ema,state,train] [--values]
  python tools/inspect_checkpoint.py PATH OTHER [--values]

One path: every array with shape, type, size and how it was split when it was saved (--depth=n adds arrays up below n
levels of the tree); totals by part of the model; step, experiment, tokenizers, data, conventions.
Two paths: leaves that only one has, other shapes and types, fields of config and data that differ; of numbers the sums
that were recorded. --values reads the numbers, one array at a time: that they are what was recorded, and of two paths
the largest absolute and relative difference of each. Exit code 1 if anything differs, 2 if something is damaged. The
last line of stdout is JSON.
"""

import json
import sys

from absl import flags

from qdepth_jax import command

_STEP = flags.DEFINE_integer("step", None, "checkpoint of this step, in both folders; default: the newest")
_DEPTH = flags.DEFINE_integer("depth", 0, "levels of the tree to show, arrays below added up; 0 = all", lower_bound=0)
_ITEMS = flags.DEFINE_list("items", [], "of params, ema, state, train; default: all that are there")
_VALUES = flags.DEFINE_bool("values", False, "read the numbers: check, and compare them")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import checkpoint_report, errors, stored_model

    if len(argv) not in (2, 3):
        raise errors.UserError(f"one or two paths are needed, got {argv[1:]}")
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    stored = [stored_model.find(path, _STEP.value) for path in argv[1:]]
    if len(stored) == 1:
        lines, summary = checkpoint_report.describe(stored[0], _ITEMS.value, _DEPTH.value)
        if _VALUES.value:
            summary["verified"] = checkpoint_report.verify(stored[0], _ITEMS.value)
            lines += ["", f"{summary['verified']} arrays read: they are what was recorded"]
    else:
        lines, summary = checkpoint_report.compare(*stored, _ITEMS.value, _VALUES.value, say)
    print("\n".join(lines))
    print(json.dumps(summary))
    return int(not summary.get("same", True))


if __name__ == "__main__":
    command.run(main)
