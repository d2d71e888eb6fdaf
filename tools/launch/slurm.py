r"""Writes an sbatch script that trains on SLURM nodes, and submits it with --nodry_run.

  python tools/launch/slurm.py --nodes=4 --gpus_per_node=8 --time=24:00:00 --repo=/shared/qdepth_jax \
      --logs=/shared/logs --output=run.sbatch [--nodry_run] \
      -- --config=experiments/libero.py:object --workdir=/shared/runs/object --config.mesh.fsdp=32

Everything behind `--` goes to `python -m qdepth_jax.train`. A dry run is the default: it prints the script and what
would be run, and writes and submits nothing.

One process per GPU, or --processes_per_node=1 for one per node. --signal asks SLURM for a
SIGTERM --grace_seconds before the time limit: train.py saves at the next step and ends with exit code 75, the script
puts its job back into the queue, and the next start, two minutes later, resumes. So it is when storage does not answer
(75 too), and --max_crashes times where a process was killed (out of memory) or another host died, at which JAX aborts
the rest (134). Exit code 2 (bad input) and other crashes end the job; a failed node puts it back (SLURM's own
--requeue). The last line of stdout is JSON.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex

import training
from absl import flags

from qdepth_jax import command, errors

_NAME = flags.DEFINE_string("name", "qdepth", "job name")
_NODES = flags.DEFINE_integer("nodes", 1, "nodes", lower_bound=1)
_GPUS = flags.DEFINE_integer("gpus_per_node", 8, "GPUs of one node; 0 = train on CPUs", lower_bound=0)
_PROCESSES = flags.DEFINE_integer(
    "processes_per_node", 0, "0 = one per GPU (or one per node without any)", lower_bound=0
)
_CPUS = flags.DEFINE_integer(
    "cpus_per_process", 0, "CPU cores of one process; 0 = what the cluster gives", lower_bound=0
)
_TIME = flags.DEFINE_string("time", "24:00:00", "time limit of one start: the run goes on in the next")
_GRACE = flags.DEFINE_integer("grace_seconds", 300, "SIGTERM comes so long before the time limit", lower_bound=30)
_RESTARTS = flags.DEFINE_integer("max_restarts", 1000, "starts after the first", lower_bound=0)
_CRASHES = flags.DEFINE_integer("max_crashes", 10, "starts after one in which a signal killed a process", lower_bound=0)
_REPO = flags.DEFINE_string("repo", "", "checkout on a shared disk, seen by all nodes (or inside --container_image)")
_REF = flags.DEFINE_string("ref", "", "git commit, branch or tag that the checkout must stand at, at every start")
_PYTHON = flags.DEFINE_string("python", "", "interpreter; default REPO/.venv/bin/python, with --container_image python")
_IMAGE = flags.DEFINE_string("container_image", "", "image for srun --container-image (pyxis)")
_MOUNTS = flags.DEFINE_list("container_mounts", [], "HOST:CONTAINER folders for the image: data, workdir")
_SETUP = flags.DEFINE_multi_string("setup", [], "shell line before the start, e.g. 'module load cuda'; repeatable")
_ENV = flags.DEFINE_multi_string(
    "env", [], "NAME=VALUE for every process, e.g. NCCL_SOCKET_IFNAME=ib0, XLA_FLAGS=...; repeatable"
)
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "further option, e.g. --partition=h100, --account=lab; repeatable")
_LOGS = flags.DEFINE_string("logs", ".", "folder of the log, seen by all nodes")
_OUTPUT = flags.DEFINE_string("output", "", "where to write the script; default NAME.sbatch in --logs")
_CHECK = flags.DEFINE_boolean("check", True, "load the config here first, with the mesh against the number of devices")
_DRY_RUN = flags.DEFINE_boolean("dry_run", True, "only show; --nodry_run writes the script and calls sbatch")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an sbatch script is made of; the fields are the flags of the same names.

    Attributes:
      arguments: of train.py.
    """

    arguments: tuple[str, ...]
    name: str = "qdepth"
    nodes: int = 1
    gpus_per_node: int = 8
    processes_per_node: int = 0
    cpus_per_process: int = 0
    time: str = "24:00:00"
    grace_seconds: int = 300
    max_restarts: int = 1000
    max_crashes: int = 10
    repo: str = ""
    ref: str = ""
    python: str = ""
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    sbatch: tuple[str, ...] = ()
    logs: str = "."

    @property
    def processes(self) -> int:
        """Of one node."""
        return self.processes_per_node or self.gpus_per_node or 1

    def __post_init__(self):
        if self.gpus_per_node % self.processes:  # 0 GPUs divide by anything
            raise errors.UserError(
                f"--processes_per_node={self.processes} does not divide {self.gpus_per_node} GPUs: use 1 or "
                f"{self.gpus_per_node}"
            )
        if not self.repo and not self.container_image:
            raise errors.UserError("no --repo: name the checkout on the shared disk (or a --container_image with it)")
        if self.ref and not self.repo:
            raise errors.UserError(f"--ref={self.ref} is checked in a checkout: name it by --repo")
        if not re.fullmatch(r"[0-9:-]+", self.time):
            raise errors.UserError(f"--time={self.time}: write it as SLURM does, e.g. 24:00:00 or 2-00:00:00")
        for option in self.sbatch:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\s\"'\\]+)?", option):
                raise errors.UserError(f"--sbatch={option}: one long option without spaces, e.g. --partition=h100")


