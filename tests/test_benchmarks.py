"""The benchmarks' own arithmetic (fast), and small cells of ours run for real (slow)."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import loader_cell, loader_gates, loader_report

ROOT = pathlib.Path(__file__).resolve().parent.parent


def row(contender: str, repeat: int, cpu: float, rss: float, mode: str = "decode") -> dict:
    cell = {"contender": contender, "mode": mode, "buffer": 2000}
    figures = {name: 1.0 for name in (*loader_report.FIGURES, "rss_slope_mb_per_1k_batches")}
    return {"cell": cell, "repeat": repeat} | figures | {"cpu_ms_per_frame": cpu, "rss_peak_mb": rss}


def test_spread_is_the_median_and_numpys_quartiles():
    values = [3.0, 1.0, 8.0, 2.0, 5.0, 13.0]
    found = loader_report.spread(values)
    np.testing.assert_allclose([found[k] for k in ("q1", "median", "q3")], np.quantile(values, [0.25, 0.5, 0.75]))
    assert loader_report.spread([4.0]) == {"median": 4.0, "q1": 4.0, "q3": 4.0, "n": 1}


def test_ratios_are_taken_within_a_repeat():
    # The machine is three times slower in repeat 1, for both: the ratio does not move. Repeat 2 has no partner.
    lines = loader_report.summarise(
        [
            row("octo", 0, 2.0, 1500),
            row("octo", 1, 6.0, 1500),
            row("octo", 2, 100.0, 1500),
            row("ours", 0, 1.0, 100),
            row("ours", 1, 3.0, 150),
        ]
    )
    octo = next(line for line in lines if line["contender"] == "octo")
    assert octo["cpu_ms_per_frame_ratio"] == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 2}
    assert octo["rss_peak_mb_ratio"]["median"] == pytest.approx(12.5)
    assert octo["cpu_ms_per_frame"]["median"] == 6.0


def test_work_left_to_the_device_is_never_an_equal_work_ratio():
    lines = loader_report.summarise(
        [
            row("ours", 0, 1.0, 100),
            row("ours", 0, 5.0, 100, "augment"),
            row("octo", 0, 10.0, 1500, "augment"),
        ]
    )
    octo = next(line for line in lines if line["contender"] == "octo")
    assert octo["cpu_ms_per_frame_ratio"]["median"] == 2.0  # against our own augmentation on the CPU
    assert octo["cpu_ms_per_frame_ratio_to_raw"]["median"] == 10.0
    raw = next(line for line in lines if line["contender"] == loader_report.SENT_RAW)
    assert raw["mode"] == "augment" and raw["cpu_ms_per_frame"]["median"] == 1.0
    assert "cpu_ms_per_frame_ratio" not in raw
    text = loader_report.table(lines)
    assert text.count("LESS WORK ON THE CPU") == 1 and "x ours, equal work" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_slope_of_growing_memory():
    assert loader_cell.slope([5.0, 7.0, 9.0, 11.0]) == pytest.approx(2.0)
    assert loader_cell.slope([5.0]) == 0.0


def test_cpu_of_a_living_child_and_of_threads_counts():
    before = loader_cell.cpu_seconds()
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "done\n"
    while_alive = loader_cell.cpu_seconds() - before
    child.communicate("\n")
    assert 0.25 < while_alive < 1.5
    # Once it has ended and was waited for, the same time comes from getrusage: neither lost nor twice.
    assert loader_cell.cpu_seconds() - before == pytest.approx(while_alive, abs=0.2)


def test_peak_memory_remembers():
    block = np.ones(64 << 20, np.uint8)
    high = loader_cell.rss_mb()
    del block
    assert loader_cell.rss_peak_mb() >= high - 1


def test_a_batch_digest_sees_every_value_and_name():
    batch = {"a": np.arange(6, dtype=np.int32), "text": np.array([b"x", b"y"], object)}
    assert loader_gates.digest(batch) == loader_gates.digest({k: batch[k].copy() for k in reversed(batch)})
    assert loader_gates.digest(batch) != loader_gates.digest(batch | {"a": np.array([0, 1, 2, 3, 4, 6], np.int32)})
    assert loader_gates.digest(batch) != loader_gates.digest(batch | {"text": np.array([b"x", b"z"], object)})
    assert loader_gates.episodes(np.array([3, 4, 10_003, 20_000])) == 3


def run_command(*arguments: str, code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


def test_bad_flags_are_answered_before_any_work():
    assert "no checkout" not in (told := run_command("benchmarks/loader.py", "--contenders=octo", code=2))
    assert "--octo=DIR" in told
    assert "octoo" in run_command("benchmarks/loader.py", "--contenders=octoo", code=2)


def test_the_loader_imports_no_jax():
    told = "import sys, qdepth_jax.data.loader; print(sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    assert run_command("-c", told) == "[]\n"


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("benchmark")
    made = run_command("benchmarks/make_dataset.py", str(folder), "--episodes=12", "--shards=2")
    return json.loads(made.splitlines()[-1])["directory"]


@pytest.mark.slow
def test_loader_benchmark_of_ours(small_data, tmp_path):
    told = run_command(
        "benchmarks/loader.py", f"--data={small_data}", f"--scratch={tmp_path}", "--contenders=ours", "--repeats=2",
        "--modes=decode,resize", "--batches=4", "--skip=2", "--batch_size=16",
    )  # fmt: skip
    result = json.loads(told.splitlines()[-1])
    lines = {(line["mode"], line["contender"]): line for line in result["lines"]}
    assert lines["decode", "ours"]["cpu_ms_per_frame"]["median"] > 0.1
    # Resizing on the host is real work, and must be in the figure.
    resize, decode = (lines[mode, "ours"]["cpu_ms_per_frame"]["median"] for mode in ("resize", "decode"))
    assert resize > 1.5 * decode
    gates = result["gates"][0]
    assert gates["same_seed_equal"] and gates["epoch_is_permutation"]
    assert gates["resume_exact"] and gates["hosts_equal"]
    assert "| ours | yes | yes | 1 |" in told
    # Nothing is left over that a later run would take for its own.
    assert not (tmp_path / "cells.jsonl").exists()


@pytest.mark.slow
def test_column_statistics_are_taken_without_decoding(small_data):
    told = run_command("benchmarks/column_statistics.py", small_data, "--repeats=2")
    text, summary = told.rstrip("\n").rsplit("\n", 1)
    found = json.loads(summary)
    assert text.startswith("## ") and small_data not in text
    assert "`python benchmarks/column_statistics.py DATASET_DIR --repeats=2`" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert found["images"] == 2 * found["frames"] and found["repeats"] == 2
    # Decoding is real work; its cell must not be the other one under another name.
    assert found["cells"]["decode"]["ratio"] > 1.5 and found["cells"]["columns"]["ratio"] == 1


@pytest.mark.slow
def test_a_stopped_benchmark_goes_on(small_data, tmp_path):
    command = (
        sys.executable, "benchmarks/loader.py", f"--data={small_data}", f"--scratch={tmp_path}", "--contenders=ours",
        "--repeats=3", "--modes=decode", "--batches=2", "--skip=1", "--batch_size=16", "--nogates", "--noprepare",
    )  # fmt: skip
    started = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    cells = tmp_path / "cells.jsonl"
    while started.poll() is None and not (cells.exists() and cells.read_text().endswith("\n")):
        time.sleep(0.05)
    started.kill()
    started.wait()
    kept = cells.read_text().splitlines()
    assert 1 <= len(kept) < 3
    told = json.loads(run_command(*command[1:]).splitlines()[-1])
    figures = json.loads(kept[0])
    assert told["lines"][0]["cpu_ms_per_frame"]["n"] == 3
    last = [json.loads(line) for line in (tmp_path / "cells.last.jsonl").read_text().splitlines()]
    assert last[0] == figures and [row["repeat"] for row in last] == [0, 1, 2]


@pytest.mark.slow
def test_memory_of_the_loader_is_bounded_and_flat(small_data):
    from benchmarks import memory

    short = memory.run(small_data, epochs=6, batch_size=32, prefetch=2)
    # Batches held, their successors in the making, interpreter noise: nothing that grows with the epochs.
    assert short["growth_mb"] < 2 * short["bound_mb"] + 40
    assert short["drift_mb"] < 16
    deep = memory.run(small_data, epochs=6, batch_size=32, prefetch=6)
    # The test can tell memory that is held from memory that is not: four more batches must show.
    assert deep["growth_mb"] > short["growth_mb"] + 2 * short["batch_mb"]


@pytest.fixture
def race_flags():
    """benchmarks/train_step.py's flags with their defaults."""
    from absl import flags

    from benchmarks import train_step

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return train_step


