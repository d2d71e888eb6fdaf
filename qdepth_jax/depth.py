"""Depth values and their normalisation: raw uint16 -> value -> x in [-1, 1], with a validity mask.

The range is metadata of a dataset and of the tokenizer trained on it (never a hidden constant):
  metric    value in metres, linear between near and far
  relative  inverse depth, already scaled per episode by its robust range; near/far are that range (1.0, 0.0)
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from qdepth_jax import errors

KINDS = ("metric", "relative")


@dataclasses.dataclass(frozen=True)
class DepthRange:
    """Which values map to -1 (near) and +1 (far). Units: metres for `metric`, 1 for `relative` (near > far there)."""

    kind: str = "metric"
    near: float = 0.5
    far: float = 3.5

    def __post_init__(self):
        if self.kind not in KINDS:
            raise errors.UserError(f"depth kind {self.kind!r} is unknown: use one of {KINDS}")
        if self.kind == "metric" and not 0 <= self.near < self.far:
            raise errors.UserError(f"metric depth range needs 0 <= near < far, got near={self.near} far={self.far}")
        if self.kind == "relative" and not self.near > self.far >= 0:
            raise errors.UserError(
                f"relative depth is inverse depth, so near > far >= 0, got near={self.near} far={self.far}"
            )


def normalise(raw: Array, scale: Array, offset: Array, depth_range: DepthRange) -> tuple[Array, Array]:
    """Raw depth to [-1, 1].

    Args:
      raw: u16 [B, H, W]; 0 marks an invalid pixel.
      scale, offset: f32 [B]; value = raw * scale + offset.
      depth_range: what -1 and +1 mean.

    Returns:
      x f32 [B, H, W] (0 where invalid) and valid bool [B, H, W]: raw is not 0 and the value lies in the range.
    """
    value = raw.astype(jnp.float32) * scale[:, None, None] + offset[:, None, None]
    x = 2.0 * (value - depth_range.near) / (depth_range.far - depth_range.near) - 1.0
    valid = (raw > 0) & (x >= -1.0) & (x <= 1.0)
    return jnp.where(valid, x, 0.0), valid


def denormalise(x: Array, depth_range: DepthRange) -> Array:
    """[-1, 1] back to values (metres or relative inverse depth); same shape, f32."""
    return depth_range.near + (x + 1.0) * 0.5 * (depth_range.far - depth_range.near)
