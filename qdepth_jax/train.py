"""Trains a depth tokenizer or a policy; resumes when --workdir holds a checkpoint.

  python -m qdepth_jax.train --config=experiments/NAME.py[:args] --workdir=DIR [--config.a.b=value]

Writes WORKDIR/config.json, command.txt, metrics.jsonl, tensorboard/ and checkpoints/. The last line of stdout is JSON
of the final metrics.

Several hosts: the same command on each, --workdir on a disk or bucket that all of them see. TPU pods, SLURM and Open
MPI are recognised; elsewhere give --coordinator, --num_processes and --process_id.

Exit codes: 0 finished; 2 bad input (the same command fails again); 75 stopped by SIGTERM after a save, or storage,
network or another host did not answer (give the same command again); anything else is a crash. All hosts end with the
code of the one that failed.
"""

import json
import shlex
import sys

from absl import flags

from qdepth_jax import command

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run: checkpoints and metrics", required=True)
_TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", None, "write event files to WORKDIR/tensorboard; by default where --workdir is no bucket"
)
_WANDB = flags.DEFINE_string("wandb", "", "project of Weights & Biases that metrics go to as well")
_PROFILE = flags.DEFINE_string("profile_steps", "", "FIRST:END writes a profile of these steps to WORKDIR/profile")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing announces it")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator: processes in all", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator: number of this one, from 0", lower_bound=0)
_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "seconds to wait for the other processes", lower_bound=1)
flags.mark_flag_as_required("config")
flags.declare_key_flag("config")  # so that --help shows it


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import config as config_lib
    from qdepth_jax import distributed, errors, experiment, train_loop, workdirs

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: flags are --config, --workdir, --config.a.b=value")
    extras = train_loop.Extras(
        command=shlex.join(["python", "-m", "qdepth_jax.train", *sys.argv[1:]]),
        tensorboard=not workdirs.is_remote(_WORKDIR.value) if _TENSORBOARD.value is None else _TENSORBOARD.value,
        wandb=_WANDB.value,
        profile_steps=_steps(_PROFILE.value),
    )
    cluster = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    with distributed.joined(*cluster, timeout=_TIMEOUT.value) as said:
        train_loop.say(said)
        main = distributed.is_main()
        distributed.same_everywhere("experiment", config_lib.to_json(_CONFIG.value))
        run = distributed.together(lambda: experiment.assemble(_CONFIG.value))
        metrics, finished = train_loop.run_training(run, _WORKDIR.value, extras)
    if main:
        print(json.dumps(metrics, sort_keys=True))
    return 0 if finished else errors.TRY_AGAIN


def _steps(text: str) -> tuple[int, int] | None:
    from qdepth_jax import errors

    if not text:
        return None
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 0 < int(first) < int(end)):
        raise errors.UserError(f"--profile_steps={text!r}: use FIRST:END with 0 < FIRST < END, e.g. 100:105")
    return int(first), int(end)


if __name__ == "__main__":
    command.run(main)
