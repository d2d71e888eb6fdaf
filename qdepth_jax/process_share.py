"""Which share of independent work a process does, and on which of its devices: nothing is connected, nobody waits."""

import os
from collections.abc import Mapping

from qdepth_jax import cluster, errors

# Launcher (cluster.detect's kind) -> variable with the number of a process.
_NUMBER = {"slurm": "SLURM_PROCID", "ompi": "OMPI_COMM_WORLD_RANK", "gketpu": "TPU_WORKER_ID"}


def find(
    process_id: int | None, num_processes: int | None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """(number of this process, number of processes): as given, or as the launcher says, or (0, 1).

    Raises:
      UserError: one of the two without the other, a number that is not below the count, or a launcher that says how
        many but not which.
    """
    if (process_id is None) != (num_processes is None):
        raise errors.UserError("--process_id=I and --num_processes=N belong together: give both, or none of them")
    if num_processes is not None:
        if not 0 <= process_id < num_processes:
            raise errors.UserError(
                f"--process_id={process_id} --num_processes={num_processes}: processes are numbered from 0 to N - 1"
            )
        return process_id, num_processes
    try:
        found = cluster.detect(environment)
    except errors.UserError as error:  # its advice is for processes that are to be connected
        raise errors.UserError(
            "the environment says that this is one of several processes, but not by a launcher that is known: give "
            "--process_id=I --num_processes=N"
        ) from error
    if found.processes == 1:
        return 0, 1
    number = environment.get(_NUMBER[found.kind], "")
    if not number.isdecimal() or environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        raise errors.UserError(
            f"{found.processes} processes were started ({found.kind}), but not which of them this is: give "
            "--process_id=I --num_processes=N"
        )
    return int(number), found.processes


def local_devices(environment: Mapping[str, str] = os.environ) -> list:
    """Devices of this process: all that it sees, but for SLURM tasks that share a node's GPUs (cluster.detect)."""
    import jax

    chosen, devices = cluster.detect(environment).devices, jax.local_devices()
    if chosen is None or devices[0].platform == "cpu":
        return devices
    return [devices[i] for i in chosen]
