"""The index: identity, damage, changed data, kills. Equality with TFDS is tested in test_tfds_writer.py."""

import json
import os
import pathlib

import numpy as np
import pytest
from libero_writer import make_libero

from qdepth_jax import errors
from qdepth_jax.data import episode_reader, example, index, index_build, shard_scan, spec, tfrecord


def test_fingerprint_follows_content_and_not_the_place(tmp_path):
    a = index.open_index(make_libero(tmp_path / "a"))
    b = index.open_index(make_libero(tmp_path / "elsewhere" / "b"), str(tmp_path / "root"))
    c = index.open_index(make_libero(tmp_path / "c", seed=1))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert a.directory.endswith("qdepth_index") and b.directory.startswith(str(tmp_path / "root"))
    os.rename(tmp_path / "a", tmp_path / "moved")
    assert index.open_index(tmp_path / "moved" / "libero_object", build=False).fingerprint == a.fingerprint


def test_columns_spans_and_shards_line_up(libero_dir):
    split = index.open_index(libero_dir).split("train")
    assert split.episodes["length"].tolist() == [7, 3, 9, 5] and split.episodes["shard"].tolist() == [0, 0, 1, 1]
    state = split.column("steps/observation/state")[:, 0]
    expected = np.concatenate([e + np.arange(n) / 100 for e, n in enumerate((7, 3, 9, 5))])
    np.testing.assert_array_equal(state, expected.astype(np.float32))
    reader = episode_reader.EpisodeReader(split)
    assert reader.depth("steps/observation/depth", 2)[:, 0, 0].tolist() == list(range(201, 210))
    assert split.episode_of(np.array([0, 6, 7, 9, 10, 23])).tolist() == [0, 0, 1, 1, 2, 3]
    assert "record 0 (episode 2), step 4" in split.where(14)


def test_a_stale_shard_length_is_said(libero_dir):
    path = pathlib.Path(libero_dir) / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["shardLengths"] = ["2", "7"]
    path.write_text(json.dumps(info))
    opened = index.open_index(libero_dir)
    assert len(opened.split("train").episodes) == 4
    assert "declares 9 episodes, the shards hold 4" in opened.warnings[0]


def _flip(path, at):
    data = bytearray(pathlib.Path(path).read_bytes())
    data[at] ^= 4
    pathlib.Path(path).write_bytes(data)


def test_damaged_shard_is_named_and_a_repaired_one_is_all_that_is_read_again(libero_dir, monkeypatch):
    shard = next(pathlib.Path(libero_dir).glob("*train*00001-of*"))
    _flip(shard, 500)
    with pytest.raises(errors.UserError, match=r"00001-of-00002: record 0 .* checksum .* --quarantine"):
        index.open_index(libero_dir)
    assert not (pathlib.Path(libero_dir) / index.DEFAULT_FOLDER).exists()
    # The good shards are not read again once the bad one is repaired.
    _flip(shard, 500)
    seen, scanned = [], []
    scan = shard_scan.scan_shard
    monkeypatch.setattr(shard_scan, "scan_shard", lambda *args: scanned.append(args[2:0:-1]) or scan(*args))
    index.open_index(libero_dir, on_shard=lambda *shard: seen.append(shard))
    assert scanned == [(1, "train"), (0, "val")] and len(seen) == 3
    assert [path.name for path in pathlib.Path(libero_dir).iterdir() if "index" in path.name] == ["qdepth_index"]


def test_missing_feature_and_wrong_count_name_the_record(libero_dir):
    path = pathlib.Path(libero_dir) / "features.json"
    features = json.loads(path.read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["gone"] = steps["action"]
    path.write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"record 0 .*: feature 'steps/gone' is missing"):
        index.open_index(libero_dir)
    del steps["gone"]
    steps["action"]["tensor"]["shape"]["dimensions"] = ["6"]
    path.write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"values, .* steps x"):
        index.open_index(libero_dir)


def test_changed_data_is_refused_until_rebuilt(libero_dir):
    first = index.open_index(libero_dir)
    shard = next(pathlib.Path(libero_dir).glob("*val*"))
    payload = next(tfrecord.scan_records(shard)).payload
    with open(shard, "ab") as file:
        tfrecord.write_record(file, payload)
    with pytest.raises(errors.UserError, match="--rebuild"):
        index.open_index(libero_dir)
    index.rebuild(spec.read_spec(libero_dir))
    second = index.open_index(libero_dir)
    assert second.fingerprint != first.fingerprint and len(second.split("val").episodes) == 2


def test_bad_folders_name_the_path_and_what_is_there(tmp_path, libero_dir):
    with pytest.raises(errors.UserError, match=r"no data set folder .*nope.* holds libero_object"):
        index.open_index(tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UserError, match=r"features.json and dataset_info.json missing; it holds nothing"):
        index.open_index(tmp_path / "empty")
    next(pathlib.Path(libero_dir).glob("*val*")).unlink()
    with pytest.raises(errors.UserError, match="1 shards missing"):
        index.open_index(libero_dir)


def test_full_disk_is_a_clear_error(libero_dir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("_save_json", "_join_tables"):
        with monkeypatch.context() as patch:
            patch.setattr(index_build, name, full)
            with pytest.raises(errors.UserError, match="the disk is full"):
                index.open_index(libero_dir)
        assert not (pathlib.Path(libero_dir) / index.DEFAULT_FOLDER).exists()
    index.open_index(libero_dir)


def test_unwritable_place_is_a_clear_error(tmp_path, libero_dir):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.UserError, match="--index_dir"):
        index.open_index(libero_dir, str(tmp_path / "file" / "index"))


def test_mutated_episodes_with_right_checksums_are_errors_or_well_formed(libero_dir):
    """Damage below the checksum (a broken writer): scanning ends in a ValueError or in tables that fit together."""
    dataset = spec.read_spec(libero_dir)
    path = pathlib.Path(dataset.shard_path(dataset.splits["val"].shards[0]))
    good = next(tfrecord.scan_records(path)).payload
    # Without the pixels, so that mutations hit structure: keep names, counts and numbers, shrink the images.
    features = {
        name: [b"\xff\xd8" + bytes(8)] * len(value) if "image" in name or "depth" in name
        else [good[a : a + n] for a, n in value.tolist()] if kind == "bytes" else value
        for name, (kind, value, _) in example.scan(good).items()
    }  # fmt: skip
    small, rng, refused = example.encode(features), np.random.default_rng(0), 0
    for _ in range(1500):
        bad = bytearray(small)
        for _ in range(int(rng.integers(1, 3))):
            bad[rng.integers(len(bad))] = rng.integers(256)
        with open(path, "wb") as file:
            tfrecord.write_record(file, bytes(bad))
        try:
            tables = shard_scan.scan_shard(dataset, "val", 0)
        except ValueError as error:
            assert "record 0" in str(error)
            refused += 1
            continue
        length = int(tables.episodes["length"].sum())
        for name, table in (tables.columns | tables.spans).items():
            assert len(table) == (length if dataset.feature(name).per_step else 1)
        for table in tables.spans.values():
            assert (table["offset"] + table["size"] <= path.stat().st_size).all()
    assert 300 < refused < 1500
