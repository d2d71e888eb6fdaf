"""Full size, nothing allocated: the official key lists, leaf by leaf, against our models and tables, and their totals.

The lists are written out from the originals' model definitions, never from our tables:
  big_vision 0127fb6: models/vit.py (So400m/14), models/ppp/gemma.py (gemma_2b, gemma2_2b)
  openpi 15a9616: models/pi0.py, models/gemma.py (gemma_2b, gemma_300m)
  open-pi-zero c3df7fb: model/vla/pizero.py, model/vla/mixture.py, model/paligemma/siglip.py
  transformers: modeling_siglip.py, modeling_gemma.py, modeling_gemma2.py, modeling_paligemma.py
"""

import functools
import math

import pytest

from qdepth_jax.models import paligemma, policy_config
from qdepth_jax.weights import (
    big_vision,
    hf_paligemma,
    importing,
    lerobot_pi0,
    open_pi_zero,
    openpi,
    source,
    table,
)


def vision_linen(width):
    """SigLIP So400m/14 at 224 pixels and the projector, scanned."""
    d, f, n = 1152, 4304, 27
    block = "Transformer/encoderblock/"
    keys = {"embedding/kernel": (14, 14, 3, d), "embedding/bias": (d,), "pos_embedding": (1, 256, d)}
    for number in "01":
        keys |= {f"{block}LayerNorm_{number}/{leaf}": (n, d) for leaf in ("scale", "bias")}
    for name in ("query", "key", "value"):
        keys[f"{block}MultiHeadDotProductAttention_0/{name}/kernel"] = (n, d, 16, 72)
        keys[f"{block}MultiHeadDotProductAttention_0/{name}/bias"] = (n, 16, 72)
    keys[f"{block}MultiHeadDotProductAttention_0/out/kernel"] = (n, 16, 72, d)
    keys[f"{block}MultiHeadDotProductAttention_0/out/bias"] = (n, d)
    keys |= {f"{block}MlpBlock_0/Dense_0/kernel": (n, d, f), f"{block}MlpBlock_0/Dense_0/bias": (n, f)}
    keys |= {f"{block}MlpBlock_0/Dense_1/kernel": (n, f, d), f"{block}MlpBlock_0/Dense_1/bias": (n, d)}
    keys |= {"Transformer/encoder_norm/scale": (d,), "Transformer/encoder_norm/bias": (d,)}
    return keys | {"head/kernel": (d, width), "head/bias": (width,)}


def gemma_linen(
    layers, d, f, heads, kv, h=256, suffix="", norms=("pre_attention_norm", "pre_ffw_norm"), adaptive=False
):
    """Gemma's layers, scanned; openpi marks its second expert by a suffix."""
    keys = {
        f"layers/attn/q_einsum{suffix}/w": (layers, heads, d, h),
        f"layers/attn/kv_einsum{suffix}/w": (layers, 2, kv, d, h),
        f"layers/attn/attn_vec_einsum{suffix}/w": (layers, heads, h, d),
        f"layers/mlp{suffix}/gating_einsum": (layers, 2, d, f),
        f"layers/mlp{suffix}/linear": (layers, f, d),
    }
    for norm, lead in (*((f"layers/{name}", (layers,)) for name in norms), ("final_norm", ())):
        if adaptive:
            keys |= {
                f"{norm}{suffix}/Dense_0/kernel": (*lead, d, 3 * d),
                f"{norm}{suffix}/Dense_0/bias": (*lead, 3 * d),
            }
        else:
            keys[f"{norm}{suffix}/scale"] = (*lead, d)
    return keys


def prefixed(prefix, keys):
    return {prefix + key: shape for key, shape in keys.items()}


def paligemma_keys(version):
    width = 2048 if version == 1 else 2304
    if version == 1:
        llm = gemma_linen(18, 2048, 16384, 8, 1)
    else:
        norms = ("pre_attention_norm", "pre_ffw_norm", "post_attention_norm", "post_ffw_norm")
        llm = gemma_linen(26, 2304, 9216, 8, 4, norms=norms)
    keys = prefixed("img/", vision_linen(width)) | prefixed("llm/", llm)
    return prefixed("params/", keys | {"llm/embedder/input_embedding": (257_152, width)})


