"""kill -9 in the middle of training, start again: the metrics file goes on and every later loss is bit-equal."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qdepth_jax import metrics

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


def start(workdir, index, share_programs=True):
    """The real command in its own process; `share_programs` keeps compiled programs for the next process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if share_programs:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": f"{index}/programs",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-m", "qdepth_jax.train", *FLAGS, f"--workdir={workdir}", f"--config.data.index_dir={index}"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses(workdir):
    """(step, kind) -> everything in the row that is not a clock."""
    out = {}
    for row in metrics.read(workdir / "metrics.jsonl"):
        kind = "val" if "val/loss" in row else "train"
        assert (row["step"], kind) not in out, "a step stands twice"
        out[row["step"], kind] = {k: v for k, v in row.items() if k != "steps_per_second"}
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
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = tmp_path / "metrics.jsonl"
        if path.exists() and f'"step": {kill_at},' in path.read_text():
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
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
    FLAGS.append("--config.optim.learning_rate=0.5")
    try:
        process = start(workdir, index)
        _, err = process.communicate(timeout=300)
    finally:
        FLAGS.pop()
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


def test_metrics_file_keeps_what_the_checkpoint_holds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsFile(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(np.float32(1 / step))})
    log.close()
    log = metrics.MetricsFile(path, 3)
    assert log.dropped == 2
    log.write({"step": 4, "loss": 9.0})
    log.close()
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4]
    path.write_text('12\nnonsense\n{"step": 1}\n')
    assert metrics.MetricsFile(path, 3).dropped == 2
    lost = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert len(lost) == 4 and lost[-2:] == ["12", "nonsense"], "nothing is lost"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    log = metrics.MetricsFile(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match=r"step 7.*not finite"):
        log.write({"step": 7, "loss": float("nan")})
