"""Policies of every convention: they train with a depth expert, have the published sizes, and bfloat16 is close."""

import dataclasses
import functools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from qdepth_jax import errors
from qdepth_jax.models import paligemma, policy, policy_config
from qdepth_jax.models.gemma import ExpertConfig
from qdepth_jax.models.siglip import SiglipConfig
from qdepth_jax.weights import big_vision, open_pi_zero, openpi, table

SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", pathlib.Path(__file__).parents[3] / "shared"))
KEY = jax.random.key(5)


def tiny(convention, **changes):
    return policy.sized("tiny", **{**policy_config.CONVENTIONS[convention], "views": ("main", "wrist"), **changes})


@functools.cache
def perturbed(config, seed=0):
    """Fresh parameters, with norms, gates and biases that matter."""
    fresh = jax.jit(lambda: policy.init(config, jax.random.key(seed)))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh["params"]), fresh[
        "state"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["pi0", "pi05"])
def test_a_depth_expert_trains_on_any_trunk(convention):
    config = tiny(convention, action_used=5, missing_views=True, freeze_embedding=True)
    params, state = perturbed(config)
    batch = synthetic.policy_batch(config, 4)
    batch["action"] = batch["action"][..., :5]
    batch["view_mask"] = batch["view_mask"].at[1, 1].set(False)

    def loss(p):
        out = policy.loss(config, p, state, batch, KEY, jnp.int32(0))
        return out.loss, out.metrics

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, metrics), gradient = step(params)
    assert set(metrics) == {"loss", "flow_loss", "depth_loss", "depth_accuracy", "lambda_t"}
    frozen = policy.frozen_table(config)
    norms = table.flatten(jax.tree.map(lambda g: float(jnp.linalg.norm(g)), gradient))
    still = {path for path, norm in norms.items() if norm == 0}
    # Softmax ignores what a key's bias adds, up to rounding; the rest is what the table of frozen parameters says.
    assert still == {path for path in norms if dict(frozen).get(path) == "all"}, still
    size = 1e-2 / math.sqrt(sum(norm**2 for norm in norms.values()))
    (after, _), _ = step(jax.tree.map(lambda p, g: p - size * g, params, gradient))
    assert math.isfinite(before) and after < before


def test_padding_and_absent_views_take_no_positions():
    config = tiny("pi0", depth=policy.sized("tiny").depth, image_steps=1)
    images = jnp.array([[True] * 8, [True] * 4 + [False] * 4])
    text = jnp.array([[True, True, True, False, False], [True, False, False, False, False]])
    ids = {name: np.asarray(x) for name, x in policy_config.valid_position_ids(config, images, text).items()}
    assert ids["image"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 3, 3, 3, 3]]
    assert ids["text"][:, :3].tolist() == [[8, 9, 10], [4, 4, 4]]
    assert ids["proprio"].tolist() == [[11], [5]] and ids["action"].tolist() == [[12, 13, 14, 15], [6, 7, 8, 9]]
    assert ids["depth"].tolist() == [[0, 1, 2, 3]] * 2
    behind = dataclasses.replace(config, positions=dataclasses.replace(config.positions, depth="after_text"))
    assert policy_config.valid_position_ids(behind, images, text)["depth"].tolist() == [[11, 12, 13, 14], [5, 6, 7, 8]]


def test_conventions_that_contradict():
    with pytest.raises(errors.UserError, match="proprio_steps=1 with action_time='adaptive'"):
        tiny("pi05", proprio_steps=1)
    with pytest.raises(errors.UserError, match="action_used=9 must be 0"):
        tiny("pi0", action_used=9)
    with pytest.raises(errors.UserError, match="'modulated' is unknown"):
        tiny("pi0", action_time="modulated")
    config = tiny("pi0", action_used=5, depth=None)
    shapes = jax.eval_shape(lambda: policy.init(config, KEY))["params"]
    with pytest.raises(errors.UserError, match="actions of 5 numbers, the batch has 7"):
        other = synthetic.policy_batch(dataclasses.replace(config, action_used=7), 2)
        jax.eval_shape(lambda p: policy.loss(config, p, {}, other, KEY, 0), shapes)


