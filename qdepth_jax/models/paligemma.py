"""PaliGemma 1 and 2 with its text path: logits and greedy decoding, to check a conversion by eye and by number.

The same tower and the same mixture as the policy, with the vlm expert alone, its final norm, and the text embedding
read backwards as the last layer. The image and the prompt see each other in both directions, what follows is causal.
Definition: big_vision, models/proj/paligemma/paligemma.py (image tokens unscaled, text times sqrt(width), positions
count valid tokens). Parameters: img/... (siglip.py), llm/... (gemma.py) with llm/final_norm_vlm/scale.

Axis letters: B batch, P patches, L text tokens, T query, S key, K kv heads, H head dim, D width, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import gemma, siglip, stack
from qdepth_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True)
class PaligemmaConfig:
    """A PaliGemma. Every field is stored with a checkpoint.

    Attributes:
      siglip, vlm: the parts. layers, heads, kv_heads, head_dim, norm_eps: of the language model.
      query_scale: attention logits are divided by its root; 0 = head_dim.
      softcap, final_softcap: of attention logits and of the last logits; 0 = none.
      window: causal tokens see in layers 0, 2, 4... only what is less than so many positions behind them; the prefix
        sees itself whole (transformers' reading; big_vision has no windows). 0 = none.
      vocabulary: rows of the text embedding (official files 257,152; Hugging Face's pad to 257,216).
      dtype, scan, remat: as in PolicyConfig.
    """

    siglip: SiglipConfig = SiglipConfig()
    vlm: gemma.ExpertConfig = gemma.ExpertConfig(width=2048, mlp=16384)
    layers: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    query_scale: float = 0.0
    softcap: float = 0.0
    final_softcap: float = 0.0
    window: int = 0
    norm_eps: float = 1e-6
    vocabulary: int = 257_152
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        stack.check_remat(self.remat)
        if self.heads % self.kv_heads:
            raise errors.UserError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise errors.UserError(f"head_dim {self.head_dim} is odd: rotary positions need pairs")

    @property
    def mixture(self) -> gemma.MixtureConfig:
        """The vlm expert alone."""
        return gemma.MixtureConfig(
            experts=(("vlm", self.vlm),),
            depth=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            softcap=self.softcap,
            norm_eps=self.norm_eps,
            vocabulary=self.vocabulary,
            query_scale=self.query_scale,
            vlm_final_norm=True,
        )


def _gemma2(width: int, mlp: int) -> dict[str, Any]:
    return {"vlm": gemma.ExpertConfig(width=width, mlp=mlp, post_norms=True), "softcap": 50.0}


# Sizes as data: keyword arguments of PaligemmaConfig (Gemma reports 1 and 2; PaliGemma 2, arXiv 2412.03555, table 1).
# The 27B trunk divides its logits by sqrt(width / heads), all others by sqrt(head_dim).
SIZES: dict[str, dict[str, Any]] = {
    "paligemma_3b": {},
    "paligemma2_3b": {**_gemma2(2304, 9216), "layers": 26, "kv_heads": 4},
    "paligemma2_10b": {**_gemma2(3584, 14336), "layers": 42, "heads": 16, "kv_heads": 8},
    "paligemma2_28b": {
        **_gemma2(4608, 36864), "layers": 46, "heads": 32, "kv_heads": 16, "head_dim": 128, "query_scale": 144.0,
    },
}  # fmt: skip


def sized(name: str, **changes: Any) -> PaligemmaConfig:
    """A PaligemmaConfig of one of SIZES, with fields replaced."""
    if name not in SIZES:
        raise errors.UserError(f"PaliGemma size {name!r} is unknown: use one of {sorted(SIZES)}")
    return PaligemmaConfig(**{**SIZES[name], **changes})


@struct.dataclass
class Output:
    """Of one forward pass; rows of padding are unspecified.

    Attributes:
      image_tokens: `dtype` [B, P, D]. embeddings: [B, P + L, D], what enters the first layer.
      pre_logits: [B, P + L, D], after the final norm. logits: f32 [B, P + L, V].
    """

    image_tokens: Array
    embeddings: Array
    pre_logits: Array
    logits: Array


class Paligemma(nn.Module):
    """The network. Methods: `__call__`, `prefill` and `extend` (decoding with a cache)."""

    config: PaligemmaConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.img = siglip.Siglip(c.siglip, c.vlm.width, dtype, c.scan, c.remat)
        self.llm = gemma.Mixture(c.mixture, dtype, c.scan, c.remat)

    def __call__(self, images: Array, text: Array, valid: Array, causal: Array | None = None) -> Output:
        """Logits of every token.

        Args:
          images: f32 [B, S, S, 3] in [-1, 1]. text: i32 [B, L]. valid: bool [B, L], False for padding.
          causal: bool [B, L], True for tokens that those before them must not see; None = none.
        """
        tokens, x = self._embed(images, text)
        positions, mask, turn = self._prefix(valid, causal)
        local = self._local(mask, positions, positions, turn > 0)
        pre_logits, _ = self._run(x, positions, mask, local_mask=local)
        return Output(tokens, x, pre_logits, self._logits(pre_logits))

    def prefill(self, images: Array, text: Array, valid: Array) -> tuple[Array, gemma.KVCache]:
        """Logits f32 [B, V] behind the last valid token of the prompt, and the cache of the image and the prompt."""
        _, x = self._embed(images, text)
        positions, mask, _ = self._prefix(valid, None)
        pre_logits, cache = self._run(x, positions, mask, return_cache=True)
        last = jnp.argmax(positions * mask[:, -1], axis=1)
        row = jnp.take_along_axis(pre_logits, last[:, None, None], axis=1)
        return self._logits(row)[:, 0], cache

    def extend(
        self, token: Array, position: Array, cache: gemma.KVCache, cached: Array, key_positions: Array
    ) -> tuple[Array, gemma.KVCache]:
        """One more token.

        Args:
          token, position: i32 [B].
          cache: of S earlier tokens. cached: bool [B, S], those to be seen. key_positions: i32 [B, S].

        Returns:
          Logits f32 [B, V] behind it, and its own keys and values.
        """
        x = self._words(token[:, None])
        own = position[:, None]
        mask = jnp.concatenate([cached, jnp.ones_like(own, bool)], axis=1)[:, None]
        keys = jnp.concatenate([key_positions, own], axis=1)
        local = self._local(mask, own, keys, jnp.ones_like(own, bool))
        pre_logits, kv = self._run(x, own, mask, local_mask=local, cache=cache, return_cache=True)
        return self._logits(pre_logits)[:, 0], kv

    def _words(self, text: Array) -> Array:
        words = self.llm.embed(text, trainable=True)
        return words * jnp.asarray(self.config.vlm.width**0.5, words.dtype)

    def _embed(self, images: Array, text: Array) -> tuple[Array, Array]:
        tokens = self.img.project(self.img(images))
        return tokens, jnp.concatenate([tokens, self._words(text)], axis=1)

    def _prefix(self, valid: Array, causal: Array | None) -> tuple[Array, Array, Array]:
        """Positions i32 [B, P + L], mask bool [B, P + L, P + L] and turns i32 [B, P + L] of image and text.

        A token's turn is the number of causal tokens up to it: 0 in the prefix.
        """
        batch, patches = valid.shape[0], self.config.siglip.tokens
        there = jnp.concatenate([jnp.ones((batch, patches), bool), valid], axis=1)
        turns = jnp.zeros_like(there) if causal is None else jnp.pad(causal, ((0, 0), (patches, 0)))
        turn = jnp.cumsum(turns, axis=1)
        mask = (turn[:, None, :] <= turn[:, :, None]) & there[:, None, :]
        return jnp.cumsum(there, axis=1) - 1, mask, turn

    def _local(self, mask: Array, positions: Array, keys: Array, bound: Array) -> Array | None:
        """The mask [B, T, S] of layers with a window, which binds some rows [B, T]; None without windows."""
        if not self.config.window:
            return None
        near = positions[:, :, None] - keys[:, None, :] < self.config.window
        return mask & (near | ~bound[:, :, None])

    def _run(self, x: Array, positions: Array, mask: Array, **fields) -> tuple[Array, gemma.KVCache | None]:
        """Embeddings [B, T, D] -> pre-logits [B, T, D] and the cache or None."""
        finals, cache = self.llm({"vlm": x}, {"vlm": positions}, mask, outputs=("vlm",), **fields)
        return finals["vlm"], cache

    def _logits(self, pre_logits: Array) -> Array:
        logits = self.llm.read(pre_logits)
        cap = self.config.final_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits


def init(config: PaligemmaConfig, key: Array) -> dict[str, Any]:
    """Fresh `{"params", "state"}`; the state is empty."""
    size = config.siglip.image_size
    shown = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    return {"params": Paligemma(config).init(key, *shown)["params"], "state": {}}


def forward(
    config: PaligemmaConfig, params, images: Array, text: Array, valid: Array, causal: Array | None = None
) -> Output:
    """See `Paligemma.__call__`."""
    return Paligemma(config).apply({"params": params}, images, text, valid, causal)


def logits(
    config: PaligemmaConfig, params, images: Array, text: Array, valid: Array, causal: Array | None = None
) -> Array:
    """f32 [B, P + L, V]; see `Paligemma.__call__`."""
    return forward(config, params, images, text, valid, causal).logits


def generate(
    config: PaligemmaConfig, params, images: Array, text: Array, valid: Array, steps: int, eos: int = 1
) -> Array:
    """The most probable next token, again and again.

    Args:
      images: f32 [B, S, S, 3] in [-1, 1]. text: i32 [B, L], the prompt. valid: bool [B, L].
      steps: tokens to write. eos: the token that ends a text (PaliGemma's is 1).

    Returns:
      i32 [B, steps]; 0 behind the end.
    """
    model, variables = Paligemma(config), {"params": params}
    first, cache = model.apply(variables, images, text, valid, method=Paligemma.prefill)
    batch, prefix = text.shape[0], cache.k.shape[2]
    there = jnp.concatenate([jnp.ones((batch, config.siglip.tokens), bool), valid], axis=1)
    length = jnp.sum(there, axis=1)
    # Room for the tokens to come, behind the prefix with its padding; positions know nothing of slots.
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, steps), (0, 0), (0, 0))), cache)
    slots = jnp.arange(steps)[None]
    keys = jnp.concatenate([jnp.cumsum(there, axis=1) - 1, length[:, None] + slots], axis=1)

    def step(carry, i):
        scores, cache, ended = carry
        token = jnp.where(ended, 0, jnp.argmax(scores, axis=-1).astype(jnp.int32))
        ended = ended | (token == eos)
        written = jnp.broadcast_to(slots < i, (batch, steps))
        cached = jnp.concatenate([there, written], axis=1)
        scores, kv = model.apply(variables, token, length + i, cache, cached, keys, method=Paligemma.extend)
        cache = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, prefix + i, 2), cache, kv)
        return (scores, cache, ended), token

    _, tokens = jax.lax.scan(step, (first, cache, jnp.zeros((batch,), bool)), jnp.arange(steps))
    return tokens.T
