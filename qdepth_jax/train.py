"""Trains a depth tokenizer or a policy; resumes when --workdir holds a checkpoint.

  python -m qdepth_jax.train --config=experiments/NAME.py[:args] --workdir=DIR [--config.a.b=value]

Writes WORKDIR/config.json, command.txt, metrics.jsonl and checkpoints/. The last line of stdout is JSON of the final
metrics.
"""

import json
import shlex
import sys

from absl import flags

from qdepth_jax import command

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run: checkpoints and metrics", required=True)
flags.mark_flag_as_required("config")
flags.declare_key_flag("config")  # so that --help shows it


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors, experiment, train_loop

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: flags are --config, --workdir, --config.a.b=value")
    run = experiment.assemble(_CONFIG.value)
    metrics = train_loop.run_training(
        run, _WORKDIR.value, command=shlex.join(["python", "-m", "qdepth_jax.train", *sys.argv[1:]])
    )
    print(json.dumps(metrics, sort_keys=True))


if __name__ == "__main__":
    command.run(main)
