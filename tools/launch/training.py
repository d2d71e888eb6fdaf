"""What the launchers share: the train command behind `--`, its check before anything is rented, and dry runs.

Pure functions but for `act`. The launchers are started as files (`python tools/launch/slurm.py`), so this module is
found beside them.
"""

import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from qdepth_jax import command, errors

ROOT = pathlib.Path(__file__).resolve().parents[2]

# "Start me again": after SIGTERM, at which train.py saves at the next step boundary, and where storage, network or
# another host did not answer. "Do not": the same command would fail again.
AGAIN, BAD_INPUT = errors.TRY_AGAIN, errors.BAD_INPUT
# Before the next start, on every host alike so that they meet. SLURM holds a requeued job back for as long by itself.
RESTART_SECONDS = 120

# Where a process stands among the others is the launcher's business or found by the process itself.
_PLACED = ("coordinator", "num_processes", "process_id")


def train_arguments(argv: list[str], shared: tuple[str, ...] = ("/", "gs://", "s3://")) -> list[str]:
    """The arguments behind `--`, checked.

    Args:
      argv: what absl leaves over: the name of the command, then everything behind `--`.
      shared: how a --workdir that all processes see begins.

    Raises:
      UserError: no --config or --workdir, a --workdir that is not seen everywhere, or flags that the launcher sets.
    """
    arguments = argv[1:]
    for argument in arguments:
        if not argument.startswith("--"):
            raise errors.UserError(
                f"unexpected argument {argument!r}: everything for qdepth_jax.train comes behind `--`, as --name=value"
            )
    for name in _PLACED:
        if value(arguments, name) is not None:
            raise errors.UserError(f"--{name} is set by the launcher or found by the process: leave it out")
    for name in ("config", "workdir"):
        if not value(arguments, name):
            raise errors.UserError(f"no --{name}=... behind `--`: every process needs it")
    workdir = value(arguments, "workdir")
    if not workdir.startswith(shared):
        raise errors.UserError(
            f"--workdir={workdir} must be one place for all processes and outlive them: begin it with "
            f"{' or '.join(shared)}"
        )
    return arguments


def check_experiment(arguments: list[str], devices: int, slices: int = 1) -> Any:
    """Loads --config with its overrides as train.py would, so that a slip is found now and not after hours in a queue.

    Returns:
      The config.

    Args:
      arguments: of train.py.
      devices: chips or GPUs of the whole job, in so many equal slices.

    Raises:
      UserError: an unknown or ill-typed field, a mesh that does not fit the devices, a batch that does not divide.
    """
    from absl import flags
    from ml_collections import config_flags

    from qdepth_jax import config as config_lib
    from qdepth_jax import experiment, sharding
    from qdepth_jax.plan import program

    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # experiments import each other
    values = flags.FlagValues()
    argv = ["train", *arguments]
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        values(argv, known_only=True)
        config = values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        message = f"the config cannot be loaded: {error.args[0] if error.args else error}"
        raise errors.UserError(command.unknown_field(argv) or message) from error
    experiment.check_keys(config)
    mesh = config_lib.build(config_lib.MeshConfig, config.mesh, "mesh")
    sizes = sharding.mesh_sizes(mesh, devices, mesh.slices or slices)
    sharding.place(sizes, program.plan_of(config).state, slices=mesh.slices or slices)  # a size that does not divide
    sharding.check_batch(config_lib.build(config_lib.TrainConfig, config.train, "train"), sizes)
    return config


def train_command(arguments: list[str], python: str = "python") -> list[str]:
    """The command line of one process."""
    return [python, "-m", "qdepth_jax.train", *arguments]


def environment(pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE strings as a table.

    Raises:
      UserError: not of that form, or a name that smells of a secret: secrets belong to the cluster, not into scripts.
    """
    table = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise errors.UserError(f"--env={pair}: write NAME=VALUE")
        if re.search(r"(?i)(secret|password|credential|(^|_)(token|key)$)", name):
            raise errors.UserError(
                f"--env={name}=...: this would stand in plain text in scripts and logs; give it to the cluster's own "
                "store of secrets"
            )
        table[name] = value
    return table


def check_name(flag: str, name: str) -> str:
    """A name that clouds, clusters and file systems all take: lower-case letters, digits, dashes, at most 40.

    Raises:
      UserError: anything else.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise errors.UserError(
            f"--{flag}={name!r}: use lower-case letters, digits and dashes, a letter first, at most 40"
        )
    return name


def value(arguments: Sequence[str], name: str) -> str | None:
    """Of the last --name=value; "" where the flag stands without a value."""
    found = None
    for argument in arguments:
        flag, _, value = argument.removeprefix("--").partition("=")
        if flag == name:
            found = value
    return found


def act(command: list[str], dry_run: bool, capture: bool = False) -> subprocess.CompletedProcess | None:
    """Runs a command, or prints what would be run, quoted for a shell; None on a dry run.

    With `capture` the result holds stdout and stderr, which is shown all the same.

    Raises:
      UserError: the program is not installed.
    """
    print(("would run: " if dry_run else "run: ") + shlex.join(command), file=sys.stderr, flush=True)
    if dry_run:
        return None
    try:
        done = subprocess.run(command, text=True, capture_output=capture, check=False)
    except FileNotFoundError as error:
        raise errors.UserError(f"{command[0]!r} is not installed here: install it or keep to --dry_run") from error
    print(done.stderr or "", end="", file=sys.stderr, flush=True)
    return done
