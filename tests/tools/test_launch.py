"""The launchers: what they render is parsed by others (YAML, bash, fake gcloud, sbatch, kubectl), SLURM where it is."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import types

import pytest
import yaml
from absl import flags

from qdepth_jax import errors

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"
sys.path.insert(0, str(LAUNCH))


def load(name: str) -> types.ModuleType:
    """A launcher as a module; its flags are forgotten, because the next one defines some of the same names."""
    module = importlib.import_module(name)
    for flag in list(flags.FLAGS.flags_by_module_dict().get(module.__name__, [])):
        delattr(flags.FLAGS, flag.name)
    return module


training, tpu_slices = importlib.import_module("training"), importlib.import_module("tpu_slices")
gke, slurm, tpu_pod = load("gke"), load("slurm"), load("tpu_pod")

# Nothing here may be taken apart or expanded by a shell, by YAML, by SLURM or by Kubernetes.
NASTY = ('--config.name=it\'s $HOME `x` $(y) "q" \\ % # : {z} *', "--config.data.text_tokenizer=a b/c\td")
ARGUMENTS = ("--config=experiments/demo.py:policy", "--workdir=gs://bucket/a run", *NASTY)


def fake(folder: pathlib.Path, name: str, answer: str = "") -> None:
    """A stand-in for a program of that name: notes its arguments in `calls`, then runs `answer`."""
    path = folder / name
    note = f"printf '%s\\0' {name} \"$@\" >>{shlex.quote(str(folder / 'calls'))}"
    end = f"printf '\\036' >>{shlex.quote(str(folder / 'calls'))}"
    path.write_text(f"#!/bin/bash\n{note}\n{end}\n{answer}\n")
    path.chmod(0o755)


def calls(folder: pathlib.Path) -> list[list[str]]:
    """What the stand-ins were called with."""
    log = folder / "calls"
    return [call.split("\0")[:-1] for call in log.read_text().split("\036")[:-1]] if log.exists() else []


def run(
    tool: str, *arguments: str, path: pathlib.Path | None = None, alone: bool = False
) -> subprocess.CompletedProcess:
    """A launcher as users start it; `path` comes before PATH, or `alone` instead of it."""
    found = ([str(path)] if path else []) + ([] if alone else [os.environ["PATH"]])
    environment = os.environ | {"PATH": ":".join(found), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(LAUNCH / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)


def bash(text: str, path: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(path), **variables}
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, timeout=60)


# ---- slices ----


@pytest.mark.parametrize(
    ("text", "chips", "hosts", "per_host", "accelerator", "label"),
    [
        ("v5e:1x1", 1, 1, 1, "v5litepod-1", "tpu-v5-lite-podslice"),
        ("v5e:2x2", 4, 1, 4, "v5litepod-4", "tpu-v5-lite-podslice"),
        ("v5e:2x4", 8, 1, 8, "v5litepod-8", "tpu-v5-lite-podslice"),
        ("v5e:4x4", 16, 4, 4, "v5litepod-16", "tpu-v5-lite-podslice"),
        ("v5e:16x16", 256, 64, 4, "v5litepod-256", "tpu-v5-lite-podslice"),
        ("v6e:4x8", 32, 8, 4, "v6e-32", "tpu-v6e-slice"),
        ("2xv5e-256", 256, 64, 4, "v5litepod-256", "tpu-v5-lite-podslice"),
        ("v4:2x2x1", 4, 1, 4, "v4-8", "tpu-v4-podslice"),
        ("v4:2x2x4", 16, 4, 4, "v4-32", "tpu-v4-podslice"),
        ("v5p-64", 32, 8, 4, "v5p-64", "tpu-v5p-slice"),
        ("v5p:8x8x16", 1024, 256, 4, "v5p-2048", "tpu-v5p-slice"),
    ],
)
def test_slices_as_the_cloud_documents_them(text, chips, hosts, per_host, accelerator, label):
    part = tpu_slices.parse(text)
    assert (part.chips, part.hosts, part.chips_per_host) == (chips, hosts, per_host)
    assert (part.accelerator, part.generation.gke) == (accelerator, label)
    assert part.hosts * part.chips_per_host == part.chips


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:4x4x4", "v5e:3x4", "v7:2x2", "v5p:4x4", "v5p:8x4x4", "v5p:64x64x64", "v4:axb", "h100-8"]
)
def test_slices_that_do_not_exist(text):
    with pytest.raises(errors.UserError, match=re.escape(text)):
        tpu_slices.parse(text)


# ---- the train command ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=/w"], "no --config"),
        (["--config=c.py"], "no --workdir"),
        (["--config=c.py", "--workdir=runs/x"], "one place for all"),
        (["--config=c.py", "--workdir=/w", "--process_id=0"], "set by the launcher"),
        (["--config=c.py", "--workdir=/w", "stray"], "'stray'"),
    ],
)
def test_bad_train_arguments(arguments, message):
    with pytest.raises(errors.UserError, match=message):
        training.train_arguments(["x", *arguments])


def test_env_takes_no_secrets():
    assert training.environment(["NCCL_DEBUG=INFO", "A=b=c"]) == {"NCCL_DEBUG": "INFO", "A": "b=c"}
    for pair in ("WANDB_API_KEY=1", "HF_TOKEN=1", "MY_PASSWORD=1", "9A=1", "novalue"):
        with pytest.raises(errors.UserError, match=r"--env="):
            training.environment([pair])


def test_a_wrong_config_is_found_before_renting():
    demo = ["--config=experiments/demo.py:tokenizer", "--workdir=/w"]
    training.check_experiment(demo, 8)
    with pytest.raises(errors.UserError, match="multiple of micro_batches x replica x fsdp = 1 x 1 x 3"):
        training.check_experiment(demo, 3)
    with pytest.raises(errors.UserError, match="mesh"):
        training.check_experiment([*demo, "--config.mesh.fsdp=3"], 8)
    with pytest.raises(errors.UserError, match="only `replica` may cross slices"):
        training.check_experiment(demo, 8, slices=2)
    with pytest.raises(errors.UserError, match="fsdpp"):
        training.check_experiment([*demo, "--config.mesh.fsdpp=3"], 8)


# ---- GKE ----


@pytest.mark.parametrize(
    ("topology", "slices"), [("v5e:4x4", 1), ("2xv5e-256", 2), ("4xv5p:2x4x4", 4), ("v6e:2x4", 1), ("2xv4:4x4x4", 2)]
)
def test_jobset(topology, slices):
    work = gke.Workload(ARGUMENTS, image="img@sha256:0", topology=topology, env=(("A", "yes"), ("B", "1: 2")))
    found = yaml.safe_load(gke.render(work))
    part = tpu_slices.parse(topology)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert found["metadata"]["annotations"] == {annotation: "cloud.google.com/gke-nodepool"}
    (group,) = found["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert group["replicas"] == slices
    assert job["parallelism"] == job["completions"] == part.hosts
    limit = container["resources"]["limits"]["google.com/tpu"]
    assert limit * part.hosts == part.chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": part.generation.gke,
        "cloud.google.com/gke-tpu-topology": part.shape,
    }
    # As Kubernetes reads it: $(X) is replaced, $$ is a literal $.
    words = [re.sub(r"\$\$", "$", word) for word in container["command"] if not re.search(r"(?<!\$)\$\(", word)]
    assert words == ["python", "-m", "qdepth_jax.train", *ARGUMENTS]
    assert container["env"] == [{"name": "A", "value": "yes"}, {"name": "B", "value": "1: 2"}]


def test_jobset_restarts_for_ever_after_a_stop_and_seldom_after_a_crash():
    found = gke.jobset(gke.Workload(ARGUMENTS, image="i", max_restarts=3, grace_seconds=77))
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    bad, stopped, evicted = job["podFailurePolicy"]["rules"]
    assert bad["action"] == stopped["action"] == evicted["action"] == "FailJob"
    for rule, code in ((bad, 2), (stopped, 75)):
        name = pod["containers"][0]["name"]
        assert rule["onExitCodes"] == {"containerName": name, "operator": "In", "values": [code]}
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    ends, rule = policy["rules"]  # in this order: the first that matches counts
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and ends["action"] == "FailJobSet"
    assert ends["onJobFailureReasons"] == rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    # ruleNameFmt of JobSet's webhook, which refuses the whole JobSet for another name; no dashes.
    assert all(re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", found["name"]) for found in policy["rules"])
    (pattern,) = ends["onJobFailureMessagePatterns"]  # Kubernetes, pkg/controller/job/pod_failure_policy.go
    message = "Container train for pod ns/x failed with exit code {} matching FailJob rule at index {}"
    assert re.search(pattern, message.format(2, 0)) and not re.search(pattern, message.format(75, 1))
    assert not re.search(pattern, "Pod ns/x has condition DisruptionTarget matching FailJob rule at index 2")
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # what podFailurePolicy demands
    assert pod["terminationGracePeriodSeconds"] == 77


def test_jobset_options():
    work = gke.Workload(
        ARGUMENTS, image="i", spot=True, queue="q", service_account="s", volumes=(("claim", "/data"), ("c2", "/w"))
    )
    found = gke.jobset(work)
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and pod["tolerations"]
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"} and pod["serviceAccountName"] == "s"
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    mounts = {claims[m["name"]]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"claim": "/data", "c2": "/w"}
    with pytest.raises(errors.UserError, match="several hosts"):
        gke.jobset(gke.Workload(ARGUMENTS, image="i", topology="2xv5e:2x4"))


def test_gke_dry_run_touches_nothing_and_the_real_one_applies(tmp_path):
    fake(tmp_path, "kubectl")
    out = tmp_path / "my jobs" / "x.yaml"
    flags = ["--image=i", "--nocheck", f"--output={out}", "--volumes=claim:/data"]
    shown = run("gke.py", *flags, "--", ARGUMENTS[0], "--workdir=/data/w", path=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert not out.exists() and not calls(tmp_path) and f"--filename={out}" in shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1]) == {"yaml": str(out), "pods": 4, "dry_run": True}
    done = run("gke.py", *flags, "--nodry_run", "--", ARGUMENTS[0], "--workdir=/data/w", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == [["kubectl", "apply", f"--filename={out}"]]
    assert out.read_text().strip() in shown.stdout  # what was shown is what is applied
    lost = run("gke.py", *flags, "--", ARGUMENTS[0], "--workdir=/elsewhere/w", path=tmp_path)
    assert lost.returncode == 2 and "gs:// or /data/" in lost.stderr


def test_gke_says_where_an_index_would_be_built_at_every_start(tmp_path):
    arguments = ["--", f"--config={ROOT}/experiments/demo.py:tokenizer", "--workdir=gs://b/w"]
    arguments += ["--config.train.batch_size=16", "--config.datasets.libero_object.path=gs://b/libero_object/1.0.0"]
    for index, told in (("/index/x", False), ("/index", False), ("/indexes", True), ("", True)):
        flags = ["--image=i", "--volumes=claim:/index", *arguments, f"--config.data.index_dir={index}"]
        shown = run("gke.py", *flags)
        assert shown.returncode == 0, shown.stderr
        assert ("scanned at every start" in shown.stderr) is told, index


# ---- Cloud TPU ----

METADATA = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3,d:4:10.0.0.4",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'",
}


def metadata(folder: pathlib.Path, **changes: str) -> None:
    """A fake curl that answers as the metadata server does."""
    for name, text in (METADATA | {k.replace("_", "-"): v for k, v in changes.items()}).items():
        (folder / name).write_text(text)
    (folder / "curl").write_text(
        f'#!/bin/bash\ncat "{folder}/${{!#}}/../${{@: -1:1}}" 2>/dev/null || '
        f'cat "{folder}/$(basename "${{@: -1:1}}")"\n'
    )
    (folder / "curl").chmod(0o755)


def pod(folder: pathlib.Path, **changes) -> tpu_pod.Pod:
    fields = {
        "project": "p",
        "zone": "z",
        "topology": "2xv5e-16",
        "code": "url",
        "ref": "r",
        "root": str(folder / "opt"),
    }
    return tpu_pod.Pod(ARGUMENTS, **(fields | changes))


def test_create_commands(tmp_path):
    words = tpu_pod.create(pod(tmp_path, topology="2xv5e:16x16", spot=True))
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "qdepth"]
    assert {"--accelerator-type=v5litepod-256", "--node-count=2", "--node-prefix=qdepth", "--spot"} <= set(words)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in words
    words = tpu_pod.create(pod(tmp_path, topology="v5p:4x4x4", runtime="mine"))
    assert {"--accelerator-type=v5p-128", "--node-id=qdepth", "--runtime-version=mine"} <= set(words)
    assert "--spot" not in words and not any(word.startswith("--node-count") for word in words)
    assert {"--type=v4", "--topology=4x4x12"} <= set(tpu_pod.create(pod(tmp_path, topology="v4:4x4x12")))
    with pytest.raises(errors.UserError, match="by number"):
        tpu_pod.create(pod(tmp_path, topology="v5p:4x4x12"))


@pytest.mark.parametrize("form", ["triples", "names", "single slice"])
def test_start_script_knows_its_place(tmp_path, form):
    changes, topology = {}, "2xv5e-16"
    expected = ["--coordinator=10.9.0.1:8482", "--num_processes=8", "--process_id=6"]
    if form == "names":
        changes = {"worker_network_endpoints": "h1,h2,h3,h4"}
    elif form == "single slice":
        changes, topology = {"tpu_env": "ACCELERATOR_TYPE: 'v5litepod-16'"}, "v5e-16"
        expected = ["--coordinator=10.0.0.1:8482", "--num_processes=4", "--process_id=2"]
    metadata(tmp_path, **changes)
    work = pod(tmp_path, topology=topology, env=(("A", "b c"),))
    (tmp_path / "opt/qdepth/venv/bin").mkdir(parents=True)
    (tmp_path / "opt/qdepth/code").mkdir()
    fake(tmp_path, "python", 'echo "$A"')
    (tmp_path / "python").rename(tmp_path / "opt/qdepth/venv/bin/python")
    done = bash(tpu_pod.start_script(work), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "b c\n"
    assert calls(tmp_path) == [["python", "-m", "qdepth_jax.train", *ARGUMENTS, *expected]]


def test_start_script_refuses_another_number_of_hosts(tmp_path):
    metadata(tmp_path, worker_network_endpoints="h1,h2")
    done = bash(tpu_pod.start_script(pod(tmp_path)), tmp_path)
    assert done.returncode == 2 and "2 slices of 2 hosts, asked: 2 of 4" in done.stderr


def test_start_script_with_an_image(tmp_path):
    metadata(tmp_path)
    fake(tmp_path, "docker")
    arguments = (*ARGUMENTS, "--config.data.index_dir=/in dex")
    work = dataclasses.replace(
        pod(tmp_path, code="", ref="", image="some/image:1", env=(("A", "b c"),)), arguments=arguments
    )
    done = bash(tpu_pod.start_script(work), tmp_path)
    assert done.returncode == 0, done.stderr
    ((_, verb, *words),) = calls(tmp_path)
    assert verb == "run" and "--env=A=b c" in words and "--init" in words
    assert f"--volume={tmp_path}/opt/qdepth/index:/in dex" in words
    assert words[words.index("some/image:1") :][: 4 + len(arguments)] == [
        "some/image:1", "python", "-m", "qdepth_jax.train", *arguments
    ]  # fmt: skip
    assert words[-1] == "--process_id=6"


def test_setup_script(tmp_path):
    """Run for real beside fakes of git, pip and systemctl, twice: it may be given again."""
    work = pod(tmp_path, code="https://host/a b.git", ref="v1'", python="python3")
    here = tmp_path / "home" / "qdepth"
    here.mkdir(parents=True)
    for name, text in {**tpu_pod.files(work), "setup.sh": tpu_pod.setup_script(work, str(tmp_path))}.items():
        (here / name).write_text(text)
    for name in ("systemctl", "python3"):
        fake(tmp_path, name, 'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/pip"; fi')
    fake(tmp_path, "git", 'if [ "$1" = clone ]; then mkdir -p "$4/.git"; fi')
    for again in (False, True):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = bash(f"cd {tmp_path}/home && bash qdepth/setup.sh", tmp_path)
        assert done.returncode == 0, done.stderr
        found = calls(tmp_path)
        assert (["git", "clone", "--quiet", "https://host/a b.git", f"{work.root}/qdepth/code"] in found) is not again
        assert ["git", "-C", f"{work.root}/qdepth/code", "checkout", "--quiet", "--detach", "v1'"] in found
        assert ["python3", "install", "--quiet", "--editable", f"{work.root}/qdepth/code[tpu,gcs]"] in found
        assert found[-1] == ["systemctl", "restart", "qdepth"]
    assert (tmp_path / "opt/qdepth/start.sh").read_text() == tpu_pod.start_script(work)
    unit = (tmp_path / "qdepth.service").read_text()
    assert "RestartForceExitStatus=75\nRestartPreventExitStatus=2\n" in unit and "TimeoutStopSec=300" in unit
    # Two minutes, as SLURM holds a requeued job back; the docs say the same, and no number of starts is too many.
    assert "\nRestartSec=120\n" in unit and "\nStartLimitIntervalSec=0\n" in unit
    assert "120 s, `RestartSec`" in (ROOT / "docs/scaling.md").read_text()


STATES = """
state=$(cat "{folder}/state" 2>/dev/null)
case "$4" in
  describe) n=$(ls "{folder}" | grep -c asked); touch "{folder}/asked$n"
    if [ $(($n % 3)) = 2 ]; then echo "ERROR: token refresh timed out" >&2; exit 1; fi
    if [ -z "$state" ]; then echo "ERROR: (gcloud...describe) NOT_FOUND: Resource 'x' was not found" >&2; exit 1; fi
    echo "$state" ;;
  create) [ -z "$state" ] || exit 1; echo ACTIVE >"{folder}/state" ;;
  delete) rm "{folder}/state" ;;
  ssh) case "$*" in *--node=0*)
    n=$(ls "{folder}" | grep -c looked); touch "{folder}/looked$n"
    if [ $n = 0 ]; then echo active success 0
    elif [ $n = 1 ]; then echo activating exit-code 75; echo SUSPENDED >"{folder}/state"
    else echo "{end}"; fi ;; esac ;;
