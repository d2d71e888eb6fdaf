r"""Trains on Cloud TPU slices through gcloud: one slice, or several joined over the data-centre network.

  python tools/launch/tpu_pod.py --name=object --project=PROJECT --zone=us-west4-a --topology=2xv5e-256 \
      --spot --code=GIT_URL --ref=COMMIT [--nodry_run] [--watch_seconds=60] \
      -- --config=experiments/libero.py:object --workdir=gs://BUCKET/runs/object \
      --config.mesh.replica=4 --config.mesh.fsdp=128 --config.train.micro_batches=1

Everything behind `--` goes to `python -m qdepth_jax.train`. A dry run is the default: it prints every command and file
in order and runs nothing.

--action=up (may be given again at any time) asks for a queued resource, deletes and asks again where the last one was
preempted, waits for it, puts code and a systemd service on every host and starts it. The service is the restart policy:
systemd sends SIGTERM when a host goes down, train.py saves on all hosts and ends with exit code 75, and every host
starts again two minutes later, as it does when storage does not answer (75 too) and after a crash; bad input (exit code
2) stays down. --watch_seconds goes on looking and brings preempted slices back.
--action=status | logs | stop (SIGTERM on all hosts) | delete act on what is there.

With --image, --config.data.index_dir (absolute) is a folder of the host, so that an index is built once; one that only
the config file names is built at every start.

The hosts need access to the code and the bucket by their service account: no secret is passed. The last line of stdout
is JSON. Sources: gcloud's reference of compute tpus queued-resources (SDK 528), cloud.google.com/tpu/docs/jax-pods and
multislice-introduction. Not run on a TPU by us.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
import tempfile
import time

import tpu_slices
import training
from absl import flags

from qdepth_jax import command, errors

ACTIONS = ("up", "status", "logs", "stop", "delete")
_ACTION = flags.DEFINE_enum("action", "up", ACTIONS, "what to do")
_NAME = flags.DEFINE_string("name", "qdepth", "of the queued resource, its nodes and the service")
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project; required")
_ZONE = flags.DEFINE_string("zone", "", "zone; required")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "as plan_pod.py takes it: v5e:4x4, v5p-64, 2xv5e-256")
_SPOT = flags.DEFINE_boolean("spot", False, "cheaper, and taken away at any time")
_RUNTIME = flags.DEFINE_string("runtime", "", "software version of the hosts; default by generation")
_CODE = flags.DEFINE_string("code", "", "git URL that the hosts can read, with --ref")
_REF = flags.DEFINE_string("ref", "", "commit or tag to train from")
_IMAGE = flags.DEFINE_string(
    "image", "", "instead of --code: container image with this repository and its extras [tpu,gcs]"
)
_PYTHON = flags.DEFINE_string("python", "python3.11", "interpreter of the hosts, installed by apt where it lacks")
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for every process; repeatable")
_GRACE = flags.DEFINE_integer("grace_seconds", 300, "from SIGTERM to SIGKILL; spot slices get 30", lower_bound=15)
_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 100, "preempted slices asked for again by --watch_seconds", lower_bound=0
)
_WATCH = flags.DEFINE_integer(
    "watch_seconds", 0, "look so often, until the run ends; 0 = return once started", lower_bound=0
)
_CHECK = flags.DEFINE_boolean("check", True, "load the config here first, with the mesh against the number of chips")
_DRY_RUN = flags.DEFINE_boolean("dry_run", True, "only show; --nodry_run acts")

GONE = ("SUSPENDED", "SUSPENDING", "FAILED", "DELETING")
WAITING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")
POLL_SECONDS = 30.0
LOST_LOOKS = 120  # an hour in which gcloud answers nothing
COPIES = 3  # tries to bring the code onto hosts that are there
CRASHED_LOOKS = 5


@dataclasses.dataclass(frozen=True)
class Pod:
    """One run on slices; the fields are the flags of the same names.

    Attributes:
      arguments: of train.py.
      root: folder on the hosts.
    """

    arguments: tuple[str, ...]
    project: str
    zone: str
    name: str = "qdepth"
    topology: str = "v5e:4x4"
    spot: bool = False
    runtime: str = ""
    code: str = ""
    ref: str = ""
    image: str = ""
    python: str = "python3.11"
    env: tuple[tuple[str, str], ...] = ()
    grace_seconds: int = 300
    root: str = "/opt"

    def __post_init__(self):
        for name in ("project", "zone"):
            if not getattr(self, name):
                raise errors.UserError(f"no --{name}: say where the TPUs are")

    @property
    def part(self) -> tpu_slices.Slices:
        """What the topology names."""
        return tpu_slices.parse(self.topology)


# ---- commands ----


def gcloud(pod: Pod, verb: str, *options: str) -> list[str]:
    """A command on the queued resource."""
    where = [f"--zone={pod.zone}", f"--project={pod.project}"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, pod.name, *where, *options]


def create(pod: Pod) -> list[str]:
    """Asks for the slices.

    Raises:
      UserError: a v5p cube that has no name of its own: gcloud takes sides (--type, --topology) up to v4 alone.
    """
    part = pod.part
    shape = [f"--accelerator-type={part.accelerator}"]
    if part.name == "v4":
        shape = ["--type=v4", f"--topology={part.shape}"]
    elif not part.usual:
        raise errors.UserError(
            f"--topology={pod.topology}: gcloud asks for {part.name} by number and picks the sides; take a power of "
            "two chips, or gke.py"
        )
    nodes = (
        [f"--node-id={pod.name}"] if part.slices == 1 else [f"--node-count={part.slices}", f"--node-prefix={pod.name}"]
    )
    runtime = f"--runtime-version={pod.runtime or part.generation.runtime}"
    return gcloud(pod, "create", *shape, runtime, *nodes, *(["--spot"] if pod.spot else []))


def on_all_hosts(pod: Pod, line: str) -> list[str]:
    """Runs a shell line on every host of every slice."""
    return gcloud(pod, "ssh", "--node=all", "--worker=all", f"--command={line}")


def on_first_host(pod: Pod, line: str) -> list[str]:
    """The same on one."""
    return gcloud(pod, "ssh", "--node=0", "--worker=0", f"--command={line}")


def copy(pod: Pod, folder: str) -> list[str]:
    """A folder of this machine, its last name the run's, into the home folder of every host."""
    where = [f"--zone={pod.zone}", f"--project={pod.project}", "--node=all", "--worker=all", "--recurse"]
    return ["gcloud", "compute", "tpus", "queued-resources", "scp", folder, f"{pod.name}:", *where]


