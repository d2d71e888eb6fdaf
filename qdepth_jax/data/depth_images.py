"""Depth as data sets store it -> raw u16 with metres per unit: the one form that batches and sidecars hold.

PNG of 16 (or 8) bits                 raw as it is, metres by the definition
tensor of integers (also zlib)        raw as it is, metres by the definition
tensor of floats (also zlib), and TFDS's float32 images (PNG with the four bytes of a float as channels)
                                      millimetres; what is not finite, not positive or beyond 65.535 m is invalid (0)
"""

import functools
from collections.abc import Callable

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import depth_labels, frame_reader, shard_scan, spec

Decode = Callable[[bytes, np.ndarray], None]


def decoder(feature: spec.FeatureSpec, metres: float) -> tuple[Decode, float]:
    """How a depth feature is decoded into u16 [H, W], and metres per unit of the result.

    Args:
      feature: of the main view's depth.
      metres: metres per stored unit, from the data set's definition.

    Raises:
      UserError: the feature holds no single-channel map.
    """
    shape = _plane(feature)
    if feature.kind == "image" and feature.dtype != "float32":
        return frame_reader.decode_depth, metres
    if feature.kind == "image":
        return functools.partial(_floats, lambda data: _float_image(data, shape), metres), 0.001
    if np.dtype(feature.dtype).kind == "f":
        return functools.partial(_floats, lambda data: shard_scan.decode_tensor(feature, data), metres), 0.001
    return functools.partial(_integers, feature), metres


def _plane(feature: spec.FeatureSpec) -> tuple[int, ...]:
    shape = feature.shape[:2]
    if feature.kind not in ("image", "tensor") or len(shape) != 2 or int(np.prod(feature.shape[2:])) != 1:
        raise errors.UserError(
            f"depth feature {feature.name!r} is {feature.kind} {feature.dtype}{list(feature.shape)}: one value per "
            "pixel expected, as an image or a tensor"
        )
    return shape


def _floats(read: Callable[[bytes], np.ndarray], metres: float, data: bytes, out: np.ndarray) -> None:
    values = read(data).reshape(out.shape)
    out[:] = depth_labels.to_uint16(values.astype(np.float64) * metres, "metric")[0]


def _integers(feature: spec.FeatureSpec, data: bytes, out: np.ndarray) -> None:
    values = shard_scan.decode_tensor(feature, data)
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"depth holds {values.min()}..{values.max()}, 0..65535 expected")
    out[:] = values.reshape(out.shape)


def _float_image(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """TFDS writes a float32 image as a PNG whose four 8-bit channels are the bytes of each value."""
    pixels = np.asarray(frame_reader.load_image(data))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 4:
        raise ValueError(f"float image of {pixels.dtype} {list(pixels.shape)}, four 8-bit channels expected")
    return np.ascontiguousarray(pixels).view("<f4")[..., 0]
