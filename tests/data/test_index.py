"""The index: identity, damage, changed data, kills. Equality with TFDS is tested in test_tfds_writer.py."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc

import example_proto
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from libero_writer import make_libero

from qdepth_jax import errors
from qdepth_jax.data import (
    episode_reader,
    example,
    frame_reader,
    index,
    index_build,
    process_pool,
    shard_scan,
    spec,
    tfrecord,
    write_rlds,
)

ROOT = pathlib.Path(__file__).parents[2]


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
    raw, scale = reader.depth("steps/observation/depth", 0.001, 2)
    assert raw[:, 0, 0].tolist() == list(range(201, 210)) and scale == 0.001
    assert split.episode_of(np.array([0, 6, 7, 9, 10, 23])).tolist() == [0, 0, 1, 1, 2, 3]
    assert "record 0 (episode 2), step 4" in split.where(14)


def test_a_stale_shard_length_is_said(libero_dir):
    path = pathlib.Path(libero_dir) / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["shardLengths"] = ["2", "1"]
    path.write_text(json.dumps(info))
    opened = index.open_index(libero_dir)
    assert len(opened.split("train").episodes) == 4
    assert "declares 3 episodes, the shards hold 4" in opened.warnings[0]


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


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_episodes_with_right_checksums_are_errors_or_well_formed(libero_dir, count):
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
    for _ in range(count):
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
        _assert_holds(tables, dataset, example_proto.read(bytes(bad)), path.read_bytes())
    assert 0.2 * count < refused < 0.8 * count


def _assert_holds(tables, dataset, values: dict[str, list], shard: bytes) -> None:
    """The tables of a shard of one record hold what protobuf reads in it, value by value."""
    (length,) = tables.episodes["length"].tolist()
    for name, column in tables.columns.items():
        feature = dataset.feature(name)
        expected = np.array(values[name], "i8" if column.dtype.kind in "iub" else "f4")
        expected = expected.reshape(length if feature.per_step else 1, *feature.shape)
        assert column.dtype == (np.float32 if feature.dtype.startswith("float") else np.dtype(feature.dtype)), name
        assert np.array_equal(column.astype(expected.dtype), expected, equal_nan=expected.dtype.kind == "f"), name
    for name, spans in tables.spans.items():
        assert len(spans) == (length if dataset.feature(name).per_step else 1), name
        assert [shard[at : at + size] for at, size in spans.tolist()] == values[name], name
    for name, (ids, table) in tables.texts.items():
        assert [table[i] for i in ids.tolist()] == values[name] and len(table) == len(set(values[name])), name
    assert set(tables.columns) | set(tables.spans) | set(tables.texts) == set(dataset.features)
    assert tables.extra == set(values) - set(dataset.features)


def _tree(directory) -> dict[str, bytes]:
    root = pathlib.Path(directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_any_number_of_workers_writes_the_same_files(libero_dir, tmp_path):
    trees = []
    for workers in (1, 3):
        opened = index.open_index(libero_dir, str(tmp_path / str(workers)), workers=workers)
        trees.append(_tree(opened.directory))
    assert trees[0] == trees[1] and len(trees[0]) > 10
    for name, (size, _) in json.loads(trees[0]["index.json"])["files"].items():
        assert len(trees[0][name]) == size


def test_a_worker_that_dies_or_fails_is_an_error(libero_dir, tmp_path):
    with pytest.raises(RuntimeError, match="worker process ended with code 7"):
        list(process_pool.each(os._exit, [(7,), (7,)], 2))
    found = [result for _, result in process_pool.each(divmod, [(n, 3) for n in range(20)], 2)]
    assert sorted(found) == sorted(divmod(n, 3) for n in range(20))
    for number in (0, 1):
        _flip(next(pathlib.Path(libero_dir).glob(f"*train*0000{number}-of*")), 500)
    with pytest.raises(errors.UserError, match=r"record 0 .* checksum"):
        index.open_index(libero_dir, str(tmp_path), workers=2)


class _KilledError(BaseException):
    pass


def test_a_build_that_was_killed_goes_on(libero_dir, tmp_path, monkeypatch):
    expected = _tree(index.open_index(libero_dir, str(tmp_path / "whole")).directory)
    scan, save = shard_scan.scan_shard, index_build._save_json
    for kill_at in range(6):
        root, scanned, steps = str(tmp_path / str(kill_at)), [], iter(range(100))

        def step():
            if next(steps) == kill_at:  # noqa: B023 - used within this turn alone
                raise _KilledError

        def killed_scan(*args):
            step()
            scanned.append(args[1:3])  # noqa: B023
            return scan(*args)

        def killed_save(*args):
            step()
            return save(*args)

        monkeypatch.setattr(shard_scan, "scan_shard", killed_scan)
        monkeypatch.setattr(index_build, "_save_json", killed_save)
        with pytest.raises(_KilledError):
            index.open_index(libero_dir, root)
        assert not list(pathlib.Path(root).glob("*/index.json"))
        opened = index.open_index(libero_dir, root)
        assert sorted(scanned) == [("train", 0), ("train", 1), ("val", 0)]  # each once, over both runs
        assert _tree(opened.directory) == expected and os.listdir(root) == [os.path.basename(opened.directory)]


def _resharded(directory, count: int) -> str:
    """The train split in `count` shards."""
    folder = pathlib.Path(directory)
    old = sorted(folder.glob("*-train.tfrecord-*"))
    payloads = [record.payload for path in old for record in tfrecord.scan_records(path)]
    parts = [payloads[n::count] for n in range(count)]
    for path in old:
        path.unlink()
    split = write_rlds.write_split(folder, "libero_object", "train", parts)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(n) for n in split.shard_lengths]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return directory


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """SIGKILL of the command with two workers; restarted, it ends with the files of an uninterrupted build."""
    rng = np.random.default_rng(0)
    directory = _resharded(make_libero(tmp_path, tuple(rng.integers(3, 60, 40).tolist())), 20)
    # Decoding makes it long enough to be hit in the middle.
    command = [sys.executable, str(ROOT / "tools" / "index_rlds.py"), directory, "--workers=2", "--check_images"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, f"--index_dir={tmp_path}/whole"], check=True, **quiet)
    (place,) = (tmp_path / "whole").glob("*/index.json")
    expected, root, left = _tree(place.parent), tmp_path / "root", set()

    def scanned():
        try:
            return len(list(root.glob("*.building/*.npz")))
        except FileNotFoundError:  # renamed between listing and reading: it is whole
            return 0

    for _ in range(10):
        # Up to three shards further than the last time, whatever the machine's pace, and a moment more.
        wanted = scanned() + rng.integers(0, 4)
        with subprocess.Popen([*command, f"--index_dir={root}"], **quiet) as running:
            while running.poll() is None and scanned() < wanted:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            running.kill()
        left.add(scanned())
        for found in root.glob("*/index.json"):  # it was quick enough: what is there is whole; once more from the start
            assert _tree(found.parent)["index.json"] == expected["index.json"]
            shutil.rmtree(found.parent)
    subprocess.run([*command, f"--index_dir={root}"], check=True, **quiet)
    (place,) = root.glob("*/index.json")
    assert _tree(place.parent) == expected and os.listdir(root) == [place.parent.name]
    assert left - {0, 21}, "no kill fell into the scan"


def test_builds_at_the_same_time_end_with_one_index(libero_dir, tmp_path):
    expected = index.open_index(libero_dir, str(tmp_path / "alone"))
    barrier = threading.Barrier(4)

    def build(_):
        barrier.wait()
        return index.open_index(libero_dir, str(tmp_path / "together")).fingerprint

    for _ in range(5):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert set(pool.map(build, range(4))) == {expected.fingerprint}
        (found,) = (tmp_path / "together").glob("*/index.json")
        assert _tree(found.parent) == _tree(expected.directory)
        shutil.rmtree(tmp_path / "together")


def test_a_changed_time_is_looked_into_once_and_changed_bytes_are_refused(libero_dir, monkeypatch):
    first = index.open_index(libero_dir)
    shard = next(pathlib.Path(libero_dir).glob("*train*00001-of*"))
    stamp = shard.stat().st_mtime_ns

    def reads() -> list[str]:
        seen = []
        assert index.open_index(libero_dir, on_shard=lambda name, _: seen.append(name)).fingerprint == first.fingerprint
        return seen

    assert reads() == []
    os.utime(shard, ns=(stamp + 10**9, stamp + 10**9))  # copied: same bytes, another time
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        assert reads() == [shard.name] == reads()  # it cannot be remembered
    assert reads() == [shard.name] and reads() == []
    _flip(shard, 500)
    with pytest.raises(errors.UserError, match=r"1 shards changed .*00001-of-00002 \(record 0 .*checksum.*--rebuild"):
        index.open_index(libero_dir)
    # A change that hides behind the old time is found by reading everything.
    os.utime(shard, ns=(stamp + 10**9, stamp + 10**9))
    hidden = index.open_index(libero_dir)
    with pytest.raises(errors.UserError, match="1 shards changed"):
        index.verify(hidden)
    _flip(shard, 500)
    index.verify(index.open_index(libero_dir))
    # Good records, but others.
    other = make_libero(pathlib.Path(libero_dir).parent / "other", seed=3)
    shard.write_bytes(next(pathlib.Path(other).glob("*train*00001-of*")).read_bytes()[: shard.stat().st_size])
    with pytest.raises(errors.UserError, match=r"is of other data|shards changed"):
        index.open_index(libero_dir)


def test_a_damaged_index_file_is_found_by_verify(libero_dir):
    opened = index.open_index(libero_dir)
    _flip(pathlib.Path(opened.directory) / "train" / "column" / "steps.action.npy", 300)
    with pytest.raises(errors.UserError, match=r"steps.action.npy is damaged.*--rebuild"):
        index.verify(opened)


def test_joining_holds_one_part_at_a_time(tmp_path):
    """30 shards of 128 KB of columns each: the peak stays near one part, not thirty."""
    features = {
        "steps": {"action": write_rlds.Tensor((64,)), "text": write_rlds.Text()},
        "episode_metadata": {"id": write_rlds.Tensor((), "int64")},
    }

    def episode(number):
        steps = {"action": np.full((500, 64), number, np.float32), "text": [f"task {number}"] * 500}
        return write_rlds.encode_episode(features, steps, {"id": np.int64(number)})

    split = write_rlds.write_split(tmp_path, "wide", "train", [[n] for n in range(30)], episode)
    write_rlds.write_metadata(tmp_path, "wide", "1.0.0", features, [split], "wide columns")
    tracemalloc.start()
    try:
        opened = index.open_index(tmp_path, workers=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    column = opened.split("train").column("steps/action")
    assert column.nbytes == 30 * 128_000 and peak < 1.9e6
    assert (column[::500, 0] == np.arange(30)).all()
    ids, strings = opened.split("train").texts("steps/text")
    assert [strings[i] for i in ids[::500]] == [f"task {n}" for n in range(30)]


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.data())
def test_any_numbers_in_any_shape_come_back(data):
    """Columns and spans of random dtype, shape and length, over random shards."""
    kinds = ("float32", "float64", "int8", "uint8", "int32", "int64", "uint16", "bool")
    shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
    names = {f"x{n}": data.draw(st.tuples(st.sampled_from(kinds), shapes)) for n in range(data.draw(st.integers(1, 3)))}
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def values(dtype, shape):
        if dtype == "bool":
            return rng.integers(0, 2, shape).astype(bool)
        if dtype.startswith("float"):
            return rng.normal(size=shape).astype(dtype)
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)

    features = {
        "steps": {name: write_rlds.Tensor(shape, dtype) for name, (dtype, shape) in names.items()},
        "episode_metadata": {"id": write_rlds.Tensor((), "int64")},
    }
    episodes = [{name: values(dtype, (n, *shape)) for name, (dtype, shape) in names.items()} for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        cut = data.draw(st.integers(0, len(lengths)))
        shards = [part for part in (list(range(cut)), list(range(cut, len(lengths)))) if part]
        split = write_rlds.write_split(
            folder,
            "any",
            "train",
            shards,
            lambda n: write_rlds.encode_episode(features, episodes[n], {"id": np.int64(n)}),
        )
        write_rlds.write_metadata(folder, "any", "1.0.0", features, [split], "any")
        opened, files = index.open_index(folder).split("train"), frame_reader.ShardFiles()
        assert opened.episodes["length"].tolist() == lengths
        assert opened.column("episode_metadata/id").tolist() == list(range(len(lengths)))
        shard_of = np.repeat(opened.episodes["shard"], lengths)
        for name, (dtype, shape) in names.items():
            expected = np.concatenate([episode[name] for episode in episodes])
            expected = expected.astype(np.float32) if dtype == "float64" else expected
            feature = opened.dataset.feature(f"steps/{name}")
            if shard_scan.storage(feature) == "column":
                mine = np.array(opened.column(feature.name))
            else:
                spans = zip(shard_of.tolist(), opened.spans(feature.name).tolist())
                rows = [files.read(opened.shard_path(shard), *span) for shard, span in spans]
                mine = np.stack([shard_scan.decode_tensor(feature, row) for row in rows])
            np.testing.assert_array_equal(mine, expected)
            assert mine.dtype == expected.dtype and mine.shape[1:] == shape
        files.close()


@pytest.mark.parametrize("name", ["quarantine.json", "train/episodes.npy", "train/column/steps.action.npy"])
def test_a_damaged_file_of_the_index_is_a_message(libero_dir, name):
    path = pathlib.Path(index.open_index(libero_dir).directory) / name
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(errors.UserError, match=r"gone or damaged .*delete the index folder"):
            split = index.open_index(libero_dir).split("train")
            split.column("steps/action"), split.episodes
