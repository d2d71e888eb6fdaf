"""Metric rows: what a restart keeps, values that are not finite, buckets, event files; where the time goes."""

import importlib.util
import json

import numpy as np
import pytest
from etils import epath

from qdepth_jax import errors, metrics, profiler, run_logs, watch, workdirs
from qdepth_jax.data import tfrecord


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


def test_in_a_bucket_the_rows_go_into_parts_that_are_not_written_again(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(workdirs, "is_remote", lambda path: True)
    monkeypatch.setattr(metrics, "PART_BYTES", 200, raising=False)
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", -1.0)  # every row
    written, own = [], type(epath.Path(path)).write_text
    monkeypatch.setattr(
        type(epath.Path(path)), "write_text", lambda self, text: (written.append(len(text)), own(self, text))[1]
    )

    def log(steps, resume):
        file = metrics.MetricsFile(path, resume)
        for step in steps:
            file.write({"step": step, "loss": 0.5})
        file.close()
        return file.dropped

    log(range(1, 101), 0)
    assert max(written) < 230 and len(list(tmp_path.glob("metrics*.jsonl"))) > 10
    assert [row["step"] for row in metrics.read(path)] == list(range(1, 101))
    # A restart drops whole parts and cuts one; what is before is left alone.
    first = path.read_bytes()
    assert log(range(43, 51), 42) == 58
    assert [row["step"] for row in metrics.read(path)] == list(range(1, 51)) and path.read_bytes() == first
    assert len((tmp_path / "metrics.dropped.jsonl").read_text().splitlines()) == 58
    # From the start again, and on a local copy.
    assert log([1, 2], 0) == 50 and not (tmp_path / "metrics.1.jsonl").exists()
    log(range(3, 30), 2)
    monkeypatch.setattr(workdirs, "is_remote", lambda path: False)
    assert log([20, 21], 19) == 10
    assert [row["step"] for row in metrics.read(path)] == list(range(1, 22))


def test_values_that_are_not_finite_are_null_and_the_file_stays_json(tmp_path):
    log = metrics.MetricsFile(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 7, "loss": float("nan"), "norm": float("inf"), "lr": 0.5, "skipped": 1})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is no JSON")) == {
        "step": 7, "loss": None, "norm": None, "lr": 0.5, "skipped": 1,
    }  # fmt: skip


def test_event_files_hold_the_rows_and_a_restart_supersedes_what_comes_after_it(tmp_path):
    log = run_logs.start(str(tmp_path), {"name": "x"}, 0, "first", use_tensorboard=True)
    log.write({"step": 1, "loss": 2.5})
    log.write({"step": 2, "loss": 1.5})
    log.close()
    again = run_logs.start(str(tmp_path), {"name": "x"}, 1, "second", use_tensorboard=True)
    again.write({"step": 2, "loss": 1.25})
    again.close()
    assert again.experiment_id == log.experiment_id, "one experiment over all starts"
    assert (tmp_path / "command.txt").read_text() == "first\nsecond\n"
    assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [2.5, 1.25]
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    # Event files are TFRecords of Event messages: checksums by our reader, values as the bytes of a protobuf float.
    records = [[r.payload for r in tfrecord.read_records(str(file))] for file in files]
    first, second = (b"".join(rows) for rows in records)
    assert b"loss" in first and np.float32(2.5).tobytes() in first and np.float32(1.5).tobytes() in first
    assert np.float32(1.25).tobytes() in second


def test_event_files_are_refused_in_a_bucket():
    with pytest.raises(errors.UserError, match="--notensorboard"):
        run_logs.tensorboard("gs://bucket/run", 1)


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_watch_tells_steps_from_stalls_and_waiting():
    clock = Clock()
    timer = watch.Watch(batch_size=8, flops=5e9, devices=2, peak=1e12, clock=clock)
    assert timer.row() == {}
    for step in range(4):
        with timer.data():
            clock.now += 0.05
        clock.now += 0.15 if step < 3 else 0.35
        timer.turn()
        if step == 1:
            with timer.checkpoint():
                clock.now += 3.0
            with timer.apart():  # a validation
                clock.now += 7.0
    row = timer.row()
    assert row["steps_per_second"] == pytest.approx(4 / 1.0)
    assert row["samples_per_second"] == pytest.approx(32)
    assert row["data_wait_share"] == pytest.approx(0.2)
    assert row["step_seconds_p50"] == pytest.approx(0.2) and row["step_seconds_max"] == pytest.approx(0.4)
    assert row["checkpoint_stall_seconds"] == pytest.approx(3.0)
    assert row["model_tflops_per_device"] == pytest.approx(32 * 5e9 / 2 / 1e12)
    assert row["mfu"] == pytest.approx(32 * 5e9 / 2 / 1e12)
    assert set(row) <= set(watch.MEASURED)
    assert timer.row() == {}


def test_turns_that_only_dispatch_are_no_steps():
    clock = Clock()
    timer = watch.Watch(batch_size=8, flops=0.0, devices=1, peak=None, ahead=2, clock=clock)
    for seconds in (0.01, 0.01, 0.18, 0.2, 0.2):  # the third waits for the first step
        clock.now += seconds
        timer.turn()
        if seconds == 0.01:
            assert timer.row() == {}
    assert timer.row()["samples_per_second"] == pytest.approx(8 / 0.2)


@pytest.mark.parametrize(
    ("steps", "start", "said", "traced"),
    [
        ((2, 4), 0, 1, [2, 3]),
        ((2, 4), 2, 2, [3]),
        ((2, 4), 3, 1, []),
        (None, 0, 0, []),
        ((4, 9), 0, 1, [4, 5]),
        ((7, 9), 0, 1, []),
    ],
)
def test_profile_covers_its_steps(tmp_path, monkeypatch, steps, start, said, traced):
    running, seen, lines = [], [], []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", running.clear)
    profile = profiler.Profiler(steps, str(tmp_path), start, lines.append)
    for step in range(start + 1, 6):
        profile.before(step)
        if running:
            seen.append(step)
    profile.close()
    assert seen == traced and not running and len(lines) == said, lines


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed")
def test_a_restart_continues_the_run_of_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # the real package, without network or login
    config = {"name": "tiny", "train": {"total_steps": 3}}
    ids = []
    for first in (1, 3):
        log = run_logs.start(str(tmp_path), config, first - 1, "train", project="arms")
        for step in range(first, 4):
            log.write({"step": step, "loss": 1.0 / step})
        log.close()
        ids.append(log.experiment_id)
    files = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert ids[0] == ids[1] and files == [f"run-{ids[0]}.wandb"] * 2
