r"""Renders a JobSet that trains on TPU slices of a GKE cluster, and applies it with --nodry_run.

  python tools/launch/gke.py --name=object --topology=2xv5e-256 --image=IMAGE --output=object.yaml \
      [--nodry_run] -- --config=experiments/libero.py:object --workdir=gs://BUCKET/runs/object \
      --config.mesh.replica=4 --config.mesh.fsdp=128 --config.train.micro_batches=1

Everything behind `--` goes to `python -m qdepth_jax.train` in the image, which holds this repository and its
extras [tpu,gcs]. A dry run is the default: it prints the YAML and the kubectl command, and writes and applies nothing.

The cluster needs the JobSet controller (0.10 or later: it tells exit codes apart by the job's message) and one node
pool per slice, of the topology asked for. One pod per host; GKE tells the pods of each other (TPU_WORKER_HOSTNAMES,
MEGASCALE_*) and train.py reads it. Exit code 75 (stopped by SIGTERM after a save, or storage does not answer) and
evicted pods restart all pods without limit, exit code 2 (bad input) ends the JobSet, any other failure restarts
--max_restarts times, such as a host that died: JAX aborts the rest (134), often before its pod counts as evicted. Every
start resumes. Identity and buckets come by --service_account (Workload Identity): no secret
stands in the YAML. The last line of stdout is JSON.

Sources: the JobSet API and its failure-policy and tpu-multislice examples (kubernetes-sigs/jobset), and
cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice. Not run on a cluster by us.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import tpu_slices
import training
from absl import flags

from qdepth_jax import command, errors

_NAME = flags.DEFINE_string("name", "qdepth", "name of the JobSet")
_NAMESPACE = flags.DEFINE_string("namespace", "default", "its namespace")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "as plan_pod.py takes it: v5e:4x4, v5p-64, 2xv5e-256")
_IMAGE = flags.DEFINE_string("image", "", "container image with this repository and its extras [tpu,gcs]; required")
_PYTHON = flags.DEFINE_string("python", "python", "interpreter in the image")
_ACCOUNT = flags.DEFINE_string("service_account", "", "Kubernetes service account that may use the buckets")
_QUEUE = flags.DEFINE_string("queue", "", "Kueue's LocalQueue, where the cluster has one")
_SPOT = flags.DEFINE_boolean("spot", False, "take spot nodes")
_VOLUMES = flags.DEFINE_list(
    "volumes", [], "CLAIM:/FOLDER, persistent volume claims to mount: data, its index, workdir"
)
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for every pod; repeatable")
_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 30, "restarts after crashes: neither exit code 2 nor 75", lower_bound=0
)
_GRACE = flags.DEFINE_integer(
    "grace_seconds", 300, "from SIGTERM to SIGKILL; GKE cuts it to 15 on spot", lower_bound=15
)
_OUTPUT = flags.DEFINE_string("output", "", "where to write the YAML; default NAME.yaml here")
_CHECK = flags.DEFINE_boolean("check", True, "load the config here first, with the mesh against the number of chips")
_DRY_RUN = flags.DEFINE_boolean("dry_run", True, "only show; --nodry_run writes the YAML and calls kubectl apply")

CONTAINER = "train"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a JobSet is made of; the fields are the flags of the same names.

    Attributes:
      arguments: of train.py.
    """

    arguments: tuple[str, ...]
    image: str
    name: str = "qdepth"
    namespace: str = "default"
    topology: str = "v5e:4x4"
    python: str = "python"
    service_account: str = ""
    queue: str = ""
    spot: bool = False
    volumes: tuple[tuple[str, str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    max_restarts: int = 30
    grace_seconds: int = 300


def jobset(work: Workload) -> dict[str, Any]:
    """The JobSet as JSON types.

    Raises:
      UserError: several slices of one host each, which GKE does not join.
    """
    part = tpu_slices.parse(work.topology)
    if part.slices > 1 and part.hosts == 1:
        raise errors.UserError(f"--topology={work.topology}: GKE joins slices of several hosts only: take larger ones")
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the JobSet starts all pods again, or none
        "terminationGracePeriodSeconds": work.grace_seconds,
        "hostNetwork": True,  # as in the multislice examples of GKE and JobSet: the traffic between slices is theirs
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": part.generation.gke,
            "cloud.google.com/gke-tpu-topology": part.shape,
            **({"cloud.google.com/gke-spot": "true"} if work.spot else {}),
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": work.image,
                # No shell between Kubernetes and train.py: it is process 1 and gets SIGTERM itself. "$(" would be
                # replaced by Kubernetes, "$$(" is how to write it.
                "command": [
                    word.replace("$(", "$$(") for word in training.train_command(list(work.arguments), work.python)
                ],
                "env": [{"name": name, "value": value} for name, value in work.env],
                "resources": {"limits": {"google.com/tpu": part.chips_per_host}},
                "volumeMounts": [
                    {"name": f"volume-{number}", "mountPath": folder} for number, (_, folder) in enumerate(work.volumes)
                ],
            }
        ],
        "volumes": [
            {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
            for number, (claim, _) in enumerate(work.volumes)
        ],
    }
    if work.spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if work.service_account:
        pod["serviceAccountName"] = work.service_account
    job = {
        "parallelism": part.hosts,
        "completions": part.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod more or less is no training: the first failure ends the job
        # Its reason, PodFailurePolicy, tells one level up what is no crash; the code in the job's message ("Container
        # ... failed with exit code 2 matching FailJob rule at index 0") tells bad input from the rest.
        "podFailurePolicy": {
            "rules": [
                _on_exit(training.BAD_INPUT),
                _on_exit(training.AGAIN),
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": work.name,
            "namespace": work.namespace,
            **({"labels": {"kueue.x-k8s.io/queue-name": work.queue}} if work.queue else {}),
            # One job, one node pool: a slice never spreads over two.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": work.max_restarts,
                "rules": [
                    {
                        "name": "BadInput",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f"exit code {training.BAD_INPUT} matching FailJob rule"],
                    },
                    {
                        "name": "StoppedOrEvicted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": part.slices, "template": {"spec": job}}],
        },
    }