FULL = {
    "open_pi_zero": (3_238_100_727, lambda: policy.sized("full", depth=None), lambda c: open_pi_zero.TABLE),
    "openpi_pi0": (3_238_048_528, lambda: policy.sized("pi0"), openpi.rows),
    "openpi_pi05": (3_353_433_872, lambda: policy.sized("pi05"), openpi.rows),
    "big_vision_paligemma": (2_923_335_408, lambda: paligemma.sized("paligemma_3b"), big_vision.rows),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_is_the_published_one_leaf_by_leaf(name):
    """Total, and the keys of a file that the original code made (at tiny size): all of them, and no others."""
    total, config, rows = FULL[name]
    config = config()
    init = paligemma.init if isinstance(config, paligemma.PaligemmaConfig) else policy.init
    shapes = jax.eval_shape(lambda: init(config, KEY))["params"]
    keys = table.keys(rows(config), shapes)
    assert sum(math.prod(shape) for shape in keys.values()) == total
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total
    path = SHARED / "fixtures" / f"{name}_tiny.npz"
    if not path.is_file():
        pytest.skip(f"no golden vector at {path}; QDEPTH_SHARED names the folder that holds fixtures/")
    with np.load(path) as file:
        prefix = "w/" if name == "open_pi_zero" else "params/"
        theirs = {key.removeprefix(prefix): file[key].shape for key in file.files if key.startswith(prefix)}
    if name == "open_pi_zero":
        # Layers are numbered there: those of the tiny model.
        few = {key for key in keys if key in theirs}
        assert few == set(theirs)
    else:
        assert set(keys) == set(theirs)
    assert all(len(keys[key]) == len(shape) for key, shape in theirs.items())


# bfloat16 keeps 8 bits: one rounding has a relative error of at most 2^-9, 2^-9 / sqrt(3) on average. A layer rounds
# about 8 times between one state of the stream and the next (norm, query, keys, logits' operands, weights, values,
# output, MLP); independent roundings add as squares, so L layers leave sqrt(8 L) 2^-9 / sqrt(3) of the output. Of these
# models (2 of vision + 3 of the mixture) that is 0.7 %. MARGIN is for what is not independent: roundings of parameters
# are the same for all tokens. At full size (27 + 18 layers) the same rule says 2.1 %, and 8.6 % with the margin.
MARGIN = 4.0


def rounding(layers):
    return MARGIN * math.sqrt(8 * layers) * 2**-9 / math.sqrt(3)


def distance(ours, reference):
    """Root mean square of the difference, relative to that of the reference."""
    return float(jnp.sqrt(jnp.mean(jnp.square(ours - reference)) / jnp.mean(jnp.square(reference))))


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["open_pi_zero", "pi0", "pi05"])
def test_bfloat16_velocity_is_float32s_up_to_rounding(convention):
    config = tiny(convention)
    batch = synthetic.policy_batch(config, 8)
    noise = jax.random.normal(KEY, batch["action"].shape)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(config, params):
        inputs = policy.prepare_images(config, batch), batch["text"], batch["proprio"]
        out = policy.Policy(config).apply({"params": params}, *inputs, noise, jnp.linspace(0.1, 0.9, 8))
        return out.velocity, out.depth

    for seed in range(2):
        params, _ = perturbed(config, seed)
        exact = outputs(config, params)
        rounded = outputs(dataclasses.replace(config, dtype="bfloat16"), params)
        limit = rounding(config.siglip.depth + config.layers)
        for a, b in zip(rounded, exact, strict=True):
            assert 1e-4 < distance(a, b) < limit, (seed, distance(a, b), limit)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_bfloat16_logits_are_float32s_up_to_rounding(version):
    trunk = {"softcap": 50.0, "final_softcap": 30.0, "kv_heads": 2} if version == 2 else {}
    config = paligemma.PaligemmaConfig(
        siglip=SiglipConfig(28, 14, 24, 2, 2, 32),
        vlm=ExpertConfig(32, 48, post_norms=version == 2),
        layers=3,
        heads=4,
        **{"kv_heads": 1, **trunk},
        head_dim=8,
        vocabulary=50,
    )
    images = jax.random.uniform(KEY, (4, 28, 28, 3), minval=-1, maxval=1)
    text = jax.random.randint(KEY, (4, 6), 1, 50)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(config, params):
        return paligemma.logits(config, params, images, text, jnp.ones_like(text, bool))

    params = jax.jit(lambda: paligemma.init(config, KEY))()["params"]
    for seed in range(2):
        rng = np.random.default_rng(seed)
        moved = jax.tree.map(lambda x, rng=rng: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
        found = distance(logits(dataclasses.replace(config, dtype="bfloat16"), moved), logits(config, moved))
        assert 1e-4 < found < rounding(5), (seed, found)