esac
"""


def test_a_run_that_crashes_at_every_start_is_told(tmp_path, monkeypatch, capsys):
    fake(
        tmp_path,
        "gcloud",
        f'''
case "$4" in
  describe) echo ACTIVE ;;
  ssh) case "$*" in *--node=0*)
    n=$(ls "{tmp_path}" | grep -c looked); touch "{tmp_path}/looked$n"
    if [ $n = 1 ]; then echo activating exit-code 75; else echo activating exit-code 1; fi ;; esac ;;
esac
''',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_pod.time, "sleep", lambda seconds: None)
    with pytest.raises(errors.UserError, match=r"crashes at every start .*\(activating exit-code 1\).*--action=stop"):
        tpu_pod.up(pod(tmp_path), watch=1, max_restarts=1, dry_run=False)
    # Storage that is away in between is no crash: counting began again.
    assert capsys.readouterr().err.count("crashed (activating exit-code 1)") == 1 + tpu_pod.CRASHED_LOOKS


@pytest.mark.parametrize("end", ["inactive success 0", "failed exit-code 2"])
def test_preempted_slices_are_asked_for_again(tmp_path, end, monkeypatch):
    fake(tmp_path, "gcloud", STATES.format(folder=tmp_path, end=end))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_pod.time, "sleep", lambda seconds: None)
    if end.startswith("failed"):
        with pytest.raises(errors.UserError, match="failed exit-code 2"):
            tpu_pod.up(pod(tmp_path), watch=1, max_restarts=1, dry_run=False)
    else:
        assert tpu_pod.up(pod(tmp_path), watch=1, max_restarts=1, dry_run=False) == "finished"
    verbs = [words[4] for words in calls(tmp_path)]
    short = [v for v in verbs if v != "describe"]
    once = ["create", "scp", "ssh"]
    assert short == [*once, "ssh", "ssh", "delete", *once, "ssh"]  # three looks in all, SUSPENDED after the second


def test_slices_taken_away_before_the_code_is_there_are_asked_for_again(tmp_path, monkeypatch):
    """The first copy fails on hosts that are there, the second because they are gone."""
    took = f"""
  scp) n=$(ls "{tmp_path}" | grep -c copied); touch "{tmp_path}/copied$n"
    [ $n != 1 ] || echo SUSPENDED >"{tmp_path}/state"; [ $n -gt 1 ] ;;
