"""Official PaliGemma files of big_vision (npz), PaliGemma 1 and 2, to ours and back.

Source: commit 0127fb6 of github.com/google-research/big_vision, models/vit.py and models/ppp/gemma.py with `scan`:
names and shapes are ours but for the place of the language model's layers. Keys carry `params/`, `opt/target/` or
nothing in front. Text embedding rows: 257,152. Files of 448 and 896 pixels differ in the positions alone.
"""

import re
from collections.abc import Mapping
from typing import Any

from qdepth_jax.models import gemma, paligemma
from qdepth_jax.weights import big_vision_names as names
from qdepth_jax.weights.table import Row

TITLE = "big_vision PaliGemma"


def clean(key: str) -> str:
    """A key without the prefix that a file may put before all of them."""
    return re.sub(r"^(params|opt/target)/", "", key)


def rows(config: paligemma.PaligemmaConfig) -> tuple[Row, ...]:
    """The table of a PaliGemma."""
    norms = names.NORMS + (names.POST_NORMS if config.vlm.post_norms else ())
    layer = (*names.LAYER, *(f"{name}/scale" for name in norms))
    return (
        *(Row(f"img/{leaf}", f"img/{leaf}") for leaf in names.VISION),
        Row("llm/embedder/input_embedding", "llm/embedder/input_embedding"),
        *(Row(f"llm/layers/{leaf}", f"llm/layers/vlm/{leaf}") for leaf in layer),
        Row("llm/final_norm/scale", "llm/final_norm_vlm/scale"),
    )


def config_of(specs: Mapping[str, Any], **changes: Any) -> paligemma.PaligemmaConfig:
    """The PaligemmaConfig of a file.

    Args:
      specs: key -> anything with a shape.
      changes: fields that replace what is found (dtype, scan, ...).

    Raises:
      UserError: the file lacks the arrays that tell its sizes.
    """
    shapes = names.shapes_of(specs, clean, TITLE, ("img/pos_embedding", "llm/layers/attn/q_einsum/w"))
    layers, heads, width, head_dim = shapes["llm/layers/attn/q_einsum/w"]
    found = {
        "siglip": names.vision_config(shapes, "img/"),
        "vlm": gemma.ExpertConfig(
            width=width,
            mlp=shapes["llm/layers/mlp/linear"][1],
            post_norms="llm/layers/post_ffw_norm/scale" in shapes,
        ),
        "layers": layers,
        "heads": heads,
        "kv_heads": shapes["llm/layers/attn/kv_einsum/w"][2],
        "head_dim": head_dim,
        "vocabulary": shapes["llm/embedder/input_embedding"][0],
    }
    return paligemma.PaligemmaConfig(**{**found, **paligemma_conventions(found), **changes})


def paligemma_conventions(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes of a PaliGemma do not show: of its Gemma-2 trunks, attention soft-cap 50, and in the 27B one
    queries divided by sqrt(width / heads) instead of sqrt(head_dim).

    Source: big_vision models/ppp/gemma.py, get_config. The final soft-cap is off, as in the PaliGemma 2 transfer
    configs; windows are not implemented there.
    """
    if not sizes["vlm"].post_norms:
        return {}
    width, heads = sizes["vlm"].width, sizes["heads"]
    return {"softcap": 50.0, "query_scale": float(width // heads) if (width, heads) == (4608, 32) else 0.0}