def script(job: Job) -> str:
    """The sbatch script."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes}",
        # Per node, not per task: NCCL shares memory between GPUs that the processes of a node all see;
        # qdepth_jax/cluster.py gives each its part.
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={job.cpus_per_process}"] if job.cpus_per_process else []),
        f"--time={job.time}",
        # Without "B:" the signal goes to the processes of srun and not to this shell.
        f"--signal=TERM@{job.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f'--output="{_option(job.logs)}/%x-%j.log"',
        *job.sbatch,
    ]
    exports = dict(job.env)
    srun = [
        "srun",
        # The first process to end may leave others in the middle of a save: they have the same grace, then they are
        # ended too (a crash elsewhere would leave them waiting in a collective).
        "--kill-on-bad-exit=0",
        f"--wait={job.grace_seconds}",
        *([f"--container-image={job.container_image}"] if job.container_image else []),
        *([f"--container-mounts={','.join(job.container_mounts)}"] if job.container_mounts else []),
    ]
    if job.cpus_per_process:
        srun.append(f"--cpus-per-task={job.cpus_per_process}")  # srun does not take it from sbatch since SLURM 22.05
    python = job.python or ("python" if job.container_image else f"{job.repo}/.venv/bin/python")
    lines = [
        "#!/bin/bash",
        "# Written by tools/launch/slurm.py.",
        *(f"#SBATCH {option}" for option in options),
        "set -u",
        *([f"cd {shlex.quote(job.repo)} || exit {training.BAD_INPUT}"] if job.repo else []),
        *(_check_ref(job.ref) if job.ref else []),
        *job.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(exports.items())),
        'echo "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"',
        "",
        "# A signal to the whole job must not end this shell before the processes have saved.",
        "trap : TERM",
        f"{shlex.join(srun)} \\\n  {shlex.join(training.train_command(list(job.arguments), python))}",
        "code=$?",
        "",
        "again=$code",
        "# A busy slurmctld answers later.",
        'try() { for _ in 1 2 3 4 5 6; do "$@" && return; sleep 10; done; return 1; }',
        "# 128 + the signal that ended a process, but for Ctrl-C. The file counts them over all starts of the job.",
        'if [ "$code" -gt 130 ]; then',
        f'  crashes={shlex.quote(f"{job.logs}/{job.name}-")}"$SLURM_JOB_ID".crashes',
        '  echo "start ${SLURM_RESTART_COUNT:-0}: exit code $code" >>"$crashes"',
        f'  if [ "$(wc --lines <"$crashes")" -le {job.max_crashes} ]; then',
        f"    again={training.AGAIN}",
        "  else",
        f'    echo "killed; --max_crashes={job.max_crashes} reached, see $crashes: submit again to go on"',
        "  fi",
        "fi",
        f'if [ "$again" = {training.AGAIN} ]; then',
        "  # A job that its owner cancelled is COMPLETING by now and must stay ended; requeue would bring it back.",
        '  state=$(try squeue --noheader --states=all --format=%T --jobs="$SLURM_JOB_ID")',
        '  if [ "$state" ] && [ "$state" != RUNNING ]; then',
        '    echo "stopped; the job is $state and stays ended"',
        f'  elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.max_restarts} ]; then',
        f'    echo "stopped; --max_restarts={job.max_restarts} reached: submit again to go on"',
        "  else",
        '    echo "stopped with exit code $code, see above: back into the queue"',
        '    try scontrol requeue "$SLURM_JOB_ID"',
        "  fi",
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _check_ref(ref: str) -> list[str]:
    quoted = shlex.quote(f"{ref}^{{commit}}")
    return [
        f'if [ "$(git rev-parse HEAD)" != "$(git rev-parse {quoted})" ]; then',
        f"  echo error: $PWD does not stand at {shlex.quote(ref)} >&2",
        f"  exit {training.BAD_INPUT}",
        "fi",
    ]


def _option(text: str) -> str:
    """Inside double quotes of a #SBATCH line; % begins a replacement there."""
    if re.search(r"[\"\\\n]", text):
        raise errors.UserError(f"--logs={text!r}: no quotes, backslashes or line ends in the log's path")
    return text.replace("%", "%%")


def main(argv: list[str]) -> int:
    """Shows or submits the job."""
    arguments = training.train_arguments(argv)
    job = Job(
        arguments=tuple(arguments),
        name=training.check_name("name", _NAME.value),
        nodes=_NODES.value,
        gpus_per_node=_GPUS.value,
        processes_per_node=_PROCESSES.value,
        cpus_per_process=_CPUS.value,
        time=_TIME.value,
        grace_seconds=_GRACE.value,
        max_restarts=_RESTARTS.value,
        max_crashes=_CRASHES.value,
        repo=_REPO.value,
        ref=_REF.value,
        python=_PYTHON.value,
        container_image=_IMAGE.value,
        container_mounts=tuple(_MOUNTS.value),
        setup=tuple(_SETUP.value),
        env=tuple(training.environment(_ENV.value).items()),
        sbatch=tuple(_SBATCH.value),
        logs=os.path.abspath(_LOGS.value),
    )
    if _CHECK.value:
        training.check_experiment(arguments, job.nodes * (job.gpus_per_node or job.processes))
    text = script(job)
    output = pathlib.Path(_OUTPUT.value or f"{job.logs}/{job.name}.sbatch")
    submit = ["sbatch", "--parsable", str(output)]
    result = {"script": str(output), "processes": job.nodes * job.processes, "dry_run": _DRY_RUN.value, "job": None}
    if _DRY_RUN.value:
        print(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    done = training.act(submit, _DRY_RUN.value, capture=True)
    if done is not None:
        if done.returncode:
            raise errors.UserError(f"sbatch refused {output} (exit code {done.returncode}); its message stands above")
        result["job"] = done.stdout.strip().partition(";")[0]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