def openpi_keys(name):
    adaptive = name == "pi05"
    keys = prefixed("img/", vision_linen(2048)) | prefixed("llm/", gemma_linen(18, 2048, 16384, 8, 1))
    keys |= prefixed("llm/", gemma_linen(18, 1024, 4096, 8, 1, suffix="_1", adaptive=adaptive))
    keys = prefixed("PaliGemma/", keys | {"llm/embedder/input_embedding": (257_152, 2048)})
    linears = {"action_in_proj": (32, 1024), "action_out_proj": (1024, 32)}
    if adaptive:
        linears |= {"time_mlp_in": (1024, 1024), "time_mlp_out": (1024, 1024)}
    else:
        linears |= {"state_proj": (32, 1024), "action_time_mlp_in": (2048, 1024), "action_time_mlp_out": (1024, 1024)}
    for layer, shape in linears.items():
        keys |= {f"{layer}/kernel": shape, f"{layer}/bias": shape[1:]}
    return prefixed("params/", keys)


def torch_linear(name, out, into, bias=True):
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def vision_torch(tower, projector, width):
    d, f = 1152, 4304
    keys = {
        f"{tower}embeddings.patch_embedding.weight": (d, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (d,),
        f"{tower}embeddings.position_embedding.weight": (256, d),
        f"{tower}post_layernorm.weight": (d,),
        f"{tower}post_layernorm.bias": (d,),
        **torch_linear(f"{projector}linear", width, d),
    }
    for i in range(27):
        layer = f"{tower}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            keys |= torch_linear(f"{layer}self_attn.{name}", d, d)
        keys |= torch_linear(f"{layer}mlp.fc1", f, d) | torch_linear(f"{layer}mlp.fc2", d, f)
        keys |= {f"{layer}layer_norm{n}.{leaf}": (d,) for n in (1, 2) for leaf in ("weight", "bias")}
    return keys


def gemma_torch(prefix, layers, d, f, heads, kv, norms=("input_layernorm", "post_attention_layernorm")):
    keys = {}
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        for name, out, into in (("q", heads * 256, d), ("k", kv * 256, d), ("v", kv * 256, d), ("o", d, heads * 256)):
            keys |= torch_linear(f"{layer}self_attn.{name}_proj", out, into, bias=False)
        for name, out, into in (("gate", f, d), ("up", f, d), ("down", d, f)):
            keys |= torch_linear(f"{layer}mlp.{name}_proj", out, into, bias=False)
        keys |= {f"{layer}{norm}.weight": (d,) for norm in norms}
    return keys


def open_pi_zero_keys():
    keys = {"embed_tokens.weight": (257_216, 2048)}
    keys |= vision_torch("vision_tower.vision_model.", "multi_modal_projector.", 2048)
    keys |= gemma_torch("joint_model.mixtures.vlm.", 18, 2048, 16384, 8, 1)
    for name in ("proprio", "action"):
        keys |= gemma_torch(f"joint_model.mixtures.{name}.", 18, 1024, 4096, 8, 1)
        keys[f"joint_model.mixtures.{name}.norm.weight"] = (1024,)
    for name, out, into in (
        ("action_encoder.linear_1", 1024, 7),
        ("action_encoder.linear_2", 1024, 2048),
        ("action_encoder.linear_3", 1024, 1024),
        ("proprio_encoder", 1024, 7),
        ("action_decoder", 7, 1024),
    ):
        keys |= torch_linear(name, out, into)
    return keys


def hf_keys(version):
    """As published: the output layer is the embedding and not stored again."""
    width = 2048 if version == 1 else 2304
    keys = vision_torch("vision_tower.vision_model.", "multi_modal_projector.", width)
    if version == 1:
        keys |= gemma_torch("language_model.model.", 18, 2048, 16384, 8, 1)
    else:
        norms = ("input_layernorm", "post_attention_layernorm")
        norms += ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        keys |= gemma_torch("language_model.model.", 26, 2304, 9216, 8, 4, norms)
    embedding = {"language_model.model.embed_tokens.weight": (257_216, width)}
    return keys | embedding | {"language_model.model.norm.weight": (width,)}


def lerobot_keys():
    """PI0Policy on transformers 4.5x, its output layers included."""
    inside = "model.paligemma_with_expert."
    vlm = inside + "paligemma.model."
    keys = vision_torch(vlm + "vision_tower.vision_model.", vlm + "multi_modal_projector.", 2048)
    keys |= gemma_torch(vlm + "language_model.", 18, 2048, 16384, 8, 1)
    keys |= gemma_torch(inside + "gemma_expert.model.", 18, 1024, 4096, 8, 1)
    keys |= {f"{vlm}language_model.norm.weight": (2048,), f"{inside}gemma_expert.model.norm.weight": (1024,)}
    keys |= {f"{inside}paligemma.lm_head.weight": (257_152, 2048)}  # safetensors keeps one of two tied tensors
    keys |= {f"{inside}gemma_expert.lm_head.weight": (257_152, 1024)}
    for name, out, into in (
        ("action_in_proj", 1024, 32),
        ("action_out_proj", 32, 1024),
        ("state_proj", 1024, 32),
        ("action_time_mlp_in", 1024, 2048),
        ("action_time_mlp_out", 1024, 1024),
    ):
        keys |= torch_linear(f"model.{name}", out, into)
    return keys


# name -> module, official keys, number of keys, parameters of our model, changes that weights do not show.
CASES = {
    "paligemma": (big_vision, functools.partial(paligemma_keys, 1), 32, 2_923_335_408),
    "paligemma2_3b": (big_vision, functools.partial(paligemma_keys, 2), 34, 3_032_094_960),
    "pi0": (openpi, functools.partial(openpi_keys, "pi0"), 50, 3_238_048_528),
    "pi05": (openpi, functools.partial(openpi_keys, "pi05"), 51, 3_353_433_872),
    "open_pi_zero": (open_pi_zero, open_pi_zero_keys, 938, 3_238_100_727),
    "hf_paligemma": (hf_paligemma, functools.partial(hf_keys, 1), 603, 2_923_335_408 + 64 * 2048),
    "hf_paligemma2_3b": (hf_paligemma, functools.partial(hf_keys, 2), 727, 3_032_094_960 + 64 * 2304),
    "lerobot_pi0": (lerobot_pi0, lerobot_keys, 777, 3_238_048_528),
}


FAST = ("paligemma", "pi05")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_official_keys_fill_our_model_leaf_by_leaf(name):
    module, official, count, total = CASES[name]
    specs = {key: source.Spec(shape, "float32") for key, shape in official().items()}
    assert len(specs) == count
    config = module.config_of(specs)
    shapes = importing.shapes_of(config)
    found = table.match(specs, module.rows(config), shapes, module.TITLE, module.clean)
    leaves = table.flatten(shapes)
    assert found.missing == [] and set(found.leaves) == set(leaves)
    assert found.unused == [key for key in specs if "gemma_expert.lm_head" in key]
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == total
    # And back: the strict key set of theirs.
    copies = open_pi_zero.copies_of() if name == "open_pi_zero" else lambda row: row.copies[:1]
    ours = table.keys(module.rows(config), shapes, copies)
    theirs = {module.clean(key): shape for key, shape in official().items()}
    theirs.pop("gemma_expert.lm_head.weight", None)
    if name == "lerobot_pi0":
        theirs["paligemma.language_model.model.embed_tokens.weight"] = theirs.pop("paligemma.lm_head.weight")
    assert ours == theirs


@pytest.mark.slow
def test_the_configs_are_the_published_sizes():
    def of(name):
        module, official, _, _ = CASES[name]
        return module.config_of({key: source.Spec(shape, "float32") for key, shape in official().items()})

    assert of("paligemma") == paligemma.sized("paligemma_3b")
    assert of("paligemma2_3b") == paligemma.sized("paligemma2_3b")
    assert of("open_pi_zero") == policy_config.sized("full", depth=None)
    assert of("lerobot_pi0") == of("pi0")


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_list_of_transformers_is_what_it_builds(version):
    """The full-size module of the installed version, without memory."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    text = {"vocab_size": 257_216, "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 1}
    sizes = {1: (2048, 16384, 18, 1), 2: (2304, 9216, 26, 4)}[version]
    text |= dict(
        zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"), sizes, strict=True)
    )
    with torch.device("meta"):
        made = transformers.PaliGemmaForConditionalGeneration(
            transformers.PaliGemmaConfig(
                vision_config=transformers.SiglipVisionConfig(
                    hidden_size=1152,
                    intermediate_size=4304,
                    num_hidden_layers=27,
                    num_attention_heads=16,
                    image_size=224,
                    patch_size=14,
                    vision_use_head=False,
                ),
                text_config=(transformers.Gemma2Config if version == 2 else transformers.GemmaConfig)(**text),
                projection_dim=sizes[0],
            )
        )
    state = {hf_paligemma.clean(key): tuple(tensor.shape) for key, tensor in made.state_dict().items()}
    state.pop("lm_head.weight", None)
    assert state == {hf_paligemma.clean(key): shape for key, shape in hf_keys(version).items()}


@pytest.mark.slow
def test_no_two_rows_name_one_key():
    """Of every table at full size: keys() would hide an overlap."""
    for module, official, _, _ in CASES.values():
        specs = {key: source.Spec(shape, "float32") for key, shape in official().items()}
        rows = module.rows(module.config_of(specs))
        for key in specs:
            assert sum(bool(row.pattern.fullmatch(module.clean(key))) for row in rows) == 1, key
