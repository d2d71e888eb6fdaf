"""Checks of gs:// reading, each run in a process of its own by test_storage.py: python gcs_checks.py NAME FOLDER."""

import dataclasses
import json
import logging
import pathlib
import sys
import time

import fake_gcs
import libero_writer
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.convert import rlds, rlds_claim, rlds_run
from qdepth_jax.data import data_config, episode_reader, frame_reader, index, loader, sidecar, spec, storage, tfrecord

PREFIX = "lab-data/rlds/libero_object/1.0.0"
URL = f"gs://{PREFIX}"


def _served(folder: pathlib.Path) -> tuple[fake_gcs.FakeGcs, pathlib.Path]:
    local = pathlib.Path(libero_writer.make_libero(folder / "local"))
    return fake_gcs.serve({f"{PREFIX}/{path.name}": path.read_bytes() for path in local.iterdir()}), local


def index_and_frames(folder: pathlib.Path) -> None:
    """An index of objects equals one of files; frames and whole episodes are the same bytes, many requests at once."""
    fake, local = _served(folder)
    storage.CHUNK_BYTES = 4000  # several chunks per shard, and records across their borders
    here = index.open_index(str(local))
    there = index.open_index("gs://lab-data/rlds/libero_object/", str(folder / "index"))  # the only version is found
    assert there.fingerprint == here.fingerprint and there.dataset.directory == URL
    assert there.shard_bytes == here.shard_bytes == sum(path.stat().st_size for path in local.glob("*.tfrecord*"))
    before = len(fake.requests)
    index.open_index(URL, str(folder / "index"), build=False)
    assert not any(wanted for _, wanted in fake.requests[before:])  # no shard is read to open an index
    mine, theirs = here.split("train"), there.split("train")
    for name in ("steps/observation/image", "steps/observation/depth"):
        np.testing.assert_array_equal(mine.spans(name), theirs.spans(name))
    files, jobs = frame_reader.ShardFiles(), []
    for name in ("steps/observation/image", "steps/observation/wrist_image", "steps/observation/depth"):
        for frame, (offset, size) in enumerate(theirs.spans(name).tolist()):
            shard = int(theirs.episodes["shard"][theirs.episode_of(np.int64(frame))])
            jobs.append((shard, offset, size))
    assert len(jobs) == 72
    fake.hold, fake.most_at_once = 64, 0
    waits = [files.start(theirs.shard_path(shard), offset, size) for shard, offset, size in jobs * 4]
    remote = [wait() for wait in waits]
    assert fake.most_at_once >= 64
    assert remote == 4 * [files.read(mine.shard_path(shard), offset, size) for shard, offset, size in jobs]
    fake.hold = 0
    images = episode_reader.EpisodeReader(theirs).images("steps/observation/image", 2)
    np.testing.assert_array_equal(images, episode_reader.EpisodeReader(mine).images("steps/observation/image", 2))
    with pytest.raises(ValueError, match="truncated"):
        files.read(theirs.shard_path(0), 10**6, 100)
    with pytest.raises(errors.UserError, match="needs a local folder"):
        index.open_index(URL)
    with pytest.raises(errors.UserError, match="needs a local folder"):
        index.open_index(URL, "gs://lab-data/index")