def state(pod: Pod) -> list[str]:
    """Prints the state of the queued resource; fails where there is none."""
    return gcloud(pod, "describe", "--format=value(state.state)")


def delete(pod: Pod) -> list[str]:
    """Gives the slices back; the bucket keeps checkpoints and metrics."""
    return gcloud(pod, "delete", "--force", "--quiet")


# ---- files on a host ----


def start_script(pod: Pod) -> str:
    """One start of train.py on one host.

    Cloud TPU machines know their place by the metadata server alone (GKE's variables are not set on them), so it is
    read here, as jax/_src/clusters/cloud_tpu_cluster.py reads it, and said to train.py.
    """
    python = "python" if pod.image else f"{pod.root}/{pod.name}/venv/bin/python"
    train = shlex.join(training.train_command(list(pod.arguments), python))
    if pod.image:
        variables = [f"--env={name}={value}" for name, value in pod.env]
        start = ["docker", "run", "--rm", "--init", f"--name={pod.name}", "--privileged", "--network=host", *variables]
        # What is in a container goes with it, and an index takes a scan of the data.
        if index := training.value(pod.arguments, "config.data.index_dir"):
            start.append(f"--volume={pod.root}/{pod.name}/index:{index}")
        train = f"{shlex.join([*start, pod.image])} {train}"
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by tools/launch/tpu_pod.py.",
            "set -eu -o pipefail",
            "attribute() {",
            "  curl --silent --fail --retry 5 --header 'Metadata-Flavor: Google' \\",
            '    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"',
            "}",
            "environment=$(attribute tpu-env)",
            """variable() { sed -n "s/^ *$1 *: *//p" <<<"$environment" | tr -d "'"; }""",
            "# HOST or NAME:ID:HOST, one line each.",
            "workers=$(attribute worker-network-endpoints | tr , '\\n' | awk -F: '{ print (NF == 3) ? $3 : $1 }')",
            'hosts=$(wc --lines <<<"$workers")',
            "slices=$(variable MEGASCALE_NUM_SLICES)",
            "slice=$(variable MEGASCALE_SLICE_ID)",
            "coordinator=$(variable MEGASCALE_COORDINATOR_ADDRESS)",
            'coordinator=${coordinator:-$(head --lines=1 <<<"$workers")}',
            f'if [ "$hosts" != {pod.part.hosts} ] || [ "${{slices:-1}}" != {pod.part.slices} ]; then',
            f'  echo "error: ${{slices:-1}} slices of $hosts hosts, asked: {pod.part.slices} of {pod.part.hosts}" >&2',
            f"  exit {training.BAD_INPUT}",
            "fi",
            *([f"cd {shlex.quote(f'{pod.root}/{pod.name}/code')}"] if not pod.image else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in pod.env if not pod.image),
            f"exec {train} \\",
            '  --coordinator="${coordinator%%:*}:8482" --num_processes=$((hosts * ${slices:-1})) \\',
            "  --process_id=$((${slice:-0} * hosts + $(attribute agent-worker-number)))",
            "",
        ]
    )


