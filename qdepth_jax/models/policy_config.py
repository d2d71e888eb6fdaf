"""Every size and convention of a policy, the sizes we use as data, and which parameters stay frozen.

`PolicyConfig()` is QDepth-VLA at full size; `PolicyConfig(depth=None)` is the open-pi-zero baseline.
"""

import dataclasses
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.models import stack, visibility
from qdepth_jax.models.depth_expert import DepthConfig
from qdepth_jax.models.flow import FlowConfig
from qdepth_jax.models.gemma import ExpertConfig, MixtureConfig
from qdepth_jax.models.siglip import SiglipConfig
from qdepth_jax.models.visibility import Table

DTYPES = ("float32", "bfloat16")
DEPTH_POSITIONS = ("image", "after_text")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Position ids. Each expert counts on its own, and padding counts: a token's id is its slot.

    Attributes:
      first: id of the first token of the vlm and of the action expert (open-pi-zero: 1).
      depth: `image` gives depth token i the id of image token i of the main view: the same place in the picture has
        the same angle (our choice, the paper is silent). `after_text` counts on behind the vlm's last slot.
    """

    first: int = 1
    depth: str = "image"

    def __post_init__(self):
        if self.depth not in DEPTH_POSITIONS:
            raise errors.UserError(f"depth positions {self.depth!r} are unknown: use one of {DEPTH_POSITIONS}")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A policy. Every field is stored with a checkpoint.

    Attributes:
      siglip, vlm, action, depth: the parts. depth None is the open-pi-zero baseline, with the same forward pass.
      layers, heads, kv_heads, head_dim: of the mixture.
      views: cameras; the first is the main view, the only one with depth. Batch keys are `image_{view}`.
      image_steps: pictures of each view, the present one and the steps before it.
      missing_views: examples may lack a view (batch key `view_mask`); its tokens are then seen by nobody.
      text_length: L, text tokens with padding.
      vocabulary: rows of the text embedding (Hugging Face's PaliGemma 257,216; official files 257,152).
      proprio_dim, proprio_steps: size and number of proprio tokens. action_dim, horizon: A, Z.
      visibility: name or table, see visibility.py.
      softcap: of attention logits in every layer of every expert, the vlm's too; 0 switches it off.
      dtype: of activations. Parameters, norms, softmax and losses are f32.
      scan: False unrolls the layers (small models on a CPU). remat: a name of stack.REMAT.
      freeze_embedding: no gradient for the text embedding (open-pi-zero, always).
      faithful: reproduce open-pi-zero's slips (loss over padded actions, v_proj of the vlm's last layer frozen).
    """

    siglip: SiglipConfig = SiglipConfig()
    vlm: ExpertConfig = ExpertConfig(width=2048, mlp=16384)
    action: ExpertConfig = ExpertConfig(width=1024, mlp=4096)
    depth: DepthConfig | None = DepthConfig()
    layers: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    views: tuple[str, ...] = ("main",)
    image_steps: int = 1
    missing_views: bool = False
    text_length: int = 20
    vocabulary: int = 257_216
    proprio_dim: int = 7
    proprio_steps: int = 1
    action_dim: int = 7
    horizon: int = 4
    flow: FlowConfig = FlowConfig()
    positions: PositionConfig = PositionConfig()
    visibility: str | Table = "r1"
    softcap: float = 50.0
    norm_eps: float = 1e-6
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    freeze_embedding: bool = True
    faithful: bool = False

    def __post_init__(self):
        visibility.resolve(self.visibility)
        stack.check_remat(self.remat)
        if self.dtype not in DTYPES:
            raise errors.UserError(f"dtype {self.dtype!r} is unknown: use one of {DTYPES}")
        if not self.views or len(set(self.views)) != len(self.views):
            raise errors.UserError(f"views {self.views} must name at least one camera and none twice")
        if self.image_steps < 1:
            raise errors.UserError(f"image_steps={self.image_steps} must be at least 1")
        if self.heads % self.kv_heads:
            raise errors.UserError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise errors.UserError(f"head_dim {self.head_dim} is odd: rotary positions need pairs")
        if self.action.width % 2 or self.action.width < 4:
            raise errors.UserError(f"action width {self.action.width} must be even and >= 4 for the time embedding")
        if self.depth is not None and self.depth.tokens != self.siglip.tokens:
            raise errors.UserError(
                f"depth grid {self.depth.grid}x{self.depth.grid} = {self.depth.tokens} tokens, but the main view has "
                f"{self.siglip.grid}x{self.siglip.grid} = {self.siglip.tokens} image tokens "
                f"(image_size {self.siglip.image_size} / patch {self.siglip.patch}): set depth.grid={self.siglip.grid} "
                f"and use a tokenizer with that grid, or siglip.image_size={self.depth.grid * self.siglip.patch}"
            )

    @property
    def mixture(self) -> MixtureConfig:
        """The experts in token order."""
        experts = [("vlm", self.vlm), ("action", self.action)]
        if self.depth is not None:
            experts.insert(1, ("depth", self.depth.expert))
        return MixtureConfig(
            experts=tuple(experts),
            depth=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            softcap=self.softcap,
            norm_eps=self.norm_eps,
            vocabulary=self.vocabulary,
        )

    @property
    def pictures(self) -> int:
        """Images of one example, all views and steps."""
        return len(self.views) * self.image_steps

    @property
    def sizes(self) -> dict[str, int]:
        """Tokens of each visibility group."""
        return {
            "image": self.siglip.tokens * self.pictures,
            "text": self.text_length,
            "depth": self.depth.tokens if self.depth is not None else 0,
            "proprio": self.proprio_steps,
            "action": self.horizon,
        }

    @property
    def depth_labels(self) -> str | None:
        """What the loss compares the depth prediction with: `codes`, `pixels` or None."""
        if self.depth is None or self.depth.loss_weight == 0:
            return None
        return self.depth.head