def test_train_step_ratio_is_theirs_over_ours_within_a_round(race_flags):
    # The machine is five times slower in the second round, for both.
    ours = [{"wall_s": 1.0, "cpu_s": 2.0}, {"wall_s": 5.0, "cpu_s": 2.0}, {"wall_s": 1.0, "cpu_s": 2.0}]
    theirs = [{"wall_s": 2.0, "cpu_s": 1.0}, {"wall_s": 10.0, "cpu_s": 1.0}, {"wall_s": 3.0, "cpu_s": 3.0}]
    found = race_flags.ratios(ours, theirs)
    assert found["wall_s"] == {"median": 2.0, "min": 2.0, "max": 3.0, "n": 3}
    assert found["cpu_s"]["median"] == 0.5


def test_train_step_race_notices_another_gradient(race_flags):
    same = race_flags.agree({"ours": [1.5, 3.0], "eager": [1.5, 3.00003]})
    assert same["relative"] == pytest.approx(1e-5) and same["relative"] <= same["tolerance"]
    other = race_flags.agree({"ours": [1.5, 3.0], "eager": [1.5, 3.0], "compile": [1.5, 3.003]})
    assert other["relative"] == pytest.approx(1e-3) and other["relative"] > other["tolerance"]


def test_train_step_batch_has_padding_and_never_the_image_token():
    from benchmarks import train_step_sizes

    size = train_step_sizes.SIZES["tiny"]
    text = train_step_sizes.make_batch(size, 6)["text"]
    lengths = (text != 0).sum(axis=1)
    assert lengths.min() == 1 and lengths.max() == size.text_length
    assert not ((text[:, 1:] != 0) & (text[:, :-1] == 0)).any() and text.max() < size.vocabulary - 1


