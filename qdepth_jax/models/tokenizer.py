"""Depth tokenizer: a convolutional VQ-VAE from one depth map to a grid of code indices and back.

  depth x, valid [B, R, R, 2] -> space-to-depth 4 -> conv -> (residual blocks, stride-2 conv)* -> z [B, g, g, D]
  -> nearest code -> decoder, the mirror image -> x_hat [B, R, R]

QDepth-VLA (arXiv 2510.14836) gives K = 256 codes of 160 dims, a 16x16 grid, beta = 0.25; encoder and decoder shapes,
the reconstruction loss and the input normalisation are not published.
DEVIATION: ours are chosen (EMA codebook, feature LayerNorm before quantisation, L1 + L2 on valid pixels, a learnt grid
bias in the decoder) because the plain objective collapses; `quantiser="plain"` is the published loss.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qdepth_jax import depth as depth_lib
from qdepth_jax.models import codebook, depth_augment, flops, objective
from qdepth_jax.models.tokenizer_config import STEM, TokenizerConfig

# Settings that came after the first tokenizers: at these values they are no part of the identity, which thus stays.
_LATER = {"crop_scale": (1.0, 1.0), "flip": 0.0, "dead_share": 0.05}


class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(norm(x))))), channels kept."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(nn.LayerNorm(dtype=self.dtype, name="norm")(x))
        h = nn.silu(nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv_in")(h))
        return x + nn.Conv(self.width, (1, 1), dtype=self.dtype, name="conv_out")(h)


class Encoder(nn.Module):
    """Depth and its mask, f32 [B, R, R] and bool [B, R, R], to features f32 [B, P, D] of mean 0, variance 1."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        h = jnp.stack([x, valid.astype(x.dtype)], axis=-1).astype(dtype)
        h = _space_to_depth(h, STEM)
        for level, width in enumerate(c.widths):
            stride = 1 if level == 0 else 2
            h = nn.Conv(width, (3, 3), (stride, stride), dtype=dtype, name=f"down_{level}")(h)
            for i in range(c.blocks):
                h = ResidualBlock(width, dtype, name=f"block_{level}_{i}")(h)
        z = nn.Conv(c.feature_dim, (1, 1), dtype=dtype, name="to_features")(nn.silu(h)).astype(jnp.float32)
        z = z.reshape(z.shape[0], c.grid * c.grid, c.feature_dim)
        if c.quantiser == "fsq":
            return z
        if c.quantiser == "l2":
            return codebook.on_sphere(z)
        # Fixes the scale of the distances in the policy's logits and keeps the commitment term from shrinking features.
        return nn.LayerNorm(use_scale=False, use_bias=False, name="feature_norm")(z)


