"""kill -9 in the middle of training, start again: the metrics file goes on and every later loss is bit-equal."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from qdepth_jax import metrics, watch

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = [
    "--config=experiments/demo.py:tokenizer",
    "--config.model.depth_size=32",
    "--config.model.grid=4",
    "--config.model.num_codes=64",
    "--config.model.code_dim=8",
    "--config.model.widths=(8,8)",
    "--config.model.start_step=3",
    "--config.train.batch_size=8",
    "--config.train.total_steps=30",
    "--config.train.log_every=1",
    "--config.train.eval_every=10",
    "--config.train.eval_batches=2",
    "--config.train.checkpoint_every=5",
    "--config.optim.ema_decay=0.9",
]


def start(workdir, index, share_programs=True, more=()):
    """The real command in its own process; `share_programs` keeps compiled programs for the next process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if share_programs:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": f"{index}/programs",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-m", "qdepth_jax.train", *FLAGS, *more, f"--workdir={workdir}",
         f"--config.data.index_dir={index}"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses(workdir):
    """(step, kind) -> everything in the row that is not measured by a clock."""
    out = {}
    for row in metrics.read(workdir / "metrics.jsonl"):
        kind = "val" if "val/loss" in row else "train"
        assert (row["step"], kind) not in out, "a step stands twice"
        out[row["step"], kind] = {k: v for k, v in row.items() if k not in watch.MEASURED}
    return out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    index = tmp_path_factory.mktemp("index")
    process = start(workdir, index)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == 30
    return losses(workdir), index, workdir


@pytest.mark.parametrize("kill_at", [pytest.param(7, marks=pytest.mark.slow), 17])
def test_kill_nine_and_resume_is_bit_equal(uninterrupted, tmp_path, kill_at):
    expected, index, _ = uninterrupted
    share = kill_at != 7  # one of them compiles anew in every process, as on another machine
    process = start(tmp_path, index, share)
    wait_for_row(process, tmp_path, kill_at)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 29, "loss": 1.')  # what a row looks like when the machine dies while it is written
    process = start(tmp_path, index, share)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    if kill_at > 10:  # the save at 10 waits for the one at 5: only then is a checkpoint sure to be complete
        assert "resumed" in err
    assert losses(tmp_path) == expected


def wait_for_row(process, workdir, step, seconds=240):
    """Returns when the metrics of `step` are on disk."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + seconds
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} after {seconds} s"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_stop_signal_saves_at_the_next_boundary(uninterrupted, tmp_path):
    expected, index, _ = uninterrupted
    process = start(tmp_path, index, more=("--config.train.checkpoint_every=1000",))
    wait_for_row(process, tmp_path, 11)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err  # EX_TEMPFAIL: a launcher starts the same command again
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert saved >= 11 and f"stopped by a signal at step {saved}" in err
    process = start(tmp_path, index)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and f"resumed {tmp_path} at step {saved}" in err, err
    assert losses(tmp_path) == expected


KILLS = int(os.environ.get("QDEPTH_KILLS", "20"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_at_random_moments_and_during_saves(tmp_path):
    """One run killed again and again: at a random step, in the middle of a save, while it starts."""
    index, rng = tmp_path / "index", random.Random(0)
    more = ("--config.train.total_steps=200", "--config.train.eval_every=100")
    process = start(tmp_path / "whole", index, more=more)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    expected, workdir, moments = losses(tmp_path / "whole"), tmp_path / "killed", []
    for kill in range(KILLS):
        process = start(workdir, index, more=more)
        done = last_step(workdir)
        moment = ("step", "save", "start")[kill % 3]
        if moment == "step":
            wait_for_row(process, workdir, min(done + rng.randrange(1, 15), 198))
            time.sleep(rng.random() * 0.05)
        elif moment == "save":
            while process.poll() is None and not list((workdir / "checkpoints").glob("*tmp*")):
                time.sleep(0.001)
        else:
            time.sleep(rng.uniform(0.0, 10.0))
        assert process.poll() is None, f"finished before kill {kill} ({moment})"
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append((moment, last_step(workdir)))
    process = start(workdir, index, more=more)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    print(f"killed at {moments}")
    assert losses(workdir) == expected, moments


def last_step(workdir):
    """Step of the last whole row in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    expected, index, workdir = uninterrupted
    process = start(workdir, index)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "holds 30 steps, 30 are asked: nothing to train" in err
    assert json.loads(out.splitlines()[-1])["step"] == 30
    assert losses(workdir) == expected


def test_a_workdir_of_another_experiment_is_refused(uninterrupted):
    _, index, workdir = uninterrupted
    before = (workdir / "config.json").read_bytes()
    process = start(workdir, index, more=("--config.optim.learning_rate=0.5",))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "optim.learning_rate: 0.004 there, 0.5 here" in err
    assert (workdir / "config.json").read_bytes() == before


def test_a_policy_refuses_a_tokenizer_of_another_grid(uninterrupted, tmp_path):
    _, _, workdir = uninterrupted
    done = subprocess.run(
        [sys.executable, "-m", "qdepth_jax.train", "--config=experiments/demo.py", f"--workdir={tmp_path / 'p'}",
         f"--config.tokenizer={workdir}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "(grid, codes, code_dim) = (4, 64, 8), the policy's depth expert (8, 256, 32)" in done.stderr
    assert not (tmp_path / "p").exists()
