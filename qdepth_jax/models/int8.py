"""Weights as 8-bit integers with one scale for each output channel, turned back into numbers where they are used.

Symmetric: w ~ values * scale, scale = max |w| / 127 over everything that is summed to one output. Activations stay as
they are, so nothing needs calibration. Qwix and AQT do this and much more (training, activations, calibration) by
rewriting what Flax modules compute; storing weights takes the twenty lines below and no dependency.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array


@struct.dataclass
class Int8:
    """values i8 of the shape of the weight; scale f32, of size 1 along the axes that are summed over."""

    values: Array
    scale: Array


def quantise(weight: np.ndarray, summed: tuple[int, ...]) -> Int8:
    """NumPy in, NumPy out: done once, at loading.

    Args:
      weight: floating, any shape. summed: its axes that the product sums over.
    """
    weight = np.asarray(weight, np.float32)
    largest = np.max(np.abs(weight), axis=summed, keepdims=True)
    scale = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
    return Int8(np.rint(weight / scale).astype(np.int8), scale)


def dequantise(tree):
    """Every Int8 of a tree as f32; other leaves as they are."""
    return jax.tree.map(
        lambda x: x.values.astype(jnp.float32) * x.scale if isinstance(x, Int8) else x, tree, is_leaf=is_int8
    )


def is_int8(x) -> bool:
    return isinstance(x, Int8)


def has_int8(tree) -> bool:
    return any(map(is_int8, jax.tree.leaves(tree, is_leaf=is_int8)))
