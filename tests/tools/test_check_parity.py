"""The parity command: green on the golden vector, red on a damaged one, a message on an unusable one."""

import importlib.util
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.models import policy, sampling
from qdepth_jax.weights import open_pi_zero, parity, parity_open_pi_zero, parity_openpi

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "models"))
import policy_by_hand  # noqa: E402

SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", ROOT.parent / "shared"))
FIXTURES = SHARED / "fixtures"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_parity = tool("check_parity")


def golden(name):
    path = FIXTURES / f"{name}_tiny.npz"
    if not path.is_file():
        pytest.skip(f"no golden vector at {path}; QDEPTH_SHARED names the folder that holds fixtures/")
    return check_parity.read(path)


@pytest.fixture(scope="module")
def arrays():
    return golden("open_pi_zero")


@pytest.fixture(scope="module")
def rows(arrays):
    return check_parity.compare("open_pi_zero", arrays, 2e-5, 1e-4)


def test_golden_vector(rows, capsys):
    assert check_parity.report("open_pi_zero", rows) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] and result["compared"] > 100
    assert max(result[name] for name in ("vision_features", "velocity", "infer_actions")) < 2e-6
    names = {row.name for row in rows}
    assert "grad_norm/joint_model.mixtures.vlm.layers.2.self_attn.q_proj.weight" in names


@pytest.mark.parametrize(
    ("name", "layout", "outputs"),
    [
        ("openpi_pi0", "openpi", {"velocity", "loss", "sample_actions", "sample_actions_uncached"}),
        ("openpi_pi05", "openpi", {"velocity", "loss", "sample_actions", "sample_actions_uncached"}),
        (
            "big_vision_paligemma",
            "paligemma",
            {"image_tokens", "prefix_embeddings", "pre_logits", "logits", "text_logits_no_padding_mask"},
        ),
    ],
)
def test_golden_vectors_of_other_layouts(name, layout, outputs):
    found = golden(name)
    assert check_parity.recognise(pathlib.Path(name), found) == layout
    rows = check_parity.compare(layout, found, 2e-5, 1e-4)
    assert {row.name for row in rows} == outputs and all(row.ok for row in rows), rows
    # Far inside the tolerance: what is left is rounding.
    assert max(row.error for row in rows) < 4e-6, rows


@pytest.mark.slow
def test_openpi_with_other_cameras_padding_and_a_word_zero():
    """One camera fewer, another batch, token 0 as a word: the reference is our own f32 run of the whole batch."""
    found = golden("openpi_pi0")
    found["ref/tokens"][0, 2] = 0
    changed = check_parity.compare("openpi", found, 2e-5, 1e-4)
    assert not any(row.ok for row in changed), "another word must change every output"
    config, params = parity_openpi.policy_from(found)
    batch = parity_openpi.batch_from(config, found)
    sample = jax.jit(lambda p: sampling.sample_actions(config, p, {}, batch, found["ref/noise"]))
    found["ref/sample_actions"] = np.asarray(sample(params))
    # An absent camera is as good as none, and an example knows nothing of its batch.
    few = {key: array for key, array in found.items() if "right_wrist" not in key}
    for key in few:
        if key.startswith("ref/") and key != "ref/config":
            few[key] = few[key][1:2]
    # What stands behind the mask does not matter.
    few["ref/tokens"] = np.where(few["ref/token_mask"], few["ref/tokens"], 7)
    rows = {row.name: row for row in check_parity.compare("openpi", few, 2e-5, 1e-4)}
    assert rows["sample_actions"].error < 2e-6 and rows["sample_actions_uncached"].error < 2e-6


@pytest.mark.slow
def test_golden_vector_of_video_depth_anything():
    found = golden("video_depth_anything")
    assert check_parity.recognise(pathlib.Path("x"), found) == "video_depth_anything"
    rows = check_parity.compare("video_depth_anything", found, 2e-5, 1e-4)
    assert [row.name for row in rows] == ["patch_tokens_last", "depth", "video_depth"] and all(row.ok for row in rows)
    found["ref/frames"] = found["ref/frames"][:, ::-1]
    assert not any(row.ok for row in check_parity.compare("video_depth_anything", found, 2e-5, 1e-4)[:2])


def test_what_a_file_lacks_is_named(tmp_path, capsys):
    check_parity.flags.FLAGS.mark_as_parsed()
    np.savez(tmp_path / "depth.npz", **{"w/pretrained.cls_token": np.zeros(2), "ref/frames": np.zeros(2)})
    assert _main(tmp_path / "depth.npz") == 2
    assert "ref/video_depth" in capsys.readouterr().err


def test_rows():
    row = parity.absolute("x", np.array([[1.0], [5.0]]), np.array([[1.5], [0.0]]), 1.0, np.array([True, False]))
    assert row.error == 0.5 and row.ok
    assert not parity.relative("x", float("nan"), 1.0, 1.0).ok
    with pytest.raises(errors.UserError, match="nothing valid"):
        parity.absolute("x", np.zeros((1, 2)), np.zeros((1, 2)), 1.0, np.array([False]))
    with pytest.raises(errors.UserError, match="must be a JSON object, not list"):
        parity.description({"c": np.array("[1]")}, "c")


def test_a_wrong_reference_is_red(arrays, rows, capsys):
    damaged = list(rows)
    damaged[1] = rows[1]._replace(error=3e-5)
    assert check_parity.report("open_pi_zero", damaged) == 1
    damaged[1] = rows[1]._replace(error=float("nan"))
    assert check_parity.report("open_pi_zero", damaged) == 1
    capsys.readouterr()


