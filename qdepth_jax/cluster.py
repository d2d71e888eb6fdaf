"""What the launcher of this process says about the run: how many processes, which GPUs are ours."""

import socket
from collections.abc import Mapping
from typing import NamedTuple

from qdepth_jax import errors


class Cluster(NamedTuple):
    """What the launcher says.

    Attributes:
      kind: name of JAX's detection method for it, or "no cluster".
      processes: of the run.
      devices: local device numbers of this process, None = all it sees.
    """

    kind: str
    processes: int
    devices: list[int] | None = None


NONE = Cluster("no cluster", 1)


def detect(environment: Mapping[str, str]) -> Cluster:
    """How many processes this environment was started with.

    GKE TPU: TPU_WORKER_HOSTNAMES times MEGASCALE_NUM_SLICES. SLURM: SLURM_NTASKS of a step (srun); a batch script or a
    shell in an allocation is no step. Open MPI: OMPI_COMM_WORLD_SIZE.

    Raises:
      UserError: GPUs that do not divide over the tasks of a node; several processes of an unknown launcher.
    """
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if workers and "WARNING" not in workers:  # libtpu writes its complaints into the variable
        slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
        return Cluster("gketpu", len(workers.split(",")) * slices)
    if all(name in environment for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")):
        tasks = int(environment.get("SLURM_NTASKS") or 1)
        return Cluster("slurm", tasks, _slurm_gpus(environment) if tasks > 1 else None)
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return Cluster("ompi", int(environment.get("OMPI_COMM_WORLD_SIZE") or 1))
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"):
        if environment.get(name, "").isdecimal() and int(environment[name]) > 1:
            # Taken for a single process, each of them would train alone into the same workdir.
            raise errors.UserError(
                f"{name}={environment[name]} says that this is one of several processes, but its launcher is none that "
                "JAX knows: give --coordinator=HOST:PORT --num_processes=N --process_id=I, or unset the variable"
            )
    return NONE


def detect_cloud_tpu() -> Cluster:
    """A Cloud TPU machine says how many hosts its slice has through its metadata server, not by its environment.

    Elsewhere this asks nobody: JAX looks for the chips first.
    """
    from jax._src import clusters

    if not clusters.GceTpuCluster.is_env_present():
        return NONE
    return Cluster("gcetpu", clusters.GceTpuCluster.get_process_count())


def _slurm_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs it sees a task takes; None where SLURM says nothing of GPUs.

    JAX would give task number i of a node GPU number i: with one task for eight GPUs seven would idle, and with GPUs
    bound to tasks (--gpus-per-task) task 1 would ask for a GPU that it does not see.
    """
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if not on_node.isdecimal() or not int(on_node):
        return None
    total, seen = int(on_node), environment.get("CUDA_VISIBLE_DEVICES")
    visible = len(seen.split(",")) if seen else total
    if visible != total:
        return list(range(visible))  # bound: all of them are ours
    # "8(x2),4" counts tasks node by node; nodes of one step differ rarely, and then the launcher must bind.
    counts = {part.split("(")[0] for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")}
    tasks, place = max(int(count) for count in counts), int(environment["SLURM_LOCALID"])
    if len(counts) > 1 or total % tasks:
        raise errors.UserError(
            f"{total} GPUs of a node do not divide over its SLURM tasks ({sorted(counts)} per node): start one task "
            "per node or per GPU, or bind them with srun --gpus-per-task"
        )
    part = total // tasks
    return list(range(place * part, (place + 1) * part))


def check_address(coordinator: str, listens: bool) -> None:
    """Raises UserError unless this is HOST:PORT; on the process that `listens` the port must be free.

    JAX's service dies of a port that is taken (segmentation fault, jaxlib 0.10.2).
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise errors.UserError(f"--coordinator={coordinator}: HOST:PORT of process 0 is needed, e.g. 10.0.0.2:8476")
    if not listens:
        return
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", int(port)))
        except OSError as error:
            raise errors.UserError(
                f"--coordinator={coordinator}: port {port} of this machine cannot be used ({error.strerror}): choose a "
                "free one"
            ) from error
