"""Depth of a whole video from a network that sees 32 frames at a time: Video-Depth-Anything's published procedure.

Definition: VideoDepthAnything.infer_video_depth (video_depth_anything/video_depth.py) of
DepthAnything/Video-Depth-Anything. Windows of 32 frames advance by 22; the first ten of a window are frames of the one
before, two far back (0 and 12) and the last eight. Those two give scale and shift of the new window, the eight are
cross-faded. Which frames a window sees does not depend on depth, so all windows of an episode are planned at once.

Axis letters: W windows, T frames, H, W pixels.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import depth_anything, resize

LENGTH, OVERLAP, FADE = 32, 10, 8
STEP = LENGTH - OVERLAP
KEYFRAMES = np.array([0, 12, *range(24, 32)])  # of the window before, that a window begins with
ANCHORS = KEYFRAMES[: OVERLAP - FADE]  # those whose depth must agree after scale and shift
LEAST = 0.01  # share of the anchors' pixels that must be finite in both windows


def network_size(
    height: int, width: int, input_size: int = 518, patch: int = 14, video: bool = True
) -> tuple[int, int]:
    """(height, width) at which the network sees a frame: the short side about input_size, multiples of the patch.

    Frames of a video longer than 16:9 are made smaller, as in the original (memory); single images are not.

    Raises:
      UserError: so long a frame that less than a patch would be left of its short side.
    """
    ratio, given = max(height, width) / min(height, width), input_size
    if video and ratio > 1.78:
        input_size = round(int(input_size * 1.777 / ratio) / 14) * 14
    if input_size < patch:
        raise errors.UserError(
            f"--input_size={given}: of a video of {height}x{width} pixels, made smaller as it is longer than 16:9, the "
            f"network would see {input_size} pixels of the short side, less than its patch of {patch}: raise it to "
            f"{int(np.ceil(patch * ratio / 1.777 / 14)) * 14} or more"
        )
    factor = max(input_size / height, input_size / width)

    def fit(size: int) -> int:
        near = int(np.round(factor * size / patch)) * patch
        return near if near >= input_size else int(np.ceil(factor * size / patch)) * patch

    return fit(height), fit(width)


def plan_windows(frames: int) -> np.ndarray:
    """Frames i64 [W, 32] that each window sees. The last frame is repeated where a window is longer than the video."""
    if frames < 1:
        raise errors.UserError("a video without frames has no depth")
    rows = []
    for start in range(0, frames, STEP):
        row = np.minimum(start + np.arange(LENGTH), frames - 1)
        if rows:
            row[:OVERLAP] = rows[-1][KEYFRAMES]
        rows.append(row)
    return np.stack(rows)


def join_windows(windows: Iterator[np.ndarray], frames: int, metric: bool = False) -> np.ndarray:
    """Depth of all windows, f32 [32, H, W] each, in order -> f32 [frames, H, W] on one scale.

    Args:
      metric: the network gives metres: nothing is scaled or shifted.
    """
    out: list[np.ndarray] = []
    anchors, left_out = None, 0
    for depth in windows:
        if anchors is None:
            out, anchors = list(depth), depth[ANCHORS]
            continue
        scale, shift = (1.0, 0.0) if metric else scale_and_shift(depth[: len(ANCHORS)], anchors)
        left_out += 0 if metric else int((~(np.isfinite(depth[: len(ANCHORS)]) & np.isfinite(anchors))).sum())
        moved = np.maximum(depth * np.float32(scale) + np.float32(shift), 0.0)
        fade = np.linspace(0.0, 1.0, FADE, dtype=np.float32)[:, None, None]
        out[-FADE:] = np.stack(out[-FADE:]) * (1 - fade) + moved[OVERLAP - FADE : OVERLAP] * fade
        out += list(moved[OVERLAP:])
        # As published: the first anchor stays that of the first window, the second moves on.
        anchors = np.stack([anchors[0], *moved[ANCHORS[1:]]])
    if left_out:
        logging.warning(
            "a video of %d frames: %d pixels of anchor frames are not finite, scale and shift are fitted to the others",
            frames, left_out,
        )  # fmt: skip
    return np.stack(out[:frames])


def scale_and_shift(source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Least squares: scale * source + shift = target over all pixels at which both are finite.

    (1, 0) where the source is constant; (nan, nan) where fewer than LEAST of the pixels are such: too little ties the
    two together. DEVIATION: the original takes all pixels, and one without a number voids the rest of the video.
    """
    x, y = source.astype(np.float64).ravel(), target.astype(np.float64).ravel()
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.all():
        x, y = x[finite], y[finite]
    if len(x) < LEAST * len(finite):
        return np.nan, np.nan
    det = len(x) * np.dot(x, x) - x.sum() ** 2
    if det <= 1e-12 * max(np.dot(x, x), 1e-30) * len(x):
        return 1.0, 0.0
    scale = (len(x) * np.dot(x, y) - x.sum() * y.sum()) / det
    return float(scale), float((y.sum() - scale * x.sum()) / len(x))


def make_window_fn(
    config: depth_anything.DepthAnythingConfig, height: int, width: int, input_size: int = 518
) -> Callable[[Any, Array], Array]:
    """(params, frames u8 [B, T, height, width, 3]) -> depth f32 [B, T, height, width]; jit it.

    Resizing to the network's size (cubic, as OpenCV does it) and back (bilinear) happens on the device.
    """
    size = network_size(height, width, input_size, config.trunk.patch, video=config.head.frames > 0)
    down, across = resize.cubic(height, size[0]), resize.cubic(width, size[1])

    def window(params: Any, frames: Array) -> Array:
        x = frames.astype(jnp.float32) / 255.0
        if size != (height, width):
            highest = jax.lax.Precision.HIGHEST
            x = jnp.einsum("yh,bthwc->btywc", down, x, precision=highest)
            x = jnp.einsum("xw,btywc->btyxc", across, x, precision=highest)
        depth = depth_anything.estimate(config, params, depth_anything.normalise(x))
        b, t = depth.shape[:2]
        back = resize.bilinear_corners(depth.reshape(b * t, *size, 1), height, width)
        return back.reshape(b, t, height, width)

    return window


def video_depth(window: Callable[[np.ndarray], Array], frames: np.ndarray, metric: bool = False) -> np.ndarray:
    """Depth of one video.

    Args:
      window: frames u8 [1, 32, H, W, 3] -> depth [1, 32, H, W], `make_window_fn` with its parameters.
      frames: u8 [T, H, W, 3], any T >= 1.

    Returns:
      f32 [T, H, W]; relative inverse depth, or metres where `metric`.
    """
    rows = plan_windows(len(frames))
    return join_windows((np.asarray(window(frames[row][None]))[0] for row in rows), len(frames), metric)
