"""One run on one, two and four real processes: the same losses, the same samples in the same order, one set of logs.

The real train command on simulated devices; processes meet on loopback.
"""

import json
import re
import signal
import time

import multihost
import numpy as np
import pytest
import tiny_runs

from qdepth_jax import metrics, watch

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


def start(folder, index, flags, count, mesh=(1, -1, 1), name="run", devices=4):
    """`count` processes with `devices` devices in all; each records what it read in FOLDER/NAME.NUMBER."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("replica", "fsdp", "tensor"), mesh)]

    def arguments(port, number):
        cluster = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}"]
        return [
            str(multihost.ROOT / "tests" / "train_child.py"), str(folder / f"{name}.{number}"), *flags, *sizes,
            *(cluster if count > 1 else []), f"--workdir={folder / 'workdir'}", f"--config.data.index_dir={index}",
        ]  # fmt: skip

    programs = {
        "JAX_COMPILATION_CACHE_DIR": f"{index}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return multihost.start_all(arguments, count, devices // count, programs)


def run(folder, index, flags, count, mesh=(1, -1, 1), name="run", devices=4):
    folder.mkdir(exist_ok=True)
    done = multihost.finish(start(folder, index, flags, count, mesh, name, devices))
    for number, (code, _, err) in enumerate(done):
        assert code == 0, f"process {number}: {code}\n{err}"
    return done


def rows(folder):
    """(step, kind) -> what was computed, without clocks."""
    out = {}
    for row in metrics.read(folder / "workdir" / "metrics.jsonl"):
        kind = "val" if "val/loss" in row else "train"
        assert (row["step"], kind) not in out, "a step stands twice: more than one process writes"
        out[row["step"], kind] = {k: v for k, v in row.items() if k not in watch.MEASURED}
    return out


def read(folder, count, name="run"):
    """step -> rows of the global batch, as (position, data set, frame), from the records of all processes."""
    out = {}
    for number in range(count):
        for line in (folder / f"{name}.{number}").read_text().splitlines():
            found = json.loads(line)
            out.setdefault(found["step"], []).extend(map(tuple, found["rows"]))
    return {step: sorted(found) for step, found in out.items()}


def assert_same(folder, expected, rtol=1e-4):
    found = rows(folder)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key].keys() == row.keys()
        for name, value in row.items():
            np.testing.assert_allclose(found[key][name], value, rtol=rtol, atol=1e-6, err_msg=f"{key} {name}")
    # What another order or another gradient would do: neighbouring steps differ by far more than the tolerance.
    losses = np.asarray([row["loss"] for (_, kind), row in expected.items() if kind == "train"])
    assert np.median(np.abs(np.diff(losses))) > 20 * rtol * np.median(losses)


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
def test_a_signal_on_one_host_saves_everywhere_and_another_number_of_hosts_goes_on(one, tmp_path):
    processes = start(tmp_path, one[1], TOKENIZER, 2)
    path, deadline = tmp_path / "workdir" / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and '"step": 12,' in path.read_text()):
        assert time.monotonic() < deadline and all(p.process.poll() is None for p in processes), multihost.finish(
            processes, 1
        )
        time.sleep(0.01)
    processes[1].process.send_signal(signal.SIGTERM)  # a host that is not the main one
    done = multihost.finish(processes)
    assert [code for code, _, _ in done] == [75, 75], done
    step = int(re.search(r"stopped by a signal at step (\d+), which is saved", done[0][2])[1])
    assert 12 <= step < STEPS
    (found,) = run(tmp_path, one[1], TOKENIZER, 1, name="again")
    assert f"at step {step}" in found[2] and "resumed" in found[2]
    assert_same(tmp_path, rows(one[0]))
    # Up to the stop by two processes, from there by one: the order of the uninterrupted run, nothing twice.
    whole, first, second = read(one[0], 1), read(tmp_path, 2), read(tmp_path, 1, "again")
    assert sorted(second) == list(range(step + 1, STEPS + 1))
    assert {s: first[s] for s in range(1, step + 1)} | second == whole


@pytest.mark.slow
def test_a_policy_whose_tensor_axis_spans_processes(one, tmp_path):
    """Two processes hold one row of the mesh, heads and widths are split over them: both read the whole batch."""
    flags = tiny_runs.flags(train__total_steps=10, train__checkpoint_every=10, train__micro_batches=2)
    run(tmp_path / "one", one[1], flags, 1, (1, 1, 2), devices=2)
    run(tmp_path / "two", one[1], flags, 2, (1, 1, 2), devices=2)
    assert len(rows(tmp_path / "two")) == 10
    assert_same(tmp_path / "two", rows(tmp_path / "one"))
    twice = {step: sorted(part * 2) for step, part in read(tmp_path / "one", 1).items()}
    assert read(tmp_path / "two", 2) == twice


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
