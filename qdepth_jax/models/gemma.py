"""Gemma mixture: any number of experts run in lock-step and meet in one joint attention per layer.

Each expert has its own norms, projections and MLP (Gemma-1 shape: RMSNorm with (1 + scale), gated tanh-GELU, no biases,
rotary positions on split halves; Gemma-2 adds norms behind attention and MLP). Keys and values of all experts are
concatenated along the sequence; the mask says who sees whom. Two oddities of open-pi-zero are kept where a config asks
for them: every stream is multiplied by sqrt(width) on entry (by the caller, see policy.py), and logits are soft-capped
in every layer of every expert. An expert may be adaptive (pi0.5): a condition, the flow time, gives its norms scale and
shift and gates what its attention and MLP add to the stream.

Parameter tree (full size). Names below `layers/vlm` are those of the official PaliGemma files below `layers`:
  embedder/input_embedding                  [257216, 2048]
  layers/EXPERT/pre_attention_norm/scale    [18, D]          layers/EXPERT/pre_ffw_norm/scale  [18, D]
  layers/EXPERT/attn/q_einsum/w             [18, 8, D, 256]
  layers/EXPERT/attn/kv_einsum/w            [18, 2, 1, D, 256]    (0 = key, 1 = value)
  layers/EXPERT/attn/attn_vec_einsum/w      [18, 8, 256, D]
  layers/EXPERT/mlp/gating_einsum           [18, 2, D, F]         (0 = gate, 1 = up)
  layers/EXPERT/mlp/linear                  [18, F, D]
  final_norm_{depth,action}/scale           [1024]           (open-pi-zero's vlm has none: nobody reads its output)
Where the config asks for it:
  final_norm_vlm/scale                      [2048]           (PaliGemma; pi0's files hold it too)
  layers/EXPERT/{post_attention_norm,post_ffw_norm}/scale    [18, D]                          (Gemma-2)
  layers/EXPERT/{pre_attention_norm,pre_ffw_norm}/Dense_0/{kernel [18, D, 3D], bias [18, 3D]}  (adaptive, no `scale`;
  final_norm_EXPERT/Dense_0/{kernel [D, 3D], bias [3D]}                           columns are scale, shift and gate)
with EXPERT, D, F = vlm 2048 16384, depth 1024 4096, action 1024 4096.

Axis letters: B batch, T query, S key, N heads, K kv heads, G heads per kv head, H head dim, D width, F mlp width,
V vocabulary, M = leading axes folded into one.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from qdepth_jax.models import attention, cached_attention, layout, linear, norms, stack


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """One set of weights in the mixture. post_norms: also normalise what attention and MLP return (Gemma-2)."""

    width: int
    mlp: int
    rope_theta: float = 10_000.0
    post_norms: bool = False


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """What all experts share, and the experts in the order of their tokens.

    Attributes:
      softcap: of attention logits; 0 = none. query_scale: logits are divided by its root; 0 = head_dim.
      vlm_final_norm: the tree has a final norm of the vlm, whoever reads it.
      adaptive: experts whose norms take a condition.
    """

    experts: tuple[tuple[str, ExpertConfig], ...]
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    softcap: float = 50.0
    norm_eps: float = 1e-6
    vocabulary: int = 257_216
    query_scale: float = 0.0
    vlm_final_norm: bool = False
    adaptive: tuple[str, ...] = ()


@struct.dataclass
class KVCache:
    """Keys (rotated) and values of all layers. Each `dtype` [depth, B, S, K, H]."""

    k: Array
    v: Array


@struct.dataclass
class Shared:
    """What every layer sees.

    Attributes:
      cos, sin: f32 [1 or B, T, H/2]. mask: bool [B, T, S].
      local_mask: bool [B, T, S] of the even layers, or None.
      conditions: adaptive expert -> [B, D].
    """

    cos: Array
    sin: Array
    mask: Array
    local_mask: Array | None
    conditions: dict[str, Array]


@struct.dataclass
class PerLayer:
    """What one layer sees alone. cache without its layer axis; even: bool scalar, where there is a local mask."""

    cache: KVCache | None
    even: Array | None


def rope_table(positions: np.ndarray | Array, head_dim: int, theta: float) -> tuple[np.ndarray | Array, ...]:
    """Angles position * theta^(-2i/H), i < H/2. positions i32 [T] or [B, T] -> cos, sin f32 [1 or B, T, H/2].

    Positions that are facts of the config are NumPy, and the table is a constant; those that depend on an example are
    traced. Angles are f32, as in open-pi-zero's f32 path.
    """
    frequencies = (1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    positions = positions[None] if positions.ndim == 1 else positions
    angles = positions.astype(np.float32)[..., None] * frequencies[None, None]
    maths = np if isinstance(positions, np.ndarray) else jnp
    return maths.cos(angles), maths.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates (first half, second half) pairs. x [B, T, N, H], tables [1 or B, T, H/2]; f32 inside, dtype of x out."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Mixture(nn.Module):
    """The stack of all experts. f32 parameters, activations in `dtype`, norms and softmax in f32."""

    config: MixtureConfig
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: str = "none"

    def setup(self):
        width = dict(self.config.experts)["vlm"].width
        self.embedder = Embedder(self.config.vocabulary, width)

    def embed(self, ids: Array, trainable: bool) -> Array:
        """i32 [B, L] -> `dtype` [B, L, D] of the vlm; unscaled."""
        table = self.embedder()
        return jnp.take(table if trainable else jax.lax.stop_gradient(table), ids, axis=0).astype(self.dtype)

    def read(self, x: Array) -> Array:
        """[B, T, D] of the vlm -> f32 logits [B, T, V]: the embedding table read backwards."""
        table = layout.gather(self.embedder().astype(self.dtype), layout.TENSOR, layout.FSDP)
        return jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)

    @nn.compact
    def __call__(
        self,
        streams: Mapping[str, Array],
        positions: Mapping[str, np.ndarray | Array],
        mask: Array,
        *,
        local_mask: Array | None = None,
        conditions: Mapping[str, Array] | None = None,
        cache: KVCache | None = None,
        return_cache: bool = False,
        outputs: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], KVCache | None]:
        """Runs the streams through all layers.

        Args:
          streams: expert -> `dtype` [B, T_e, D_e], already scaled. Any subset of the experts.
          positions: expert -> i32 [T_e], or [B, T_e] for all of them.
          mask: bool [B, T, S]; rows are the streams' tokens in expert order; columns the cached ones, then the rows'.
          local_mask: the same for layers 0, 2, 4..., where Gemma-2 sees no further than a window; None = `mask`.
          conditions: [B, D_e] for every adaptive expert with a stream.
          cache: keys and values of earlier tokens.
          return_cache: also return the keys and values of these tokens.
          outputs: experts whose final states are wanted.

        Returns:
          expert -> normed final states [B, T_e, D_e] for `outputs`; the cache or None.
        """
        config = self.config
        experts = tuple((name, expert) for name, expert in config.experts if name in streams)
        tables = [rope_table(positions[name], config.head_dim, expert.rope_theta) for name, expert in experts]
        cos, sin = (_joined(parts) for parts in zip(*tables, strict=True))
        conditions = {name: (conditions or {})[name] for name, _ in experts if name in config.adaptive}
        even = None if local_mask is None else jnp.arange(config.depth) % 2 == 0
        streams = {name: streams[name].astype(self.dtype) for name, _ in experts}
        streams, kv = stack.run_layers(
            self,
            Layer,
            {"config": config, "experts": experts, "dtype": self.dtype, "return_kv": return_cache, "outputs": outputs},
            streams,
            PerLayer(cache, even),
            Shared(cos, sin, mask, local_mask, conditions),
            name="layers",
            depth=config.depth,
            scan=self.scan,
            remat=self.remat,
        )
        # Asked for or not: a parameter that the files hold is in the tree, and the compiler drops its use.
        kept = ("vlm",) if config.vlm_final_norm and "vlm" in streams and "vlm" not in outputs else ()
        finals = {}
        for name in (*outputs, *kept):
            norm = _norm(config, self.dtype, name in config.adaptive, name=f"final_norm_{name}")
            finals[name], _ = norms.normed(norm, streams[name], conditions.get(name), self.dtype)
        return {name: finals[name] for name in outputs}, kv


def _joined(parts: tuple[np.ndarray | Array, ...]) -> Array:
    """Tables of all experts along the tokens; of NumPy tables a constant."""
    if all(isinstance(part, np.ndarray) for part in parts):
        return jnp.asarray(np.concatenate(parts, axis=1))
    return jnp.concatenate(parts, axis=1)


class Embedder(nn.Module):
    """The text embedding table, f32 [V, D]. Drawn so that it has unit variance after the scaling by sqrt(D)."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        init = linear.normal_like(self.width**-0.5)
        return self.param("input_embedding", init, (self.vocabulary, self.width))