def _on_exit(code: int) -> dict[str, Any]:
    return {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]},
    }


def render(work: Workload) -> str:
    """The JobSet as YAML."""
    import yaml

    return "# Written by tools/launch/gke.py.\n" + yaml.safe_dump(jobset(work), sort_keys=False, width=120)


def _volumes(entries: list[str]) -> tuple[tuple[str, str], ...]:
    out = []
    for entry in entries:
        claim, colon, folder = entry.partition(":")
        if not colon or not claim or not folder.startswith("/"):
            raise errors.UserError(f"--volumes={entry}: write CLAIM:/FOLDER")
        out.append((claim, folder))
    return tuple(out)


def main(argv: list[str]) -> int:
    """Shows or applies the JobSet."""
    volumes = _volumes(_VOLUMES.value)
    # What is in a container goes with it: a workdir must be in a bucket or on a volume.
    arguments = training.train_arguments(argv, ("gs://", *(f"{folder}/" for _, folder in volumes)))
    if not _IMAGE.value:
        raise errors.UserError("no --image: name the container image that holds this repository")
    work = Workload(
        arguments=tuple(arguments),
        image=_IMAGE.value,
        name=training.check_name("name", _NAME.value),
        namespace=_NAMESPACE.value,
        topology=_TOPOLOGY.value,
        python=_PYTHON.value,
        service_account=_ACCOUNT.value,
        queue=_QUEUE.value,
        spot=_SPOT.value,
        volumes=volumes,
        env=tuple(training.environment(_ENV.value).items()),
        max_restarts=_RESTARTS.value,
        grace_seconds=_GRACE.value,
    )
    part = tpu_slices.parse(work.topology)
    text = render(work)
    if _CHECK.value:
        config = training.check_experiment(arguments, part.chips * part.slices, part.slices)
        index, kept = f"{config.data.index_dir}/", tuple(f"{folder}/" for _, folder in volumes)
        if any("://" in data.path for data in config.datasets.values()) and not index.startswith(kept):
            print(
                "note: data in a bucket is scanned at every start of the pods: keep its index on a volume, by "
                "--volumes=CLAIM:/FOLDER and --config.data.index_dir=/FOLDER",
                file=sys.stderr,
            )
    output = pathlib.Path(_OUTPUT.value or f"{work.name}.yaml")
    if _DRY_RUN.value:
        print(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    done = training.act(["kubectl", "apply", f"--filename={output}"], _DRY_RUN.value)
    if done is not None and done.returncode:
        raise errors.UserError(f"kubectl refused {output} (exit code {done.returncode}); its message stands above")
    print(json.dumps({"yaml": str(output), "pods": part.hosts * part.slices, "dry_run": _DRY_RUN.value}))
    return 0


if __name__ == "__main__":
    command.run(main)
