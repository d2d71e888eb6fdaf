"""Depth maps for data without depth: the interface of an estimator, and the storage of its estimates.

An estimator sees one episode of a camera, u8 [T, H, W, 3], and returns float [T, H, W]: metres ("metric") or inverse
depth up to an unknown scale and shift ("relative"). Relative estimates are scaled per episode by their robust range.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from qdepth_jax import errors


@dataclasses.dataclass(frozen=True)
class Estimator:
    """`name`: identity stored with the maps; `kind`: "metric" or "relative"; `estimate`: u8 [T,H,W,3] -> [T,H,W]."""

    name: str
    kind: str
    estimate: Callable[[np.ndarray], np.ndarray]


def stand_in(frames: np.ndarray) -> np.ndarray:
    """NOT a depth estimate: a smooth map of image row and brightness, u8 [T, H, W, 3] -> f32 [T, H, W].

    It has the form of a relative estimate (lower rows are nearer, brighter is nearer), so that a pipeline can be run
    end to end without any depth network. Nothing learned from it means anything.
    """
    luminance = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    rows = np.linspace(0, 1, frames.shape[1], dtype=np.float32)
    return 0.8 * rows[None, :, None] + 0.2 * luminance


ESTIMATORS = {"stand_in": Estimator("stand_in-v1 (image row and brightness, no depth)", "relative", stand_in)}


def find(name: str) -> Estimator:
    if name not in ESTIMATORS:
        raise errors.UserError(f"no depth estimator {name!r}: there is {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def to_uint16(values: np.ndarray, kind: str) -> tuple[np.ndarray, float, float]:
    """Float maps of one episode as raw u16 with scale and offset; raw 0 = invalid (not finite, or not positive metres).

    metric: millimetres; beyond 65.535 m is invalid. relative: the 2nd..98th percentile of the episode becomes 0..1,
    values outside are clipped to it.

    Args:
      values: [T, H, W].
      kind: "metric" or "relative".

    Returns:
      raw u16 [T, H, W], scale, offset; value = raw * scale + offset.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if kind == "metric":
        millimetres = np.where(finite, np.round(np.where(finite, values, 0) * 1000), 0)
        return np.where((millimetres >= 1) & (millimetres <= 65535), millimetres, 0).astype(np.uint16), 0.001, 0.0
    if kind != "relative":
        raise ValueError(f"depth kind {kind!r}: use 'metric' or 'relative'")
    if not finite.any():
        return np.zeros(values.shape, np.uint16), 1.0, 0.0
    low, high = np.quantile(values[finite], [0.02, 0.98])
    x = np.clip((np.where(finite, values, low) - low) / max(high - low, 1e-12), 0, 1)
    # A hair inside of [0, 1], so that float32 arithmetic cannot carry an end point out of the valid range.
    margin = 1e-6
    scale = (1 - 2 * margin) / 65534
    return np.where(finite, 1 + np.round(x * 65534), 0).astype(np.uint16), scale, margin - scale
