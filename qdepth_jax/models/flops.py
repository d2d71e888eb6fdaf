"""Floating point operations of one training example by formula: the numerator of every model FLOP utilisation.

XLA's own count sees the body of a scanned stack once, so at full size it reports a twentieth. Counted here are matrix
products, 2 for each multiply-add; norms, activations and softmax are left out (a percent or two at full size).
Attention is counted densely, masked entries included, because that is what runs.

The backward pass of a product y = x W costs one product for x's gradient and one for W's: twice the forward pass, save
where the input is data (patches, noisy actions, proprio: no gradient for x) or the weight is frozen (the codes).
"""

from typing import NamedTuple

from qdepth_jax import errors
from qdepth_jax.models import policy_config, siglip, tokenizer_config

# Which forward work each policy of stack.REMAT repeats in the backward pass, by field of `Part`.
RECOMPUTE: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("dense", "batched"),
    "attention": ("around",),
    "dots": ("batched",),
}


class Part(NamedTuple):
    """FLOPs of one part of the model for one example.

    Attributes:
      forward, backward: what training needs.
      dense: forward products of weights that a layer's backward pass asks for again (all but the last of a layer).
      batched: the same for products of two activations (attention).
      around: what of both is left where queries, keys, values and the result of attention are kept: logits, and the
        products after attention but the last.
      unread: forward + backward that a scanned stack spends on results nobody reads: the vlm's last layer, and the
        depth expert's where no loss reads it.
      unread_dense, unread_batched, unread_around: `dense`, `batched` and `around` of that work.
    """

    forward: float
    backward: float
    dense: float = 0.0
    batched: float = 0.0
    around: float = 0.0
    unread: float = 0.0
    unread_dense: float = 0.0
    unread_batched: float = 0.0
    unread_around: float = 0.0

    @property
    def model(self) -> float:
        """Forward + backward: the FLOPs that count for utilisation."""
        return self.forward + self.backward


def policy(config: policy_config.PolicyConfig) -> dict[str, Part]:
    """Part name -> FLOPs of one example of a policy; every weight but the text embedding and the codes is trained."""
    tower, sizes, h = config.siglip, config.sizes, config.head_dim
    pictures, p = config.pictures, config.siglip.tokens
    parts = {"SigLIP": _vision(tower, pictures), "SigLIP attention": _vision_attention(tower, pictures)}

    tokens = {"vlm": sizes["image"] + sizes["text"], "action": sizes["proprio"] + sizes["action"]}
    if config.depth is not None:
        tokens["depth"] = sizes["depth"]
    total = sum(tokens.values())
    # Only its keys and values of such an expert's last layer reach anybody.
    silent = {"vlm"} if config.depth_labels is not None or config.depth is None else {"vlm", "depth"}
    for name, expert in config.mixture.experts:
        t, d = tokens[name], expert.width
        kv = 2 * t * d * 2 * config.kv_heads * h
        after = 2 * t * d * (config.heads * h + 2 * expert.mlp)  # output, gate and up
        inner = 2 * t * d * config.heads * h + after  # with the query
        down = 2 * t * expert.mlp * d
        layers = config.layers - (name in silent)
        forward = config.layers * kv + layers * (inner + down)
        wasted = config.scan and name in silent
        parts[f"{name} expert"] = Part(
            forward,
            2 * forward,
            dense=config.layers * kv + layers * inner,
            around=layers * after,
            unread=3 * (inner + down) * wasted,
            unread_dense=inner * wasted,
            unread_around=after * wasted,
        )
    query = 2 * 2 * config.heads * h * total  # one token with all keys and all values
    still = sum(tokens[name] for name in silent)
    forward, wasted = query * (config.layers * total - still), query * still * config.scan
    parts["joint attention"] = Part(
        forward,
        2 * forward,
        batched=forward,
        around=forward / 2,
        unread=3 * wasted,
        unread_batched=wasted,
        unread_around=wasted / 2,
    )

    width = config.action.width
    heads = [
        _trained(2 * pictures * p * tower.width * config.vlm.width),  # projector
        _first(2 * sizes["proprio"] * config.proprio_dim * width),
        _first(2 * config.horizon * config.action_dim * width),
        # The time's half of the second layer's input needs no gradient, but it is one product with the other half's.
        # Adaptive norms take the time once for each example: its MLP, and a dense layer to 3 D for each norm.
        _trained(2 * config.horizon * (2 * width * width + width * width))
        if config.action_time == "concat"
        else _trained(2 * (2 + 3 * (2 * config.layers + 1)) * width * width),
        _trained(2 * config.horizon * width * config.action_dim),
    ]
    parts["action heads, projector"] = _add(heads)
    if config.depth is not None:
        parts["depth heads"] = _add(_depth_heads(config))
    return parts


