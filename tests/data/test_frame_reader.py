"""Decoders against TensorFlow's, reads beyond the limit of open files, and files that the system does not read."""

import errno
import io
import os
import resource
import subprocess
import sys

import libero_writer
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from qdepth_jax import errors
from qdepth_jax.data import frame_reader, index

RNG = np.random.default_rng(0)


def _rgb(height=20, width=30):
    return np.asarray(Image.fromarray(RNG.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height)))


@pytest.mark.slow  # imports TensorFlow
def test_depth_png_equals_tensorflow():
    tf = pytest.importorskip("tensorflow")
    depth = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    for data in (libero_writer.png(depth), tf.io.encode_png(depth[..., None]).numpy()):
        out = np.empty_like(depth)
        frame_reader.decode_depth(data, out)
        np.testing.assert_array_equal(out, depth)
        np.testing.assert_array_equal(out, tf.io.decode_png(data, dtype=tf.uint16).numpy()[..., 0])


def test_rgb_kinds_and_sizes():
    frame = _rgb()
    jpeg, buffer = simplejpeg.encode_jpeg(np.ascontiguousarray(frame), 95), io.BytesIO()
    Image.fromarray(frame).save(buffer, "png")
    out = np.empty_like(frame)
    frame_reader.decode_rgb(buffer.getvalue(), out)
    np.testing.assert_array_equal(out, frame)
    frame_reader.decode_rgb(jpeg, out)
    np.testing.assert_array_equal(out, simplejpeg.decode_jpeg(jpeg))
    assert frame_reader.image_size(jpeg) == frame_reader.image_size(buffer.getvalue()) == (20, 30)
    small = np.empty((10, 15, 3), np.uint8)
    frame_reader.decode_rgb(jpeg, small)
    expected = Image.fromarray(out).resize((15, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(small, np.asarray(expected))


def test_damaged_images_are_errors():
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(_rgb()), 95)
    rgb, depth = np.empty((20, 30, 3), np.uint8), np.empty((20, 30), np.uint16)
    good = libero_writer.png(RNG.integers(0, 65536, (20, 30)).astype(np.uint16))
    for data in (b"", b"text", jpeg[: len(jpeg) // 2], jpeg[:3], b"\x89PNG\r\n"):
        with pytest.raises(ValueError):
            frame_reader.decode_rgb(data, rgb)
        with pytest.raises(ValueError):
            frame_reader.check(data)
    for data in (b"", good[:40], good[: len(good) // 2], jpeg, libero_writer.png(np.ones((20, 31), np.uint16))):
        with pytest.raises(ValueError):
            frame_reader.decode_depth(data, depth)
    frame_reader.check(jpeg)
    frame_reader.check(good, "uint16")
    with pytest.raises(ValueError):
        frame_reader.check(good[: len(good) // 2], "uint16")


def test_reads_beyond_the_limit_of_open_files(tmp_path):
    files = frame_reader.ShardFiles()
    files._limit = 2
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    for _ in range(2):
        for number in range(5):
            assert files.read(str(tmp_path / str(number)), 3, 4) == bytes([number]) * 4
            assert files.start(str(tmp_path / str(number)), 3, 4)() == bytes([number]) * 4
    assert len(files._open) == 2
    with pytest.raises(ValueError, match="ends 1 bytes short of byte 11"):
        files.read(str(tmp_path / "0"), 5, 6)
    files.close()


@pytest.mark.parametrize(("soft", "limit"), [(1024, 256), (64, 16), (resource.RLIM_INFINITY, frame_reader.UNLIMITED)])
def test_open_shards_take_a_quarter_of_the_limit(monkeypatch, soft, limit):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    assert frame_reader.ShardFiles()._limit == limit


@pytest.mark.parametrize("where", ["open", "pread"])
@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOENT, errors.UserError, "the file is gone"),
        (
            errno.EMFILE,
            errors.UserError,
            r"all \d+ files open that it may: raise the limit with `ulimit -n N`",
        ),
        (errno.EACCES, errors.UserError, "may not read it"),
        (errno.ESTALE, errors.TryAgain, "its file server started again"),
        (errno.EIO, errors.TryAgain, "does not answer"),
        (errno.ETIMEDOUT, errors.TryAgain, "does not answer"),
    ],
)
def test_a_file_that_the_system_does_not_read(tmp_path, monkeypatch, where, number, kind, text):
    path = tmp_path / "shard"
    path.write_bytes(bytes(10))

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    files = frame_reader.ShardFiles()
    monkeypatch.setattr(frame_reader.os, where, fail)
    for read in (files.read, lambda *span: files.start(*span)()):
        with pytest.raises(errors.UserError, match=f"{path} cannot be read .*{os.strerror(number)}.*{text}") as found:
            read(str(path), 0, 4)
        assert type(found.value) is kind
    monkeypatch.undo()
    files.close()


def test_a_missing_object_is_gone(monkeypatch):
    def missing():
        raise FileNotFoundError("gs://b/x: there is no such object")

    monkeypatch.setattr(frame_reader.storage, "start", lambda *span: missing)
    with pytest.raises(errors.UserError, match=r"no such object.*the file is gone"):
        frame_reader.ShardFiles().start("gs://b/x", 0, 4)()


def test_an_index_is_not_built_over_a_disk_that_is_away(tmp_path, monkeypatch):
    directory = libero_writer.make_libero(tmp_path, (3,))

    def scan(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("qdepth_jax.data.shard_scan.scan_shard", scan)
    with pytest.raises(errors.TryAgain, match=r"0000[01]-of-00002 cannot be read \(Input/output error\)"):
        index.open_index(directory, workers=1)


def test_too_many_open_files_are_told_with_no_descriptor_left(tmp_path):
    """In a process of its own: the message must not need a descriptor either."""
    path = tmp_path / "shard"
    path.write_bytes(bytes(10))
    program = f"""
import os, resource
from qdepth_jax.data import frame_reader
files = frame_reader.ShardFiles()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = []
try:
    while True:
        held.append(os.open({str(path)!r}, os.O_RDONLY))
except OSError:
    pass
try:
    files.read({str(path)!r}, 0, 4)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "all 64 files open that it may: raise the limit with `ulimit -n N`" in done.stdout
