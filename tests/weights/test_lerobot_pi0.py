"""lerobot's pi0 and pi0.5: equal to the same weights in openpi's own layout, in every prefix that was used."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.models import gemma, policy_config, siglip
from qdepth_jax.weights import importing, lerobot_pi0, openpi, table


def config(name):
    sizes = {
        "siglip": siglip.SiglipConfig(28, 14, 24, 2, 2, 32),
        "vlm": gemma.ExpertConfig(32, 48),
        "action": gemma.ExpertConfig(16, 24),
        "depth": None,
        "layers": 2,
        "heads": 4,
        "head_dim": 8,
        "vocabulary": 40,
        "action_dim": 6,
        "views": openpi.VIEWS,
        **openpi.SIZES[name],
        **({"proprio_dim": 5} if name == "pi0" else {}),
    }
    return policy_config.PolicyConfig(**{**policy_config.CONVENTIONS[name], **sizes})


@functools.cache
def shapes(name):
    return importing.shapes_of(config(name))


@functools.cache
def random(name):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes(name))
    return dict(table.save(params, lerobot_pi0.rows(config(name)))), params


def load(name, weights):
    return table.load(weights, lerobot_pi0.rows(config(name)), shapes(name), lerobot_pi0.TITLE, lerobot_pi0.clean)


def early(key):
    """lerobot before transformers 4.52."""
    key = key.replace("vision_tower.", "vision_tower.vision_model.")
    inside = key.startswith(("paligemma.", "gemma_expert."))
    return "model." + ("paligemma_with_expert." if inside else "") + key


def of_openpi(key):
    """openpi's own PyTorch port: no `model.` in front."""
    return lerobot_pi0.ported(key).removeprefix("model.")


@pytest.mark.parametrize(
    ("name", "layout"), [("pi0", lerobot_pi0.ported), ("pi0", early), ("pi05", lerobot_pi0.ported), ("pi05", of_openpi)]
)
def test_every_layout(name, layout):
    saved, params = random(name)
    weights = {layout(key): array for key, array in saved.items()}
    weights[layout("gemma_expert.lm_head.weight")] = np.zeros((40, 16), np.float32)
    weights[layout("paligemma.lm_head.weight")] = saved["paligemma.language_model.model.embed_tokens.weight"]
    if layout is early:
        weights["normalize_inputs.buffer_observation_state.mean"] = np.zeros(5, np.float32)
    assert lerobot_pi0.config_of(weights, head_dim=8, vision_heads=2) == config(name)
    loaded = load(name, weights)
    assert loaded.missing == [] and len(loaded.unused) == (2 if layout is early else 1)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_same_numbers_as_in_openpis_layout(name):
    """By openpi's converter to torch: linears transposed, pi0's [action, time] order kept."""
    saved, params = random(name)
    theirs = dict(table.save(params, openpi.rows(config(name))))
    first = "time_mlp_in" if name == "pi05" else "action_time_mlp_in"
    np.testing.assert_array_equal(saved[f"{first}.weight"], theirs[f"{first}/kernel"].T)
    np.testing.assert_array_equal(saved["action_out_proj.weight"], theirs["action_out_proj/kernel"].T)
    layer = "PaliGemma/llm/layers/attn/"
    q = theirs[layer + "q_einsum_1/w"][1].transpose(0, 2, 1).reshape(4 * 8, 16)
    np.testing.assert_array_equal(saved["gemma_expert.model.layers.1.self_attn.q_proj.weight"], q)
    v = theirs[layer + "kv_einsum/w"][0, 1, 0].T
    np.testing.assert_array_equal(saved["paligemma.language_model.model.layers.0.self_attn.v_proj.weight"], v)


def test_its_config_names_what_weights_do_not_show():
    weights = random("pi0")[0]
    about = {"type": "pi0", "chunk_size": 10, "tokenizer_max_length": 30}
    found = lerobot_pi0.config_of(weights, about, head_dim=8, vision_heads=2)
    assert (found.horizon, found.text_length) == (10, 30)
    assert found == lerobot_pi0.config_of(weights, about | {"num_inference_steps": 10}, head_dim=8, vision_heads=2)
    for key in ("num_inference_steps", "num_steps"):
        fewer = lerobot_pi0.config_of(weights, about | {key: 5}, head_dim=8, vision_heads=2)
        assert fewer.flow == dataclasses.replace(found.flow, steps=5)
    with pytest.raises(errors.UserError, match="one of a 'smolvla' policy"):
        lerobot_pi0.config_of(weights, {"type": "smolvla"})
    with pytest.raises(errors.UserError, match="no lerobot pi0 weights"):
        lerobot_pi0.config_of({"model.x": np.zeros(1)})
    with pytest.raises(errors.UserError, match="hold no whole heads of size 256"):
        lerobot_pi0.config_of(weights)
