"""Resizing on the device is JAX's own antialiased Lanczos-3, rounded."""

import augment_by_tensorflow as by_tf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax.models import images


@pytest.mark.parametrize("shape", [(1, 20, 30, 3), (1, 9, 12, 3)])
def test_resize_is_lanczos3(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    expected = jax.image.resize(jnp.asarray(image, jnp.float32), (1, 14, 14, 3), "lanczos3", antialias=True)
    ours = images.resize(jnp.asarray(image), 14)
    assert np.abs(np.asarray(ours) - np.clip(np.round(expected), 0, 255)).max() <= 1  # a tie may round either way
    assert (np.asarray(ours) == np.clip(np.round(expected), 0, 255)).mean() > 0.99
    assert (np.asarray(ours) == np.round(ours)).all()


@pytest.mark.parametrize(("height", "width", "size"), by_tf.RESIZES)
def test_resize_is_tensorflows_lanczos3(height, width, size):
    """Golden: within one grey value, and that on next to no pixel."""
    ours = np.asarray(images.resize(jnp.asarray(by_tf.photograph(height, width)[None]), size))[0]
    off = np.abs(ours - np.load(by_tf.GOLDEN)[f"lanczos_{height}"].astype(np.float32))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3


@pytest.mark.parametrize(("height", "width", "size"), [(40, 52, 28), (20, 28, 28), (128, 128, 96), (256, 320, 224)])
def test_the_host_resizes_as_the_device_does(height, width, size):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    for picture in (noise, by_tf.photograph(height, width)):
        found = images.resize_on_host(picture, size)
        assert found.dtype == np.uint8 and images.resize_on_host(found, size) is found
        wanted = jax.jit(lambda x: images.resize(x[None], size)[0])(picture)
        off = np.abs(np.asarray(wanted, int) - found)
        assert off.max() <= 1 and off.sum() <= 1e-4 * off.size  # none of the small ones


def test_range_and_pass_through():
    image = jnp.array([0, 255], jnp.uint8).repeat(6).reshape(1, 2, 2, 3)
    np.testing.assert_allclose(images.prepare(image, 2).ravel()[:1], -1.0, atol=1e-6)
    np.testing.assert_allclose(images.prepare(image, 2).ravel()[-1:], 1.0, atol=1e-6)
    floats = jnp.full((1, 2, 2, 3), 0.25)
    np.testing.assert_array_equal(images.prepare(floats, 2), floats)
