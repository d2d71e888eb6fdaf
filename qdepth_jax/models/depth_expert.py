"""QDepth-VLA's depth expert around the mixture: encoder in front, decoder behind, the codebook logits and the losses.

  SigLIP features of the main view (before the projector) -> MLP 1152-1024-1024, GELU -> [mixture] -> final norm
  -> reshape to the grid -> 3x3 convolution, GELU, 3x3 convolution -> x_i, one vector for each depth token

The paper names neither widths nor kernels, only the total: 2.606 B -> 2.924 B trained parameters. The mixture's part is
311,464,960, the MLP's 2,230,272; a hidden convolution width of 384 gives 4,092,448, in all 317,787,680, which rounds to
the paper's 0.318 B. That is the evidence for 384.

Logits are the paper's eq. 3, l_ik = -||x_i - c_k||^2 / tau. x is written in affine coordinates of the frozen
codebook, x = mean(c) + s x' with s^2 = mean_k ||c_k - mean(c)||^2, and tau = temperature * s^2; then
l_ik = -||x'_i - c'_k||^2 / temperature with c' = (c - mean(c)) / s. The formula is unchanged, but its value no longer
depends on where the codebook lies and how large it is. With x' near 0 at the start, the cross-entropy of code k is
||c'_k||^2 / temperature + ln sum_j exp(-||c'_j||^2 / temperature): ln C where all codes are equally far from their
mean, but far above it where the codes in use lie outside of a crowd of unused ones (collapsed: 6 of 256 codes
have ||c'||^2 near 40). `start_temperature` makes up for that.

Axis letters: B batch, P depth tokens, C codes, D width, E code dimension, R depth pixels along one side of a token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qdepth_jax import depth as depth_values
from qdepth_jax import errors
from qdepth_jax.models import gemma, layout, linear

HEADS = ("codes", "pixels")
START_SHARE = 0.07


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """The depth expert.

    Attributes:
      expert: its transformer. sizes from the paper's table 1.
      grid: depth tokens along one side; must equal the patches along one side of the main view.
      head: `codes` (the paper) or `pixels` (ablation: regress normalised depth, no tokenizer).
      codes, code_dim: the tokenizer's codebook [C, E]; the frozen codes are in the model state, not in the parameters.
      conv_width: hidden channels of the decoder (see the module docstring).
      temperature: tau / s^2; 0 = `start_temperature` of the codebook. The paper does not give tau.
      loss_weight, loss_decay: lambda = loss_weight * loss_decay^step. 0.01 is the paper's; the paper does not give the
        decay, 0.9999 is a third party's value. loss_weight 0 needs no depth labels at all.
      pixels_per_token: R, for `pixels`.
      range: what -1 and 1 mean, for `pixels`.
    """

    expert: gemma.ExpertConfig = gemma.ExpertConfig(width=1024, mlp=4096)
    grid: int = 16
    head: str = "codes"
    codes: int = 256
    code_dim: int = 160
    conv_width: int = 384
    temperature: float = 0.0
    loss_weight: float = 0.01
    loss_decay: float = 0.9999
    pixels_per_token: int = 8
    range: depth_values.DepthRange = depth_values.DepthRange()

    def __post_init__(self):
        if self.head not in HEADS:
            raise errors.UserError(f"depth head {self.head!r} is unknown: use one of {HEADS}")
        if not self.temperature >= 0:
            raise errors.UserError(
                f"depth temperature must be positive, or 0 for one that suits the codebook, got {self.temperature}"
            )
        if self.loss_weight < 0:
            raise errors.UserError(f"depth loss_weight must not be negative, got {self.loss_weight}: 0 switches it off")

    @property
    def tokens(self) -> int:
        """P."""
        return self.grid**2

    @property
    def outputs(self) -> int:
        """Numbers predicted for each token."""
        return self.code_dim if self.head == "codes" else self.pixels_per_token**2


class DepthEncoder(nn.Module):
    """Vision features [B, P, D_vision] -> depth stream `dtype` [B, P, D], unscaled."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        h = linear.Linear(self.width, self.dtype, name="linear_1")(features)
        return linear.Linear(self.width, self.dtype, name="linear_2")(jax.nn.gelu(h, approximate=True))


class DepthDecoder(nn.Module):
    """Normed depth stream [B, P, D] -> f32 [B, P, outputs], tokens row-major."""

    config: DepthConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, p, d = x.shape
        grid = x.reshape(b, self.config.grid, self.config.grid, d)
        h = jax.nn.gelu(Conv3x3(self.config.conv_width, self.dtype, name="conv_1")(grid), approximate=True)
        # Small, so that x' starts near 0.
        y = Conv3x3(self.config.outputs, self.dtype, scale=0.02, name="conv_2")(h)
        return y.reshape(b, p, self.config.outputs).astype(jnp.float32)


