"""The converter as real processes on real data: equal bytes from every engine, after every kill, and for plain TFDS."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sidecar_writer

from qdepth_jax.data import example, index, sidecar, spec, tfrecord, write_rlds

ROOT = pathlib.Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "libero_object" / "1.0.0"


def command(*arguments):
    return [sys.executable, str(ROOT / "tools" / "convert_rlds.py"), *map(str, arguments)]


def convert(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def files(folder):
    paths = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_command_line(libero_dir, tmp_path):
    made = convert(
        libero_dir, f"--output={tmp_path}/new", "--split=train", "--episodes=0", "--resize=12,16", "--workers=2"
    )
    assert (made["action"], made["episodes"], made["shards"]) == ("converted", 1, 1)
    assert made["images_resized"] == 3 * made["frames"] and made["dropped"] == {"outside of --episodes": 3}
    for wrong, message in (("--resize=12", "height,width"), ("--split=test", "has no split 'test'")):
        done = subprocess.run(command(libero_dir, f"--output={tmp_path}/x", wrong), capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# ---- slow: minutes of processes ----


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """All episodes of the shipped sample, one per shard."""
    folder = tmp_path_factory.mktemp("source") / "libero_object" / "1.0.0"
    folder.mkdir(parents=True)
    old = spec.read_spec(SAMPLE)
    splits = []
    for name, split in old.splits.items():
        records = [r.payload for shard in split.shards for r in tfrecord.scan_records(old.shard_path(shard))]
        splits.append(write_rlds.write_split(folder, old.name, name, [[record] for record in records]))
    info = json.loads((SAMPLE / "dataset_info.json").read_text())
    (folder / "features.json").write_text((SAMPLE / "features.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "splits": write_rlds.splits_json(splits)}))
    index.open_index(folder)
    return folder


@pytest.fixture(scope="module")
def bridge(bridge_dir, tmp_path_factory):
    """(folder, index root) of the real Bridge sample, which is read-only."""
    return pathlib.Path(bridge_dir), tmp_path_factory.mktemp("bridge_index")


def arguments_for(source, index_dir, folder, camera, size=(16, 16)):
    """Flags that use every kind of change, sidecars included."""
    opened = index.open_index(source, str(index_dir) if index_dir else "")
    depth = sidecar_writer.make_sidecar(folder / "depth", opened, "depth", camera, shape=size)
    tokens = sidecar_writer.make_sidecar(folder / "tokens", opened, "depth_tokens", camera, shape=(256,), seed=1)
    flags = [f"--depth=relative_depth_made={depth}", f"--depth_tokens={tokens}", "--resize=48,40"]
    return opened, [*flags, f"--index_dir={index_dir}"] if index_dir else flags


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bridge", "sample", "sample in many shards"])
@pytest.mark.parametrize("engine", ["three workers", "beam"])
def test_every_engine_writes_the_same(which, engine, request, tmp_path):
    if engine == "beam":
        pytest.importorskip("apache_beam", reason="Apache Beam is not installed (extra 'convert')")
    source, index_dir = _source(which, request, tmp_path)
    camera = "steps/observation/image" + ("_0" if which == "bridge" else "")
    _, flags = arguments_for(source, index_dir, tmp_path, camera)
    one = convert(source, f"--output={tmp_path}/one/1.1.0", "--workers=1", *flags)
    other = ["--runner=DirectRunner"] if engine == "beam" else ["--workers=3"]
    two = convert(source, f"--output={tmp_path}/two/1.1.0", *other, *flags)
    assert {**one, "output": 0, "seconds": 0} == {**two, "output": 0, "seconds": 0}
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) == one["shards"] + 3


def _source(which, request, tmp_path):
    if which == "bridge":
        return request.getfixturevalue("bridge")
    if which == "sample":
        return SAMPLE, tmp_path / "index"
    return request.getfixturevalue("many_shards"), ""


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_alike(many_shards, tmp_path):
    _, flags = arguments_for(many_shards, "", tmp_path, "steps/observation/image")
    flags += ["--workers=3", "--split=train"]

    def start(folder):
        """A running conversion, returned when it begins to write."""
        lock = folder / "1.1.0" / "convert_state" / "lock"
        lock.unlink(missing_ok=True)  # of a run that is dead; it is made anew when writing begins
        process = subprocess.Popen(
            command(many_shards, f"--output={folder}/1.1.0", *flags),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _until(lambda: lock.exists() or process.poll() is not None)
        return process

    process = start(tmp_path / "whole")
    began = time.monotonic()
    assert process.wait() == 0
    duration = time.monotonic() - began
    whole = files(tmp_path / "whole")
    rng = np.random.default_rng(20251)
    stages = {"no shard": 0, "some shards": 0, "all": 0}
    for moment, fraction in enumerate(rng.uniform(0, 1, 10)):
        folder = tmp_path / f"killed-{moment}"
        for part in (fraction, rng.uniform(0, 0.3)):  # the restart is killed too
            process = start(folder)
            time.sleep(part * duration)
            _kill_group(process)
            found = files(folder)
            shards = {name for name in found if ".tfrecord-" in name and "partial" not in name and "done" not in name}
            assert all(found[name] == whole[name] for name in shards)  # a shard with a name is whole
            complete = any(name.endswith("dataset_info.json") for name in found)
            stages["all" if complete else "some shards" if shards else "no shard"] += 1
        last = convert(many_shards, f"--output={folder}/1.1.0", *flags)
        assert files(folder) == whole
        # A shard may be there without its done file, if the kill came between the two: it is made again.
        done = {name for name in found if name.endswith(".json") and "done" in name}
        assert last["shards_of_earlier_runs"] == len(done) or last["action"] == "opened"
    print(f"killed after: {stages}")
    assert stages["some shards"] > 0  # else the test has killed at the wrong moments


def _kill_group(process):
    """SIGKILL to the group that `start_new_session` made for our own process, workers included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        assert process.poll() is not None
    process.wait()