esac"""
    fake(tmp_path, "gcloud", STATES.format(folder=tmp_path, end="inactive success 0").rpartition("esac")[0] + took)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_pod.time, "sleep", lambda seconds: None)
    assert tpu_pod.up(pod(tmp_path), watch=0, max_restarts=1, dry_run=False) == "started"
    verbs = [words[4] for words in calls(tmp_path) if words[4] != "describe"]
    assert verbs == ["create", "scp", "scp", "delete", "create", "scp", "ssh"]


def test_hosts_that_do_not_take_the_code_and_a_gcloud_that_tells_nothing_end_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_pod.time, "sleep", lambda seconds: None)
    fake(tmp_path, "gcloud", 'case "$4" in describe) echo ACTIVE ;; *) exit 7 ;; esac')
    with pytest.raises(errors.UserError, match="failed 3 times, at last with exit code 7"):
        tpu_pod.up(pod(tmp_path), watch=1, max_restarts=1, dry_run=False)
    fake(tmp_path, "gcloud", "echo 'ERROR: not logged in' >&2; exit 1")
    monkeypatch.setattr(tpu_pod, "LOST_LOOKS", 4)
    with pytest.raises(errors.TryAgain, match="did not tell the state of qdepth 4 times"):
        tpu_pod.up(pod(tmp_path), watch=1, max_restarts=1, dry_run=False)


def test_tpu_dry_run_calls_nothing(tmp_path):
    fake(tmp_path, "gcloud")
    where = ["--project=p", "--zone=z", "--code=u", "--ref=r", "--nocheck"]
    done = run("tpu_pod.py", *where, "--", *ARGUMENTS, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not calls(tmp_path)
    assert [line.split()[6] for line in done.stderr.splitlines() if line.startswith("would run: ")] == [
        "describe", "create", "scp", "ssh"
    ]  # fmt: skip
    for action in tpu_pod.ACTIONS[1:]:
        shown = run("tpu_pod.py", f"--action={action}", "--project=p", "--zone=z", path=tmp_path)
        assert shown.returncode == 0 and "would run: gcloud" in shown.stderr, shown.stderr
    assert not calls(tmp_path)


# ---- SLURM ----

JOB = slurm.Job(("--config=c.py", "--workdir=/shared/a run", *NASTY), repo="/shared/my repo's", logs="/shared/a log")


def options(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE)
    return dict(found)


def test_sbatch_options():
    job = slurm.Job(**{**vars(JOB), "nodes": 4, "sbatch": ("--partition=h100",), "cpus_per_process": 6})
    found = options(slurm.script(job))
    assert found["nodes"] == "4" and found["ntasks-per-node"] == found["gpus-per-node"] == "8"
    assert found["signal"] == "TERM@300" and found["requeue"] == "" and found["open-mode"] == "append"
    assert found["output"] == '"/shared/a log/%x-%j.log"' and found["partition"] == "h100"
    assert "gpus-per-task" not in found  # NCCL: all GPUs of a node are seen by all of its processes
    one = options(slurm.script(slurm.Job(**{**vars(JOB), "processes_per_node": 1})))
    assert one["ntasks-per-node"] == "1" and one["gpus-per-node"] == "8"
    assert "gpus-per-node" not in options(slurm.script(slurm.Job(**{**vars(JOB), "gpus_per_node": 0})))


SRUN = 'while [[ "$1" == --* ]]; do shift; done; echo "$A"; exit {code}'


@pytest.mark.parametrize(
    ("code", "state", "restarts", "requeued", "said"),
    [
        (0, "RUNNING", "0", False, ""),
        (75, "RUNNING", "3", True, "back into the queue"),
        (75, "COMPLETING", "0", False, "stays ended"),  # scancel by its owner
        (75, "RUNNING", "4", False, "--max_restarts=4 reached"),
        (2, "RUNNING", "0", False, ""),
        (1, "RUNNING", "0", False, ""),
        (130, "RUNNING", "0", False, ""),  # Ctrl-C
        (134, "RUNNING", "3", True, "back into the queue"),  # another host died
        (137, "COMPLETING", "0", False, "stays ended"),
    ],
)
def test_sbatch_script_run_by_bash(tmp_path, code, state, restarts, requeued, said):
    (tmp_path / "my repo's").mkdir()
    job = slurm.Job(
        **vars(JOB)
        | {"repo": str(tmp_path / "my repo's"), "logs": str(tmp_path / "my repo's")}
        | {"env": (("A", "b  'c"),), "max_restarts": 4}
    )
    text = slurm.script(job)
    fake(tmp_path, "srun", SRUN.format(code=code))
    fake(tmp_path, "scontrol")
    fake(tmp_path, "squeue", f"echo {state}")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = bash(text, tmp_path, SLURM_RESTART_COUNT=restarts, **variables)
    assert done.returncode == code and said in done.stdout, done.stderr
    assert "b  'c" in done.stdout
    srun = next(words for words in calls(tmp_path) if words[0] == "srun")
    python = f"{job.repo}/.venv/bin/python"
    assert srun[1:3] == ["--kill-on-bad-exit=0", "--wait=300"]  # nobody is killed in the middle of a save
    assert srun[srun.index(python) :] == [python, "-m", "qdepth_jax.train", *job.arguments]
    assert (["scontrol", "requeue", "7"] in calls(tmp_path)) is requeued


@pytest.mark.parametrize("answers", [1, 99], ids=["late", "never"])
def test_a_scheduler_that_does_not_answer_takes_no_job_from_the_queue(tmp_path, answers):
    slow = f'[ $(grep -c "" {tmp_path}/asked) -gt {answers} ]'
    (tmp_path / "asked").touch()
    fake(tmp_path, "srun", "exit 75")
    fake(tmp_path, "sleep")
    fake(tmp_path, "squeue", f"echo >>{tmp_path}/asked; {slow} && echo RUNNING")
    fake(tmp_path, "scontrol", f"echo >>{tmp_path}/asked; [ {answers} = 99 ] || {slow}")
    text = slurm.script(slurm.Job(**vars(JOB) | {"repo": str(tmp_path)}))
    done = bash(text, tmp_path, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n")
    assert done.returncode == 75 and "back into the queue" in done.stdout, done.stdout
    assert ["scontrol", "requeue", "7"] in calls(tmp_path) and ["sleep", "10"] in calls(tmp_path)


def test_a_job_whose_processes_are_killed_comes_back_so_many_times(tmp_path):
    for name, answer in (("srun", "exit 137"), ("scontrol", ""), ("squeue", "echo RUNNING")):
        fake(tmp_path, name, answer)
    text = slurm.script(slurm.Job(**vars(JOB) | {"repo": str(tmp_path), "logs": str(tmp_path), "max_crashes": 2}))
    said = [bash(text, tmp_path, SLURM_JOB_ID=job, SLURM_JOB_NODELIST="n").stdout.splitlines()[-1] for job in "77787"]
    assert [line.startswith("killed; --max_crashes=2 reached") for line in said] == [False, False, True, False, True]
    assert calls(tmp_path).count(["scontrol", "requeue", "7"]) == 2


def test_sbatch_script_with_container_and_ref(tmp_path):
    job = slurm.Job(**{**vars(JOB), "container_image": "img:1", "container_mounts": ("/a:/b", "/c:/d"), "repo": ""})
    text = slurm.script(job)
    assert "--container-image=img:1 --container-mounts=/a:/b,/c:/d" in text and "\ncd " not in text
    repo = tmp_path / "repo"
    repo.mkdir()
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "1"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    fake(tmp_path, "srun")
    text = slurm.script(slurm.Job(**{**vars(JOB), "repo": str(repo), "ref": "v1"}))
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    assert bash(text, tmp_path, **variables).returncode == 0
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "2"], check=True)
    moved = bash(text, tmp_path, **variables)
    assert moved.returncode == 2 and "does not stand at v1" in moved.stderr


def test_bad_jobs():
    for changes, message in (
        ({"repo": ""}, "no --repo"),
        ({"processes_per_node": 3}, "does not divide 8 GPUs"),
        ({"time": "1h; rm"}, "--time=1h"),
        ({"sbatch": ("--comment=a b",)}, "--sbatch="),
    ):
        with pytest.raises(errors.UserError, match=message):
            slurm.Job(**{**vars(JOB), **changes})
    with pytest.raises(errors.UserError, match="--logs="):
        slurm.script(slurm.Job(**{**vars(JOB), "logs": 'a"b'}))


def test_slurm_dry_run_and_submission(tmp_path):
    fake(tmp_path, "sbatch", "echo '42;cluster'")
    flags = [f"--repo={tmp_path}", f"--logs={tmp_path}/my logs", "--nocheck", "--gpus_per_node=2", "--nodes=3"]
    shown = run("slurm.py", *flags, "--", *JOB.arguments, f"--config={ROOT}/experiments/demo.py", path=tmp_path)
    assert shown.returncode == 2 and "no experiment file" in shown.stderr  # c.py: before anything is queued
    arguments = ["--", f"--config={ROOT}/experiments/demo.py", "--workdir=/w", *NASTY]
    shown = run("slurm.py", *flags, *arguments, path=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert not calls(tmp_path) and not (tmp_path / "my logs").exists()
    done = run("slurm.py", *flags, "--nodry_run", *arguments, path=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "my logs" / "qdepth.sbatch"
    assert calls(tmp_path) == [["sbatch", "--parsable", str(script)]]
    assert script.read_text().strip() in shown.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "script": str(script), "processes": 6, "dry_run": False, "job": "42"
    }  # fmt: skip
    (tmp_path / "sbatch").rename(tmp_path / "gone")
    missing = run("slurm.py", *flags, "--nodry_run", *arguments, path=tmp_path, alone=True)
    assert missing.returncode == 2 and "'sbatch' is not installed here" in missing.stderr


TRAIN = """#!/bin/bash
# Stand-in for train.py: saves and ends with 75 on the first start, finishes on the second.
echo "$SLURM_PROCID $SLURM_RESTART_COUNT $*" >>"$WORK/started"
[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0
trap 'sleep $((1 + 2 * SLURM_PROCID)); echo "$SLURM_PROCID" >>"$WORK/saved"; exit 75' TERM
for _ in $(seq 600); do sleep 0.1; done
"""


@pytest.fixture
def job(tmp_path):
    """Number of a job of two stand-ins that run on a real scheduler; ended with the test."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM that answers here")
    (tmp_path / "train").write_text(TRAIN)
    (tmp_path / "train").chmod(0o755)
    flags = ["--gpus_per_node=0", "--processes_per_node=2", f"--repo={tmp_path}", f"--python={tmp_path}/train"]
    flags += [f"--logs={tmp_path}/my logs", f"--env=WORK={tmp_path}", "--nocheck", "--nodry_run"]
    done = run("slurm.py", *flags, "--", f"--config={ROOT}/experiments/demo.py", "--workdir=/w", *NASTY)
    assert done.returncode == 0, done.stderr
    number = json.loads(done.stdout.splitlines()[-1])["job"]
    try:
        if not until(lambda: "JobState=RUNNING" in show(number)):
            pytest.skip("no two free CPUs on a node of the default partition")
        yield number
    finally:
        subprocess.run(["scancel", number])


