"""DINOv2 vision trunk: a ViT with layer scale, a class token and interpolated positions, and its intermediate layers.

Definition: facebookresearch/dinov2 as carried by Video-Depth-Anything (video_depth_anything/dinov2.py). Kept from
there: bicubic interpolation of the positions with the factor (patches + 0.1) / trained patches, and the one final norm
that every intermediate layer passes through.

Parameter tree (ViT-L: depth 24, width 1024, 16 heads, mlp 4096):
  embedding/{kernel [14,14,3,D], bias}   cls_token [1,1,D]   pos_embedding [1,1+37*37,D]   norm/{scale,bias} [D]
  blocks/norm_{1,2}/{scale,bias} [L,D]   blocks/attention/qkv/{kernel [L,3,D,N,H], bias [L,3,N,H]}
  blocks/attention/out/{kernel [L,N,H,D], bias [L,D]}        blocks/scale_{1,2} [L,D]
  blocks/mlp/{fc1,fc2}/{kernel,bias}; ViT-g instead: blocks/mlp/{w12 [L,D,2F], w3 [L,F,D]} with biases

Axis letters: B images, P patches, T = 1 + P tokens, N heads, H head dim, D width, F mlp width, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import attention, linear, resize, siglip, stack

MLPS = ("gelu", "swiglu")
LONG = 1024  # tokens from which on attention is computed for few heads at a time
LOGITS = 2**22  # numbers that an attention computes at once: 16 MiB in float32


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes of a trunk.

    Attributes:
      trained_size: pixels of the square images of the position table.
      mlp: `gelu` (4 D wide) or `swiglu` (ViT-g: two thirds of 4 D, rounded up to a multiple of 8).
      taps: layers whose output is wanted, counted from 0, ascending.
      offset: patches that are added before the factor of the position interpolation is taken.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp: str = "gelu"
    patch: int = 14
    trained_size: int = 518
    taps: tuple[int, ...] = (4, 11, 17, 23)
    offset: float = 0.1

    def __post_init__(self):
        if self.mlp not in MLPS:
            raise errors.UserError(f"DINOv2 mlp {self.mlp!r} is unknown: use one of {MLPS}")
        if self.width % self.heads:
            raise errors.UserError(f"DINOv2 width {self.width} does not divide into {self.heads} heads")
        if list(self.taps) != sorted(set(self.taps)) or not self.taps or not 0 <= self.taps[-1] < self.depth:
            raise errors.UserError(f"DINOv2 taps {self.taps} must be ascending layers below {self.depth}")

    @property
    def trained_grid(self) -> int:
        """Patches along one side of the position table."""
        return self.trained_size // self.patch


# The published trunks; taps as in Depth Anything V2 and Video-Depth-Anything.
SIZES: dict[str, dict[str, Any]] = {
    "vits": {"width": 384, "depth": 12, "heads": 6, "taps": (2, 5, 8, 11)},
    "vitb": {"width": 768, "depth": 12, "heads": 12, "taps": (2, 5, 8, 11)},
    "vitl": {"width": 1024, "depth": 24, "heads": 16, "taps": (4, 11, 17, 23)},
    "vitg": {"width": 1536, "depth": 40, "heads": 24, "mlp": "swiglu", "taps": (9, 19, 29, 39)},
}


class Dinov2(nn.Module):
    """Images -> tokens of the tapped layers. f32 parameters, activations in `dtype`, norms and softmax in f32."""

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32
    scan: bool = True

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """f32 [B, H, W, 3], normalised, H and W multiples of the patch.

        Returns:
          Normed patch tokens `dtype` [taps, B, P, D], row-major, and normed class tokens [taps, B, D].
        """
        c = self.config
        b, height, width, _ = images.shape
        if height % c.patch or width % c.patch:
            raise errors.UserError(f"DINOv2 takes images of multiples of {c.patch} pixels, got {height}x{width}")
        patches = siglip.PatchEmbedding(c.patch, c.width, self.dtype, name="embedding")(images.astype(self.dtype))
        cls = self.param("cls_token", linear.normal_like(1e-6), (1, 1, c.width))
        table = self.param("pos_embedding", linear.normal_like(0.02), (1, 1 + c.trained_grid**2, c.width))
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (b, 1, c.width)), patches], axis=1)
        x = x + positions(c, table, height // c.patch, width // c.patch).astype(self.dtype)

        slots = np.full(c.depth, -1, np.int32)
        slots[list(c.taps)] = np.arange(len(c.taps))
        taps = jnp.zeros((len(c.taps), *x.shape), x.dtype)
        (_, taps), _ = stack.run_layers(
            self,
            Block,
            {"config": c, "dtype": self.dtype},
            (x, taps),
            jnp.asarray(slots),
            None,
            name="blocks",
            depth=c.depth,
            scan=self.scan,
            remat="none",
        )
        taps = _norm("norm", 1e-6)(taps).astype(self.dtype)
        return taps[:, :, 1:], taps[:, :, 0]


def positions(config: Dinov2Config, table: Array, rows: int, columns: int) -> Array:
    """The position table f32 [1, 1 + G*G, D] at another grid -> f32 [1, 1 + rows*columns, D].

    Its own grid comes back as it is; any other, a square of the same number of patches too, is interpolated.
    """
    grid = config.trained_grid
    if (rows, columns) == (grid, grid):
        return table
    cls, square = table[:, :1], table[:, 1:].reshape(grid, grid, -1)
    # The factor is given, so coordinates are those of a picture of (rows + offset) patches, of which `rows` are taken.
    down = resize.cubic(grid, rows, (rows + config.offset) / grid)
    across = resize.cubic(grid, columns, (columns + config.offset) / grid)
    square = jnp.einsum("rg,ghd,ch->rcd", down, square, across, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([cls, square.reshape(1, rows * columns, -1)], axis=1)


class Block(nn.Module):
    """x + scale_1 attention(norm(x)), then x + scale_2 mlp(norm(x)); keeps its output where a tap asks for it."""

    config: Dinov2Config
    dtype: jnp.dtype
    last: bool

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], slot: Array, shared: None) -> tuple[tuple[Array, Array], None]:
        del shared
        x, taps = carry
        h = Attention(self.config.heads, self.dtype, name="attention")(_norm("norm_1", 1e-6)(x).astype(self.dtype))
        x = x + h * self._scale("scale_1")
        mlp = SwiGlu if self.config.mlp == "swiglu" else Mlp
        h = mlp(4 * self.config.width, self.dtype, name="mlp")(_norm("norm_2", 1e-6)(x).astype(self.dtype))
        x = x + h * self._scale("scale_2")
        # One slot is always written, with what it holds where no tap asks: a condition would copy all of them.
        place = jnp.maximum(slot, 0)
        return (x, taps.at[place].set(jnp.where(slot >= 0, x, taps[place]))), None

    def _scale(self, name: str) -> Array:
        return self.param(name, nn.initializers.ones, (self.config.width,)).astype(self.dtype)[None, None]


class Attention(nn.Module):
    """Full attention. [B, T, D] -> [B, T, D]."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, t, d = x.shape
        init, h = linear.fan_in_uniform(d), d // self.heads
        folded = Qkv(self.heads, self.dtype, name="qkv")(linear.fold(x)).reshape(b, t, 3, self.heads, h)
        q, k, v = (folded[:, :, i] for i in range(3))
        out = attend(q, k, v).reshape(b * t, self.heads, h)
        return nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, kernel_init=init, name="out")(out).reshape(b, t, d)