class Decoder(nn.Module):
    """Quantised features f32 [B, P, D] to depth f32 [B, R, R] in [-1, 1] (not clipped)."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        h = z.reshape(z.shape[0], c.grid, c.grid, c.feature_dim).astype(dtype)
        h = nn.Conv(c.widths[-1], (3, 3), dtype=dtype, name="from_features")(h)
        # The main camera stands still in most robot data: a bias per grid cell stores the empty scene once.
        bias = self.param("grid_bias", nn.initializers.zeros, (c.grid, c.grid, c.widths[-1]))
        h = h + bias[None].astype(dtype)
        for level in reversed(range(len(c.widths))):
            for i in range(c.blocks):
                h = ResidualBlock(c.widths[level], dtype, name=f"block_{level}_{i}")(h)
            if level > 0:
                h = nn.Conv(4 * c.widths[level - 1], (1, 1), dtype=dtype, name=f"up_{level}")(h)
                h = _depth_to_space(h, 2)
        h = nn.Conv(STEM * STEM, (3, 3), dtype=dtype, name="to_depth")(nn.silu(h))
        return _depth_to_space(h, STEM)[..., 0].astype(jnp.float32)


def _space_to_depth(x: Array, p: int) -> Array:
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // p, w // p, p * p * c)


def _depth_to_space(x: Array, p: int) -> Array:
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, c // (p * p))


def init(config: TokenizerConfig, key: Array) -> dict[str, Any]:
    """{"params": {"encoder", "decoder"[, "codebook"]}, "state": {"codebook", ...}}."""
    enc_key, dec_key, code_key = jax.random.split(key, 3)
    x = jnp.zeros((1, config.depth_size, config.depth_size))
    z = jnp.zeros((1, config.grid * config.grid, config.feature_dim))
    params = {
        "encoder": Encoder(config).init(enc_key, x, x > 0)["params"],
        "decoder": Decoder(config).init(dec_key, z)["params"],
    }
    if config.running:
        return {"params": params, "state": codebook.init_state(config.num_codes, config.code_dim)}
    if config.quantiser == "plain":
        bound = 1.0 / config.num_codes  # van den Oord's and Esser's start
        shape = (config.num_codes, config.code_dim)
        params["codebook"] = jax.random.uniform(code_key, shape, minval=-bound, maxval=bound)
    return {"params": params, "state": {}}


def codes_of(config: TokenizerConfig, params: Any, state: Any) -> Array:
    """The codebook, f32 [K, D], wherever the quantiser keeps it."""
    if config.running:
        return state["codebook"]
    if config.quantiser == "plain":
        return params["codebook"]
    return codebook.fsq_codebook(codebook.fsq_levels(config.num_codes))


def preprocess(config: TokenizerConfig, raw: Array, scale: Array, offset: Array) -> tuple[Array, Array]:
    """Raw depth u16 [B, H, W] to (x f32, valid bool) [B, R, R]. Nearest resampling: depth must not blend over edges."""
    x, valid = depth_lib.normalise(raw, scale, offset, config.range)
    if raw.shape[1:] == (config.depth_size, config.depth_size):
        return x, valid
    rows = (np.arange(config.depth_size) * 2 + 1) * raw.shape[1] // (2 * config.depth_size)
    cols = (np.arange(config.depth_size) * 2 + 1) * raw.shape[2] // (2 * config.depth_size)
    return x[:, rows][:, :, cols], valid[:, rows][:, :, cols]


def token_validity(config: TokenizerConfig, valid: Array) -> Array:
    """bool [B, P]: tokens of which at least half of the pixels of bool [B, R, R] are valid (data/sidecar.py's rule)."""
    b, cell = valid.shape[0], config.depth_size // config.grid
    share = jnp.mean(valid.reshape(b, config.grid, cell, config.grid, cell).astype(jnp.float32), axis=(2, 4))
    return (share >= 0.5).reshape(b, -1)


def encode(config: TokenizerConfig, params: Any, state: Any, x: Array, valid: Array) -> Array:
    """Code indices i32 [B, P] of normalised depth (see `preprocess`)."""
    z = Encoder(config).apply({"params": params["encoder"]}, x, valid)
    if config.quantiser == "fsq":
        return codebook.fsq_quantise(z, codebook.fsq_levels(config.num_codes))[1]
    return codebook.nearest(z, codes_of(config, params, state))


def decode(config: TokenizerConfig, params: Any, state: Any, index: Array) -> Array:
    """Normalised depth f32 [B, R, R] in [-1, 1] from code indices i32 [B, P]."""
    return _decode(config, params, codes_of(config, params, state)[index])


def decode_expected(config: TokenizerConfig, params: Any, state: Any, probabilities: Array) -> Array:
    """Depth as `decode` gives it, from the expected code under f32 [B, P, K] ("soft tokens", AiT, Ning et al. 2023).

    The probabilities are a policy's, over the codes it predicts, or those of `code_probabilities`.
    """
    codes = codes_of(config, params, state)
    z = jnp.einsum("BPK,KD->BPD", probabilities, codes)
    return _decode(config, params, codebook.on_sphere(z) if config.quantiser == "l2" else z)


def _decode(config: TokenizerConfig, params: Any, z: Array) -> Array:
    return jnp.clip(Decoder(config).apply({"params": params["decoder"]}, z), -1.0, 1.0)


def code_probabilities(
    config: TokenizerConfig, params: Any, state: Any, x: Array, valid: Array, softness: float
) -> Array:
    """softmax_k(-||z - c_k||^2 / (softness * D)), f32 [B, P, K]: features have mean square 1, distances go with D."""
    z = Encoder(config).apply({"params": params["encoder"]}, x, valid)
    if config.quantiser == "fsq":
        z = jnp.tanh(z)
    distances = codebook.squared_distances(z, codes_of(config, params, state))
    return jax.nn.softmax(-distances / (softness * config.feature_dim), axis=-1)


def compiled_roundtrip(
    config: TokenizerConfig, softness: float = 0.0
) -> Callable[..., tuple[Array, Array, Array, Array]]:
    """A jitted (variables, raw, scale, offset) -> (codes i32 [B, P], x_hat, x f32 [B, R, R], valid bool [B, R, R]).

    softness > 0 decodes the expected code under `code_probabilities` instead of the nearest one.
    """

    @jax.jit
    def run(variables, raw, scale, offset):
        params, state = variables["params"], variables["state"]
        x, valid = preprocess(config, raw, scale, offset)
        codes = encode(config, params, state, x, valid)
        if softness:
            p = code_probabilities(config, params, state, x, valid, softness)
            return codes, decode_expected(config, params, state, p), x, valid
        return codes, decode(config, params, state, codes), x, valid

    return run


def make_objective(config: TokenizerConfig) -> objective.Objective:
    """VQ-VAE loss (QDepth-VLA eq. 2): reconstruction + [codebook term] + beta * commitment.

    Reconstruction is over valid pixels; codes learn from, and are counted on, tokens that stand for depth
    (`token_validity`): nobody uses the others.
    """

    def loss(params, state, batch, key, step) -> objective.LossOutput:
        x, valid = preprocess(config, batch["depth"], batch["depth_scale"], batch["depth_offset"])
        z = Encoder(config).apply({"params": params["encoder"]}, x, valid)
        flat = z.reshape(-1, config.feature_dim)
        kept = token_validity(config, valid)
        codebook_loss = commitment = jnp.zeros(())
        started = jnp.ones((), bool)
        if config.quantiser == "fsq":
            quantised, index = codebook.fsq_quantise(z, codebook.fsq_levels(config.num_codes))
        else:
            step_key = jax.random.fold_in(key, step)
            if config.running:
                started = jnp.asarray(step) >= config.start_step
                before, still = state, jax.lax.stop_gradient(flat)
                state = codebook.start_from_data(state, still, step_key, kept.reshape(-1))
            codes = codes_of(config, params, state)
            index = codebook.nearest(z, codes)
            hard = codes[index]
            commitment = jnp.where(started, _mean_square(z - jax.lax.stop_gradient(hard), kept), 0.0)
            if config.running:
                update_key = jax.random.fold_in(step_key, 1)
                spherical = config.quantiser == "l2"
                state = codebook.ema_update(
                    state, still, index.reshape(-1), update_key, config.decay, spherical, config.dead_share,
                    kept.reshape(-1),
                )  # fmt: skip
                state = jax.tree.map(lambda new, old: jnp.where(started, new, old), state, before)
            else:
                codebook_loss = _mean_square(jax.lax.stop_gradient(z) - hard, kept)
            quantised = jnp.where(started, codebook.straight_through(z, hard), z)
        x_hat = Decoder(config).apply({"params": params["decoder"]}, quantised)
        error = jnp.where(valid, x_hat - x, 0.0)
        # Mean per example, then over examples: micro-batches average to the whole batch. (The EMA codebook takes one
        # update per micro-batch.)
        pixels = jnp.maximum(jnp.sum(valid, axis=(1, 2)), 1)
        l1 = jnp.mean(jnp.sum(jnp.abs(error), axis=(1, 2)) / pixels)
        l2 = jnp.mean(jnp.sum(jnp.square(error), axis=(1, 2)) / pixels)
        total = l1 + config.l2_weight * l2 + codebook_loss + config.beta * commitment
        used, perplexity = (jnp.where(started, x, 0.0) for x in codebook.usage(index, config.num_codes, kept))
        half_range = 0.5 * abs(config.range.far - config.range.near)
        metrics = {
            "loss": total,
            "reconstruction_l1": l1,
            "reconstruction_l2": l2,
            "commitment": commitment,
            "codebook_loss": codebook_loss,
            "rmse": jnp.sqrt(l2) * half_range,  # in the units of the range (metres for metric depth)
            "codes_used": used,
            "perplexity": perplexity,
            "valid_pixels": jnp.mean(valid.astype(jnp.float32)),
        }
        return objective.LossOutput(total, metrics, state)

    parts = ("encoder", "decoder", "codebook") if config.quantiser == "plain" else ("encoder", "decoder")
    return objective.Objective(
        init=lambda key: init(config, key),
        loss=loss,
        features=("depth", "depth_scale", "depth_offset"),
        augment=(lambda batch, key: depth_augment.augment(batch, key, config.crop_scale, config.flip))
        if config.augments
        else None,
        flops=flops.model_flops(flops.tokenizer(config)),
        groups=tuple((name, f"{name}(/.*)?") for name in parts),
    )


def _mean_square(x: Array, kept: Array) -> Array:
    """Mean over the kept tokens bool [B, P] of each example, then over examples, of the squares of x [B, P, D]."""
    squares, weight = jnp.mean(jnp.square(x), axis=-1), kept.astype(jnp.float32)
    return jnp.mean(jnp.sum(squares * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0))


def identity(config: TokenizerConfig, params: Any, state: Any) -> str:
    """16 hex digits over config, encoder weights and codebook: what decides which tokens a depth map gets."""
    settings = dataclasses.asdict(config)
    for name, default in _LATER.items():
        if settings[name] == default:
            del settings[name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["encoder"]):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    digest.update(np.ascontiguousarray(jax.device_get(codes_of(config, params, state))).tobytes())
    return digest.hexdigest()[:16]