def show(job: str) -> str:
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout


def until(true, seconds: float = 60.0) -> bool:
    """Waits for `true()`; what it returned last."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(found)


@pytest.mark.slow
def test_real_slurm(tmp_path, job):
    """Signal, uneven saves, requeue and end."""

    def lines(name: str) -> list[str]:
        return (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []

    assert until(lambda: len(lines("started")) == 2)
    time.sleep(0.5)  # for the traps
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    assert until(lambda: "JobState=PENDING" in show(job)), show(job)
    assert sorted(lines("saved")) == ["0", "1"]  # the slow one was not killed by the end of the quick one
    # SLURM holds a requeued job back for two minutes: long enough for the first start to be over on all nodes. Hurried
    # at once, the second is refused with "Job credential revoked".
    time.sleep(5)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    assert until(lambda: "JobState=COMPLETED" in show(job)), show(job)
    tail = " ".join(["-m qdepth_jax.train", f"--config={ROOT}/experiments/demo.py", "--workdir=/w", *NASTY])
    assert sorted(lines("started")) == sorted(f"{rank} {start} {tail}" for rank in "01" for start in ("", "1"))


@pytest.mark.slow
def test_real_slurm_cancelled_stays_ended(tmp_path, job):
    assert until(lambda: (tmp_path / "started").exists())
    time.sleep(0.5)
    subprocess.run(["scancel", job], check=True)
    assert until(lambda: "JobState=CANCELLED" in show(job)), show(job)
    assert "Restarts=0" in show(job)
