"""lerobot's pi0 and pi0.5 (safetensors of its PyTorch port) to ours and back.

Source: github.com/huggingface/lerobot, policies/pi0/modeling_pi0.py and policies/pi05 (August 2026), and openpi's own
port, which has the same names without `model.` in front. Inside are transformers' PaliGemma (every key layout of it,
see hf_paligemma.py) and Gemma. The expert's own output layer is never used, nor are the statistics that early versions
saved beside the weights; they are listed as unused.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from qdepth_jax import errors
from qdepth_jax.models import gemma, policy_config
from qdepth_jax.weights import big_vision_names, hf_paligemma, openpi, transformers_names
from qdepth_jax.weights.table import Row, dense

TITLE = "lerobot pi0"
VLM, EXPERT = "paligemma.", "gemma_expert.model."


def clean(key: str) -> str:
    """A key in the one form that the table knows."""
    key = key.removeprefix("model.").removeprefix("paligemma_with_expert.")
    return VLM + hf_paligemma.clean(key.removeprefix(VLM)) if key.startswith(VLM) else key


def _swapped(w):
    """Torch weight [E, 2D]: the first D inputs after the last D (pi0: action, time; we: time, action)."""
    return w.reshape(w.shape[0], 2, -1)[:, ::-1].reshape(w.shape)


SWAPPED = {"load": lambda w, shape: _swapped(w).T, "save": lambda w: _swapped(w.T)}


def rows(config: policy_config.PolicyConfig) -> tuple[Row, ...]:
    """The table of a pi0 (or, with adaptive norms, a pi0.5)."""
    adaptive = config.action_time == "adaptive"
    norm, target = EXPERT + "norm", "llm/final_norm_action"
    if adaptive:
        around = [
            *dense(norm + ".dense", target + "/Dense_0"),
            *dense("time_mlp_in", "time_encoder/linear_1"),
            *dense("time_mlp_out", "time_encoder/linear_2"),
        ]
    else:
        around = [
            Row(norm + ".weight", target + "/scale"),
            *dense("state_proj", "proprio_encoder"),
            Row("action_time_mlp_in.weight", "action_encoder/linear_2/kernel", **SWAPPED),
            Row("action_time_mlp_in.bias", "action_encoder/linear_2/bias"),
            *dense("action_time_mlp_out", "action_encoder/linear_3"),
        ]
    return (
        Row(VLM + "{copy}", "llm/embedder/input_embedding", copies=hf_paligemma.EMBEDDING),
        *transformers_names.vision(VLM + hf_paligemma.TOWER, VLM + hf_paligemma.PROJECTOR),
        *transformers_names.gemma(VLM + hf_paligemma.LAYERS, "vlm"),
        Row(VLM + "language_model.model.norm.weight", "llm/final_norm_vlm/scale"),
        *transformers_names.gemma(EXPERT + "layers.", "action", adaptive=adaptive),
        *around,
        *dense("action_in_proj", "action_encoder/linear_1"),
        *dense("action_out_proj", "action_decoder"),
        Row("gemma_expert.lm_head.weight", ""),
        Row("{copy}.{rest}", "", copies=("normalize_inputs", "normalize_targets", "unnormalize_outputs")),
    )


def config_of(
    specs: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    head_dim: int = 0,
    vision_heads: int = 0,
    **changes,
) -> policy_config.PolicyConfig:
    """The PolicyConfig of a checkpoint: pi0.5 where the action expert has adaptive norms, else pi0.

    Args:
      specs: key -> anything with a shape.
      about: its config.json (chunk_size, tokenizer_max_length, num_inference_steps or, before lerobot's #1910,
        num_steps).
      head_dim, vision_heads: 0 = those of PaliGemma.
      changes: fields that replace what is found or assumed.

    Raises:
      UserError: the checkpoint lacks the arrays that tell its sizes, or the config is one of another policy.
    """
    about = about or {}
    if about.get("type", "pi0") not in ("pi0", "pi05"):
        raise errors.UserError(f"config.json is one of a {about['type']!r} policy, not of pi0 or pi05")
    q = VLM + hf_paligemma.LAYERS + "0.self_attn.q_proj.weight"
    needed = (q, EXPERT + "layers.0.self_attn.q_proj.weight", "action_in_proj.weight")
    shapes = big_vision_names.shapes_of(specs, clean, TITLE, needed)
    name = "pi05" if EXPERT + "norm.dense.weight" in shapes else "pi0"
    found = transformers_names.trunk_sizes(shapes, VLM + hf_paligemma.LAYERS, head_dim)
    expert = transformers_names.trunk_sizes(shapes, EXPERT + "layers.", head_dim)
    embedding = next((shapes[VLM + key] for key in hf_paligemma.EMBEDDING if VLM + key in shapes), (0,))
    convention = policy_config.CONVENTIONS[name]
    steps = about.get("num_inference_steps", about.get("num_steps", convention["flow"].steps))
    sizes = {
        "flow": dataclasses.replace(convention["flow"], steps=steps),
        "siglip": transformers_names.vision_config(shapes, VLM + hf_paligemma.TOWER, vision_heads),
        "vlm": gemma.ExpertConfig(found.pop("width"), found.pop("mlp")),
        "action": gemma.ExpertConfig(expert["width"], expert["mlp"]),
        **found,
        "vocabulary": embedding[0],
        "action_dim": shapes["action_in_proj.weight"][1],
        "views": openpi.VIEWS,
        "horizon": about.get("chunk_size", openpi.SIZES[name]["horizon"]),
        "text_length": about.get("tokenizer_max_length", openpi.SIZES[name]["text_length"]),
    }
    if name == "pi0":
        sizes["proprio_dim"] = shapes["state_proj.weight"][1]
    return policy_config.PolicyConfig(**{"depth": None, **convention, **sizes, **changes})


def ported(key: str) -> str:
    """A key of the table as lerobot saves it (transformers 4.52 to 4.57)."""
    key = re.sub(r"^paligemma\.language_model\.model\.", "paligemma.model.language_model.", key)
    key = re.sub(r"^paligemma\.vision_tower\.", "paligemma.model.vision_tower.vision_model.", key)
    key = re.sub(r"^paligemma\.multi_modal_projector\.", "paligemma.model.multi_modal_projector.", key)
    return "model.paligemma_with_expert." + key if key.startswith(("paligemma.", "gemma_expert.")) else "model." + key