def test_gradient_rules(arrays):
    """A key the reference lacks needs an exactly zero gradient of ours, except for the frozen set."""
    config, _ = parity_open_pi_zero.policy_from(arrays)
    value = parity_open_pi_zero.gradient_rows
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    absent = "joint_model.mixtures.vlm.layers.2.self_attn.o_proj.weight"
    assert [r.error for r in value(config, {}, {absent: zero}, 1e-4)] == [0.0]
    assert [r.ok for r in value(config, {}, {absent: one}, 1e-4)] == [False]
    frozen = "joint_model.mixtures.vlm.layers.2.self_attn.v_proj.weight"
    assert value(config, {}, {frozen: one}, 1e-4) == []
    unknown = value(config, {"grad_norm/new.weight": np.float32(1)}, {}, 1e-4)
    assert unknown[0].error == float("inf")


def test_another_model_from_an_independent_implementation(tmp_path, capsys):
    """Other sizes, seed, padding, batch, head groups, window and steps than the golden vector; made by NumPy loops."""
    c = {
        "vlm_width": 24, "vlm_mlp": 20, "expert_width": 12, "expert_mlp": 16, "depth": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 6, "vision_width": 18, "vision_mlp": 14, "vision_depth": 1, "vision_heads": 3,
        "image_size": 24, "patch_size": 8, "num_image_tokens": 9, "max_text_tokens": 3, "vocab_size": 31,
        "image_token_id": 30, "pad_token_id": 0, "horizon": 3, "cond_steps": 2, "action_dim": 5, "proprio_dim": 8,
        "num_inference_steps": 3, "final_action_clip": 0.8, "flow_sig_min": 0.01, "time_max_period": 50.0,
        "expert_rope_theta": 300.0, "vlm_rope_theta": 1000.0, "attn_softclamp": 4.0, "rms_norm_eps": 1e-5,
        "adaptive": None,
    }  # fmt: skip
    rng = np.random.default_rng(11)
    text = rng.integers(1, 30, (4, 3))
    text[1, 1:], text[2, 2:] = 0, 0
    arrays = {
        "config": np.array(json.dumps(c)),
        "input_ids": np.concatenate([np.full((4, 9), 30), text], axis=1).astype(np.int32),
        "pixel_values": rng.uniform(-1, 1, (4, 24, 24, 3)),
        "proprio": rng.normal(size=(4, 2, 8)),
        "actions": rng.uniform(-1, 1, (4, 3, 5)),
        "t": rng.uniform(0, 1, 4),
        "noise": rng.normal(size=(4, 3, 5)),
        "infer_noise": rng.normal(size=(4, 3, 5)),
    }
    config, _ = parity_open_pi_zero.policy_from(arrays)
    shapes = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    weights = open_pi_zero.save(jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape), shapes), copies=("action",))

    def forward(i, x_t, t):
        image, words, state = arrays["pixel_values"][i][None], text[i], arrays["proprio"][i]
        return policy_by_hand.forward(weights, config, image, words, state, x_t, t)[:2]

    velocity, features, sampled = [], [], []
    for i in range(4):
        t, noise, action = arrays["t"][i], arrays["noise"][i], arrays["actions"][i]
        v, f = forward(i, (1 - 0.99 * t) * noise + t * action, t)
        velocity.append(v)
        features.append(f)
        x = arrays["infer_noise"][i]
        for step in range(3):
            x = x + forward(i, x, step / 3)[0] / 3
        sampled.append(np.clip(x, -0.8, 0.8))
    target = arrays["actions"] - 0.99 * arrays["noise"]
    arrays |= {
        "velocity": np.stack(velocity),
        "vision_features": np.stack(features),
        "infer_actions": np.stack(sampled),
        "loss": np.mean((np.stack(velocity) - target) ** 2),
    }
    arrays |= {f"w/{name}": array for name, array in weights.items()}
    arrays = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}
    np.savez(tmp_path / "other.npz", **arrays)
    check_parity.flags.FLAGS.mark_as_parsed()
    assert _main(tmp_path / "other.npz") == 0
    assert "no gradient norms" in capsys.readouterr().out
    arrays["velocity"] = arrays["velocity"] + 1e-4
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert _main(tmp_path / "wrong.npz") == 1


def _main(*arguments):
    """The exit code, as command.run makes it."""
    try:
        return check_parity.main(["check_parity.py", *map(str, arguments)])
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2


def test_unusable_files(arrays, tmp_path, capsys):
    check_parity.flags.FLAGS.mark_as_parsed()
    assert _main(tmp_path / "nothing.npz") == 2
    (tmp_path / "text.npz").write_text("no archive")
    assert _main(tmp_path / "text.npz") == 2
    np.savez(tmp_path / "other.npz", params=np.zeros(2))
    assert _main(tmp_path / "other.npz") == 2
    few = {name: array for name, array in arrays.items() if name not in ("t", "velocity")}
    np.savez(tmp_path / "few.npz", **few)
    assert _main(tmp_path / "few.npz") == 2
    odd = {**arrays, "input_ids": arrays["input_ids"][:, ::-1]}
    np.savez(tmp_path / "odd.npz", **odd)
    assert _main(tmp_path / "odd.npz") == 2
    gap = {name: array for name, array in arrays.items() if name != "w/action_decoder.bias"}
    np.savez(tmp_path / "gap.npz", **gap)
    assert _main(tmp_path / "gap.npz") == 2
    messages = capsys.readouterr().err
    for fragment in (
        "nothing.npz is no file",
        "cannot be read as .npz",
        "unknown layout",
        "lacks ['t', 'velocity']",
        "image tokens",
        "action_decoder.bias: not in the file",
    ):
        assert fragment in messages
