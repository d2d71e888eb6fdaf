"""Interpolation against numbers that OpenCV 4.12 and PyTorch 2.10 gave for the same row of squares."""

import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax.models import resize

SQUARES = np.arange(5, dtype=np.float32) ** 2


@pytest.mark.parametrize(
    ("out", "factor", "expected"),
    [
        # cv2.resize(..., INTER_CUBIC)
        (7, None, [-0.07871729, 0.2653066, 1.6822183, 4.0, 7.046644, 12.463555, 16.551022]),
        (3, None, [0.14814812, 4.0, 14.07407]),
        # torch.nn.functional.interpolate(scale_factor=3.1 / 5, mode="bicubic"): DINOv2's positions
        (3, 3.1 / 5, [0.13933372, 3.5535758, 13.1905994]),
    ],
)
def test_cubic(out, factor, expected):
    matrix = resize.cubic(5, out, factor)
    np.testing.assert_allclose(matrix @ SQUARES, expected, atol=1e-5)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)


def test_bilinear_with_corners_on_corners():
    x = jnp.asarray(np.broadcast_to(SQUARES[None, :, None, None], (2, 5, 3, 1)))
    found = resize.bilinear_corners(x, 7, 3)
    # torch.nn.functional.interpolate(size=7, mode="bilinear", align_corners=True)
    expected = [0.0, 0.6666667, 2.0, 4.0, 7.3333335, 11.3333335, 16.0]
    np.testing.assert_allclose(found[1, :, 2, 0], expected, atol=2e-6)
    np.testing.assert_array_equal(resize.bilinear_corners(x, 5, 3), x)
    np.testing.assert_array_equal(resize.bilinear_corners(x, 1, 3)[:, 0], x[:, 0])


@pytest.mark.parametrize(("axis", "out"), [(1, 9), (2, 4), (1, 3), (2, 1)])
def test_linear_steps_as_products_and_as_gathers_agree(axis, out):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32))
    found = resize.linear_product(x, axis, out)
    np.testing.assert_allclose(found, resize.linear_gathered(x, axis, out), atol=1e-6)
    np.testing.assert_array_equal(jnp.take(found, 0, axis), jnp.take(x, 0, axis))
    assert found.shape[axis] == out