@pytest.mark.slow
def test_train_step_of_ours_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--size=tiny", "--batch=2", "--rounds=2"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    ours = result["contestants"]["ours"]
    # 55,583 is torch's own count of the same network; the embedding (64 x 32) and the vlm's last layer are frozen.
    assert (ours["parameters"], ours["trained"]) == (55583, 47615)
    assert result["agree"] and not result["failed"] and ours["samples_per_s"]["n"] == 2


@pytest.mark.slow
def test_train_step_without_the_checkout_is_a_message(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), f"--open_pi_zero={tmp_path}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 2 and "is it a checkout?" in done.stderr


def test_video_depth_race_notices_another_depth_and_a_network_without_any():
    from benchmarks import video_depth_report

    depth = np.linspace(0.5, 2.0, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    assert video_depth_report.agree([depth, depth + 1e-4])["relative"] == pytest.approx(5e-5, rel=1e-2)
    assert video_depth_report.agree([0 * depth, 0 * depth])["relative"] == np.inf
    turns = [{"wall_s": 1.0, "cpu_s": 2.0}, {"wall_s": 4.0, "cpu_s": 2.0}]
    slower = [{"wall_s": 2.0, "cpu_s": 1.0}, {"wall_s": 8.0, "cpu_s": 1.0}]
    found = video_depth_report.ratios(turns, slower)
    assert found["wall_s"]["median"] == 2.0 and found["cpu_s"]["max"] == 0.5


def test_video_depth_sizes():
    from benchmarks import video_depth_order
    from qdepth_jax import errors

    assert video_depth_order.parse_size("vits:32x140x182") == ("vits", 32, 140, 182)
    for bad in ("vitg:32x140x182", "vits:33x140x182", "vits:32x140x180", "vits"):
        with pytest.raises(errors.UserError, match="--size="):
            video_depth_order.parse_size(bad)


@pytest.mark.slow
def test_video_depth_of_ours_alone():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "video_depth.py"), "--size=vits:2x28x28", "--rounds=2"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["agree"] and result["contestants"]["ours"]["frames_per_s"]["n"] == 2
    assert "ratio" not in result and "| ours |" in done.stdout


@pytest.fixture
def chunk_race():
    """benchmarks/inference.py as a module, its flags away again afterwards."""
    import stored_runs
    from absl import flags

    with stored_runs.tool_module("inference", "benchmarks") as module:
        flags.FLAGS(["inference"])
        yield module


def test_inference_race_parts_a_chunk_into_prefix_and_steps(chunk_race):
    # A prefix of 5 s and steps of 0.2 s, two chunks a turn: 14 s with ten steps, 10.4 s with one.
    many = {"wall_s": 14.0, "cpu_s": 28.0, "peak_mb": 7.0}
    one = {"wall_s": 10.4, "cpu_s": 20.8, "peak_mb": 5.0}
    found = chunk_race.timing(many, one, 10, 2)
    assert found["wall_s"] == 7.0 and found["peak_mb"] == 7.0
    assert found["step_wall_s"] == pytest.approx(0.2) and found["prefix_wall_s"] == pytest.approx(5.0)
    assert found["step_cpu_s"] == pytest.approx(0.4) and found["prefix_cpu_s"] == pytest.approx(10.0)
    slower = {name: 3.0 * value for name, value in found.items()}
    assert chunk_race.ratios([found], [slower])["wall_s"]["median"] == pytest.approx(3.0)


def test_inference_race_compares_actions_within_a_network(chunk_race):
    actions = {"ours": [0.0, 1.0], "eager": [0.0, 1.5], "ours_pi0": [9.0, 9.0], "openpi": [9.0, 9.25]}
    assert chunk_race.distance(actions) == {"eager": 0.5, "openpi": 0.25}


@pytest.mark.slow
def test_inference_race_of_ours_alone():
    told = run_command("benchmarks/inference.py", "--size=tiny", "--rounds=2", "--flow_steps=3")
    result = json.loads(told.splitlines()[-1])
    rows = result["contestants"]
    # 55,583 is torch's own count of the same network.
    assert result["agree"] and not result["failed"] and rows["ours"]["parameters"] == 55583
    assert rows["int8"]["weight_bytes"] < rows["ours"]["weight_bytes"] == 4 * 55583
    assert 0 < result["distance"]["int8"] < 0.1 and rows["ours"]["wall_s"]["n"] == 2


def test_inference_race_wants_what_it_compares_with():
    assert "compared with ours" in run_command("benchmarks/inference.py", "--contestants=int8", code=2)
    assert "is it a checkout?" in run_command("benchmarks/inference.py", "--openpi=/nowhere", code=2)
    assert "need their checkout" in run_command("benchmarks/inference.py", "--contestants=ours,eager", code=2)
