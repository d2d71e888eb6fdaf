"""Interpolation of pictures along one axis as constant matrices and gathers: PyTorch's and OpenCV's conventions.

jax.image.resize has neither corner-aligned bilinear nor the cubic kernel with a = -0.75 that both of them use.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_A = -0.75  # of the cubic convolution kernel (Keys 1981) in PyTorch and OpenCV; others use -0.5


def cubic(size: int, out: int, factor: float | None = None) -> np.ndarray:
    """Cubic interpolation f32 [out, size], pixel centres at half coordinates, borders repeated, no anti-aliasing.

    Args:
      size: pixels there are. out: pixels wanted.
      factor: out pixels per pixel, where it is not out / size (torch's interpolate with scale_factor).
    """
    # As in both originals the coordinates are float32.
    step = np.float32(1.0 / factor if factor is not None else size / out)
    at = (np.arange(out, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    first = np.floor(at)
    t = at - first
    matrix = np.zeros((out, size), np.float32)
    for shift, weight in zip(range(-1, 3), _cubic_weights(t)):
        np.add.at(matrix, (np.arange(out), np.clip(first.astype(int) + shift, 0, size - 1)), weight)
    return matrix


def _cubic_weights(t: np.ndarray) -> list[np.ndarray]:
    """Weights of the pixels at -1, 0, 1, 2 around a point t in [0, 1) behind pixel 0."""
    near = lambda x: ((_A + 2) * x - (_A + 3)) * x * x + 1  # noqa: E731
    far = lambda x: ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A  # noqa: E731
    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def bilinear_corners(x: Array, height: int, width: int) -> Array:
    """Bilinear with corners on corners (torch: align_corners=True). [B, H, W, C] -> [B, height, width, C]."""
    return _linear(_linear(x, 1, height), 2, width)


def _linear(x: Array, axis: int, out: int) -> Array:
    if x.shape[axis] == out:
        return x
    # A CPU gathers thirty times faster than it multiplies; matrix units multiply, and gathers cost them several copies.
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: linear_gathered(x, axis, out),
        default=lambda x: linear_product(x, axis, out),
    )


def linear_gathered(x: Array, axis: int, out: int) -> Array:
    """Linear interpolation along one axis of [B, H, W, C], corners on corners, from the two neighbours."""
    low, weight = _corners(x.shape[axis], out)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    weight = jnp.asarray(weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x.dtype)
    return jnp.take(x, low, axis=axis) * (1 - weight) + jnp.take(x, high, axis=axis) * weight


def linear_product(x: Array, axis: int, out: int) -> Array:
    """The same as a matrix product with two weights in every row."""
    low, weight = _corners(x.shape[axis], out)
    matrix = np.zeros((out, x.shape[axis]), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - weight)
    np.add.at(matrix, (np.arange(out), np.minimum(low + 1, x.shape[axis] - 1)), weight)
    which = {1: "yh,bhwc->bywc", 2: "xw,bhwc->bhxc"}[axis]
    return jnp.einsum(which, jnp.asarray(matrix, x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def _corners(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """(neighbour below i64 [out], weight of the one above f32 [out])."""
    step = (size - 1) / (out - 1) if out > 1 else 0.0
    at = np.arange(out, dtype=np.float32) * np.float32(step)
    low = np.minimum(at.astype(int), size - 1)
    return low, (at - low).astype(np.float32)
