"""PaliGemma 1 and 2 as Hugging Face `transformers` saves them (safetensors) to ours and back.

Keys have changed with transformers' versions; the first is what the published files and newer `save_pretrained` use:
  language_model.model.layers...  vision_tower.vision_model...  language_model.lm_head     published, up to 4.51
  model.language_model.layers...  model.vision_tower.vision_model...  lm_head              4.52 and later, in memory
  language_model.model.layers...  vision_tower.embeddings...                               saved by 5
`clean` brings all of them to one form. The output layer is the text embedding; a file may hold it once or twice. Text
embedding rows: 257,216 (PaliGemma 1: 257,152 and `<image>`, padded to 64) or 257,152 and more.

Sizes that shapes cannot show (heads, head size, soft-caps) come from the `config.json` beside the weights.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from qdepth_jax import errors
from qdepth_jax.models import gemma, paligemma
from qdepth_jax.weights import big_vision_names, transformers_names
from qdepth_jax.weights.table import Row

TITLE = "Hugging Face PaliGemma"
TOWER, PROJECTOR, LAYERS = "vision_tower.", "multi_modal_projector.", "language_model.model.layers."
EMBEDDING = ("language_model.model.embed_tokens.weight", "lm_head.weight")


def clean(key: str) -> str:
    """A key in the one form that the table knows."""
    key = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", key)
    key = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", key)
    key = key.replace("language_model.lm_head.", "lm_head.")
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", key)


def rows(config: paligemma.PaligemmaConfig) -> tuple[Row, ...]:
    """The table of a PaliGemma."""
    return (
        Row("{copy}", "llm/embedder/input_embedding", copies=EMBEDDING),
        *transformers_names.vision(TOWER, PROJECTOR),
        *transformers_names.gemma(LAYERS, "vlm", post_norms=config.vlm.post_norms),
        Row("language_model.model.norm.weight", "llm/final_norm_vlm/scale"),
    )


def published(key: str) -> str:
    """A key of the table as in the published files."""
    key = key.replace("vision_tower.", "vision_tower.vision_model.", 1) if key.startswith("vision_tower.") else key
    return "language_model." + key if key.startswith("lm_head.") else key


def config_of(
    specs: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    head_dim: int = 0,
    vision_heads: int = 0,
    **changes: Any,
) -> paligemma.PaligemmaConfig:
    """The PaligemmaConfig of some weights.

    Args:
      specs: key -> anything with a shape.
      about: their config.json; None assumes the conventions of the published models of these sizes.
      head_dim, vision_heads: 0 = what `about` says, else those of the published models.
      changes: fields that replace what is found.

    Raises:
      UserError: the weights lack the arrays that tell their sizes, or the config is one of another model.
    """
    first = LAYERS + "0.self_attn.q_proj.weight"
    shapes = big_vision_names.shapes_of(specs, clean, TITLE, (first, TOWER + "embeddings.patch_embedding.weight"))
    about = about or {}
    text, vision = about.get("text_config", {}), about.get("vision_config", {})
    if about and about.get("model_type") != "paligemma":
        raise errors.UserError(f"config.json is one of a {about.get('model_type')!r}, not of a paligemma")
    post_norms = LAYERS + "0.post_feedforward_layernorm.weight" in shapes
    width, heads = shapes[first][1], text.get("num_attention_heads", 0)
    for field in ("num_attention_heads", "head_dim"):
        if not isinstance(text.get(field) or 0, int):
            raise errors.UserError(f"config.json: {field}={text[field]!r} must be a whole number")
    head_dim = head_dim or text.get("head_dim") or (shapes[first][0] // heads if heads else 128 if width == 4608 else 0)
    found = transformers_names.trunk_sizes(shapes, LAYERS, head_dim)
    _check_about(text, found)
    theta = text.get("rope_theta") or text.get("rope_parameters", {}).get("rope_theta") or 10_000.0
    expert = gemma.ExpertConfig(found.pop("width"), found.pop("mlp"), theta, post_norms=post_norms)
    embedding = next((shapes[key] for key in EMBEDDING if key in shapes), None)
    if embedding is None:
        raise errors.UserError(f"no {TITLE} weights: none of {EMBEDDING} is there")
    sizes = {
        "siglip": transformers_names.vision_config(shapes, TOWER, vision_heads or vision.get("num_attention_heads", 0)),
        "vlm": expert,
        "vocabulary": embedding[0],
        **found,
    }
    sizes |= _conventions(sizes, text)
    return paligemma.PaligemmaConfig(**{**sizes, **changes})


def _check_about(text: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """Refuses a text config that contradicts the weights, or asks for what this trunk does not do."""
    wrong = []
    sizes = {
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "intermediate_size": "mlp",
    }
    for field, name in sizes.items():
        if field in text and text[field] != found[name]:
            wrong.append(f"{field}={text[field]!r}, the weights have {found[name]}")
    for field in ("hidden_activation", "hidden_act"):
        # Gemma's first configs say "gelu" and were run with the tanh form all the same (transformers, GemmaConfig).
        if text.get(field) not in (None, "gelu_pytorch_tanh", "gelu", "gelu_tanh"):
            wrong.append(f"{field}={text[field]!r}: this trunk has gelu_pytorch_tanh")
    for field in ("rope_scaling", "rope_parameters"):
        kind = (text.get(field) or {}).get("rope_type", "default")
        if kind != "default":
            wrong.append(f"{field}.rope_type={kind!r}: this trunk turns positions without scaling")
    if wrong:
        raise errors.UserError("config.json does not fit these weights:\n  " + "\n  ".join(wrong))


def _conventions(sizes: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Soft-caps and scales: from the text config, else those of the published PaliGemma 2.

    transformers' Gemma-2 has a window of 4096 in every other layer; its PaliGemma attends both ways inside the prefix,
    and shorter sequences than the window never notice it.
    """
    if not sizes["vlm"].post_norms:
        return {"norm_eps": text.get("rms_norm_eps", 1e-6)}
    scale = text.get("query_pre_attn_scalar") or sizes["vlm"].width // sizes["heads"]
    if not text and sizes["head_dim"] == transformers_names.HEAD_DIM:
        scale = 0
    return {
        "norm_eps": text.get("rms_norm_eps", 1e-6),
        "softcap": float(text.get("attn_logit_softcapping", 50.0) or 0.0),
        "final_softcap": float(text.get("final_logit_softcapping", 30.0) or 0.0),
        "query_scale": 0.0 if scale == sizes["head_dim"] else float(scale),
        "window": 0
        if "sliding_attention" not in (text.get("layer_types") or ["sliding_attention"])
        else int(text.get("sliding_window", 4096) or 0),
    }


def read_about(path: str) -> dict[str, Any] | None:
    """The config.json beside weights (a folder, or a file in it); None where there is none."""
    where = epath.Path(path)
    beside = (where if where.is_dir() else where.parent) / "config.json"
    if not beside.exists():
        return None
    try:
        return json.loads(beside.read_text())
    except ValueError as error:
        raise errors.UserError(f"{beside} is no JSON: {error}") from error