class Conv3x3(nn.Module):
    """3x3 convolution, stride 1, zero padding. [B, h, w, D] -> [B, h, w, features]."""

    features: int
    dtype: jnp.dtype
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = 9 * x.shape[-1]
        init = linear.fan_in_uniform(fan_in, self.scale)
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features)).astype(self.dtype)
        kernel = layout.gather(kernel, None, None, layout.FSDP)
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return layout.pin(y) + bias[None, None, None]


def unit_codebook(codebook: Array) -> tuple[Array, Array, Array]:
    """Codes f32 [C, E] -> (c' [C, E] with mean 0 and mean square norm 1, mean [E], s scalar)."""
    mean = jnp.mean(codebook, axis=0)
    centred = codebook - mean[None]
    s = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(centred), axis=-1)))
    return centred / s, mean, s


def start_temperature(codes: Array) -> Array:
    """The least temperature >= 1 (f32 scalar) that starts cross-entropy within 10 % of ln C for any targets.

    With r_k = ||c'_k||^2, of mean 1, and targets of frequency q it differs from ln C by (E_q r - 1) / temperature and a
    term of second order. The policy does not know q, and guesses at it fail: halfway into a collapse a handful of codes
    beyond all others take every token. So q is bounded by the worst, max |r - 1|. START_SHARE of ln C leaves room for
    the second order (half the square of the first) and for an x' that is not quite 0.

    Args:
      codes: c' f32 [C, E] of `unit_codebook`.
    """
    spread = jnp.max(jnp.abs(jnp.sum(jnp.square(codes), axis=-1) - 1.0))
    return jnp.maximum(1.0, spread / (START_SHARE * math.log(codes.shape[0])))


def code_logits(x: Array, codebook: Array, temperature: float) -> Array:
    """-||x'_i - c'_k||^2 / temperature. x' f32 [B, P, E], codebook f32 [C, E] -> f32 [B, P, C].

    temperature 0 is `start_temperature`.
    """
    codes, _, _ = unit_codebook(codebook)
    temperature = temperature or start_temperature(codes)
    products = jnp.einsum("BPE,CE->BPC", x, codes)
    norms = jnp.sum(jnp.square(x), axis=-1)[..., None] + jnp.sum(jnp.square(codes), axis=-1)[None, None]
    return (2.0 * products - norms) / temperature


def code_loss(logits: Array, targets: Array, valid: Array) -> tuple[Array, Array]:
    """Cross-entropy to the tokenizer's indices: mean over the valid tokens of each example, then over the batch.

    Args:
      logits: f32 [B, P, C]. targets: i32 [B, P]. valid: bool [B, P].

    Returns:
      f32 scalars: loss and accuracy (share of valid tokens whose largest logit is the target; over the examples that
      have any, where the loss takes 0 for the others).
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    hit = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    labelled = jnp.mean(jnp.any(valid, axis=1).astype(jnp.float32))
    return _masked_mean(nll, valid), _masked_mean(hit, valid) / jnp.where(labelled > 0, labelled, 1.0)


def pixel_targets(batch: dict[str, Array], config: DepthConfig) -> tuple[Array, Array]:
    """Normalised depth of the pixels of each token.

    The map is sampled at grid * R pixels along each side, nearest neighbour: averaging would invent depths at edges.

    Args:
      batch: depth u16 [B, H, W], depth_scale and depth_offset f32 [B].

    Returns:
      x f32 [B, P, R*R] in [-1, 1] and valid bool [B, P, R*R].
    """
    side, r = config.grid * config.pixels_per_token, config.pixels_per_token
    b, h, w = batch["depth"].shape
    rows = (jnp.arange(side) * 2 + 1) * h // (2 * side)
    columns = (jnp.arange(side) * 2 + 1) * w // (2 * side)
    raw = batch["depth"][:, rows][:, :, columns]
    x, valid = depth_values.normalise(raw, batch["depth_scale"], batch["depth_offset"], config.range)

    def patches(image: Array) -> Array:
        image = image.reshape(b, config.grid, r, config.grid, r).transpose(0, 1, 3, 2, 4)
        return image.reshape(b, config.tokens, r * r)

    return patches(x), patches(valid)


def pixel_map(prediction: Array, config: DepthConfig) -> Array:
    """Pixels of tokens [B, P, R*R] as one map [B, G*R, G*R]: how `pixel_targets` cut it."""
    b, g, r = prediction.shape[0], config.grid, config.pixels_per_token
    return prediction.reshape(b, g, g, r, r).transpose(0, 1, 3, 2, 4).reshape(b, g * r, g * r)


def pixel_loss(prediction: Array, targets: Array, valid: Array) -> Array:
    """L1, mean over the valid pixels of each example, then over the batch. All [B, P, R*R] -> f32 scalar."""
    return _masked_mean(jnp.abs(prediction - targets), valid)


def _masked_mean(x: Array, valid: Array) -> Array:
    """Mean over valid entries of each example, then over examples; an example without any counts as 0."""
    axes = tuple(range(1, x.ndim))
    weight = valid.astype(jnp.float32)
    return jnp.mean(jnp.sum(x * weight, axis=axes) / jnp.maximum(jnp.sum(weight, axis=axes), 1.0))
