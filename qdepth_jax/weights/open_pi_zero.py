"""Parameters of the PyTorch code base open-pi-zero to ours and back, by one table.

Source: commit c3df7fb of github.com/allenzren/open-pi-zero, state dict `model` of its checkpoints: linears [out, in],
convolutions [out, in, kh, kw]. `mixtures.proprio` and `mixtures.action` are one module saved twice; a file may hold
either or both, and both must then be equal. Text embedding rows: 257,216.

Compiled models were saved with `_orig_mod.` in their keys.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qdepth_jax.models import gemma, policy_config
from qdepth_jax.weights import big_vision_names, source, table, transformers_names
from qdepth_jax.weights.table import Loaded, Row, dense

TITLE = "open-pi-zero"
# One module under two names.
SHARED = ("action", "proprio")

TABLE: tuple[Row, ...] = (
    Row("embed_tokens.weight", "llm/embedder/input_embedding"),
    *transformers_names.vision("vision_tower.vision_model.", "multi_modal_projector."),
    *transformers_names.gemma("joint_model.mixtures.vlm.layers.", "vlm"),
    *transformers_names.gemma("joint_model.mixtures.{copy}.layers.", "action", copies=SHARED),
    Row("joint_model.mixtures.{copy}.norm.weight", "llm/final_norm_action/scale", copies=SHARED),
    *dense("action_encoder.linear_1", "action_encoder/linear_1"),
    *dense("action_encoder.linear_2", "action_encoder/linear_2"),
    *dense("action_encoder.linear_3", "action_encoder/linear_3"),
    *dense("proprio_encoder", "proprio_encoder"),
    *dense("action_decoder", "action_decoder"),
)


def rows(config: policy_config.PolicyConfig) -> tuple[Row, ...]:
    """The table; the same for every config."""
    del config
    return TABLE


def config_of(
    specs: Mapping[str, Any], head_dim: int = 0, vision_heads: int = 0, **changes: Any
) -> policy_config.PolicyConfig:
    """The PolicyConfig of a checkpoint, with the conventions of open-pi-zero's released models.

    Those have theta and time period 10,000 (config/eval/*.yaml); models trained with its present training configs have
    100 in both (config/train/*.yaml). No file of weights says which.

    Args:
      specs: key -> anything with a shape.
      head_dim, vision_heads: 0 = those of PaliGemma, the only ones it was trained with.
      changes: fields that replace what is found or assumed: horizon (4), text_length (20), flow, rope_theta of the
        experts are not in the weights.

    Raises:
      UserError: the file lacks the arrays that tell its sizes.
    """
    vlm, action = "joint_model.mixtures.vlm.layers.", "joint_model.mixtures.action.layers."
    tower = "vision_tower.vision_model."
    needed = (vlm + "0.self_attn.q_proj.weight", tower + "embeddings.patch_embedding.weight", "embed_tokens.weight")

    def one_name(key: str) -> str:
        return clean(key).replace("mixtures.proprio.", "mixtures.action.")

    shapes = big_vision_names.shapes_of(specs, one_name, TITLE, (*needed, action + "0.self_attn.q_proj.weight"))
    found = transformers_names.trunk_sizes(shapes, vlm, head_dim)
    expert = transformers_names.trunk_sizes(shapes, action, head_dim)
    sizes = {
        "siglip": transformers_names.vision_config(shapes, tower, vision_heads),
        "vlm": gemma.ExpertConfig(found.pop("width"), found.pop("mlp")),
        "action": gemma.ExpertConfig(expert["width"], expert["mlp"]),
        **found,
        "vocabulary": shapes["embed_tokens.weight"][0],
        "action_dim": shapes["action_encoder.linear_1.weight"][1],
        "proprio_dim": shapes["proprio_encoder.weight"][1],
    }
    convention = policy_config.CONVENTIONS["open_pi_zero"]
    return policy_config.PolicyConfig(**{"depth": None, **convention, **sizes, **changes})


def clean(key: str) -> str:
    """A key without what torch.compile puts before it (open-pi-zero: before the whole name)."""
    return key.replace("_orig_mod.", "")


def load(
    weights: source.Source | Mapping[str, np.ndarray],
    shapes: Any,
    on_read: Callable[[str, int], None] = lambda path, size: None,
) -> Loaded:
    """A state dict as our parameters, see table.load.

    Args:
      weights: key -> array, or a reader's Source.
      shapes: our parameter tree, arrays or ShapeDtypeStructs (`jax.eval_shape` of init), with or without shardings.

    Returns:
      The parameters. Leaves of ours that no row of the table names (the depth expert's) are listed as missing.

    Raises:
      UserError: unknown or duplicate keys, unequal copies, wrong shapes, gaps in a leaf.
    """
    return table.load(weights, TABLE, shapes, TITLE, clean, on_read)


def save(params: Any, copies: tuple[str, ...] = SHARED) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) as a float32 state dict; the inverse of `load`. Leaves without a row are left out.

    Args:
      params: nested dict of arrays.
      copies: names under which the shared expert is written.
    """
    saved = table.save(params, TABLE, copies_of(copies))
    return {key: np.asarray(array, np.float32) for key, array in saved}


def copies_of(names: tuple[str, ...] = SHARED) -> Callable[[Row], tuple[str, ...]]:
    """Which names of the shared expert table.save and table.keys write; a checkpoint of theirs has both."""
    return lambda row: names if row.copies else ()
