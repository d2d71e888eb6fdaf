"""The depth commands on real data: killed at random moments, by 1, 2 and 4 processes, with the bytes of one run.

LIBERO's sample and real BridgeData; a tiny Video-Depth-Anything with random weights, a tokenizer of four steps.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = ["depth_size=32", "grid=4", "num_codes=64", "code_dim=8", "widths=(8,8)", "blocks=1", "start_step=2"]
KILLS = 5


def content(root) -> dict[str, bytes]:
    root = pathlib.Path(root)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class Commands:
    """Runs commands of the project with one compilation cache, so that a start costs seconds."""

    def __init__(self, cache):
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, *words) -> subprocess.Popen:
        words = [sys.executable, *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=ROOT, env=self._environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *words) -> dict:
        return last(self.start(*words))


def last(child: subprocess.Popen, killed: bool = False) -> dict:
    """The last line of stdout as JSON; {} of a process that may have been killed."""
    out, err = child.communicate(timeout=900)
    if killed and child.returncode == -signal.SIGKILL:
        return {}
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def done(root) -> int:
    """Episodes that are finished below a root."""
    found = 0
    for path in pathlib.Path(root).rglob("done.npy"):
        try:
            found += int(np.load(path).sum())
        except (OSError, ValueError, EOFError):  # being created
            continue
    return found


def survive(commands: Commands, words, root, processes: int, kills: int, rng: random.Random) -> list[dict]:
    """Starts `processes`, kills one of them at a random moment, `kills` times; then runs to the end."""
    shares = [[f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)]
    for _ in range(kills):
        running = [commands.start(*words, f"--output={root}", *share) for share in shares]
        victim = rng.choice(running)
        wanted, deadline = done(root) + rng.randrange(6), time.monotonic() + 120
        while victim.poll() is None and done(root) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        victim.send_signal(signal.SIGKILL)
        print(f"killed one of {processes} with {done(root)} episodes done")
        for child in running:
            if child is not victim:
                child.send_signal(signal.SIGKILL)  # and the others right after it, wherever they are
            last(child, killed=True)
    running = [commands.start(*words, f"--output={root}", *share) for share in shares]
    return [last(child) for child in running]


@pytest.fixture(params=["libero_object", "bridge_dataset"])
def data(request) -> tuple[str, str]:
    """Name and folder of a data set."""
    if request.param == "bridge_dataset":
        return request.param, request.getfixturevalue("bridge_dir")
    return request.param, str(ROOT / "data" / request.param / "1.0.0")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # thirty starts of Python
def test_annotation_killed_and_shared(data, tmp_path):
    commands, rng = Commands(tmp_path / "cache"), random.Random(data[0])
    annotate = [
        "tools/annotate_depth.py", data[1], "--estimator=video_depth_anything", "--weights=random:tiny",
        "--input_size=28", "--views=main", f"--index_dir={tmp_path}/index",
    ]  # fmt: skip
    made = commands.run(*annotate, f"--output={tmp_path}/depth")
    assert "RANDOM" in made["estimator"] and all(row["directory"] for row in made["views"]["main"].values())
    expected = whole(tmp_path / "depth")
    for processes, found in shared(commands, annotate, tmp_path / "depth", rng):
        assert found == expected, processes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tokenisation_killed_and_shared(data, tmp_path):
    (name, folder), commands, rng = data, Commands(tmp_path / "cache"), random.Random(data[0])
    index, experiment = tmp_path / "index", ["--config=experiments/demo.py:tokenizer"]  # simulator depth, two data sets
    if name == "bridge_dataset":
        depth = f"{tmp_path}/depth"
        commands.run(
            "tools/annotate_depth.py", folder, "--estimator=stand_in", f"--output={depth}", f"--index_dir={index}"
        )
        experiment = [
            "--config=experiments/tokenizer.py:bridge",
            f"--config.datasets.bridge_dataset.path={folder}",
            f"--config.datasets.bridge_dataset.depth={depth}",
            "--config.data.held_out_every=5",
        ]
    commands.run(
        "-m", "qdepth_jax.train", *experiment, f"--workdir={tmp_path}/tokenizer", f"--config.data.index_dir={index}",
        "--config.train.batch_size=8", "--config.train.eval_batches=1", "--config.train.total_steps=4",
        "--config.train.eval_every=4", *(f"--config.model.{flag}" for flag in TOKENIZER),
    )  # fmt: skip
    tokenise = ["tools/tokenize_depth.py", f"--tokenizer={tmp_path}/tokenizer", "--report=none"]
    commands.run(*tokenise, f"--output={tmp_path}/tokens")
    expected = whole(tmp_path / "tokens")
    for processes, found in shared(commands, tokenise, tmp_path / "tokens", rng):
        assert found == expected, processes


def whole(root):
    """The content of finished sidecars, with every file that they have to have."""
    found = content(root)
    files = {"values.npy", "scale.npy", "figures.npy", "sums.npy", "metadata.json"}
    assert files == {pathlib.Path(file).name for file in found}
    return found


def shared(commands: Commands, words, root, rng: random.Random):
    """(processes, what they made) of 1, 2 and 4 processes that were killed on the way."""
    for processes, kills in {1: 2, 2: 2, 4: KILLS - 4}.items():
        other = root.with_name(f"{root.name}_{processes}")
        survive(commands, words, other, processes, kills, rng)
        yield processes, content(other)
