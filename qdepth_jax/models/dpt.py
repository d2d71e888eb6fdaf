"""DPT head over four layers of a vision trunk: Depth Anything V2, and with temporal modules Video-Depth-Anything.

Definition: video_depth_anything/{dpt,dpt_temporal}.py and motion_module/ of DepthAnything/Video-Depth-Anything. Kept
from there: corner-aligned bilinear steps, ReLU before every convolution of a residual unit, sinusoidal frame positions
added after the norm of a temporal attention, GEGLU with the gate last.

Parameter tree, C = out_channels, E = features:
  project_{0..3}/{kernel [1,1,D,C_i], bias}   resize_{0,1}/{kernel [k,k,C,C], bias}   resize_3/{kernel [3,3,C,C], bias}
  reduce_{1..4}/kernel [3,3,C_i,E]            fuse_{1..4}/{unit_{1,2}/conv_{1,2},out}/{kernel,bias}
  output_1/{kernel [3,3,E,E/2], bias}         output_2/{kernel [3,3,E/2,32], bias}   output_3/{kernel [1,1,32,1], bias}
  motion_{0..3}/{norm, proj_in, attention_{0,1}/{query,key,value,out}, norm_{0,1}, ff_norm, ff_in, ff_out, proj_out}

Axis letters: B videos, T frames, H, W pixels of a feature map, C channels, N heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from qdepth_jax.models import attention, linear, resize


@dataclasses.dataclass(frozen=True)
class DptConfig:
    """Sizes of a head.

    Attributes:
      features: E, channels of the fusion.
      out_channels: C of the four levels.
      frames: longest window of the temporal modules; 0 = none of them (single images).
      temporal_heads: of their attention.
    """

    features: int = 256
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    frames: int = 0
    temporal_heads: int = 8


class DptHead(nn.Module):
    """Tokens of four layers -> one non-negative number a pixel. f32 parameters, activations in `dtype`."""

    config: DptConfig
    patch: int = 14
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, grid: tuple[int, int], frames: int = 1) -> Array:
        """`dtype` [4, B*T, P, D] over grid (rows, columns) -> f32 [B*T, rows * patch, columns * patch].

        Args:
          tokens: of the layers from the first to the last.
          frames: T, neighbours in the leading axis that belong to one video.
        """
        c, levels = self.config, []
        for i in range(4):
            x = tokens[i].reshape(tokens.shape[1], *grid, -1)
            x = self._conv(c.out_channels[i], 1, f"project_{i}")(x)
            if i < 2:
                x = Upsample(4 // (i + 1), self.dtype, name=f"resize_{i}")(x)
            elif i == 3:
                x = self._conv(c.out_channels[i], 3, "resize_3", stride=2)(x)
            levels.append(x)
        if c.frames:
            levels[2] = self._motion(0)(levels[2], frames)
            levels[3] = self._motion(1)(levels[3], frames)
        levels = [
            nn.Conv(c.features, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name=f"reduce_{i + 1}")(x)
            for i, x in enumerate(levels)
        ]
        x = Fuse(c.features, self.dtype, name="fuse_4")(levels[3], None, levels[2].shape[1:3])
        if c.frames:
            x = self._motion(2)(x, frames)
        x = Fuse(c.features, self.dtype, name="fuse_3")(x, levels[2], levels[1].shape[1:3])
        if c.frames:
            x = self._motion(3)(x, frames)
        x = Fuse(c.features, self.dtype, name="fuse_2")(x, levels[1], levels[0].shape[1:3])
        x = Fuse(c.features, self.dtype, name="fuse_1")(x, levels[0], tuple(2 * n for n in levels[0].shape[1:3]))
        x = self._conv(c.features // 2, 3, "output_1")(x)
        x = resize.bilinear_corners(x, grid[0] * self.patch, grid[1] * self.patch).astype(jnp.float32)
        # In float32 as in the original: differences of depth are small beside the depth. TPUs round float32 operands to
        # bfloat16 unless told otherwise; what comes in here was bfloat16 before, so three passes give all of it.
        x = nn.relu(nn.Conv(32, (3, 3), padding=1, precision=jax.lax.Precision.HIGH, name="output_2")(x))
        return nn.relu(Weighted(name="output_3")(x))

    def _conv(self, channels: int, size: int, name: str, stride: int = 1) -> nn.Conv:
        return nn.Conv(channels, (size, size), strides=stride, padding=size // 2, dtype=self.dtype, name=name)

    def _motion(self, number: int) -> "Motion":
        return Motion(self.config.temporal_heads, self.dtype, name=f"motion_{number}")


class Weighted(nn.Module):
    """1x1 convolution to one channel. f32 [B, H, W, C] -> [B, H, W]. As a sum: eight times as fast as a convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        kernel = self.param("kernel", linear.fan_in_uniform(c), (1, 1, c, 1))
        bias = self.param("bias", nn.initializers.zeros, (1,))
        return jnp.sum(x * kernel.reshape(1, 1, 1, c), axis=-1) + bias[0]


