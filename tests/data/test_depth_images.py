"""Every way in which data sets store depth comes out as the same u16 map."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from qdepth_jax import errors
from qdepth_jax.data import depth_images, example, spec

METRES = np.array([[0.5, 1.25, 0.0], [3.0, np.nan, 70.0]], np.float32)
MILLIMETRES = np.array([[500, 1250, 0], [3000, 0, 0]], np.uint16)


def _png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def _read(feature, data, metres):
    out = np.full((2, 3), 7, np.uint16)
    decode, scale = depth_images.decoder(feature, metres)
    decode(data, out)
    return out, scale


@pytest.mark.parametrize(
    ("feature", "data", "metres"),
    [
        (spec.FeatureSpec("d", "image", "uint16", (2, 3, 1), "png", True), _png(MILLIMETRES), 0.001),
        (spec.FeatureSpec("d", "tensor", "float32", (2, 3), "none", True), METRES.tobytes(), 1.0),
        (spec.FeatureSpec("d", "tensor", "float32", (2, 3, 1), "zlib", True), zlib.compress(METRES.tobytes()), 1.0),
        (spec.FeatureSpec("d", "tensor", "float32", (2, 3), "bytes", True), (METRES * 10).tobytes(), 0.1),
        (spec.FeatureSpec("d", "tensor", "uint16", (2, 3), "zlib", True), zlib.compress(MILLIMETRES.tobytes()), 0.001),
        # TFDS: `image.view(np.uint8)` with the four bytes of a float as channels.
        (
            spec.FeatureSpec("d", "image", "float32", (2, 3, 1), "png", True),
            _png(METRES[..., None].view(np.uint8)),
            1.0,
        ),
    ],
)
def test_the_same_map_from_every_encoding(feature, data, metres):
    out, scale = _read(feature, data, metres)
    np.testing.assert_array_equal(out, MILLIMETRES)
    assert scale == 0.001


def test_packed_integers_and_units():
    feature = spec.FeatureSpec("d", "tensor", "int32", (2, 3), "none", True)
    payload = example.encode({"d": MILLIMETRES.astype(np.int64).reshape(-1)})
    start = example.scan(payload)["d"].start
    out, scale = _read(feature, payload[start:], 0.0005)
    np.testing.assert_array_equal(out, MILLIMETRES)
    assert scale == 0.0005


def test_what_is_no_depth_is_refused():
    colour = spec.FeatureSpec("d", "image", "uint8", (2, 3, 3), "jpeg", True)
    with pytest.raises(errors.UserError, match="one value per pixel"):
        depth_images.decoder(colour, 1.0)
    big = spec.FeatureSpec("d", "tensor", "int64", (2, 3), "bytes", True)
    with pytest.raises(ValueError, match=r"0\.\.65535 expected"):
        _read(big, np.full((2, 3), 70_000, np.int64).tobytes(), 0.001)
    broken = spec.FeatureSpec("d", "image", "float32", (2, 3, 1), "png", True)
    with pytest.raises(ValueError, match="four 8-bit channels"):
        _read(broken, _png(MILLIMETRES), 1.0)
