"""From observations to rows of the network: resizing and noise are those of training and evaluation, to the bit."""

import dataclasses
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import stored_runs

from qdepth_jax import depth, errors, exported, planner
from qdepth_jax.data import normalise, text
from qdepth_jax.models import flow, images, inference, policy, sampling, tokenizer

OTHER_WORDS = stored_runs.WORDS.replace("libero.model", "study.model")


def pair(dims, kind="bounds"):
    """Statistics of a data set whose actions and states have so many numbers."""
    values = np.random.default_rng(dims).normal(size=(20, dims)).astype(np.float32)
    return dict.fromkeys(("action", "proprio"), normalise.Normaliser(normalise.compute(values), kind))


def without_weights(monkeypatch, stored, **fields):
    """What planner.load finds."""
    model = policy.sized("tiny", scan=False, **fields)
    found = exported.Exported("policy", model, {"params": {}}, stored, stored_runs.WORDS, 24, "raw", 0, "", {})
    monkeypatch.setattr(exported, "load", lambda path: found)


@pytest.mark.parametrize(("height", "width"), [(40, 52), (20, 28)])
def test_pictures_are_resized_as_in_training(height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    found = planner._resized(picture, 28)
    assert found.dtype == np.uint8 and found.shape == (28, 28, 3)
    wanted = jax.jit(lambda x: images.prepare(x, 28))(picture[None])
    np.testing.assert_array_equal(images.prepare(jax.numpy.asarray(found[None]), 28), wanted)
    assert planner._resized(found, 28) is found


def test_noise_depends_on_seed_and_call_alone():
    config = policy.sized("tiny")
    found = np.asarray(planner._noise(config, np.asarray([[3, 0], [3, 1], [4, 0]], np.uint32)))
    for row, (seed, call) in zip(found, [(3, 0), (3, 1), (4, 0)]):
        key = jax.random.split(jax.random.fold_in(jax.random.key(seed), call), 1)[0]
        np.testing.assert_array_equal(row, jax.random.normal(key, (config.horizon, config.action_dim)))


def test_programs_are_filled_and_cut():
    rows = [planner.Row({"x": np.full(2, i)}, np.zeros(2, np.uint32)) for i in (1, 2, 3)]
    assert planner._stack(rows, 4)["x"][:, 0].tolist() == [1, 2, 3, 1]
    assert planner._stack(rows, 0)["x"][:, 0].tolist() == [1, 2, 3]


def test_packing_renames_no_policy_and_another_sampler_does():
    params = stored_runs.random_like(stored_runs.shapes("policy", stored_runs.QDEPTH), 0)["params"]
    config = dataclasses.replace(stored_runs.QDEPTH, scan=False)
    found, words = (
        exported.Exported("policy", config, {}, {}, "", 24, "raw", 0, "", {}),
        text.TextTokenizer(stored_runs.WORDS),
    )
    given = planner.Planner(config, {"params": params, "state": {}}, found, "", None, None, words, None)
    packed, small = (
        given._replace(variables={"params": inference.pack(config, params, weights), "state": {}})
        for weights in inference.WEIGHTS
    )
    assert planner.identity(packed) == planner.identity(given)
    others = [planner.identity(small), planner.identity(given._replace(solver="heun"))]
    others.append(planner.identity(given._replace(config=inference.configured(config, inference.Inference(4)))))
    others.append(planner.identity(given._replace(found=found._replace(text_rule="openpi"))))
    others.append(planner.identity(given._replace(words=text.TextTokenizer(OTHER_WORDS))))
    assert len({planner.identity(given), *others}) == 6


def test_a_run_whose_tokenizers_were_replaced_is_refused(tmp_path):
    words = pathlib.Path(shutil.copy(stored_runs.WORDS, tmp_path / "words.model"))
    config = stored_runs.experiment("policy", stored_runs.QDEPTH, tokenizer=str(tmp_path / "codes"))
    config.data.text_tokenizer = str(words)
    codes = stored_runs.write_tokenizer(tmp_path / "codes")
    stored_runs.write(tmp_path / "policy", "policy", stored_runs.QDEPTH, config, tokenizer=codes)
    run = str(tmp_path / "policy")
    planner.load(run, decode_depth=True)
    shutil.rmtree(tmp_path / "codes")
    stored_runs.write(tmp_path / "codes", "tokenizer", stored_runs.TOKENIZER, ema=False, seed=1)
    planner.load(run)  # actions need no codes
    with pytest.raises(errors.UserError, match=f"learnt the codes of depth tokenizer {codes}, what lies at .*codes'"):
        planner.load(run, decode_depth=True)
    shutil.copy(OTHER_WORDS, words)
    before, now = (text.file_identity(path) for path in (stored_runs.WORDS, OTHER_WORDS))
    with pytest.raises(errors.UserError, match=f"text tokenizer {before}, .*words.model' now is {now}"):
        planner.load(run)


@pytest.mark.parametrize("dataset", ["", "bridge"])
def test_whose_robot_it_drives_is_a_flag(monkeypatch, dataset):
    stored = dict.fromkeys(("libero_object", "libero_spatial"))
    found = exported.Exported("policy", policy.sized("tiny"), {}, stored, "", 24, "raw", 0, "", {})
    monkeypatch.setattr(exported, "load", lambda path: found)
    with pytest.raises(errors.UserError, match=r"trained on \['libero_object', 'libero_spatial'\].*--dataset=NAME"):
        planner.load("run", dataset)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("libero_object", "libero_object"),
        ("libero_object_swap", "libero_object_swap"),
        ("libero_object_swap_lan", "libero_object_swap"),
        ("libero_object_lan", "libero_object"),
        ("kitchen(v1.0)_lan", "kitchen(v1.0)"),
        ("libero_objects", ""),
        ("kitchen(v1x0)", ""),
    ],
)
def test_the_nearest_name_says_whose_statistics(monkeypatch, asked, meant):
    stored = {name: pair(dims) for dims, name in enumerate(("libero_object", "libero_object_swap", "kitchen(v1.0)"), 1)}
    without_weights(monkeypatch, stored)
    if not meant:
        with pytest.raises(errors.UserError, match=f"not on {re.escape(repr(asked))}"):
            planner.load("run", asked)
        return
    loaded = planner.load("run", asked)
    assert (loaded.dataset, loaded.action, loaded.proprio) == (meant, *stored[meant].values())


