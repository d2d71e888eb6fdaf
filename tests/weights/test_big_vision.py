"""big_vision's PaliGemma files: golden keys, void bfloat16 and float16, prefixes, other resolutions, PaliGemma 2."""

import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage

from qdepth_jax import errors
from qdepth_jax.models import gemma, paligemma, siglip
from qdepth_jax.weights import big_vision, importing, npz, resample, source, table

SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", pathlib.Path(__file__).parents[3] / "shared"))
TINY = paligemma.PaligemmaConfig(
    siglip=siglip.SiglipConfig(28, 14, 24, 2, 2, 40),
    vlm=gemma.ExpertConfig(32, 64),
    layers=2,
    heads=4,
    kv_heads=1,
    head_dim=8,
    vocabulary=128,
)


@pytest.fixture(scope="module")
def golden():
    path = SHARED / "fixtures" / "big_vision_paligemma_tiny.npz"
    if not path.is_file():
        pytest.skip(f"no golden vector at {path}; QDEPTH_SHARED names the folder that holds fixtures/")
    with np.load(path) as data:
        weights = {key: data[key] for key in data.files if key.startswith("params/")}
        return weights, json.loads(str(data["ref/config"]))


def load(weights, config=None):
    config = config or big_vision.config_of(source.specs_of(weights))
    shapes = importing.shapes_of(config)
    return table.load(weights, big_vision.rows(config), shapes, big_vision.TITLE, big_vision.clean)


def random(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    keys = table.keys(big_vision.rows(config), importing.shapes_of(config))
    return {f"params/{key}": rng.normal(size=shape).astype(dtype) for key, shape in keys.items()}


def test_every_golden_key_there_and_back(golden):
    weights, sizes = golden
    config = big_vision.config_of(weights)
    assert (config.siglip.width, config.siglip.heads, config.siglip.mlp) == (48, 4, 96)
    assert (config.vlm.width, config.layers, config.kv_heads) == (sizes["width"], sizes["depth"], sizes["num_kv_heads"])
    assert config.vocabulary == sizes["vocab_size"] and config.softcap == 0
    loaded = load(weights)
    assert sorted(loaded.read) == sorted(weights) and loaded.missing == []
    back = dict(table.save(loaded.params, big_vision.rows(config)))
    assert {f"params/{key}" for key in back} == set(weights)
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[f"params/{key}"])


@pytest.mark.parametrize(
    ("dtype", "prefix"), [(np.float32, ""), (np.float16, "opt/target/"), (ml_dtypes.bfloat16, "params/")]
)
def test_files_of_every_type_and_prefix(tmp_path, dtype, prefix):
    weights = random(TINY, dtype)
    np.savez(tmp_path / "w.npz", **{prefix + key.removeprefix("params/"): a for key, a in weights.items()})
    found = load(npz.open_source(str(tmp_path / "w.npz")))
    for path, leaf in table.flatten(found.params).items():
        key = "params/" + path.replace("layers/vlm", "layers").replace("final_norm_vlm", "final_norm")
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, weights[key].astype(np.float32))


def test_paligemma_2_has_two_norms_more():
    config = paligemma.PaligemmaConfig(
        siglip=TINY.siglip,
        vlm=gemma.ExpertConfig(32, 64, post_norms=True),
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        vocabulary=128,
    )
    weights = random(config)
    assert len(weights) == 34
    found = big_vision.config_of(weights)
    assert found.vlm.post_norms and found.kv_heads == 2 and found.softcap == 50.0
    assert load(weights).missing == []
    with pytest.raises(errors.UserError, match="post_ffw_norm/scale: matches 0 rows"):
        load(weights, TINY)


@pytest.mark.parametrize(("old", "new"), [(2, 4), (16, 32), (16, 64), (5, 3), (3, 1), (1, 3)])
def test_positions_as_scipy_and_so_big_vision_resample_them(old, new):
    grid = np.random.default_rng(0).normal(size=(old, old, 6)).astype(np.float32)
    found = resample.positions(grid, new)
    if old == 1:
        np.testing.assert_array_equal(found, np.broadcast_to(grid, (new, new, 6)))
        return
    wanted = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)
    if new == 1:  # scipy divides by zero there
        wanted = grid[:1, :1]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_file_for_another_picture_size(tmp_path):
    weights = random(TINY)
    np.savez(tmp_path / "w.npz", **weights)
    opened = importing.open_weights("big_vision", str(tmp_path / "w.npz"), image_size=56)
    assert opened.config.siglip.image_size == 56
    found = load(opened.weights, opened.config).params
    assert found["img"]["pos_embedding"].shape == (1, 16, 24)
    old = weights["params/img/pos_embedding"].reshape(2, 2, 24)
    np.testing.assert_allclose(found["img"]["pos_embedding"].reshape(4, 4, 24)[::3, ::3], old, atol=1e-6)
    with pytest.raises(errors.UserError, match="image_size=50 is no multiple of the patch, 14 pixels: use 56"):
        importing.open_weights("big_vision", str(tmp_path / "w.npz"), image_size=50)


def test_missing_and_foreign_files(golden):
    weights, _ = golden
    short = {key: array for key, array in weights.items() if "mlp/linear" not in key and "encoder_norm" not in key}
    with pytest.raises(errors.UserError) as caught:
        load(short, big_vision.config_of(weights))
    assert str(caught.value).startswith("3 problems")
    assert "llm/layers/mlp/linear: not in the file" in str(caught.value)
    with pytest.raises(errors.UserError, match="no big_vision PaliGemma weights"):
        big_vision.config_of({"a": np.zeros(2)})
    odd = weights | {"params/img/pos_embedding": np.zeros((1, 5, 48), np.float32)}
    with pytest.raises(errors.UserError, match="5 position embeddings are no square"):
        big_vision.config_of(odd)


def test_27b_scales_its_queries_otherwise():
    sizes = {"vlm": gemma.ExpertConfig(4608, 36_864, post_norms=True), "heads": 32}
    assert big_vision.paligemma_conventions(sizes)["query_scale"] == 144.0
    sizes = {"vlm": gemma.ExpertConfig(2304, 9216, post_norms=True), "heads": 8}
    assert big_vision.paligemma_conventions(sizes)["query_scale"] == 0.0


def test_eight_devices_hold_what_one_holds(tmp_path):
    from qdepth_jax import config as config_lib
    from qdepth_jax import sharding

    np.savez(tmp_path / "w.npz", **random(TINY))
    found = []
    for devices in (jax.devices(), jax.devices()[:1]):
        opened = importing.open_weights("big_vision", str(tmp_path / "w.npz"))
        mesh = sharding.make_mesh(config_lib.MeshConfig(1, -1, 1), devices)
        found.append(importing.place(opened, mesh).params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *found)
    assert len(table.flatten(found[0])["llm/layers/vlm/mlp/linear"].sharding.device_set) == 8
