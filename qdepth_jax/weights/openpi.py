"""openpi's pi0 and pi0.5 (the Orbax item `params` of its checkpoints) to ours and back.

Source: commit 15a9616 of github.com/Physical-Intelligence/openpi, models/pi0.py and models/gemma.py. The vlm carries
big_vision's names, the action expert the same with `_1`. Checkpoints of training runs have a level `value` below each
array, released ones not. pi0 feeds [action, time] into its first time layer and we [time, action]: the halves of that
kernel's input rows change places on the way.
"""

import re
from collections.abc import Mapping
from typing import Any

from qdepth_jax import errors
from qdepth_jax.models import gemma, policy_config
from qdepth_jax.weights import big_vision_names as names
from qdepth_jax.weights.table import Row

TITLE = "openpi"
# Its cameras in the order of their tokens (models/model.py), under our names of views.
VIEWS = ("main", "left_wrist", "right_wrist")
ACT = "llm/layers/action/"


def clean(key: str) -> str:
    """A key without `params/` in front and `/value` behind."""
    return re.sub(r"^params/|/value$", "", key)


def _swap_halves(w):
    """Kernel [2D, E]: the first D input rows after the last D. Its own inverse."""
    return w.reshape(2, -1, w.shape[-1])[::-1].reshape(w.shape)


SWAPPED = {"load": lambda w, shape: _swap_halves(w), "save": _swap_halves}


def rows(config: policy_config.PolicyConfig) -> tuple[Row, ...]:
    """The table of a pi0 (or, with adaptive norms, a pi0.5)."""
    vlm, llm = "PaliGemma/llm/layers/", "PaliGemma/llm/"
    norm = ("Dense_0/kernel", "Dense_0/bias") if config.action_time == "adaptive" else ("scale",)
    experts = []
    for leaf in (*names.LAYER, *(f"{name}/scale" for name in names.NORMS)):
        experts.append(Row(vlm + leaf, f"llm/layers/vlm/{leaf}"))
    for leaf in names.LAYER:
        # attn/q_einsum/w -> attn/q_einsum_1/w, mlp/linear -> mlp_1/linear.
        level = 1 if leaf.startswith("attn") else 0
        levels = leaf.split("/")
        levels[level] += "_1"
        experts.append(Row(vlm + "/".join(levels), ACT + leaf))
    for name in names.NORMS:
        experts += [Row(f"{vlm}{name}_1/{leaf}", f"{ACT}{name}/{leaf}") for leaf in norm]
    return (
        *(Row(f"PaliGemma/img/{leaf}", f"img/{leaf}") for leaf in names.VISION),
        Row(llm + "embedder/input_embedding", "llm/embedder/input_embedding"),
        *experts,
        Row(llm + "final_norm/scale", "llm/final_norm_vlm/scale"),
        *(Row(f"{llm}final_norm_1/{leaf}", f"llm/final_norm_action/{leaf}") for leaf in norm),
        *_linear("action_in_proj", "action_encoder/linear_1"),
        *_linear("action_out_proj", "action_decoder"),
        *_around(config),
    )


def _around(config: policy_config.PolicyConfig) -> list[Row]:
    if config.action_time == "adaptive":
        return [*_linear("time_mlp_in", "time_encoder/linear_1"), *_linear("time_mlp_out", "time_encoder/linear_2")]
    return [
        *_linear("state_proj", "proprio_encoder"),
        Row("action_time_mlp_in/kernel", "action_encoder/linear_2/kernel", **SWAPPED),
        Row("action_time_mlp_in/bias", "action_encoder/linear_2/bias"),
        *_linear("action_time_mlp_out", "action_encoder/linear_3"),
    ]


def _linear(key: str, target: str) -> list[Row]:
    return [Row(f"{key}/{leaf}", f"{target}/{leaf}") for leaf in ("kernel", "bias")]


# What pi0's weights do not show: sizes of its training (models/pi0_config.py, __post_init__).
SIZES = {"pi0": {"text_length": 48, "horizon": 50}, "pi05": {"text_length": 200, "horizon": 50}}


def config_of(specs: Mapping[str, Any], **changes: Any) -> policy_config.PolicyConfig:
    """The PolicyConfig of a checkpoint: pi0.5 where its action expert has adaptive norms, else pi0.

    Args:
      specs: key -> anything with a shape.
      changes: fields that replace what is found or assumed: views, text_length and horizon are not in the weights.

    Raises:
      UserError: LoRA weights, or the checkpoint lacks the arrays that tell its sizes.
    """
    q = "PaliGemma/llm/layers/attn/q_einsum/w"
    shapes = names.shapes_of(specs, clean, TITLE, (q, "PaliGemma/img/pos_embedding", "action_in_proj/kernel"))
    if lora := [key for key in specs if "lora" in key]:
        raise errors.UserError(f"{len(lora)} LoRA arrays ({lora[0]}, ...): merge them into the weights first")
    layers, heads, width, head_dim = shapes[q]
    adaptive = "PaliGemma/llm/final_norm_1/Dense_0/kernel" in shapes
    name = "pi05" if adaptive else "pi0"
    action = shapes["action_in_proj/kernel"]
    linear = "PaliGemma/llm/layers/mlp{}/linear"
    sizes = {
        "siglip": names.vision_config(shapes, "PaliGemma/img/"),
        "vlm": gemma.ExpertConfig(width=width, mlp=shapes[linear.format("")][1]),
        "action": gemma.ExpertConfig(width=action[1], mlp=shapes[linear.format("_1")][1]),
        "layers": layers,
        "heads": heads,
        "kv_heads": shapes["PaliGemma/llm/layers/attn/kv_einsum/w"][2],
        "head_dim": head_dim,
        "vocabulary": shapes["PaliGemma/llm/embedder/input_embedding"][0],
        "action_dim": action[0],
        "views": VIEWS,
        **SIZES[name],
    }
    if not adaptive:
        sizes["proprio_dim"] = shapes["state_proj/kernel"][0]
    return policy_config.PolicyConfig(**{"depth": None, **policy_config.CONVENTIONS[name], **sizes, **changes})