def sequential(folder: pathlib.Path) -> None:
    """Shards come whole and in order for every size of chunk; an object that is replaced meanwhile is noticed."""
    fake, local = _served(folder)
    path = next(local.glob("*train*00000*"))
    data, url = path.read_bytes(), f"{URL}/{path.name}"
    expected = [record.payload for record in tfrecord.scan_records(path)]
    # A chunk beyond the object, one that ends with it, one that leaves a byte, small ones.
    for chunk in (len(data) + 1, len(data), len(data) - 1, len(data) // 2, 700):
        storage.CHUNK_BYTES = chunk
        assert [record.payload for record in tfrecord.scan_records(url)] == expected
    name = f"{PREFIX}/{path.name}"
    fake.put(name, data[:-10])
    with pytest.raises(ValueError, match=r"record 1 at byte \d+: truncated payload"):
        list(tfrecord.scan_records(url))
    fake.put(name, b"")
    assert list(tfrecord.scan_records(url)) == []
    fake.put(name, data)
    records = tfrecord.scan_records(url)
    next(records)
    fake.put(name, data)
    with pytest.raises(ValueError, match="was replaced"):
        list(records)
    with pytest.raises(FileNotFoundError):
        list(tfrecord.scan_records(f"{URL}/gone"))


def changed(folder: pathlib.Path) -> None:
    """A new generation of an object is read again once; other content is refused."""
    fake, local = _served(folder)
    place = str(folder / "index")
    index.open_index(URL, place)
    path = next(local.glob("*train*00001*"))
    data, name = path.read_bytes(), f"{PREFIX}/{path.name}"
    fake.put(name, data)
    for reads in (True, False):  # the first open reads it, and remembers that it is the same
        before = len(fake.requests)
        index.open_index(URL, place)
        assert any(wanted for _, wanted in fake.requests[before:]) == reads
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    fake.put(name, bytes(flipped))
    with pytest.raises(errors.UserError, match=r"1 shards changed .*00001-of-00002 .*checksum"):
        index.open_index(URL, place)
    del fake.objects[name]
    with pytest.raises(errors.UserError, match=r"1 shards missing: .*00001-of-00002"):
        index.open_index(URL, place)


def unreadable(folder: pathlib.Path) -> None:
    """Every way in which a bucket cannot be read ends soon, with a message that names it and the fix."""
    fake, _ = _served(folder)
    storage.RETRIES, storage.FIRST_WAIT, storage.LONGEST_WAIT, storage.TIMEOUT_SECONDS = 2, "10ms", "20ms", 3.0
    fake.status = {"denied-bucket": 403, "not-signed-in": 401, "broken-bucket": 503, "black-hole": "hang"}
    started = time.monotonic()
    for url, message in (
        ("gs://no-such-bucket/x", "features.json and dataset_info.json missing.*bucket does not exist"),
        ("gs://lab-data/elsewhere", "features.json and dataset_info.json missing"),
        ("gs://denied-bucket/x", "access is denied: give credentials.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://not-signed-in/x", "give credentials"),
        ("gs://broken-bucket/x", "given up after 2 retries"),
        ("gs://black-hole/x", "no answer within 3 s"),
        ("gs://Bad_Bucket!/x", "Bad_Bucket"),
        ("gs:///x", "names no bucket"),
        ("s3://bucket/x", "only local folders and gs://"),
    ):
        with pytest.raises(errors.UserError, match=message) as found:
            spec.read_spec(url)
        away = "given up" in message or "no answer" in message
        assert errors.exit_code(found.value) == (errors.TRY_AGAIN if away else errors.BAD_INPUT), url
    assert time.monotonic() - started < 60


def batches(folder: pathlib.Path) -> None:
    """Batches of objects, image by image and in blocks, equal those of files."""
    fake, local = _served(folder)
    keys = ("image_main", "image_wrist", "depth", "action", "frame")
    for more in ({}, {"read": "blocks", "block_mib": 1}):
        mine, theirs = (
            loader.Loader(
                data_config.DataConfig(
                    datasets=(data_config.DatasetConfig(path=path),),
                    views=("main", "wrist"),
                    index_dir=str(folder / "index"),
                    **more,
                ),
                keys,
                8,
            )
            for path in (str(local), URL)
        )
        before = len(fake.requests)
        for step in (0, 5):
            expected, found = mine.batch(step), theirs.batch(step)
            for key in keys:
                np.testing.assert_array_equal(found[key], expected[key])
        # 3 images of 8 frames, twice; or each of the two shards once, in one piece.
        assert len(fake.requests) - before == (2 if more else 48)
        assert mine.identity() == theirs.identity()
    fake.status = {"lab-data": 403}
    theirs = dataclasses.replace(theirs.config, read="frames")
    with pytest.raises(errors.UserError, match="access is denied"):
        loader.Loader(theirs, keys, 8).batch(0)


def converted(folder: pathlib.Path) -> None:
    """A data set of objects is converted to the same files as one on a disk; the output must be a local folder."""
    fake, local = _served(folder)
    (local / "extra.labels.txt").write_text("a\nb\n")
    fake.put(f"{PREFIX}/extra.labels.txt", b"a\nb\n")
    made = []
    for number, source in enumerate((str(local), URL)):
        output = folder / str(number) / "1.1.0"
        plan = rlds.plan(source, str(output), rlds.Options(resize=(12, 16)), str(folder / "index"))
        with rlds_claim.claimed(plan.target):
            rlds_run.finish(plan, rlds_run.run_local(plan, 1))
        made.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert made[0] == made[1] and "extra.labels.txt" in made[1] and len(made[1]) == 7
    for write in (
        lambda: rlds.plan(URL, "gs://lab-data/new", rlds.Options(), str(folder / "index")),
        lambda: sidecar.Writer("gs://lab-data/new", sidecar.Metadata("depth", "", "train", "", "", (2, 2), 1, 1)),
    ):
        with pytest.raises(errors.UserError, match=r"--output=gs://lab-data/new: .*local folder"):
            write()


if __name__ == "__main__":
    logging.disable()
    checks = {
        check.__name__: check for check in (index_and_frames, sequential, changed, unreadable, batches, converted)
    }
    checks[sys.argv[1]](pathlib.Path(sys.argv[2]))
    print(json.dumps({"passed": sys.argv[1]}))