class Layer(nn.Module):
    """One layer of all experts.

    Attributes:
      experts: those with a stream, in token order.
      return_kv: also return this layer's keys and values as a KVCache without the layer axis.
      last: compute only what `outputs` need. A scanned stack cannot know, so there the last layer computes streams that
        nobody reads (1/18 of the vlm at full size); the results are the same.
    """

    config: MixtureConfig
    experts: tuple[tuple[str, ExpertConfig], ...]
    dtype: jnp.dtype
    return_kv: bool
    outputs: tuple[str, ...]
    last: bool

    @nn.compact
    def __call__(self, streams: dict[str, Array], own: PerLayer, shared: Shared):
        config, cache = self.config, own.cache
        streams = {name: layout.pin(x) for name, x in streams.items()}
        blocks = {name: Block(config, expert, self.dtype, name in config.adaptive, name=name)
                  for name, expert in self.experts}  # fmt: skip
        wanted = [name for name in blocks if not self.last or name in self.outputs]

        conditions = {name: shared.conditions.get(name) for name in blocks}
        normed, gates = {}, {}
        for name, block in blocks.items():
            normed[name], gates[name] = block.norm_in(streams[name], conditions[name])
        keys, values = zip(*(block.key_value(normed[name]) for name, block in blocks.items()), strict=True)
        k = apply_rope(jnp.concatenate(keys, axis=1), shared.cos, shared.sin)
        v = jnp.concatenate(values, axis=1)
        kv = KVCache(k, v) if self.return_kv else None
        if not wanted:
            return streams, kv

        q = jnp.concatenate([blocks[name].query(normed[name]) for name in wanted], axis=1)
        # By the order of `blocks`: a dict that went through a scan comes back with its keys sorted.
        ends = dict(zip(blocks, itertools.accumulate(streams[name].shape[1] for name in blocks), strict=True))
        rows = [slice(ends[name] - streams[name].shape[1], ends[name]) for name in wanted]
        cos, sin = (jnp.concatenate([table[:, row] for row in rows], axis=1) for table in (shared.cos, shared.sin))
        mask = shared.mask if own.even is None else jnp.where(own.even, shared.local_mask, shared.mask)
        mask = jnp.concatenate([mask[:, row] for row in rows], axis=1)
        q = apply_rope(q, cos, sin)
        if cache is None:
            attended = attention.attend(q, k, v, mask, config.softcap, config.query_scale)
        else:
            attended = cached_attention.attend(q, k, v, cache.k, cache.v, mask, config.softcap, config.query_scale)

        out, start = dict(streams), 0
        for name in wanted:
            size = streams[name].shape[1]
            mine = attended[:, start : start + size]
            out[name] = blocks[name].finish(streams[name], mine, gates[name], conditions[name])
            start += size
        return out, kv


