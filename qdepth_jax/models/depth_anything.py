"""Depth Anything V2 (single images) and Video-Depth-Anything (windows of frames): DINOv2 trunk + DPT head.

Parameters: trunk/... (dinov2.py), head/... (dpt.py). The outputs are relative inverse depth, larger = nearer, without
unit; the metric checkpoints of the same network give metres.

Axis letters: B videos, T frames, H, W pixels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import dinov2, dpt

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which both networks expect


@dataclasses.dataclass(frozen=True)
class DepthAnythingConfig:
    """A depth network. head.frames > 0 makes it a video network. dtype: of activations; the last two layers are f32."""

    trunk: dinov2.Dinov2Config = dinov2.Dinov2Config()
    head: dpt.DptConfig = dpt.DptConfig()
    dtype: str = "float32"
    scan: bool = True

    def __post_init__(self):
        if len(self.trunk.taps) != 4:
            raise errors.UserError(f"the DPT head reads four layers, the trunk gives {self.trunk.taps}")


# Heads of the published sizes; the trunks are dinov2.SIZES.
_HEADS: dict[str, dict[str, Any]] = {
    "vits": {"features": 64, "out_channels": (48, 96, 192, 384)},
    "vitb": {"features": 128, "out_channels": (96, 192, 384, 768)},
    "vitl": {"features": 256, "out_channels": (256, 512, 1024, 1024)},
    "vitg": {"features": 384, "out_channels": (1536, 1536, 1536, 1536)},
}


def sized(name: str, video: bool, **changes: Any) -> DepthAnythingConfig:
    """A published size, `vits`, `vitb`, `vitl` or `vitg` (images only), with other fields replaced."""
    if name not in _HEADS or (video and name == "vitg"):
        sizes = sorted(set(_HEADS) - ({"vitg"} if video else set()))
        raise errors.UserError(f"depth network {name!r} is unknown: use one of {sizes}")
    trunk = dinov2.Dinov2Config(**dinov2.SIZES[name])
    head = dpt.DptConfig(**_HEADS[name], frames=32 if video else 0)
    return DepthAnythingConfig(trunk=trunk, head=head, **changes)


class DepthAnything(nn.Module):
    """Normalised frames -> depth."""

    config: DepthAnythingConfig

    def setup(self):
        dtype = jnp.dtype(self.config.dtype)
        self.trunk = dinov2.Dinov2(self.config.trunk, dtype, self.config.scan)
        self.head = dpt.DptHead(self.config.head, self.config.trunk.patch, dtype)

    def __call__(self, frames: Array) -> Array:
        """f32 [B, T, H, W, 3], normalised by MEAN and STD, H and W multiples of the patch -> f32 [B, T, H, W] >= 0."""
        b, t, h, w, _ = frames.shape
        if self.config.head.frames and t > self.config.head.frames:
            raise errors.UserError(f"a window has at most {self.config.head.frames} frames, got {t}")
        patch = self.config.trunk.patch
        tokens, _ = self.trunk(frames.reshape(b * t, h, w, 3))
        return self.head(tokens, (h // patch, w // patch), t).reshape(b, t, h, w)

    def tokens(self, frames: Array) -> Array:
        """f32 [N, H, W, 3] -> normed patch tokens of the last tapped layer [N, P, D]."""
        return self.trunk(frames)[0][-1]


def init(config: DepthAnythingConfig, key: Array) -> dict[str, Any]:
    """Fresh {"params"}; the networks are published as trained weights, fresh ones serve shapes and tests."""
    side = 2 * config.trunk.patch
    frames = jnp.zeros((1, 2 if config.head.frames else 1, side, side, 3))
    return DepthAnything(config).init(key, frames)


def estimate(config: DepthAnythingConfig, params: Any, frames: Array) -> Array:
    """Normalised frames f32 [B, T, H, W, 3] -> depth f32 [B, T, H, W]."""
    return DepthAnything(config).apply({"params": params}, frames)


def normalise(frames: Array) -> Array:
    """RGB f32 [..., 3] in [0, 1] -> as the networks expect it."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape((1,) * (frames.ndim - 1) + (3,)) for x in (MEAN, STD))
    return (frames - mean) / std


def parameter_count(config: DepthAnythingConfig) -> int:
    """Numbers in the network."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))