def position_ids(config: PolicyConfig) -> dict[str, np.ndarray]:
    """Position ids i32 [tokens] of each group: vlm 1..image+text, depth 1..P, proprio 1..n, action n+1.."""
    sizes, first = config.sizes, config.positions.first
    vlm = np.arange(first, first + sizes["image"] + sizes["text"], dtype=np.int32)
    start = first if config.positions.depth == "image" else first + len(vlm)
    depth = np.arange(start, start + sizes["depth"], dtype=np.int32)
    own = np.arange(first, first + sizes["proprio"] + sizes["action"], dtype=np.int32)
    return {
        "image": vlm[: sizes["image"]],
        "text": vlm[sizes["image"] :],
        "depth": depth,
        "proprio": own[: sizes["proprio"]],
        "action": own[sizes["proprio"] :],
    }


def frozen_table(config: PolicyConfig) -> tuple[tuple[str, str], ...]:
    """Which parameters are never trained: (regex over the whole path, part).

    part is `all`, `last_layer` (the last index of axis 0) or `last_layer_value` ([-1, 1], the value half of a
    kv_einsum). The vlm's last layer feeds others by its keys and values alone. The corrected table freezes what
    therefore has a zero gradient; `faithful` reproduces open-pi-zero, which freezes v_proj (it has a gradient) instead
    of q_proj (it has none).
    """
    layer = "llm/layers/vlm/"
    rows = [
        (layer + "attn/attn_vec_einsum/w", "last_layer"),
        (layer + "pre_ffw_norm/scale", "last_layer"),
        (layer + "mlp/(gating_einsum|linear)", "last_layer"),
    ]
    if config.faithful:
        rows.append((layer + "attn/kv_einsum/w", "last_layer_value"))
    else:
        rows.append((layer + "attn/q_einsum/w", "last_layer"))
    if config.freeze_embedding:
        rows.insert(0, ("llm/embedder/input_embedding", "all"))
    return tuple(rows)


# Sizes as data: keyword arguments of PolicyConfig. `full` is the published model.
_SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    # Seconds on a CPU; trains to something useful in minutes.
    "demo": {
        "siglip": SiglipConfig(image_size=112, patch=14, width=192, depth=4, heads=4, mlp=512),
        "vlm": ExpertConfig(width=192, mlp=512),
        "action": ExpertConfig(width=128, mlp=384),
        "depth": DepthConfig(expert=ExpertConfig(width=128, mlp=384), grid=8, conv_width=128),
        "layers": 4,
        "heads": 4,
        "head_dim": 32,
        "text_length": 20,
        "vocabulary": 1024,
        "scan": False,
    },
    # As small as every branch allows; for tests.
    "tiny": {
        "siglip": SiglipConfig(image_size=28, patch=14, width=24, depth=2, heads=2, mlp=32),
        "vlm": ExpertConfig(width=32, mlp=48),
        "action": ExpertConfig(width=16, mlp=24, rope_theta=100.0),
        "depth": DepthConfig(
            expert=ExpertConfig(width=16, mlp=24), grid=2, codes=8, code_dim=6, conv_width=8, pixels_per_token=4
        ),
        "layers": 3,
        "heads": 4,
        "head_dim": 8,
        "text_length": 5,
        "vocabulary": 40,
    },
}


def sized(name: str, **changes: Any) -> PolicyConfig:
    """A PolicyConfig of one of the sizes `full`, `demo`, `tiny`, with fields replaced."""
    if name not in _SIZES:
        raise errors.UserError(f"policy size {name!r} is unknown: use one of {sorted(_SIZES)}")
    return PolicyConfig(**{**_SIZES[name], **changes})