class Upsample(nn.Module):
    """Transposed convolution with stride = kernel: every pixel becomes k x k. [B, H, W, C] -> [B, kH, kW, C]."""

    factor: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        (b, h, w, c), k = x.shape, self.factor
        kernel = self.param("kernel", linear.fan_in_uniform(c * k * k), (k, k, c, c)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,)).astype(self.dtype)
        return jnp.einsum("bhwc,ijcd->bhiwjd", x, kernel).reshape(b, h * k, w * k, c) + bias[None, None, None]


class Fuse(nn.Module):
    """resize(out(unit_2(x + unit_1(other)))). [B, H, W, E] -> [B, *size, E].

    The original resizes before its 1x1 convolution. Weights of an interpolation add up to one, so the order is free but
    for rounding, and this one convolves a quarter of the pixels.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, other: Array | None, size: tuple[int, int]) -> Array:
        unit_1 = Residual(self.features, self.dtype, name="unit_1")
        if other is not None:
            x = x + unit_1(other)
        elif self.is_initializing():
            unit_1(x)  # published files hold its weights although nobody reads them
        x = Residual(self.features, self.dtype, name="unit_2")(x)
        return resize.bilinear_corners(nn.Conv(self.features, (1, 1), dtype=self.dtype, name="out")(x), *size)


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))). [B, H, W, E]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv_1")(nn.relu(x))
        return x + nn.Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv_2")(nn.relu(h))


class Motion(nn.Module):
    """Attention over the frames of a video, for every pixel by itself. [B*T, H, W, C] -> the same."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, frames: int) -> Array:
        bt, h, w, c = x.shape
        y = nn.GroupNorm(32, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name="norm")(x)
        y = linear.Linear(c, self.dtype, name="proj_in")(y.astype(self.dtype))
        # Frames become the sequence, pixels join the batch.
        y = y.reshape(bt // frames, frames, h * w, c).transpose(0, 2, 1, 3).reshape(-1, frames, c)
        for number in range(2):
            normed = _norm(f"norm_{number}")(y).astype(self.dtype)
            y = y + FrameAttention(self.heads, self.dtype, name=f"attention_{number}")(normed)
        gates = linear.Linear(8 * c, self.dtype, name="ff_in")(_norm("ff_norm")(y).astype(self.dtype))
        value, gate = jnp.split(gates, 2, axis=-1)
        y = y + linear.Linear(c, self.dtype, name="ff_out")(value * jax.nn.gelu(gate, approximate=False))
        y = linear.Linear(c, self.dtype, name="proj_out")(y)
        y = y.reshape(bt // frames, h * w, frames, c).transpose(0, 2, 1, 3)
        return y.reshape(bt, h, w, c) + x


class FrameAttention(nn.Module):
    """Full attention over T frames with sinusoidal positions. [B, T, C] -> [B, T, C]."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, t, c = x.shape
        x = x + jnp.asarray(frame_positions(t, c), self.dtype)[None]
        q, k, v = (
            nn.Dense(c, use_bias=False, dtype=self.dtype, name=name)(x).reshape(b, t, self.heads, -1)
            for name in ("query", "key", "value")
        )
        return linear.Linear(c, self.dtype, name="out")(attention.attend(q, k, v, mask=None).reshape(b, t, c))


def frame_positions(frames: int, channels: int) -> np.ndarray:
    """sin on even channels, cos on odd ones, periods from 2 pi to 10,000 * 2 pi. f32 [T, C]."""
    rate = np.exp(np.arange(0, channels, 2, dtype=np.float32) * np.float32(-np.log(10_000.0) / channels))
    angle = np.arange(frames, dtype=np.float32)[:, None] * rate
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(frames, channels)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)