@pytest.mark.parametrize(
    ("kind", "clip", "said"), [("normal", 1.0, True), ("normal", 0.0, False), ("minmax", 1.0, False)]
)
def test_a_policy_whose_actions_are_cut_off_is_said(monkeypatch, caplog, kind, clip, said):
    without_weights(monkeypatch, {"bridge": pair(7, kind)}, flow=flow.FlowConfig(clip=clip))
    planner.load("run")
    assert ("'run' cuts its actions off 1 standard deviations from their mean" in caplog.text) == said


@pytest.mark.slow
def test_depth_is_decoded_by_the_tokenizer_of_the_policy(tmp_path):
    stored_runs.write_qdepth(tmp_path)
    loaded = planner.load(str(tmp_path / "policy"), decode_depth=True)
    rng = np.random.default_rng(0)
    picture, state = rng.integers(0, 255, (28, 28, 3)).astype(np.uint8), rng.normal(size=7)
    rows = [planner.make_row(loaded, {"main": picture}, state, words, 0, 0) for words in ("open", "close")]
    found = planner.predict_depth(loaded, rows, 4)
    assert found.shape == (2, 8, 8) and found.dtype == np.float32
    batch = planner._stack(rows, 0)
    model, variables = loaded.decoder

    @jax.jit
    def decoded(given):
        logits = sampling.predict_depth(loaded.config, given["params"], given["state"], batch)
        return tokenizer.decode(model, variables["params"], variables["state"], logits.argmax(-1))

    x = decoded(loaded.variables)
    np.testing.assert_allclose(found, depth.denormalise(x, model.range), atol=1e-4)
    with pytest.raises(errors.UserError, match="decode_depth=True"):
        planner.predict_depth(loaded._replace(decoder=None), rows)
    # Both answers by one program, with and without an old chunk.
    alone = planner.plan(loaded, rows, 4)
    actions, together = planner.plan_with_depth(loaded, rows, 4)
    np.testing.assert_allclose(actions, alone, atol=1e-5)
    np.testing.assert_allclose(together, found, atol=1e-4)
    old = planner.make_row(loaded, {"main": picture}, state, "open", 0, 0, alone[0, 1:], 2)
    actions, together = planner.plan_with_depth(loaded, [old, rows[1]], 4)
    np.testing.assert_allclose(actions, planner.plan(loaded, [old, rows[1]], 4), atol=1e-5)
    np.testing.assert_allclose(actions[0, :2], alone[0, 1:3], atol=1e-5)
    np.testing.assert_allclose(together, found, atol=1e-4)
    with pytest.raises(errors.UserError, match=r"7 numbers, got \[8\]"):
        planner.make_row(loaded, {"main": picture}, np.zeros(8), "open", 0, 0)