def _group(leader):
    """Living members of a process group."""
    members = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            members.append(int(status.parent.name))
    return members


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_parent_that_was_killed(many_shards, tmp_path):
    arguments = command(many_shards, f"--output={tmp_path}/new", "--workers=3", "--resize=48,40")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _until(lambda: len(_group(process.pid)) >= 4)  # the workers have started
        workers = [pid for pid in _group(process.pid) if pid != process.pid]
        assert len(workers) >= 3
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # killed at its work, not finished before
        _until(lambda: not _group(process.pid))
        assert _group(process.pid) == []  # ended ones may wait to be reaped: nobody of the group lives
        assert not (tmp_path / "new" / "dataset_info.json").exists()  # nobody went on and called it whole
    finally:
        _kill_group(process)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_a_plain_message(many_shards, tmp_path):
    arguments = command(many_shards, f"--output={tmp_path}/new", "--workers=2", "--resize=48,40")
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _until(lambda: list((tmp_path / "new").glob("*.partial.*")))
        partial = next(iter((tmp_path / "new").glob("*.partial.*")))
        open_files = {pid: [os.path.realpath(fd) for fd in _files(pid)] for pid in _group(process.pid)}
        writer = next(pid for pid, files in open_files.items() if os.path.realpath(partial) in files)
        os.kill(writer, signal.SIGKILL)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 2 and "fewer --workers" in stderr and "Traceback" not in stderr
    finally:
        _kill_group(process)


def _files(pid):
    """What a process has open; nothing of one that has ended meanwhile."""
    try:
        return list(pathlib.Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


def _until(condition, seconds=60):
    for _ in range(seconds * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bridge", "sample"])
@pytest.mark.parametrize("encoding", ["none", "bytes"])
def test_plain_tfds_reads_all_original_features_and_the_new_ones(which, encoding, request, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="extra 'test' is not installed")
    source, index_dir = _source(which, request, tmp_path)
    camera = "steps/observation/image" + ("_0" if which == "bridge" else "")
    opened, flags = arguments_for(source, index_dir, tmp_path, camera)
    flags = [flag for flag in flags if not flag.startswith("--resize")]
    convert(source, f"--output={tmp_path}/new/1.1.0", f"--token_encoding={encoding}", *flags)
    tokens_name = "depth_tokens" + ("_0" if which == "bridge" else "")
    theirs = {place: tfds.builder_from_directory(str(place)) for place in (source, tmp_path / "new" / "1.1.0")}
    read = tfds.ReadConfig(interleave_cycle_length=1)
    for name in opened.splits:
        old, new = (
            tfds.as_numpy(
                builder.as_dataset(split=name, read_config=read, decoders={"steps": tfds.decode.SkipDecoding()})
            )
            for builder in theirs.values()
        )
        maps, codes = (sidecar.open_sidecar(tmp_path / kind, name) for kind in ("depth", "tokens"))
        frame = count = 0
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            made = after["episode_metadata"]
            assert made.pop("relative_depth_made_scale") == np.float32(0.5 + number)
            assert (
                made.pop("relative_depth_made_offset") == -number
                and made.pop("relative_depth_made_kind") == b"relative"
            )
            length = len(after["steps"]["action"])
            skipped = after["steps"]["observation"].pop(tokens_name)
            if encoding == "none":  # what octo's and OpenVLA's loaders see
                np.testing.assert_array_equal(skipped, codes.values[frame : frame + length])
            after["steps"]["observation"].pop("relative_depth_made")
            before.setdefault("episode_metadata", {})
            _assert_equal(before, after)
            frame, count = frame + length, count + 1
        assert frame == opened.split(name).frames and count == len(opened.split(name).episodes)
        # Decoded by TFDS: the new features by value, images pixel by pixel.
        decoded_old, decoded_new = (b.as_dataset(split=name, read_config=read) for b in theirs.values())
        frame = 0
        for before, after in zip(decoded_old, decoded_new, strict=True):
            for step_before, step_after in zip(
                tfds.as_numpy(before["steps"]), tfds.as_numpy(after["steps"]), strict=True
            ):
                depth = step_after["observation"].pop("relative_depth_made")
                tokens = step_after["observation"].pop(tokens_name)
                assert depth.dtype == tokens.dtype == np.uint16
                np.testing.assert_array_equal(depth[..., 0], maps.values[frame])
                np.testing.assert_array_equal(tokens, codes.values[frame])
                _assert_equal(step_before, step_after)
                frame += 1
    # And our own reader: every original feature, to the byte.
    made = index.open_index(tmp_path / "new" / "1.1.0")
    for name in opened.splits:
        for old_payload, new_payload in zip(
            _payloads(opened.dataset, name), _payloads(made.dataset, name), strict=True
        ):
            a, b = example.entries(old_payload), example.entries(new_payload)
            assert all(old_payload[slice(*a[key])] == new_payload[slice(*b[key])] for key in a)


def _payloads(dataset, split):
    for shard in dataset.splits[split].shards:
        for record in tfrecord.scan_records(dataset.shard_path(shard)):
            yield record.payload


def _assert_equal(a, b, path=""):
    if isinstance(a, dict):
        assert sorted(a) == sorted(b), path
        for key in a:
            _assert_equal(a[key], b[key], f"{path}/{key}")
    else:
        np.testing.assert_array_equal(a, b, err_msg=path)