def service(pod: Pod) -> str:
    """The systemd unit around it."""
    return "\n".join(
        [
            "[Unit]",
            "Description=training with qdepth_jax",
            "Wants=network-online.target",
            "After=network-online.target",
            "# Storage may be away for hours: no number of starts is too many, RestartSec keeps them apart.",
            "StartLimitIntervalSec=0",
            "[Service]",
            f"ExecStart=/bin/bash {pod.root}/{pod.name}/start.sh",
            "Restart=on-failure",
            f"RestartForceExitStatus={training.AGAIN}",
            f"RestartPreventExitStatus={training.BAD_INPUT}",
            f"RestartSec={training.RESTART_SECONDS}",
            "# SIGTERM to train.py alone: it ends its own helpers, after the save.",
            "KillMode=mixed",
            f"TimeoutStopSec={pod.grace_seconds}",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ]
    )


def setup_script(pod: Pod, units: str = "/etc/systemd/system") -> str:
    """Code, start.sh and the service on one host; harmless when given again. `units`: systemd's folder."""
    folder = f"{pod.root}/{pod.name}"
    if pod.image:
        code = [shlex.join(["docker", "pull", "--quiet", pod.image])]
    else:
        code = [
            f"python={shlex.quote(pod.python)}",
            'command -v "$python" || { apt-get update -q; apt-get install -qy "$python" "$python-venv"; }',
            f"[ -d {folder}/code/.git ] || git clone --quiet {shlex.quote(pod.code)} {folder}/code",
            f"git -C {folder}/code fetch --quiet --tags --force origin",
            f"git -C {folder}/code checkout --quiet --detach {shlex.quote(pod.ref)}",
            f'[ -d {folder}/venv ] || "$python" -m venv {folder}/venv',
            f"{folder}/venv/bin/pip install --quiet --editable '{folder}/code[tpu,gcs]'",
        ]
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by tools/launch/tpu_pod.py; runs as root beside start.sh and the service.",
            "set -eux",
            f"mkdir -p {folder}",
            *code,
            f'cp "$(dirname "$0")"/start.sh {folder}/start.sh',
            f'cp "$(dirname "$0")"/{pod.name}.service {units}/{pod.name}.service',
            "systemctl daemon-reload",
            f"systemctl reset-failed {pod.name} || true",
            f"systemctl enable {pod.name}",
            f"systemctl restart {pod.name}",
            "",
        ]
    )


def files(pod: Pod) -> dict[str, str]:
    """Name -> content of what every host gets."""
    return {"setup.sh": setup_script(pod), "start.sh": start_script(pod), f"{pod.name}.service": service(pod)}


# ---- actions ----


def up(pod: Pod, watch: int, max_restarts: int, dry_run: bool) -> str:
    """From nothing, or from whatever is there, to a running service; with `watch` to its end. Returns the last state.

    Raises:
      UserError: gcloud refuses, or the run failed on its hosts.
    """
    for start in range(max_restarts + 1):
        _provide(pod, dry_run)
        end = _start(pod, dry_run)
        if end == "started" and watch and not dry_run:
            end = _watch(pod, watch)
        if end not in GONE:
            return end
        print(f"slices {end.lower()}: asking again, {start + 1} of {max_restarts}", file=sys.stderr, flush=True)
    raise errors.UserError(f"the slices were taken away {max_restarts + 1} times: raise --max_restarts to go on")


