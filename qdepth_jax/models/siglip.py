"""SigLIP vision tower (So400m/14 by default) with the parameter names of the official PaliGemma files.

Pre-norm blocks, LayerNorm with eps 1e-6, biases everywhere, tanh-GELU, learned positions, no class token, no pooling.
Definition: the `img` part of big_vision's PaliGemma and the vision tower of open-pi-zero, which are the same network.

Parameter tree (full size; depth 27, width 1152, 16 heads of 72, mlp 4304):
  embedding/{kernel [14,14,3,1152], bias [1152]}          pos_embedding [1,256,1152]
  Transformer/encoderblock/LayerNorm_{0,1}/{scale,bias} [27,1152]
  Transformer/encoderblock/MultiHeadDotProductAttention_0/{query,key,value}/{kernel [27,1152,16,72], bias [27,16,72]}
  Transformer/encoderblock/MultiHeadDotProductAttention_0/out/{kernel [27,16,72,1152], bias [27,1152]}
  Transformer/encoderblock/MlpBlock_0/Dense_0/{kernel [27,1152,4304], bias}   Dense_1/{kernel [27,4304,1152], bias}
  Transformer/encoder_norm/{scale,bias} [1152]
  head/{kernel [1152,2048], bias [2048]}                  the projector, a method of its own

Axis letters: B batch, P patches (tokens), N heads, H head dim, D width, M = B*P folded.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import attention, layout, linear, stack


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower. Pixels for image_size and patch."""

    image_size: int = 224
    patch: int = 14
    width: int = 1152
    depth: int = 27
    heads: int = 16
    mlp: int = 4304

    def __post_init__(self):
        if self.image_size % self.patch:
            raise errors.UserError(
                f"siglip image_size {self.image_size} is no multiple of patch {self.patch}: "
                f"use {self.image_size // self.patch * self.patch} or another patch"
            )
        if self.width % self.heads:
            raise errors.UserError(f"siglip width {self.width} does not divide into {self.heads} heads")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """Patches of one image, row-major."""
        return self.grid**2


class Siglip(nn.Module):
    """Images -> features. `project` maps features to the language model's width.

    f32 parameters, activations in `dtype`, norms and softmax in f32. Fresh kernels are Xavier-uniform (big_vision).
    """

    config: SiglipConfig
    projection: int
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: str = "none"

    def setup(self):
        self.embedding = PatchEmbedding(self.config.patch, self.config.width, self.dtype)
        shape = (1, self.config.tokens, self.config.width)
        self.pos_embedding = self.param("pos_embedding", linear.normal_like(self.config.width**-0.5), shape)
        self.Transformer = Encoder(self.config, self.dtype, self.scan, self.remat)
        self.head = linear.Linear(self.projection, self.dtype)

    def __call__(self, images: Array) -> Array:
        """f32 [B, image_size, image_size, 3] in [-1, 1] -> `dtype` [B, P, D], after the final norm."""
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise errors.UserError(f"siglip takes images of shape [B, {size}, {size}, 3], got {images.shape}")
        x = self.embedding(images.astype(self.dtype)) + self.pos_embedding.astype(self.dtype)
        return layout.pin(self.Transformer(layout.pin(x)))

    def project(self, features: Array) -> Array:
        """[B, P, D] -> [B, P, projection]."""
        return self.head(features)


class PatchEmbedding(nn.Module):
    """Convolution with stride = kernel, as one matrix product. [B, H, W, 3] -> [B, P, D], patches row-major."""

    patch: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        b, h, w, c = images.shape
        p = self.patch
        kernel = self.param("kernel", linear.normal_like((p * p * c) ** -0.5), (p, p, c, self.width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p * c)
        x = patches @ layout.gather(kernel.reshape(p * p * c, self.width), None, layout.FSDP) + bias[None]
        return x.reshape(b, (h // p) * (w // p), self.width)


class Encoder(nn.Module):
    """The stack of blocks and the final norm. [B, P, D] -> [B, P, D]."""

    config: SiglipConfig
    dtype: jnp.dtype
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, _ = stack.run_layers(
            self,
            EncoderBlock,
            {"config": self.config, "dtype": self.dtype},
            x,
            None,
            None,
            name="encoderblock",
            depth=self.config.depth,
            scan=self.scan,
            remat=self.remat,
        )
        return _layer_norm("encoder_norm")(x).astype(self.dtype)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, P, D]."""

    config: SiglipConfig
    dtype: jnp.dtype
    last: bool

    @nn.compact
    def __call__(self, x: Array, per_layer: None, shared: None) -> tuple[Array, None]:
        del per_layer, shared
        x = layout.pin(x)
        h = _layer_norm("LayerNorm_0")(x).astype(self.dtype)
        x = x + SelfAttention(self.config.heads, self.dtype, name="MultiHeadDotProductAttention_0")(h)
        h = _layer_norm("LayerNorm_1")(x).astype(self.dtype)
        return x + MlpBlock(self.config.mlp, self.dtype, name="MlpBlock_0")(h), None


class SelfAttention(nn.Module):
    """Full attention, every patch to every patch. [B, P, D] -> [B, P, D]."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, p, d = x.shape
        h = d // self.heads
        folded = linear.fold(x)
        init = linear.xavier_uniform(d, d)

        def project(name: str) -> Array:
            dot = layout.gathered_dot(layout.FSDP, layout.TENSOR)
            y = nn.DenseGeneral((self.heads, h), dtype=self.dtype, kernel_init=init, dot_general=dot, name=name)(folded)
            return layout.pin(y.reshape(b, p, self.heads, h), None, layout.TENSOR)

        out = attention.attend(project("query"), project("key"), project("value"), mask=None)
        dot = layout.gathered_dot(layout.TENSOR, None, layout.FSDP)
        y = nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, kernel_init=init, dot_general=dot, name="out")(
            out.reshape(b * p, self.heads, h)
        )
        return y.reshape(b, p, d)


class MlpBlock(nn.Module):
    """Dense, tanh-GELU, dense. [B, P, D] -> [B, P, D]."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = linear.xavier_uniform(x.shape[-1], self.hidden)
        split = layout.gathered_dot(layout.FSDP, layout.TENSOR)
        h = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=init, dot_general=split, name="Dense_0")(linear.fold(x))
        h = jax.nn.gelu(layout.pin(h, layout.TENSOR), approximate=True)
        merge = layout.gathered_dot(layout.TENSOR, layout.FSDP)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, dot_general=merge, name="Dense_1")(h)
        return y.reshape(x.shape)


def _layer_norm(name: str) -> nn.LayerNorm:
    # The two-pass variance: the one-pass form loses half the digits of float32.
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)
