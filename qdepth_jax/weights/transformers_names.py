"""Rows for the modules of Hugging Face `transformers` that other code bases build on: SigLIP tower, Gemma layers.

Torch layout: linears [out, in], convolutions [out, in, kh, kw], one key for each layer. Names as in transformers'
modeling_siglip.py, modeling_gemma.py and modeling_gemma2.py (4.41 to 5).
"""

import re
from collections.abc import Mapping

from qdepth_jax import errors
from qdepth_jax.models import siglip
from qdepth_jax.weights import big_vision_names
from qdepth_jax.weights.table import CONV, HEADS_IN, LINEAR, OUT, POSITIONS, VISION_IN, VISION_IN_BIAS, Row, dense


def vision(tower: str, projector: str) -> list[Row]:
    """SigLIP tower below `tower` and the linear projector below `projector` (keys with their final dot)."""
    layer, block = tower + "encoder.layers.{i}.", "img/Transformer/encoderblock/"
    attention = block + "MultiHeadDotProductAttention_0/"
    rows = [
        Row(tower + "embeddings.patch_embedding.weight", "img/embedding/kernel", **CONV),
        Row(tower + "embeddings.patch_embedding.bias", "img/embedding/bias"),
        Row(tower + "embeddings.position_embedding.weight", "img/pos_embedding", **POSITIONS),
        Row(layer + "self_attn.out_proj.weight", attention + "out/kernel", **OUT),
        Row(layer + "self_attn.out_proj.bias", attention + "out/bias"),
        Row(tower + "post_layernorm.weight", "img/Transformer/encoder_norm/scale"),
        Row(tower + "post_layernorm.bias", "img/Transformer/encoder_norm/bias"),
        *dense(layer + "mlp.fc1", block + "MlpBlock_0/Dense_0"),
        *dense(layer + "mlp.fc2", block + "MlpBlock_0/Dense_1"),
        *dense(projector + "linear", "img/head"),
    ]
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rows.append(Row(f"{layer}self_attn.{short}_proj.weight", f"{attention}{name}/kernel", **VISION_IN))
        rows.append(Row(f"{layer}self_attn.{short}_proj.bias", f"{attention}{name}/bias", **VISION_IN_BIAS))
    for number in (0, 1):
        rows.append(Row(f"{layer}layer_norm{number + 1}.weight", f"{block}LayerNorm_{number}/scale"))
        rows.append(Row(f"{layer}layer_norm{number + 1}.bias", f"{block}LayerNorm_{number}/bias"))
    return rows


# Norms of one layer: theirs -> ours. Gemma-2 gave an old name a new meaning.
GEMMA_NORMS = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
GEMMA2_NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gemma(
    layers: str, expert: str, copies: tuple[str, ...] = (), post_norms: bool = False, adaptive: bool = False
) -> list[Row]:
    """All layers of one expert.

    Args:
      layers: key up to the layer's number, with its final dot; `{copy}` in it stands for one of `copies`.
      expert: our name.
      post_norms: Gemma-2. adaptive: norms that are a linear map of the flow time (`dense`, as in openpi's port).
    """
    source, target = layers + "{i}.", f"llm/layers/{expert}/"
    rows = [
        Row(source + "self_attn.q_proj.weight", target + "attn/q_einsum/w", copies=copies, **HEADS_IN),
        Row(source + "self_attn.k_proj.weight", target + "attn/kv_einsum/w", part=(0,), copies=copies, **HEADS_IN),
        Row(source + "self_attn.v_proj.weight", target + "attn/kv_einsum/w", part=(1,), copies=copies, **HEADS_IN),
        Row(source + "self_attn.o_proj.weight", target + "attn/attn_vec_einsum/w", copies=copies, **OUT),
        Row(source + "mlp.gate_proj.weight", target + "mlp/gating_einsum", part=(0,), copies=copies, **LINEAR),
        Row(source + "mlp.up_proj.weight", target + "mlp/gating_einsum", part=(1,), copies=copies, **LINEAR),
        Row(source + "mlp.down_proj.weight", target + "mlp/linear", copies=copies, **LINEAR),
    ]
    for theirs, ours in (GEMMA2_NORMS if post_norms else GEMMA_NORMS).items():
        if adaptive:
            rows += dense(f"{source}{theirs}.dense", f"{target}{ours}/Dense_0")
        else:
            rows.append(Row(f"{source}{theirs}.weight", f"{target}{ours}/scale", copies=copies))
    return rows


# SigLIP width -> heads, where no config tells them (big_vision models/vit.py, decode_variant). Gemma's head size is 256
# in all trunks but the 27B one.
VISION_HEADS = {768: 12, 1024: 16, 1152: 16}
HEAD_DIM = 256


def stacked(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many layers there are below `prefix`."""
    numbers = [int(m[1]) for key in shapes if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))]
    return 1 + max(numbers, default=-1)


def vision_config(shapes: Mapping[str, tuple[int, ...]], tower: str, heads: int = 0) -> siglip.SiglipConfig:
    """SigLIP's sizes from the shapes below `tower`; heads 0 = those of the known tower of this width.

    Raises:
      UserError: no known tower has this width.
    """
    width, _, patch, _ = shapes[tower + "embeddings.patch_embedding.weight"]
    tokens = shapes[tower + "embeddings.position_embedding.weight"][0]
    heads = heads or VISION_HEADS.get(width, 0)
    if not heads:
        raise errors.UserError(
            f"the weights do not tell how many heads a vision tower of width {width} has, and none of the known ones "
            f"({VISION_HEADS}) is this wide: keep the config.json of the weights beside them"
        )
    return siglip.SiglipConfig(
        image_size=big_vision_names.image_side(tokens) * patch,
        patch=patch,
        width=width,
        depth=stacked(shapes, tower + "encoder.layers."),
        heads=heads,
        mlp=shapes[tower + "encoder.layers.0.mlp.fc1.weight"][0],
    )


def trunk_sizes(shapes: Mapping[str, tuple[int, ...]], layers: str, head_dim: int = 0) -> dict[str, int]:
    """layers, heads, kv_heads, head_dim, width and mlp of the Gemma layers below `layers`; head_dim 0 = 256."""
    head_dim = head_dim or HEAD_DIM
    q, k = (shapes[f"{layers}0.self_attn.{name}_proj.weight"] for name in "qk")
    if q[0] % head_dim or k[0] % head_dim:
        raise errors.UserError(
            f"q_proj {q} and k_proj {k} hold no whole heads of size {head_dim}: keep the config.json of the weights "
            "beside them, or say the size with --change=head_dim=N; else it is another model"
        )
    return {
        "layers": stacked(shapes, layers),
        "heads": q[0] // head_dim,
        "kv_heads": k[0] // head_dim,
        "head_dim": head_dim,
        "width": q[1],
        "mlp": shapes[f"{layers}0.mlp.up_proj.weight"][0],
    }
