"""Every size and convention of a policy, the sizes we use as data, and which parameters stay frozen.

`PolicyConfig()` is QDepth-VLA at full size; `PolicyConfig(depth=None)` is the open-pi-zero baseline.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qdepth_jax import errors
from qdepth_jax.models import stack, visibility
from qdepth_jax.models.depth_expert import DepthConfig
from qdepth_jax.models.flow import FlowConfig
from qdepth_jax.models.gemma import ExpertConfig, MixtureConfig
from qdepth_jax.models.siglip import SiglipConfig
from qdepth_jax.models.visibility import Table

DTYPES = ("float32", "bfloat16")
DEPTH_POSITIONS = ("image", "after_text")
COUNTS = ("slots", "valid")
ACTION_TIMES = ("concat", "adaptive")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Position ids.

    Attributes:
      count: `slots`: each expert counts on its own, and padding counts: a token's id is its slot (open-pi-zero).
        `valid`: image, text, proprio and action are one sequence, and an id is the number of valid tokens before it:
        padding and views that an example lacks take no ids (pi0).
      first: id of the first token (open-pi-zero: 1, pi0: 0).
      depth: `image` gives depth token i the id of image token i of the main view: the same place in the picture has
        the same angle (our choice, the paper is silent). `after_text` counts on behind the vlm's last slot or, with
        `valid`, its last valid token. Depth tokens never shift the ids of others: a trained action expert meets the
        ids that it knows.
    """

    count: str = "slots"
    first: int = 1
    depth: str = "image"

    def __post_init__(self):
        if self.depth not in DEPTH_POSITIONS:
            raise errors.UserError(f"depth positions {self.depth!r} are unknown: use one of {DEPTH_POSITIONS}")
        if self.count not in COUNTS:
            raise errors.UserError(f"counting positions by {self.count!r} is unknown: use one of {COUNTS}")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A policy. Every field is stored with a checkpoint.

    Attributes:
      siglip, vlm, action, depth: the parts. depth None is the open-pi-zero baseline, with the same forward pass.
      layers, heads, kv_heads, head_dim: of the mixture.
      views: cameras; the first is the main view, the only one with depth. Batch keys are `image_{view}`.
      image_steps: pictures of each view, the present one and the steps before it.
      missing_views: examples may lack a view (batch key `view_mask`); its tokens are then seen by nobody, and
        without the main view the depth tokens neither.
      text_length: L, text tokens with padding.
      vocabulary: rows of the text embedding (Hugging Face's PaliGemma 257,216; official files 257,152).
      proprio_dim, proprio_steps: size and number of proprio tokens; without any (proprio_steps=0: pi0.5, whose state is
        text) there is no proprio encoder and no proprio in a batch. action_dim, horizon: A, Z.
      action_used: numbers of a robot's action; the rest up to action_dim is filled with zeros, as pi0's 32 are, and
        sampled actions are cut to it. The loss is over all A, because the sampler starts all A from noise. 0 = all.
      action_time: how the flow time enters the action expert: `concat` with each action token before an MLP
        (open-pi-zero, pi0), or `adaptive`, by the scale, shift and gate of its norms (pi0.5).
      scale_experts: depth, proprio and action streams are multiplied by sqrt(width), as the vlm's is (open-pi-zero).
      visibility: name or table, see visibility.py.
      softcap: of attention logits in every layer of every expert, the vlm's too; 0 switches it off.
      query_scale: attention logits are divided by its root; 0 = head_dim.
      vlm_final_norm: the tree holds the vlm's final norm, which nobody reads (pi0; never trained).
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
    action_used: int = 0
    action_time: str = "concat"
    scale_experts: bool = True
    flow: FlowConfig = FlowConfig()
    positions: PositionConfig = PositionConfig()
    visibility: str | Table = "r1"
    softcap: float = 50.0
    query_scale: float = 0.0
    vlm_final_norm: bool = False
    norm_eps: float = 1e-6
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    freeze_embedding: bool = True
    faithful: bool = False

    def __post_init__(self):
        for name in ("layers", "heads", "kv_heads", "head_dim", "text_length", "vocabulary", "action_dim", "horizon"):
            if getattr(self, name) < 1:
                raise errors.UserError(f"{name}={getattr(self, name)} must be at least 1")
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
        if self.action_time not in ACTION_TIMES:
            raise errors.UserError(f"action_time {self.action_time!r} is unknown: use one of {ACTION_TIMES}")
        if self.action_time == "adaptive" and self.proprio_steps:
            raise errors.UserError(
                f"proprio_steps={self.proprio_steps} with action_time='adaptive': the action expert's norms depend on "
                "the flow time, so proprio tokens in it would change at every step of the sampler; pi0.5 writes the "
                "state into the text: set proprio_steps=0, or action_time='concat'"
            )
        if not 0 <= self.action_used <= self.action_dim:
            raise errors.UserError(f"action_used={self.action_used} must be 0 (all) to action_dim={self.action_dim}")
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
            query_scale=self.query_scale,
            vlm_final_norm=self.vlm_final_norm,
            adaptive=("action",) if self.action_time == "adaptive" else (),
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
    def robot_action_dim(self) -> int:
        """Numbers of an action of the data and of a sampled one."""
        return self.action_used or self.action_dim

    @property
    def depth_labels(self) -> str | None:
        """What the loss compares the depth prediction with: `codes`, `pixels` or None."""
        if self.depth is None or self.depth.loss_weight == 0:
            return None
        return self.depth.head


def position_ids(config: PolicyConfig) -> dict[str, np.ndarray]:
    """Position ids i32 [tokens] of each group counted by slots: vlm 1.., depth 1..P, proprio 1..n, action n+1.."""
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


def valid_position_ids(config: PolicyConfig, image_valid: Array, text_valid: Array) -> dict[str, Array]:
    """Position ids i32 [B, tokens] of each group counted by valid tokens.

    image_valid bool [B, image tokens], text_valid bool [B, L].
    """
    sizes, first = config.sizes, config.positions.first
    valid = jnp.concatenate([image_valid, text_valid], axis=1).astype(jnp.int32)
    vlm = jnp.cumsum(valid, axis=1) + (first - 1)
    behind = vlm[:, -1:] + 1
    own = behind + jnp.arange(sizes["proprio"] + sizes["action"], dtype=jnp.int32)[None]
    after = behind + jnp.arange(sizes["depth"], dtype=jnp.int32)[None]
    return {
        "image": vlm[:, : sizes["image"]],
        "text": vlm[:, sizes["image"] :],
        "depth": vlm[:, : sizes["depth"]] if config.positions.depth == "image" else after,
        "proprio": own[:, : sizes["proprio"]],
        "action": own[:, sizes["proprio"] :],
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
    if config.vlm_final_norm:
        rows.append(("llm/final_norm_vlm/scale", "all"))
    if config.vlm.post_norms:
        rows.append((layer + "(post_attention_norm|post_ffw_norm)/scale", "last_layer"))
    if config.freeze_embedding:
        rows.insert(0, ("llm/embedder/input_embedding", "all"))
    return tuple(rows)


# Conventions as data: keyword arguments of PolicyConfig, no sizes but the number of proprio tokens. open-pi-zero's are
# the defaults. pi0's and pi0.5's: github.com/Physical-Intelligence/openpi, src/openpi/models/{pi0,gemma}.py.
_PI0: dict[str, Any] = {
    "flow": FlowConfig(noise_at=1, sigma_min=0.0, time_shortest=4e-3, time_period=1000.0, clip=0.0),
    "positions": PositionConfig(count="valid", first=0),
    "scale_experts": False,
    "softcap": 0.0,
    "vlm_final_norm": True,
    "freeze_embedding": False,
}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "open_pi_zero": {},
    "pi0": _PI0,
    "pi05": {**_PI0, "action_time": "adaptive", "proprio_steps": 0},
}

_OPENPI: dict[str, Any] = {
    "depth": None,
    "views": ("main", "left_wrist", "right_wrist"),
    "vocabulary": 257_152,
    "action_dim": 32,
    "horizon": 50,
}

# Sizes as data: keyword arguments of PolicyConfig. `full` is the published model.
_SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    # The published pi0 and pi0.5 of openpi (models/pi0_config.py): three cameras, actions and state padded to 32.
    "pi0": {**_OPENPI, **CONVENTIONS["pi0"], "text_length": 48, "proprio_dim": 32},
    "pi05": {**_OPENPI, **CONVENTIONS["pi05"], "text_length": 200},
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
    """A PolicyConfig of one of the sizes `full`, `pi0`, `pi05`, `demo`, `tiny`, with fields replaced."""
    if name not in _SIZES:
        raise errors.UserError(f"policy size {name!r} is unknown: use one of {sorted(_SIZES)}")
    return PolicyConfig(**{**_SIZES[name], **changes})
