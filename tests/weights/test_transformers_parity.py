"""PaliGemma 1 and 2 against Hugging Face's own code: logits and greedy tokens of small random models in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax import checkpoint, export_model
from qdepth_jax import config as config_lib
from qdepth_jax.models import paligemma
from qdepth_jax.weights import hf_paligemma, table

torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install torch transformers")
transformers = pytest.importorskip(
    "transformers", reason="needs torch and transformers: pip install torch transformers"
)

IMAGE_TOKEN, VOCABULARY, PATCHES, STEPS = 99, 100, 4, 16
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 4, "max_position_embeddings": 128, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
TRUNKS = {
    "PaliGemma": {"model_type": "gemma", "num_key_value_heads": 1, **SIZES},
    # A scale that is not head_dim, and a window that binds from the third written token on.
    "PaliGemma 2": {
        "model_type": "gemma2", "num_key_value_heads": 2, "query_pre_attn_scalar": 12, "sliding_window": 10,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **SIZES,
    },
}  # fmt: skip


def build(trunk, seed):
    """Their model, our config and its weights as ours."""
    vision = {
        "image_size": 28, "patch_size": 14, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 32, "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=trunk, vision_config=vision, image_token_index=IMAGE_TOKEN, projection_dim=32, hidden_size=32
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.PaliGemmaForConditionalGeneration(config).float().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norm scales and biases that matter; a table so small that tokens do not merely repeat themselves.
            size = 0.3 if weight.ndim == 1 else 0.08 if "embed_tokens" in name else 1.5 / weight.shape[-1] ** 0.5
            weight.copy_(torch.from_numpy(size * rng.normal(size=weight.shape).astype(np.float32)))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    ours = hf_paligemma.config_of(weights, config.to_dict())
    shapes = jax.eval_shape(lambda: paligemma.init(ours, jax.random.key(0)))["params"]
    loaded = table.load(weights, hf_paligemma.rows(ours), shapes, hf_paligemma.TITLE, hf_paligemma.clean)
    return model, ours, jax.tree.map(jnp.asarray, loaded.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUNKS)
def test_logits_and_greedy_tokens(name):
    model, config, params = build(TRUNKS[name], seed=3)
    assert config.vlm.post_norms == (name == "PaliGemma 2") and bool(config.window) == (name == "PaliGemma 2")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
    text = rng.integers(2, IMAGE_TOKEN, (2, 5)).astype(np.int32)
    valid = np.ones_like(text, bool)
    ids = torch.from_numpy(np.concatenate([np.full((2, PATCHES), IMAGE_TOKEN), text], axis=1)).long()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    given = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        theirs = model(input_ids=ids, **given).logits.numpy()
        ours = jax.jit(lambda p: paligemma.logits(config, p, images, text, valid))(params)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        assert theirs.std() > 0.1

        written = model.generate(input_ids=ids, **given, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        tokens = jax.jit(lambda p: paligemma.generate(config, p, images, text, valid, STEPS, eos=-1))(params)
        np.testing.assert_array_equal(tokens, written[:, ids.shape[1] :].numpy())
        assert len(np.unique(tokens)) > 6, tokens

        # The prompt and what was written, in one forward pass with a causal end.
        whole = np.concatenate([text, np.asarray(tokens)[:, :-1]], axis=1)
        causal = np.arange(whole.shape[1])[None].repeat(2, 0) >= text.shape[1]
        again = jax.jit(lambda p: paligemma.logits(config, p, images, whole, np.ones_like(causal), causal))(params)
        np.testing.assert_array_equal(jnp.argmax(again[:, PATCHES + text.shape[1] - 1 :], axis=-1), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRUNKS, "PaliGemma 2 without windows"])
def test_an_export_is_read_by_transformers(name, tmp_path):
    """Our folder, opened by their own from_pretrained: no key missing, the same logits, and tokens written."""
    trunk = TRUNKS[name.removesuffix(" without windows")]
    _, config, params = build(trunk, seed=5)
    if name.endswith("without windows"):  # as big_vision's files are imported
        config = dataclasses.replace(config, window=0)
    experiment = {"name": "x", "model_kind": "paligemma", "model": config_lib.to_json(config_lib.section(config))}
    checkpoint.save_params(str(tmp_path / "run"), jax.device_put(params, jax.devices()[0]), {"config": experiment})
    options = export_model.Options(format="hf_paligemma")
    export_model.write_export(str(tmp_path / "run"), str(tmp_path / "hf"), options, lambda line: None)
    theirs, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        str(tmp_path / "hf"), output_loading_info=True, attn_implementation="eager", torch_dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.config.image_token_index = theirs.config.image_token_id = IMAGE_TOKEN  # of this small vocabulary
    theirs.model.config.image_token_id = IMAGE_TOKEN
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
    text = rng.integers(2, IMAGE_TOKEN, (2, 5)).astype(np.int32)
    ids = torch.from_numpy(np.concatenate([np.full((2, PATCHES), IMAGE_TOKEN), text], axis=1)).long()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    given = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    valid = np.ones_like(text, bool)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p: paligemma.logits(config, p, images, text, valid))(params)
        np.testing.assert_allclose(theirs.eval()(input_ids=ids, **given).logits.numpy(), ours, atol=2e-5)
        written = theirs.generate(input_ids=ids, **given, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        tokens = jax.jit(lambda p: paligemma.generate(config, p, images, text, valid, STEPS, eos=-1))(params)
        np.testing.assert_array_equal(tokens, written[:, ids.shape[1] :].numpy())
