"""A run is refused when its samples would be others: what counts as a change, what does not, and how it is said."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import libero_writer
import numpy as np
import pytest

from qdepth_jax import errors, same_experiment
from qdepth_jax.data import data_config, example, index, loader, shard_scan, spec, tfrecord

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _config(directory, **more) -> data_config.DataConfig:
    return data_config.DataConfig(datasets=(data_config.DatasetConfig(path=str(directory)),), threads=1, **more)


def _identity(directory, **more) -> dict:
    return loader.Loader(_config(directory, **more), ("action", "proprio"), 4).identity()


def _changed(before: dict, after: dict) -> set[str]:
    """Names of what differs, told as a resume tells it."""
    before, after = json.loads(json.dumps([before, after]))  # as a checkpoint keeps it
    with pytest.raises(errors.UserError, match="the data changed since 'runs/x' was trained") as refused:
        same_experiment.check_data({"data": before | {"position": 12}}, {"data": after}, "runs/x", 12)
    _, *lines = str(refused.value).splitlines()
    assert all(" there" in line and len(line) < 310 for line in lines)
    return {line.strip().split(":")[0].replace("0 libero_object.", "") for line in lines}


def _patch(directory, split: str, name: str, change) -> None:
    """Rewrites the first record of a split with another value of one feature, checksums right, same size of file."""
    path = sorted(pathlib.Path(directory).glob(f"*-{split}.tfrecord-*"))[0]
    before = path.stat()
    first, *rest = [record.payload for record in tfrecord.scan_records(path)]
    features = {}
    for key, (kind, value, _) in example.scan(first).items():
        old = [first[a : a + n] for a, n in value.tolist()] if kind == "bytes" else np.array(value)
        features[key] = change(old) if key == name else old
    with open(path, "wb") as file:
        for payload in (example.encode(features), *rest):
            tfrecord.write_record(file, payload)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def _one_action(values):
    values[8] += 0.25
    return values


def _one_image_byte(images):
    # In the entropy-coded part, one of the last bytes before the end mark.
    return [*images[:-1], images[-1][:-4] + bytes([images[-1][-4] ^ 1]) + images[-1][-3:]]


def _rebuilt(directory, **checks) -> None:
    index.rebuild(spec.read_spec(directory), checks=shard_scan.Checks(**checks))


def test_one_image_byte_is_another_data_set(libero_dir):
    before = _identity(libero_dir)
    _patch(libero_dir, "train", "steps/observation/image", _one_image_byte)
    with pytest.raises(errors.UserError, match="1 shards changed since they were indexed"):
        _identity(libero_dir)
    _rebuilt(libero_dir)
    # Frames and statistics are what they were: only the fingerprint can tell.
    assert _changed(before, _identity(libero_dir)) == {"datasets.fingerprint"}


def test_one_action_value_is_another_data_set(libero_dir):
    before = _identity(libero_dir)
    _patch(libero_dir, "train", "steps/action", _one_action)
    _rebuilt(libero_dir)
    found = _changed(before, _identity(libero_dir))
    assert "datasets.fingerprint" in found and "normalisation.libero_object.action" in found
    assert not any("proprio" in name for name in found)


def test_another_data_set_of_the_same_shape_is_refused(tmp_path):
    before = _identity(libero_writer.make_libero(tmp_path / "a"))
    assert "datasets.fingerprint" in _changed(before, _identity(libero_writer.make_libero(tmp_path / "b", seed=1)))


def test_what_is_set_aside_counts(libero_dir):
    _patch(
        libero_dir, "train", "steps/observation/image", lambda images: [images[0], b"\0" * len(images[1]), *images[2:]]
    )
    before = _identity(libero_dir)
    _rebuilt(libero_dir, tolerate=True, images=True)
    after = _identity(libero_dir)
    assert before["datasets"][0]["quarantine"] == "" != after["datasets"][0]["quarantine"]
    found = _changed(before, after)
    assert {"datasets.quarantine", "datasets.frames", "datasets.frames_digest"} <= found
    assert "datasets.fingerprint" not in found
    # Where the frames and their statistics are the same, the list alone differs.
    aside = _identity(libero_dir, split="val")
    _rebuilt(libero_dir)
    assert _changed(_identity(libero_dir, split="val"), aside) == {"datasets.quarantine"}


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"split": "train[:3]"}, {"datasets.split", "datasets.frames", "datasets.frames_digest"}),
        ({"held_out_every": 2}, {"datasets.held_out", "datasets.frames", "datasets.frames_digest"}),
        ({"chunk_end": "neutral"}, {"chunk_end"}),
        ({"chunk_end": "truncate"}, {"chunk_end", "datasets.frames", "datasets.frames_digest"}),
        ({"horizon": 3}, {"horizon"}),
        ({"proprio_steps": 2}, {"proprio_steps"}),
        ({"image_steps": 2}, {"image_steps"}),
        ({"goal": "final"}, {"goal"}),
        ({"goal_max_steps": 3}, {"goal_max_steps"}),
        ({"instructions": "random"}, {"instructions"}),
        ({"shuffle": False}, {"shuffle"}),
        ({"normalisation": "minmax"}, {"normalisation.libero_object.action"}),
        ({"max_frames_per_episode": 4}, {"datasets.frames", "datasets.frames_digest"}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_sampled_and_how_counts(libero_dir, more, names):
    found = _changed(_identity(libero_dir), _identity(libero_dir, **more))
    assert names <= found
    assert all(name.startswith("normalisation.") for name in found - names)


def test_place_threads_and_a_new_index_do_not_count(libero_dir, tmp_path):
    before = _identity(libero_dir)
    copied = shutil.copytree(libero_dir, tmp_path / "copy" / "1.0.0", ignore=shutil.ignore_patterns("qdepth_index"))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(str(pathlib.Path(libero_dir).parent), tmp_path / "elsewhere" / "renamed")
    for directory, more in ((copied, {}), (moved, {}), (copied, {"index_dir": str(tmp_path / "indexes")})):
        after = loader.Loader(dataclasses.replace(_config(directory, **more), threads=3), ("action",), 4).identity()
        assert after == before
        same_experiment.check_data({"data": before | {"position": 0}}, {"data": after}, "runs/x", 0)


def test_another_batch_size_means_another_position(tmp_path):
    data = {"seed": 0, "datasets": [{"name": "a", "fingerprint": "1"}]}
    saved = {"data": data | {"position": 80}}
    same_experiment.check_data(saved, {"data": data}, "runs/x", 80)
    with pytest.raises(errors.UserError, match=r"'runs/x' had seen 80 samples .* stands for 160: restore train.batch"):
        same_experiment.check_data(saved, {"data": data}, "runs/x", 160)
    # The configuration kept beside a run says it first.
    same_experiment.write_config(str(tmp_path), {"train": {"batch_size": 8}})
    with pytest.raises(errors.UserError, match=r"train\.batch_size: 8 there, 16 here"):
        same_experiment.check_same_experiment(str(tmp_path), {"train": {"batch_size": 16}})


# ---- the command ----

FLAGS = (
    "--config=experiments/demo.py:tokenizer", "--config.model.depth_size=32", "--config.model.grid=4",
    "--config.model.num_codes=64", "--config.model.code_dim=8", "--config.model.widths=(8,8)",
    "--config.model.start_step=3", "--config.train.batch_size=8", "--config.train.log_every=1",
    "--config.train.checkpoint_every=2", "--config.train.eval_every=0",
)  # fmt: skip


def _train(data, workdir, steps: int, programs, *more: str):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    suites = [f"--config.datasets.{path.parent.name}.path={path}" for path in data]
    command = [sys.executable, "-m", "qdepth_jax.train", *FLAGS, *suites, f"--workdir={workdir}"]
    command += [f"--config.train.total_steps={steps}", *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def _files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_run_whose_data_changed_is_refused_and_left_as_it_is(tmp_path):
    data = []
    for suite in ("libero_object", "libero_spatial"):
        data.append(tmp_path / suite / "1.0.0")
        shutil.copytree(ROOT / "data" / suite / "1.0.0", data[-1], ignore=shutil.ignore_patterns("qdepth_index*"))
    workdir, programs = tmp_path / "run", tmp_path / "programs"
    done = _train(data, workdir, 4, programs)
    assert done.returncode == 0, done.stderr
    before = _files(workdir)
    assert any(name.startswith("checkpoints/4/") or "/4/" in name or name.startswith("4/") for name in before), before

    def refused(*told: str, more=()):
        done = _train(data, workdir, 8, programs, *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert all(text in done.stderr for text in told), done.stderr
        assert _files(workdir) == before

    refused("train.batch_size: 8 there, 16 here", more=["--config.train.batch_size=16"])
    path = data[0]
    _patch(path, "train", "steps/action", _one_action)
    refused("1 shards changed since they were indexed", "--rebuild")
    command = [sys.executable, str(ROOT / "tools" / "index_rlds.py"), str(path), "--rebuild"]
    subprocess.run(command, check=True, capture_output=True)
    refused("the data changed since", "datasets.0 libero_object.fingerprint: ", "start a new --workdir")
    _patch(path, "train", "steps/action", lambda values: values - np.eye(1, values.size, 8, np.float32)[0] / 4)
    subprocess.run(command, check=True, capture_output=True)
    done = _train(data, workdir, 8, programs)
    assert done.returncode == 0 and f"resumed {workdir} at step 4" in done.stderr, done.stderr