def attend(q: Array, k: Array, v: Array) -> Array:
    """`attention.attend` without a mask, [B, T, N, H] -> the same; few heads at a time where there are many tokens.

    Logits of 32 frames of 518 x 518 pixels are 4 GB a layer. Written to a v5e's memory and read again they would take
    three times as long as all products together; those of few heads stay on the chip. The loop runs over images: under
    a batch that is split over devices it belongs into `shard_map`, or every device would do all of them.
    """
    b, t, n, h = q.shape
    if t < LONG or b * n * t * t <= LOGITS:
        return attention.attend(q, k, v, mask=None)
    heads = next(size for size in range(max(1, LOGITS // (t * t)), 0, -1) if b * n % size == 0)
    fold = lambda x: x.transpose(0, 2, 1, 3).reshape(b * n // heads, heads, t, 1, h)  # noqa: E731
    out = jax.lax.map(lambda x: attention.attend(*x, mask=None), (fold(q), fold(k), fold(v)))
    return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)


class Qkv(nn.Module):
    """Query, key and value projections in one. [M, D] -> [M, 3 N H]."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        shape = (3, d, self.heads, d // self.heads)
        kernel = self.param("kernel", linear.fan_in_uniform(d), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3, *shape[2:])).astype(self.dtype)
        # One plain product: with three and heads as axes of its result it takes 1.5 times as long on XLA:CPU.
        return x @ kernel.transpose(1, 0, 2, 3).reshape(d, -1) + bias.reshape(1, -1)


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), exact GELU. [..., D] -> [..., D]."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = jax.nn.gelu(linear.Linear(self.hidden, self.dtype, name="fc1")(x), approximate=False)
        return linear.Linear(x.shape[-1], self.dtype, name="fc2")(h)


class SwiGlu(nn.Module):
    """w3(silu(first half of w12 x) * second half). [..., D] -> [..., D]; `hidden` is that of a plain MLP."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = (self.hidden * 2 // 3 + 7) // 8 * 8
        gate, value = jnp.split(linear.Linear(2 * hidden, self.dtype, name="w12")(x), 2, axis=-1)
        return linear.Linear(x.shape[-1], self.dtype, name="w3")(jax.nn.silu(gate) * value)


def _norm(name: str, eps: float) -> nn.LayerNorm:
    # The two-pass variance: the one-pass form loses half the digits of float32.
    return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name)