def _vision(tower: siglip.SiglipConfig, pictures: int) -> Part:
    p, d = pictures * tower.tokens, tower.width
    embedding = _first(2 * p * tower.patch**2 * 3 * d)
    inner = tower.depth * (2 * p * 4 * d * d + 2 * p * d * tower.mlp)
    after = tower.depth * (2 * p * d * d + 2 * p * d * tower.mlp)
    down = tower.depth * 2 * p * d * tower.mlp
    return _add([embedding, Part(inner + down, 2 * (inner + down), dense=inner, around=after)])


def _vision_attention(tower: siglip.SiglipConfig, pictures: int) -> Part:
    forward = tower.depth * pictures * 2 * 2 * tower.tokens**2 * tower.width
    return Part(forward, 2 * forward, batched=forward, around=forward / 2)


def _depth_heads(config: policy_config.PolicyConfig) -> list[Part]:
    depth, p = config.depth, config.siglip.tokens
    d = depth.expert.width
    parts = [
        _trained(2 * p * (config.siglip.width * d + d * d)),
        _trained(2 * _taps(depth.grid) * (d * depth.conv_width + depth.conv_width * depth.outputs)),
    ]
    if config.depth_labels == "codes":
        product = 2 * p * depth.codes * depth.code_dim
        parts.append(Part(product, product))  # the codes are frozen
    if config.depth_labels is None:
        # Without a loss on depth its decoder feeds nobody, and the compiler drops it.
        return parts[:1]
    return parts


def tokenizer(config: tokenizer_config.TokenizerConfig) -> dict[str, Part]:
    """Part name -> FLOPs of one depth map of a tokenizer."""
    stem, encoder, decoder = tokenizer_config.STEM, [], []
    channels, side = 2 * stem * stem, config.depth_size // stem
    for level, width in enumerate(config.widths):
        side = side if level == 0 else side // 2
        down = 2 * (_taps(side) if level == 0 else 9 * side * side) * channels * width
        encoder.append(_first(down) if level == 0 else _trained(down))
        block = config.blocks * 2 * (_taps(side) + side * side) * width * width
        encoder.append(_trained(block))
        decoder.append(_trained(block))
        if level > 0:
            decoder.append(_trained(2 * side * side * width * 4 * config.widths[level - 1]))
        channels = width
    last, tokens, features = config.widths[-1], config.grid**2, config.feature_dim
    encoder.append(_trained(2 * tokens * last * features))
    decoder.append(_trained(2 * _taps(config.grid) * features * last))
    decoder.append(_trained(2 * _taps(config.depth_size // stem) * config.widths[0] * stem * stem))
    parts = {"encoder": _add(encoder), "decoder": _add(decoder)}
    if config.quantiser != "fsq":
        distances = 2 * tokens * config.num_codes * features
        parts["nearest code"] = Part(distances, 0.0)
    return parts


def _taps(side: int) -> int:
    """Pairs of (output, input) of a padded 3x3 convolution with stride 1 on a square grid: no product with padding."""
    return (3 * side - 2) ** 2


def model_flops(parts: dict[str, Part]) -> float:
    """Forward + backward of one example, without recomputation: what MFU counts (Objective.flops)."""
    return float(sum(part.model for part in parts.values()))


def recomputed(parts: dict[str, Part], remat: str) -> float:
    """Forward FLOPs that the backward pass repeats under a policy of stack.REMAT.

    Raises:
      UserError: a policy that is not in RECOMPUTE.
    """
    if remat not in RECOMPUTE:
        raise errors.UserError(f"no FLOP count for remat policy {remat!r}: use one of {sorted(RECOMPUTE)}")
    return float(sum(getattr(part, name) for part in parts.values() for name in RECOMPUTE[remat]))


def unread(parts: dict[str, Part], remat: str) -> float:
    """What a scanned stack spends on results that nobody reads, its own recomputation included."""
    again = sum(getattr(part, f"unread_{name}") for part in parts.values() for name in RECOMPUTE[remat])
    return float(again + sum(part.unread for part in parts.values()))


def _trained(product: float) -> Part:
    return Part(product, 2 * product)


def _first(product: float) -> Part:
    """A layer whose input is data."""
    return Part(product, product)


def _add(parts: list[Part]) -> Part:
    return Part(*(sum(column) for column in zip(*parts, strict=True)))
