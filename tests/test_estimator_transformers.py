"""Depth models of transformers as estimators, from a local folder: nothing is downloaded."""

import importlib.util

import numpy as np
import pytest

from qdepth_jax import depth_weights, errors, estimators
from qdepth_jax.weights import depth_anything as names
from qdepth_jax.weights import table

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="torch and transformers are not installed (extra `transformers`)",
)


@pytest.fixture
def folder(tmp_path):
    """A tiny Depth Anything V2 with random weights, as transformers saves it."""
    import torch
    import transformers

    params = depth_weights.random_params(depth_weights.sized("tiny", False), seed=3)  # its own are nearly constant
    rows = tuple(row for row in names.HF_TABLE if row.target in table.flatten(params))
    trunk = transformers.Dinov2Config(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=trunk,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[32, 32, 64, 64],
        fusion_hidden_size=32,
        head_hidden_size=32,
    )
    model = transformers.DepthAnythingForDepthEstimation(config)
    state = {key: torch.from_numpy(np.array(array)) for key, array in table.save(params, rows)}
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    model.save_pretrained(tmp_path)
    transformers.DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3, do_pad=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


def test_a_local_folder_gives_depth_of_every_frame(folder):
    estimator = estimators.make(f"transformers:{folder}")
    assert estimator.kind == "relative" and estimator.licence == "unknown" and "sha256:" in estimator.name
    rng = np.random.default_rng(0)
    episodes = [rng.integers(0, 256, (n, 28, 42, 3), np.uint8) for n in (1, 11)]
    found = list(estimator.estimate(iter(episodes)))
    assert [maps.shape for maps in found] == [(1, 28, 42), (11, 28, 42)] and found[1].std() > 1e-4
    (again,) = estimator.estimate([episodes[1][8:9]])
    np.testing.assert_allclose(again[0], found[1][8], atol=1e-5)
    # Ours with the same file; squares, since transformers resizes others to another size than the authors did.
    square = np.stack([np.full((56, 56, 3), level, np.uint8) for level in (0, 255)])
    square[:, 20:40, 10:30] = 128
    ours = estimators.make("depth_anything_v2", str(folder), estimators.Options(input_size=56))
    (mine,), (theirs,) = ours.estimate([square]), estimator.estimate([square])
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    named = estimators.make(f"transformers:{folder}")
    assert named.licence.startswith("apache-2.0") and named.name != estimator.name


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(errors.UserError, match="estimates relative depth, not --depth_kind=metric"):
        estimators.make(f"transformers:{folder}", options=estimators.Options(kind="metric"))
    with pytest.raises(errors.UserError, match="is no folder"):
        estimators.make(f"transformers:{tmp_path}/gone")
    with pytest.raises(errors.UserError, match="a model's name or folder is missing"):
        estimators.make("transformers:")
    (folder / "model.safetensors").unlink()
    with pytest.raises(errors.UserError, match="holds no depth model of transformers"):
        estimators.make(f"transformers:{folder}")


def test_zoedepth_gets_its_border_taken_off(tmp_path):
    """Its processor pads every picture, and refuses to go back without the sizes before that."""
    import torch
    import transformers

    torch.manual_seed(0)
    trunk = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, use_relative_position_bias=True,
    )  # fmt: skip
    config = transformers.ZoeDepthConfig(
        backbone_config=trunk, neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16, bottleneck_features=16,
        bin_embedding_dim=16, num_attractors=[4, 3, 2, 1], num_relative_features=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    )  # fmt: skip
    transformers.ZoeDepthForDepthEstimation(config).save_pretrained(tmp_path)
    transformers.ZoeDepthImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    estimator = estimators.make(f"transformers:{tmp_path}")
    assert estimator.kind == "metric"
    frames = np.random.default_rng(0).integers(0, 256, (3, 28, 42, 3), np.uint8)
    (found,) = estimator.estimate([frames])
    assert found.shape == (3, 28, 42) and np.isfinite(found).all()
