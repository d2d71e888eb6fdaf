"""Video-Depth-Anything against its own golden vectors, Depth Anything V2 against transformers; sizes and refusals."""

import dataclasses
import importlib.util
import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdepth_jax import errors, video_depth
from qdepth_jax.models import attention, depth_anything, dinov2, dpt
from qdepth_jax.weights import depth_anything as depth_table
from qdepth_jax.weights import table

FIXTURE = conftest.SHARED / "fixtures" / "video_depth_anything_tiny.npz"
TINY = depth_anything.DepthAnythingConfig(
    trunk=dinov2.Dinov2Config(width=64, depth=4, heads=4, trained_size=70, taps=(0, 1, 2, 3)),
    head=dpt.DptConfig(features=32, out_channels=(32, 32, 64, 64), frames=32),
)


def load(source, config, rows=depth_table.TABLE):
    shapes = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    loaded = table.load(source, rows, shapes, "depth network", clean=depth_table.renamed)
    assert not loaded.missing and all("mask_token" in key or key.endswith(".pe") for key in loaded.unused)
    return jax.tree.map(jnp.asarray, loaded.params)


@pytest.fixture(scope="module")
def golden():
    if not FIXTURE.is_file():
        pytest.skip(f"no golden vectors at {FIXTURE}; QDEPTH_SHARED names the folder that holds fixtures/")
    arrays = dict(np.load(FIXTURE, allow_pickle=False))
    config = json.loads(str(arrays["ref/config"]))
    assert config["embed_dim"] == 64 and config["pos_embed_image_size"] == 70 and config["features"] == 32
    weights = {name.removeprefix("w/"): x for name, x in arrays.items() if name.startswith("w/")}
    return arrays, weights, load(weights, TINY), config


def test_tokens_and_depth_of_a_window(golden):
    arrays, _, params, _ = golden
    frames = jnp.asarray(arrays["ref/frames"])
    network = depth_anything.DepthAnything(TINY)
    tokens = jax.jit(lambda p, x: network.apply({"params": p}, x, method="tokens"))(params, frames[0])
    np.testing.assert_allclose(tokens, arrays["ref/patch_tokens_last"], atol=2e-5)
    estimate = jax.jit(lambda p, x: depth_anything.estimate(TINY, p, x))
    found = estimate(params, frames)
    np.testing.assert_allclose(found, arrays["ref/depth"], atol=2e-5)
    # What would be seen of another order of the frames: the temporal modules matter.
    turned = estimate(params, frames[:, ::-1])[:, ::-1]
    assert np.abs(turned - arrays["ref/depth"]).max() > 1e-3


@pytest.mark.slow
def test_a_whole_video_by_the_published_procedure(golden):
    arrays, _, params, config = golden
    video = arrays["ref/video_uint8"]
    window = jax.jit(video_depth.make_window_fn(TINY, *video.shape[1:3], config["input_size"]))
    found = video_depth.video_depth(lambda frames: window(params, frames), video)
    np.testing.assert_allclose(found, arrays["ref/video_depth"], atol=1e-4)


def test_the_frame_positions_are_those_of_the_file(golden):
    _, weights, _, _ = golden
    found = [name for name in weights if name.endswith("pos_encoder.pe")]
    assert len(found) == 8
    for name in found:
        pe = weights[name][0]
        np.testing.assert_allclose(dpt.frame_positions(*pe.shape), pe, atol=2e-6)


@pytest.mark.slow
def test_scanned_and_unrolled_trunks_agree(golden):
    arrays, _, params, _ = golden
    frames, flat = jnp.asarray(arrays["ref/frames"][:, :2]), dataclasses.replace(TINY, scan=False)
    found, expected = (jax.jit(lambda p, c=c: depth_anything.estimate(c, p, frames))(params) for c in (flat, TINY))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_attention_by_few_heads_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 12, 5, 8)).astype(np.float32)) for _ in range(3))
    expected = attention.attend(q, k, v, mask=None)
    for numbers in (1, 2 * 144, 3 * 144, 7 * 144):  # 1, 2, 2 and 5 of the 10 heads at once
        monkeypatch.setattr(dinov2, "LOGITS", numbers)
        monkeypatch.setattr(dinov2, "LONG", 1)
        np.testing.assert_allclose(dinov2.attend(q, k, v), expected, atol=1e-6)


# The authors' counts (READMEs). Those of the video networks leave out the position table and the residual unit of the
# coarsest level, which nobody reads.
@pytest.mark.parametrize(
    ("name", "video", "millions"),
    [
        ("vits", False, 24.8),
        ("vitb", False, 97.5),
        ("vitl", False, 335.3),
        ("vits", True, 28.4),
        ("vitb", True, 113.1),
        ("vitl", True, 381.8),
    ],
)
def test_published_sizes(name, video, millions):
    config = depth_anything.sized(name, video)
    shapes = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    left_out = [shapes["trunk"]["pos_embedding"], shapes["head"]["fuse_4"]["unit_1"]] if video else []
    count = depth_anything.parameter_count(config) - sum(x.size for x in jax.tree.leaves(left_out))
    assert abs(count / 1e6 - millions) <= 0.05 + 1e-9


def test_refusals():
    with pytest.raises(errors.UserError, match="use one of"):
        depth_anything.sized("vitg", video=True)

    def shapes_of(*frames):
        return jax.eval_shape(lambda: depth_anything.DepthAnything(TINY).init(jax.random.key(0), jnp.zeros(frames)))

    with pytest.raises(errors.UserError, match="multiples of 14 pixels, got 28x30"):
        shapes_of(1, 1, 28, 30, 3)
    with pytest.raises(errors.UserError, match="at most 32 frames, got 33"):
        shapes_of(1, 33, 28, 28, 3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("size", ["tiny", "vits"])
def test_depth_anything_v2_equals_transformers(size):
    import torch
    import transformers

    torch.manual_seed(0)
    if size == "tiny":
        config = dataclasses.replace(TINY, head=dataclasses.replace(TINY.head, frames=0))
    else:
        config = depth_anything.sized("vits", video=False)
    trunk, head = dataclasses.replace(config.trunk, offset=0.0), config.head
    config = dataclasses.replace(config, trunk=trunk)
    backbone = transformers.Dinov2Config(
        hidden_size=trunk.width, num_hidden_layers=trunk.depth, num_attention_heads=trunk.heads,
        image_size=trunk.trained_size, patch_size=14, out_indices=[i + 1 for i in trunk.taps],
        reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    theirs = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=trunk.width, patch_size=14,
            neck_hidden_sizes=list(head.out_channels), fusion_hidden_size=head.features, head_hidden_size=32,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for _, p in theirs.named_parameters():
            p.normal_(0, 0.7 / p[0].numel() ** 0.5) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.05)
        theirs.backbone.embeddings.position_embeddings.normal_(0, 0.3)
        theirs.head.conv3.bias.fill_(0.5)
        images = torch.randn(1, 3, 56, 84)
        expected = theirs(images).predicted_depth.numpy()
    source = {k: v.numpy() for k, v in theirs.state_dict().items()}
    params = load(source, config, depth_table.HF_TABLE)
    frames = jnp.asarray(images.numpy().transpose(0, 2, 3, 1))[:, None]
    found = jax.jit(lambda p: depth_anything.estimate(config, p, frames))(params)
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-5)
