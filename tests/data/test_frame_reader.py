"""Decoders against TensorFlow's, and reads beyond the limit of open files."""

import io

import libero_writer
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from qdepth_jax.data import frame_reader

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
