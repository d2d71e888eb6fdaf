"""The data commands as a user runs them: JSON on the last line, exit code 2 with a plain message on bad input."""

import json
import pathlib
import subprocess
import sys

import pytest

from qdepth_jax.data import data_config, loader

ROOT = pathlib.Path(__file__).parents[2]


def _run(tool, *arguments):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_index_builds_opens_verifies_and_notices_damage(libero_dir):
    built = _json(_run("index_rlds", libero_dir))
    assert (built["episodes"], built["frames"], built["action"]) == (5, 29, "built")
    shards = list(pathlib.Path(libero_dir).glob("*.tfrecord-*"))
    assert built["quarantine"] == {"digest": "", "rows": 0}
    assert built["bytes"] == sum(path.stat().st_size for path in shards)
    assert built["statistics"]["frames"] == 24 and len(built["statistics"]["action"]["q01"]) == 7
    assert _json(_run("index_rlds", libero_dir))["action"] == "opened"
    verified = _json(_run("index_rlds", libero_dir, "--verify"))
    assert verified["action"] == "verified" and verified["fingerprint"] == built["fingerprint"]
    data = bytearray(shards[0].read_bytes())
    data[300] ^= 1
    shards[0].write_bytes(data)
    broken = _run("index_rlds", libero_dir, "--verify")
    assert broken.returncode == 2 and "record 0" in broken.stderr and "Traceback" not in broken.stderr


@pytest.mark.parametrize("tool", ["index_rlds", "annotate_depth"])
def test_missing_folder_is_a_plain_message(tool, tmp_path):
    more = [f"--output={tmp_path}/out", "--estimator=stand_in"] if tool == "annotate_depth" else []
    done = _run(tool, tmp_path / "gone", *more)
    assert done.returncode == 2 and "no data set folder" in done.stderr and "Traceback" not in done.stderr


def test_bridge_is_annotated_by_the_stand_in_and_read(bridge_dir, tmp_path):
    arguments = (bridge_dir, f"--index_dir={tmp_path}/index", f"--output={tmp_path}/depth", "--splits=train")
    arguments += ("--estimator=stand_in",)
    done = _run("annotate_depth", *arguments)
    summary = _json(done)
    assert "no depth" in summary["estimator"] and "NO depth" in done.stderr
    assert summary["splits"]["train"]["annotated_now"] == 25
    assert _json(_run("annotate_depth", *arguments))["splits"]["train"]["annotated_now"] == 0
    entry = data_config.DatasetConfig(path=bridge_dir, depth=str(tmp_path / "depth"))
    config = data_config.DataConfig(datasets=(entry,), index_dir=str(tmp_path / "index"))
    reader = loader.Loader(config, ("image_main", "depth", "depth_scale", "depth_offset"), 8)
    batch = reader.batch(0)
    assert reader.depth_kind == "relative" and batch["depth"].shape == (8, 64, 64) and (batch["depth"] > 0).all()
    value = batch["depth"] * batch["depth_scale"][:, None, None] + batch["depth_offset"][:, None, None]
    assert 0 <= value.min() < 0.1 and 0.9 < value.max() <= 1


def test_text_tokenizer_is_trained_from_a_data_set(libero_dir, tmp_path):
    (tmp_path / "more.txt").write_text("open the top drawer\nopen the oven\n")
    model = tmp_path / "text.model"
    arguments = (libero_dir, f"--texts={tmp_path}/more.txt", f"--output={model}", "--vocabulary=290")
    summary = _json(_run("train_text_tokenizer", *arguments))
    assert summary["instructions"] == 4 and summary["unknown"] == 0 and summary["vocabulary"] == 290
    # Definitions name variants of the instruction that only some copies have: early DROID has the first alone.
    more = _json(_run("train_text_tokenizer", *arguments[:2], f"--output={model}2", "--vocabulary=290", "--name=droid"))
    assert more["instructions"] == 4
    again = _run("train_text_tokenizer", *arguments)
    assert again.returncode == 2 and "--overwrite" in again.stderr