def _provide(pod: Pod, dry_run: bool) -> None:
    """Returns when the slices are there."""
    found = _state(pod, dry_run)
    if found in GONE:
        _must(delete(pod), dry_run)
        found = ""
    if not found:
        _must(create(pod), dry_run)
    while not dry_run and (found := _state(pod, dry_run)) != "ACTIVE":
        if found not in WAITING:
            raise errors.UserError(f"queued resource {pod.name} is {found or 'not there'}: see gcloud describe")
        print(f"{pod.name}: {found}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)


def _start(pod: Pod, dry_run: bool) -> str:
    """Code and service on every host: "started", or a state of GONE where the slices went meanwhile.

    Raises:
      UserError: the hosts are there, but did not take it COPIES times.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / pod.name
        folder.mkdir()
        for name, text in files(pod).items():
            (folder / name).write_text(text)
        for words in (copy(pod, str(folder)), on_all_hosts(pod, f"sudo bash {pod.name}/setup.sh")):
            for tried in range(1, COPIES + 1):
                done = training.act(words, dry_run)
                if done is None or done.returncode == 0:
                    break
                if (found := _state(pod, dry_run)) != "ACTIVE":
                    return found or "DELETING"
                if tried == COPIES:
                    raise errors.UserError(
                        f"gcloud failed {COPIES} times, at last with exit code {done.returncode}; its "
                        "message stands above"
                    )
                time.sleep(POLL_SECONDS)
    return "started"


def _watch(pod: Pod, seconds: int) -> str:
    """Waits for the run to end ("finished") or the slices to go (a state of GONE).

    systemd starts what crashed again and again, for it cannot tell bad luck from a bad image: CRASHED_LOOKS in a row
    that find it waiting for the next start after a crash are no bad luck.
    """
    crashed = 0
    while True:
        time.sleep(seconds)
        found = _state(pod, False)
        if found != "ACTIVE":
            return found or "DELETING"
        asked = f"systemctl show --property=ActiveState,Result,ExecMainStatus --value {pod.name} | paste -sd ' '"
        done = training.act(on_first_host(pod, asked), False, capture=True)
        words = done.stdout.split() if done.returncode == 0 else []
        if "inactive" in words:
            return "finished"
        if "failed" in words:
            raise errors.UserError(f"the run failed on its hosts ({' '.join(words)}): see --action=logs")
        again = {"0", str(training.AGAIN)} & set(words) or "activating" not in words
        crashed = 0 if again else crashed + 1
        if crashed:
            print(f"{pod.name} crashed ({' '.join(words)}) and is started again", file=sys.stderr, flush=True)
        if crashed == CRASHED_LOOKS:
            raise errors.UserError(
                f"{pod.name} crashes at every start and goes on being started ({' '.join(words)}): see --action=logs, "
                "end it with --action=stop"
            )


def _state(pod: Pod, dry_run: bool) -> str:
    """Of the queued resource; "" where there is none, which only a NOT_FOUND says: other failures say nothing of it.

    Raises:
      TryAgain: gcloud answered nothing for LOST_LOOKS looks.
    """
    for _ in range(LOST_LOOKS):
        done = training.act(state(pod), dry_run, capture=True)
        if done is None or "NOT_FOUND" in done.stderr:
            return ""
        if done.returncode == 0:
            return done.stdout.strip()
        print(f"the state of {pod.name} is not known: asking again", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    raise errors.TryAgain(f"gcloud did not tell the state of {pod.name} {LOST_LOOKS} times; its messages stand above")


def _must(words: list[str], dry_run: bool) -> None:
    done = training.act(words, dry_run)
    if done is not None and done.returncode:
        raise errors.UserError(f"gcloud failed with exit code {done.returncode}; its message stands above")


def main(argv: list[str]) -> int:
    """Shows or does it."""
    rising = _ACTION.value == "up"
    arguments = training.train_arguments(argv, ("gs://",)) if rising else []
    pod = Pod(
        arguments=tuple(arguments),
        project=_PROJECT.value,
        zone=_ZONE.value,
        name=training.check_name("name", _NAME.value),
        topology=_TOPOLOGY.value,
        spot=_SPOT.value,
        runtime=_RUNTIME.value,
        code=_CODE.value,
        ref=_REF.value,
        image=_IMAGE.value,
        python=_PYTHON.value,
        env=tuple(training.environment(_ENV.value).items()),
        grace_seconds=_GRACE.value,
    )
    dry_run, end = _DRY_RUN.value, _ACTION.value
    if rising:
        if bool(pod.image) == bool(pod.code and pod.ref):
            raise errors.UserError("how does the code get there? Give --code=GIT_URL --ref=COMMIT, or --image")
        index = training.value(arguments, "config.data.index_dir")
        if pod.image and index and not index.startswith("/"):
            raise errors.UserError(f"--config.data.index_dir={index}: a container mounts absolute folders only")
        if _CHECK.value:
            training.check_experiment(arguments, pod.part.chips * pod.part.slices, pod.part.slices)
        if dry_run:
            for name, text in files(pod).items():
                print(f"---- {name}\n{text}")
        end = up(pod, _WATCH.value, _RESTARTS.value, dry_run)
    elif end == "status":
        end = _state(pod, dry_run) or end
        _must(on_all_hosts(pod, f"sudo systemctl --no-pager status {pod.name} | head -n 4"), dry_run)
    elif end == "logs":
        _must(on_first_host(pod, f"sudo journalctl --no-pager --lines=200 --unit={pod.name}"), dry_run)
    elif end == "stop":
        _must(on_all_hosts(pod, f"sudo systemctl disable {pod.name}; sudo systemctl stop {pod.name}"), dry_run)
    else:
        _must(delete(pod), dry_run)
    print(json.dumps({"state": end, "hosts": pod.part.hosts * pod.part.slices, "dry_run": dry_run}))
    return 0


if __name__ == "__main__":
    command.run(main)
