"""Images on the device: uint8 of any size -> f32 in [-1, 1] at the size of the vision tower.

The resampling matrices depend on sizes alone, so they are NumPy constants: nothing of them is traced or compiled. Where
sizes are not known beforehand, `resize_on_host` does the same without compiling anything.

Axis letters: B batch, H W input size, S output size.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array


@functools.lru_cache(maxsize=32)  # up to 1 MB each, and the clients of a server choose the sizes
def lanczos_weights(size_in: int, size_out: int) -> np.ndarray:
    """Lanczos-3 resampling along one axis, antialiased when shrinking, edges renormalised. f32 [size_out, size_in]."""
    scale = size_in / size_out
    centre = (np.arange(size_out) + 0.5) * scale - 0.5
    x = np.abs(centre[:, None] - np.arange(size_in)[None]) / max(scale, 1.0)
    weights = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize(image: Array, size: int) -> Array:
    """[B, H, W, 3] grey values -> f32 [B, size, size, 3], rounded to whole grey values and clipped to 0..255.

    The aspect ratio is not kept. Rounding is part of the definition: open-pi-zero resizes offline and stores uint8.
    """
    rows, columns = (lanczos_weights(n, size) for n in image.shape[1:3])
    # Full precision: the fast default of accelerators keeps 8 bits, as few as a grey value has.
    x = jnp.einsum("BHWC,SH->BSWC", image.astype(jnp.float32), rows, precision="highest")
    x = jnp.einsum("BSWC,RW->BSRC", x, columns, precision="highest")
    return jnp.clip(jnp.round(x), 0.0, 255.0)


def resize_on_host(picture: np.ndarray, size: int) -> np.ndarray:
    """`resize` of one picture u8 [H, W, 3] in NumPy -> u8 [size, size, 3].

    Equal to it but for the order of sums: where one comes out half way between two grey values, it may be the other.
    """
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    rows, columns = (lanczos_weights(n, size) for n in (height, width))
    x = rows @ picture.reshape(height, width * 3).astype(np.float32)
    x = columns @ x.reshape(size, width, 3).swapaxes(0, 1).reshape(width, size * 3)
    return np.clip(np.round(x), 0, 255).astype(np.uint8).reshape(size, size, 3).swapaxes(0, 1)


def prepare(image: Array, size: int) -> Array:
    """One view for the vision tower.

    Args:
      image: uint8 [B, H, W, 3], resized if it has another size, then x / 127.5 - 1; or f32 [B, size, size, 3] that is
        in [-1, 1] already and is returned as it is.
      size: S.

    Returns:
      f32 [B, S, S, 3].
    """
    if image.dtype != jnp.uint8:
        return image
    x = image.astype(jnp.float32) if image.shape[1:3] == (size, size) else resize(image, size)
    return (x * (1 / 255) - 0.5) / 0.5
