"""Hugging Face PaliGemma: all key layouts that transformers has used, tied heads, configs, the library itself."""

import json

import jax
import numpy as np
import pytest
from test_safetensors_files import encode

from qdepth_jax import errors
from qdepth_jax.models import gemma, paligemma, siglip
from qdepth_jax.weights import hf_paligemma, importing, safetensors_files, table


def config(version):
    return paligemma.PaligemmaConfig(
        siglip=siglip.SiglipConfig(28, 14, 24, 2, 2, 32),
        vlm=gemma.ExpertConfig(32, 48, post_norms=version == 2),
        layers=2,
        heads=4,
        kv_heads=version,
        head_dim=8,
        vocabulary=40,
        **({"softcap": 50.0, "final_softcap": 30.0, "query_scale": 16.0, "window": 4096} if version == 2 else {}),
    )


def about(version):
    """As config.json of a tiny model would say."""
    text = {"num_attention_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
    if version == 2:
        text |= {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {"model_type": "paligemma", "text_config": text, "vision_config": {"num_attention_heads": 2}}


def random(version, seed=0):
    """Table keys -> arrays, and the parameters they hold."""
    rng = np.random.default_rng(seed)
    shapes = importing.shapes_of(config(version))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    return dict(table.save(params, hf_paligemma.rows(config(version)))), params


def published(key):
    return hf_paligemma.published(key)


def in_memory(key):
    key = key.replace("language_model.model.", "model.language_model.")
    key = key.replace("vision_tower.", "model.vision_tower.vision_model.")
    return key.replace("multi_modal_projector.", "model.multi_modal_projector.")


def flat_tower(key):
    return key


@pytest.mark.parametrize(
    ("layout", "version", "head"),
    [
        (published, 1, "absent"),
        (published, 2, "tied"),
        (in_memory, 1, "tied"),
        (in_memory, 2, "alone"),
        (flat_tower, 1, "alone"),
        (flat_tower, 2, "absent"),
    ],
)
def test_every_layout(layout, version, head):
    weights, params = random(version)
    embedding, lm_head = hf_paligemma.EMBEDDING
    if head != "absent":
        weights[lm_head] = weights[embedding]
    if head == "alone":
        del weights[embedding]
    weights = {layout(key): array for key, array in weights.items()}
    found = hf_paligemma.config_of(weights, about(version))
    assert found == config(version)
    loaded = table.load(
        weights, hf_paligemma.rows(found), importing.shapes_of(found), hf_paligemma.TITLE, hf_paligemma.clean
    )
    assert sorted(loaded.read) == sorted(weights) and loaded.missing == [] and loaded.unused == []
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_published_names():
    keys = {published(key) for key in random(2)[0]}
    for key in (
        "language_model.model.layers.1.post_feedforward_layernorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "multi_modal_projector.linear.weight",
        "language_model.model.embed_tokens.weight",
    ):
        assert key in keys
    assert published("lm_head.weight") == "language_model.lm_head.weight"
    assert {hf_paligemma.clean(key) for key in keys} == set(random(2)[0])


def test_grouped_heads_keep_their_order():
    """Key head 1 of a layer: rows 8..16 of k_proj; query head 3: rows 24..32 of q_proj."""
    weights, params = random(2)
    attention = params["llm"]["layers"]["vlm"]["attn"]
    prefix = "language_model.model.layers.1.self_attn."
    np.testing.assert_array_equal(attention["kv_einsum"]["w"][1, 0, 1], weights[prefix + "k_proj.weight"][8:16].T)
    np.testing.assert_array_equal(attention["kv_einsum"]["w"][1, 1, 1], weights[prefix + "v_proj.weight"][8:16].T)
    np.testing.assert_array_equal(attention["q_einsum"]["w"][1, 3], weights[prefix + "q_proj.weight"][24:].T)
    np.testing.assert_array_equal(attention["attn_vec_einsum"]["w"][1, 3], weights[prefix + "o_proj.weight"][:, 24:].T)


def test_untied_head_and_other_problems():
    weights, _ = random(1)
    embedding, lm_head = hf_paligemma.EMBEDDING
    weights[lm_head] = weights[embedding] + 1
    weights["model.language_model.norm.weight"] = weights["language_model.model.norm.weight"]
    weights["vision_tower.head.probe"] = np.zeros((1, 1, 24), np.float32)
    with pytest.raises(errors.UserError) as caught:
        table.load(
            weights,
            hf_paligemma.rows(config(1)),
            importing.shapes_of(config(1)),
            hf_paligemma.TITLE,
            hf_paligemma.clean,
        )
    for line in (
        "lm_head.weight: differs from language_model.model.embed_tokens.weight",
        "model.language_model.norm.weight: duplicate of language_model.model.norm.weight",
        "vision_tower.head.probe: matches 0 rows",
    ):
        assert line in str(caught.value)


def test_sizes_without_a_config_are_those_of_the_published_models():
    keys = {
        "language_model.model.layers.0.self_attn.q_proj.weight": (2048, 2304),
        "language_model.model.layers.0.self_attn.k_proj.weight": (1024, 2304),
        "language_model.model.layers.0.mlp.up_proj.weight": (9216, 2304),
        "language_model.model.layers.0.post_feedforward_layernorm.weight": (2304,),
        "language_model.model.embed_tokens.weight": (257_216, 2304),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (1024, 1152),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (4304, 1152),
    }
    found = hf_paligemma.config_of({key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in keys.items()})
    assert (found.heads, found.kv_heads, found.head_dim, found.siglip.heads) == (8, 4, 256, 16)
    assert found.siglip.image_size == 448 and found.query_scale == 0.0 and found.softcap == 50.0
    keys["vision_tower.vision_model.embeddings.patch_embedding.weight"] = (1000, 3, 14, 14)
    with pytest.raises(errors.UserError, match=r"how many heads a vision tower of width 1000 has.*config.json"):
        hf_paligemma.config_of({key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in keys.items()})


def test_config_of_another_model(tmp_path):
    with pytest.raises(errors.UserError, match="one of a 'llava'"):
        hf_paligemma.config_of(random(1)[0], {"model_type": "llava"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.UserError, match=r"config.json is no JSON"):
        hf_paligemma.read_about(str(tmp_path))
    assert hf_paligemma.read_about(str(tmp_path / "none" / "model.safetensors")) is None


def test_import_of_shards(tmp_path):
    weights, params = random(1)
    names = [published(key) for key in weights]
    where = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(names)}
    for file in set(where.values()):
        held = {published(key): array for key, array in weights.items() if where[published(key)] == file}
        (tmp_path / file).write_bytes(encode(held, {"format": "pt"}))
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps(about(1)))
    opened = importing.open_weights("hf_paligemma", str(tmp_path))
    assert opened.config == config(1)
    found = table.load(
        opened.weights, hf_paligemma.rows(opened.config), opened.shapes, hf_paligemma.TITLE, hf_paligemma.clean
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_what_transformers_itself_saves(tmp_path, version, shard):
    """save_pretrained of the installed version; its own state dict says which number belongs where."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": version,
        "head_dim": 8,
        **({"query_pre_attn_scalar": 16} if version == 2 else {}),
    }
    made = transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                vision_use_head=False,
                projection_dim=32,
            ),
            text_config=(transformers.Gemma2Config if version == 2 else transformers.GemmaConfig)(**text),
            image_token_id=39,
            projection_dim=32,
        )
    )
    made.save_pretrained(tmp_path, max_shard_size=shard)
    opened = importing.open_weights("hf_paligemma", str(tmp_path))
    assert opened.config == config(version)
    loaded = table.load(
        opened.weights, hf_paligemma.rows(opened.config), opened.shapes, hf_paligemma.TITLE, hf_paligemma.clean
    )
    assert loaded.missing == [] and sorted(loaded.read) == sorted(opened.weights.specs)
    back = dict(table.save(loaded.params, hf_paligemma.rows(opened.config), lambda row: row.copies))
    state = {hf_paligemma.clean(key): tensor.numpy() for key, tensor in made.state_dict().items()}
    assert set(state) == set(back)
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key])
