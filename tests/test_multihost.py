"""One run on one, two and four real processes: the same losses, the same samples in the same order, one set of logs.

The real train command on simulated devices; processes meet on loopback.
"""

import json
import re
import signal
import time

import multihost
import pytest
from multihost_runs import assert_same, read, rows, run, start

STEPS = 50
TOKENIZER = [
    "--config=experiments/demo.py:tokenizer",
    "--config.model.depth_size=16",
    "--config.model.grid=4",
    "--config.model.num_codes=16",
    "--config.model.code_dim=4",
    "--config.model.widths=(8,)",
    "--config.model.blocks=1",
    "--config.model.start_step=3",
    "--config.train.batch_size=8",
    f"--config.train.total_steps={STEPS}",
    "--config.train.log_every=1",
    "--config.train.eval_every=50",
    "--config.train.eval_batches=1",
    "--config.train.checkpoint_every=25",
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The tokenizer on one process with four devices."""
    folder, index = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("index")
    run(folder, index, TOKENIZER, 1)
    assert sorted(read(folder, 1)) == list(range(1, STEPS + 1))
    return folder, index


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_same_run_on_several_processes(one, tmp_path, count):
    done = run(tmp_path, one[1], TOKENIZER, count)
    assert_same(tmp_path, rows(one[0]))
    assert read(tmp_path, count) == read(one[0], 1)
    # The main process alone reports: one line of JSON, the one folder with one command.
    assert json.loads(done[0][1].splitlines()[-1])["step"] == STEPS
    assert not any("{" in out for _, out, _ in done[1:]), "Gloo's own lines are all that others print"
    assert f"host 0 of {count} (as given)" in done[0][2] and len(list((tmp_path / "workdir").glob("*.json"))) == 2
    assert len((tmp_path / "workdir" / "command.txt").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "next_count", "next_devices"),
    [(2, 4, 1, 4), (1, 8, 2, 4)],
    ids=["two processes to one", "eight devices of one process to two processes"],
)
def test_a_signal_saves_on_all_hosts_and_other_hosts_go_on(one, tmp_path, count, devices, next_count, next_devices):
    processes = start(tmp_path, one[1], TOKENIZER, count, devices=devices)
    path, deadline = tmp_path / "workdir" / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and '"step": 12,' in path.read_text()):
        assert time.monotonic() < deadline and all(p.process.poll() is None for p in processes), multihost.finish(
            processes, 1
        )
        time.sleep(0.01)
    processes[-1].process.send_signal(signal.SIGTERM)  # where there are two: a host that is not the main one
    done = multihost.finish(processes)
    assert [code for code, _, _ in done] == [75] * count, done
    step = int(re.search(r"stopped by a signal at step (\d+), which is saved", done[0][2])[1])
    assert 12 <= step < STEPS
    found = run(tmp_path, one[1], TOKENIZER, next_count, name="again", devices=next_devices)[0]
    assert f"at step {step}" in found[2] and "resumed" in found[2]
    assert_same(tmp_path, rows(one[0]))
    # Up to the stop by some processes, from there by others: the order of the uninterrupted run, nothing twice.
    whole, first, second = read(one[0], 1), read(tmp_path, count), read(tmp_path, next_count, "again")
    assert sorted(second) == list(range(step + 1, STEPS + 1))
    assert {s: first[s] for s in range(1, step + 1)} | second == whole


@pytest.mark.slow
def test_a_signal_while_a_resumed_run_starts_ends_it_and_it_goes_on(one, tmp_path):
    half = ["--config.train.total_steps=25", "--config.train.eval_every=0"]
    run(tmp_path, one[1], [*TOKENIZER, *half], 2, name="first")
    processes = start(tmp_path, one[1], TOKENIZER, 2)
    deadline = time.monotonic() + 120
    while "host 0 of 2" not in processes[0].err.read_text():  # they have met; index, restore and compilation follow
        assert time.monotonic() < deadline and processes[0].process.poll() is None, multihost.finish(processes, 1)
        time.sleep(0.01)
    processes[1].process.send_signal(signal.SIGTERM)
    done = multihost.finish(processes)
    assert [code for code, _, _ in done] == [75, 75], done
    assert re.search(r"stopped by a signal (before step 26:|at step 26,)", done[0][2]), done
    run(tmp_path, one[1], TOKENIZER, 2, name="again")
    assert_same(tmp_path, rows(one[0]))


@pytest.mark.slow
def test_hosts_with_different_configs_end_before_anything_is_written(tmp_path):
    def arguments(port, number):
        return [
            "-m", "qdepth_jax.train", *TOKENIZER, f"--workdir={tmp_path / 'workdir'}",
            f"--config.optim.learning_rate={0.001 if number else 0.002}",
            f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}",
        ]  # fmt: skip

    done = multihost.run_all(arguments, 2)
    assert [code for code, _, _ in done] == [2, 2], done
    for _, _, err in done:
        assert "the experiment is not the same on all hosts" in err
        assert "optim.learning_rate: 0.002 there, 0.001 here" in err
    assert not (tmp_path / "workdir").exists()