class Block(nn.Module):
    """One expert's part of one layer."""

    config: MixtureConfig
    expert: ExpertConfig
    dtype: jnp.dtype
    adaptive: bool

    def setup(self):
        self.pre_attention_norm = _norm(self.config, self.dtype, self.adaptive)
        self.attn = Attention(self.config, self.expert.width, self.dtype)
        self.pre_ffw_norm = _norm(self.config, self.dtype, self.adaptive)
        self.mlp = GatedMlp(self.expert.mlp, self.dtype)
        if self.expert.post_norms:
            self.post_attention_norm = norms.RMSNorm(self.config.norm_eps)
            self.post_ffw_norm = norms.RMSNorm(self.config.norm_eps)

    def norm_in(self, x: Array, condition: Array | None) -> tuple[Array, Array | None]:
        """[B, T, D] -> normed [B, T, D] and the gate of what attention returns, [B, 1, D] or None."""
        return norms.normed(self.pre_attention_norm, x, condition, self.dtype)

    def query(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, N, H]."""
        return self.attn.query(x)

    def key_value(self, x: Array) -> tuple[Array, Array]:
        """[B, T, D] -> key and value, each [B, T, K, H]."""
        return self.attn.key_value(x)

    def finish(self, x: Array, attended: Array, gate: Array | None, condition: Array | None) -> Array:
        """Stream [B, T, D] and attention [B, T, N, H] -> next stream [B, T, D]."""
        y = self.attn.out(attended)
        if self.expert.post_norms:
            y = self.post_attention_norm(y).astype(self.dtype)
        x = x + (y if gate is None else y * gate)
        h, gate = norms.normed(self.pre_ffw_norm, x, condition, self.dtype)
        y = self.mlp(h)
        if self.expert.post_norms:
            y = self.post_ffw_norm(y).astype(self.dtype)
        return x + (y if gate is None else y * gate)


class Attention(nn.Module):
    """Projections of one expert."""

    config: MixtureConfig
    width: int
    dtype: jnp.dtype

    def setup(self):
        n, k, h, d = self.config.heads, self.config.kv_heads, self.config.head_dim, self.width
        self.q_einsum = Weight((n, d, h), d)
        self.kv_einsum = Weight((2, k, d, h), d)
        self.attn_vec_einsum = Weight((n, h, d), n * h)

    def query(self, x: Array) -> Array:
        weight = layout.gather(self.q_einsum().astype(self.dtype), layout.TENSOR, layout.FSDP)
        q = jnp.einsum("MD,NDH->MNH", linear.fold(x), weight)
        return layout.pin(q.reshape(*x.shape[:2], *q.shape[1:]), None, layout.TENSOR)

    def key_value(self, x: Array) -> tuple[Array, Array]:
        weight = layout.gather(self.kv_einsum().astype(self.dtype), None, None, layout.FSDP)
        folded = linear.fold(x)
        k, v = (jnp.einsum("MD,KDH->MKH", folded, weight[i]) for i in range(2))
        k, v = (layout.pin(y.reshape(*x.shape[:2], *y.shape[1:]), None, layout.TENSOR) for y in (k, v))
        return k, v

    def out(self, attended: Array) -> Array:
        b, t, n, h = attended.shape
        attended = layout.pin(attended, None, layout.TENSOR)
        weight = layout.gather(self.attn_vec_einsum().astype(self.dtype), layout.TENSOR, None, layout.FSDP)
        return jnp.einsum("MNH,NHD->MD", attended.reshape(b * t, n, h), weight).reshape(b, t, self.width)


class Weight(nn.Module):
    """A single f32 array named `w`, uniform in +-1/sqrt(fan_in)."""

    shape: tuple[int, ...]
    fan_in: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("w", linear.fan_in_uniform(self.fan_in), self.shape)


class GatedMlp(nn.Module):
    """linear(gelu_tanh(gate x) * up x). [B, T, D] -> [B, T, D]."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        gating = self.param("gating_einsum", linear.fan_in_uniform(width), (2, width, self.hidden))
        gating = layout.gather(gating.astype(self.dtype), None, layout.FSDP, layout.TENSOR)
        down = self.param("linear", linear.fan_in_uniform(self.hidden), (self.hidden, width))
        down = layout.gather(down.astype(self.dtype), layout.TENSOR, layout.FSDP)
        folded = linear.fold(x)
        gate, up = (layout.pin(jnp.einsum("MD,DF->MF", folded, gating[i]), layout.TENSOR) for i in range(2))
        gate = jax.nn.gelu(gate, approximate=True)
        return jnp.einsum("MF,FD->MD", gate * up, down).reshape(x.shape)


def _norm(config: MixtureConfig, dtype: jnp.dtype, adaptive: bool, name: str | None = None) -> nn.Module:
    if adaptive:
        return norms.AdaptiveNorm(config.norm_eps, dtype, name=name)
    return norms.RMSNorm(config.norm_eps, name=name)
