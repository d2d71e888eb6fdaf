"""Augmentation of depth maps that keeps geometry: crop and mirror. No value changes, no two values mix.

A crop is resampled to the whole size by nearest neighbour, since a mean of two depths at an edge is a depth that
nothing has. Every random number is a function of (run key, global position of the example), as in models/augment.py.

Axis letters: B batch, H rows, W columns.
"""

import jax
import jax.numpy as jnp
from jax import Array

from qdepth_jax.models import flow


def augment(batch: dict[str, Array], key: Array, crop_scale: tuple[float, float], flip: float) -> dict[str, Array]:
    """The batch with "depth" u16 [B, H, W] cropped and mirrored; everything else as it is.

    Args:
      batch: with "depth" and "position" u32 [B].
      key: of the run, the same at every step.
      crop_scale: (low, high) share of the area that a crop keeps; its place is uniform, its shape that of the map.
      flip: probability of left-right mirroring.
    """
    raw = batch["depth"]

    def one(raw: Array, key: Array) -> Array:
        scale, top, left, turned = jax.random.uniform(key, (4,))
        side = jnp.sqrt(crop_scale[0] + scale * (crop_scale[1] - crop_scale[0]))
        rows, columns = _places(top, side, raw.shape[0]), _places(left, side, raw.shape[1])
        columns = jnp.where(turned < flip, columns[::-1], columns)
        return raw[rows][:, columns]

    return dict(batch) | {"depth": jax.vmap(one)(raw, flow.example_keys(key, batch["position"]))}


def _places(offset: Array, side: Array, size: int) -> Array:
    """Which of `size` pixels i32 [size] a crop shows: `side` of the axis, from `offset` (0 = first, 1 = last place)."""
    start = offset * (1.0 - side)
    place = (start + side * (jnp.arange(size, dtype=jnp.float32) + 0.5) / size) * size
    return jnp.clip(jnp.floor(place).astype(jnp.int32), 0, size - 1)
