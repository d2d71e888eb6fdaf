"""Golden vectors of big_vision's PaliGemma: its parameters in, image tokens, embeddings, pre-logits, logits compared.

Arrays: `params/...` as in the official files; `ref/image` f32 [B, S, S, 3], `ref/tokens` i32 [B, L], `ref/input_mask`
bool [B, L]; the outputs `ref/image_tokens`, `ref/prefix_embeddings`, `ref/pre_logits` and `ref/logits` of the prefix,
all of it seen in both directions and rows of padding unspecified; optionally `ref/text_logits_no_padding_mask`, with
every token valid. `ref/config` is JSON.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax.models import paligemma
from qdepth_jax.weights import big_vision, parity, table

# Golden output -> field of paligemma.Output.
OUTPUTS = {
    "image_tokens": "image_tokens",
    "prefix_embeddings": "embeddings",
    "pre_logits": "pre_logits",
    "logits": "logits",
}
NEEDED = tuple(f"ref/{name}" for name in ("config", "image", "tokens", "input_mask", *OUTPUTS))
WITHOUT_PADDING = "text_logits_no_padding_mask"


def compare(arrays: dict[str, np.ndarray], absolute: float, relative: float) -> list[parity.Row]:
    """Runs our model on the file's inputs; one row for each output."""
    del relative  # no losses here
    config, params = model_from(arrays)
    image, text, valid = (jnp.asarray(arrays[f"ref/{name}"]) for name in ("image", "tokens", "input_mask"))
    forward = jax.jit(lambda p, v: paligemma.forward(config, p, image, text, v))
    out = forward(params, valid)
    there = np.pad(arrays["ref/input_mask"], ((0, 0), (config.siglip.tokens, 0)), constant_values=True)
    rows = [
        parity.absolute(
            name, getattr(out, field), arrays[f"ref/{name}"], absolute, None if name == "image_tokens" else there
        )
        for name, field in OUTPUTS.items()
    ]
    if f"ref/{WITHOUT_PADDING}" in arrays:
        whole = forward(params, jnp.ones_like(valid)).logits[:, config.siglip.tokens :]
        rows.append(parity.absolute(WITHOUT_PADDING, whole, arrays[f"ref/{WITHOUT_PADDING}"], absolute))
    return rows


def model_from(arrays: dict[str, np.ndarray]) -> tuple[paligemma.PaligemmaConfig, dict]:
    """The PaligemmaConfig of the file, and its parameters as ours."""
    c = parity.description(arrays, "ref/config")
    weights = {name: array for name, array in arrays.items() if name.startswith("params/")}
    said = {
        ours: c[theirs]
        for theirs, ours in (
            ("attn_logits_softcap", "softcap"), ("final_logits_softcap", "final_softcap"), ("norm_eps", "norm_eps"),
        )
        if c.get(theirs) is not None
    }  # fmt: skip
    config = big_vision.config_of(weights, **said)
    shapes = jax.eval_shape(lambda: paligemma.init(config, jax.random.key(0)))["params"]
    params = table.load(weights, big_vision.rows(config), shapes, big_vision.TITLE, big_vision.clean).params
    return config, jax.tree.map(jnp.asarray, params)
