"""openpi's pi0 and pi0.5: golden key names, both directions, its Orbax folders, wrong models."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qdepth_jax import errors
from qdepth_jax.models import gemma, siglip
from qdepth_jax.weights import importing, openpi, orbax_params, table

SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", pathlib.Path(__file__).parents[3] / "shared"))


@pytest.fixture(params=["pi0", "pi05"], scope="module")
def golden(request):
    """(name, weights, sizes) of a tiny model that openpi itself made."""
    path = SHARED / "fixtures" / f"openpi_{request.param}_tiny.npz"
    if not path.is_file():
        pytest.skip(f"no golden vector at {path}; QDEPTH_SHARED names the folder that holds fixtures/")
    with np.load(path) as data:
        weights = {key: data[key] for key in data.files if key.startswith("params/")}
        return request.param, weights, json.loads(str(data["ref/config"]))


@functools.cache
def shapes(config):
    return importing.shapes_of(config)


def load(weights, config=None):
    config = config or openpi.config_of(weights)
    return table.load(weights, openpi.rows(config), shapes(config), openpi.TITLE, openpi.clean)


def test_every_golden_key_there_and_back(golden):
    _, weights, _ = golden
    config = openpi.config_of(weights)
    loaded = load(weights)
    assert sorted(loaded.read) == sorted(weights) and loaded.missing == [] and loaded.unused == []
    back = dict(table.save(loaded.params, openpi.rows(config)))
    assert {f"params/{key}" for key in back} == set(weights)
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[f"params/{key}"])


def test_sizes_and_conventions(golden):
    name, weights, sizes = golden
    config = openpi.config_of(weights, text_length=sizes["max_token_len"], horizon=sizes["horizon"])
    vlm, expert = sizes["vlm"], sizes["expert"]
    assert (config.vlm.width, config.vlm.mlp) == (vlm["width"], vlm["mlp_dim"])
    assert (config.action.width, config.action.mlp) == (expert["width"], expert["mlp_dim"])
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (
        vlm["depth"],
        vlm["num_heads"],
        vlm["num_kv_heads"],
        vlm["head_dim"],
    )
    assert (config.vocabulary, config.action_dim, config.horizon) == (sizes["vocab_size"], sizes["action_dim"], 5)
    assert (config.siglip.image_size, config.siglip.patch) == (sizes["image_size"], sizes["patch_size"])
    assert config.action_time == ("adaptive" if name == "pi05" else "concat")
    assert config.flow.noise_at == 1 and config.softcap == 0 and config.vlm_final_norm and config.depth is None
    assert len(config.views) == 3
    full = openpi.config_of(weights)
    assert (full.text_length, full.horizon) == ((200, 50) if name == "pi05" else (48, 50))


def test_halves_of_the_first_time_layer_change_places(golden):
    name, weights, _ = golden
    if name == "pi05":
        pytest.skip("pi0.5 has no such layer")
    kernel = weights["params/action_time_mlp_in/kernel"]
    ours = load(weights).params["action_encoder"]["linear_2"]["kernel"]
    half = len(kernel) // 2
    np.testing.assert_array_equal(ours, np.concatenate([kernel[half:], kernel[:half]]))


@pytest.mark.slow
@pytest.mark.parametrize("value", [False, True])
def test_orbax_folder(golden, tmp_path, value):
    """As released, and as its training saves it: every array one level deeper."""
    _, weights, _ = golden
    tree = table.nest({key + ("/value" if value else ""): jnp.asarray(array) for key, array in weights.items()})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave(tree))
    source = orbax_params.open_source(str(tmp_path))
    config = openpi.config_of(source.specs)
    found = table.load(source, openpi.rows(config), shapes(config), openpi.TITLE, openpi.clean).params
    jax.tree.map(np.testing.assert_array_equal, found, load(weights).params)


def test_wrong_model(golden):
    name, weights, _ = golden
    other = openpi.config_of(weights)
    wrong = {key: array for key, array in weights.items() if "time_mlp" not in key}
    with pytest.raises(errors.UserError) as caught:
        load(wrong, other)
    missing = "time_mlp_in/kernel" if name == "pi05" else "action_time_mlp_in/kernel"
    assert f"{missing}: not in the file" in str(caught.value)
    with pytest.raises(errors.UserError, match=r"no openpi weights: "):
        openpi.config_of({"params/x": np.zeros(3)})
    lora = weights | {"params/PaliGemma/llm/layers/attn/q_einsum/lora_a": np.zeros(3)}
    with pytest.raises(errors.UserError, match="1 LoRA arrays"):
        openpi.config_of(lora)


@pytest.mark.slow
def test_a_checkpoint_of_another_size(golden):
    _, weights, _ = golden
    config = openpi.config_of(
        weights, vlm=gemma.ExpertConfig(32, 128), siglip=siglip.SiglipConfig(28, 14, 32, 1, 2, 64)
    )
    with pytest.raises(errors.UserError) as caught:
        load(weights, config)
    assert "shape (131, 64), the model needs (131, 32)" in str(caught.value)
    assert "PaliGemma/img/embedding/kernel: shape" in str(caught.value)
