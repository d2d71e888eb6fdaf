"""Names and shapes of big_vision's stacked SigLIP and Gemma, on which PaliGemma and openpi build."""

from collections.abc import Callable, Mapping
from typing import Any

from qdepth_jax import errors
from qdepth_jax.models import siglip
from qdepth_jax.weights import source

VISION = (
    "embedding/kernel",
    "embedding/bias",
    "pos_embedding",
    *(f"Transformer/encoderblock/LayerNorm_{n}/{leaf}" for n in (0, 1) for leaf in ("scale", "bias")),
    *(
        f"Transformer/encoderblock/MultiHeadDotProductAttention_0/{name}/{leaf}"
        for name in ("query", "key", "value", "out")
        for leaf in ("kernel", "bias")
    ),
    *(f"Transformer/encoderblock/MlpBlock_0/Dense_{n}/{leaf}" for n in (0, 1) for leaf in ("kernel", "bias")),
    "Transformer/encoder_norm/scale",
    "Transformer/encoder_norm/bias",
    "head/kernel",
    "head/bias",
)
LAYER = ("attn/q_einsum/w", "attn/kv_einsum/w", "attn/attn_vec_einsum/w", "mlp/gating_einsum", "mlp/linear")
NORMS, POST_NORMS = ("pre_attention_norm", "pre_ffw_norm"), ("post_attention_norm", "post_ffw_norm")


def vision_config(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> siglip.SiglipConfig:
    """SigLIP's sizes from the shapes of its stacked arrays below `prefix`."""
    block = prefix + "Transformer/encoderblock/"
    depth, width, heads, _ = shapes[block + "MultiHeadDotProductAttention_0/query/kernel"]
    patch, tokens = shapes[prefix + "embedding/kernel"][0], shapes[prefix + "pos_embedding"][1]
    return siglip.SiglipConfig(
        image_size=image_side(tokens) * patch,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp=shapes[block + "MlpBlock_0/Dense_0/kernel"][2],
    )


def image_side(tokens: int) -> int:
    """Patches along one side.

    Raises:
      UserError: they are not those of a square.
    """
    side = round(tokens**0.5)
    if side**2 != tokens:
        raise errors.UserError(f"{tokens} position embeddings are no square of patches: another vision tower?")
    return side


class Shapes(dict):
    """Key -> shape; one that is asked for and not there is a message. title: of the weights."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], title: str):
        super().__init__(shapes)
        self._title = title

    def __missing__(self, key: str):
        there = ", ".join(sorted(self)[:5])
        raise errors.UserError(f"no {self._title} weights: {key} is not there; found {len(self)} arrays: {there}, ...")


def shapes_of(specs: Mapping[str, Any], clean: Callable[[str], str], title: str, needed: tuple[str, ...]) -> Shapes:
    """Key as in the table -> shape.

    Raises:
      UserError: one of the needed keys is not there.
    """
    shapes = Shapes({clean(key): spec.shape for key, spec in source.specs_of(specs).items()}, title)
    for key in needed:
        shapes[key]  # raises
    return shapes
