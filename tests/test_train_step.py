"""The step: 8 devices = 1 device, accumulation = no accumulation, frozen parts stand still, EMA follows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from qdepth_jax import config as config_lib
from qdepth_jax import optim, sharding, train_loop, train_step
from qdepth_jax.models import policy, tokenizer

TINY = policy.sized("tiny", layers=2)
OPTIM = config_lib.OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, ema_decay=0.9)
KEY = jax.random.key(0)


def one_step(objective, batch, mesh_config, devices, frozen=(), micro_batches=1, optim_config=OPTIM):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    tx = optim.make(optim_config, 100, frozen)
    init = functools.partial(train_step.init_state, objective=objective, tx=tx, ema=True)
    placed = sharding.state_shardings(mesh, jax.eval_shape(init, KEY))
    step = functools.partial(
        train_step.train_step, objective=objective, tx=tx, frozen=frozen, micro_batches=micro_batches, ema_decay=0.9
    )
    with jax.set_mesh(mesh):
        start = jax.jit(init, out_shardings=placed)(KEY)
        end, metrics = jax.jit(step, out_shardings=(placed, None))(start, train_loop.put_batch(batch, mesh), KEY)
    return jax.device_get((start, end, metrics))


@functools.lru_cache
def reference():
    objective = policy.make_objective(TINY)
    batch = {k: np.asarray(v) for k, v in synthetic.policy_batch(TINY, 8).items() if k in objective.features}
    return objective, batch, one_step(objective, batch, config_lib.MeshConfig(), 1)


def assert_close(a, b, tolerance=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1e-3, float(np.max(np.abs(x))))
        assert np.max(np.abs(x - y)) <= tolerance * scale, sharding.path_of(path)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        ((2, 2, 2), 2),
        pytest.param((1, 8, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 4, 2), 1, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(mesh, micro_batches):
    objective, batch, (_, _, metrics) = reference()
    _, end, other = one_step(objective, batch, config_lib.MeshConfig(*mesh), 8, micro_batches=micro_batches)
    assert_close(metrics, other)
    # First moments are (1 - b1) times the clipped gradient: equal moments mean equal gradients, leaf by leaf.
    mu = [
        x for p, x in jax.tree_util.tree_leaves_with_path(reference()[2][1].opt_state) if "/mu/" in sharding.path_of(p)
    ]
    nu = [x for p, x in jax.tree_util.tree_leaves_with_path(end.opt_state) if "/mu/" in sharding.path_of(p)]
    assert len(mu) > 20
    largest = max(float(np.max(np.abs(x))) for x in mu)
    for x, y in zip(mu, nu, strict=True):
        assert np.max(np.abs(x - y)) <= 1e-5 * largest


def test_accumulation_equals_one_big_batch():
    objective, batch, (_, _, metrics) = reference()
    _, _, other = one_step(objective, batch, config_lib.MeshConfig(), 1, micro_batches=4)
    # Accuracy under a mask is a ratio of sums, every loss is a mean over examples.
    assert_close(
        {k: metrics[k] for k in ("loss", "flow_loss", "depth_loss", "grad_norm")},
        {k: other[k] for k in ("loss", "flow_loss", "depth_loss", "grad_norm")},
    )


@pytest.mark.parametrize("faithful", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_parts_stand_still_and_the_rest_moves(faithful):
    config = dataclasses.replace(TINY, faithful=faithful)
    frozen = policy.frozen_table(config)
    objective = policy.make_objective(config)
    batch = {k: np.asarray(v) for k, v in synthetic.policy_batch(config, 8).items() if k in objective.features}
    decay = dataclasses.replace(OPTIM, weight_decay=0.1)
    start, end, _ = one_step(objective, batch, config_lib.MeshConfig(), 1, frozen, optim_config=decay)
    a, b = start.params["llm"], end.params["llm"]
    np.testing.assert_array_equal(a["embedder"]["input_embedding"], b["embedder"]["input_embedding"])
    before, after = a["layers"]["vlm"], b["layers"]["vlm"]
    np.testing.assert_array_equal(before["mlp"]["linear"][-1], after["mlp"]["linear"][-1])
    assert (before["mlp"]["linear"][0] != after["mlp"]["linear"][0]).any()
    kv = before["attn"]["kv_einsum"]["w"], after["attn"]["kv_einsum"]["w"]
    assert (kv[0][-1, 0] != kv[1][-1, 0]).any(), "the last layer's keys are trained"
    assert (kv[0][-1, 1] == kv[1][-1, 1]).all() == faithful, "its values are frozen only by the reference's slip"
    q = before["attn"]["q_einsum"]["w"], after["attn"]["q_einsum"]["w"]
    assert (q[0][-1] == q[1][-1]).all() == (not faithful)


def test_ema_is_the_running_average():
    _, _, (start, end, _) = reference()
    for s, e, a in zip(*(jax.tree.leaves(t) for t in (start.params, end.params, end.ema)), strict=True):
        np.testing.assert_allclose(a, 0.9 * s + 0.1 * e, rtol=1e-5, atol=1e-7)


def test_tokenizer_codebook_statistics_are_global():
    config = tokenizer.TokenizerConfig(
        depth_size=32, grid=4, num_codes=64, code_dim=8, widths=(16, 16), blocks=1, start_step=0
    )
    objective = tokenizer.make_objective(config)
    raw = np.random.default_rng(0).integers(500, 3500, (8, 32, 32)).astype(np.uint16)
    batch = {
        "depth": raw,
        "depth_scale": np.full((8,), 0.001, np.float32),
        "depth_offset": np.zeros((8,), np.float32),
    }
    _, one, metrics = one_step(objective, batch, config_lib.MeshConfig(), 1)
    _, eight, other = one_step(objective, batch, config_lib.MeshConfig(8, 1, 1), 8)
    assert_close(metrics, other)
    np.testing.assert_allclose(one.state["count"], eight.state["count"], atol=1e-4)
    np.testing.assert_allclose(one.state["codebook"], eight.state["codebook"], atol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule_values(schedule):
    config = config_lib.OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10, min_learning_rate=0.1)
    at = optim.schedule(config, 110)
    assert abs(float(at(0)) - 0.1) < 1e-6 and abs(float(at(5)) - 0.55) < 1e-6 and abs(float(at(10)) - 1.0) < 1e-6
    assert abs(float(at(110)) - (0.1 if schedule == "cosine" else 1.0)) < 1e-6
    assert abs(float(at(60)) - (0.55 if schedule == "cosine" else 1.0)) < 1e-6


@pytest.mark.parametrize("field", ["frozen", "scale"])
def test_a_row_that_matches_nothing_is_refused(field):
    row = ((r"llm/tpyo", "all" if field == "frozen" else 0.1),)
    tx = optim.make(dataclasses.replace(OPTIM, **{field: row}), 10)
    with pytest.raises(ValueError, match=rf"optim.{field} row 'llm/tpyo' matches no parameter.*'llm/typo'"):
        tx.init({"llm": {"typo": jnp.ones(3)}})


def test_learning_rate_factors_scale_the_update():
    params = {"img": {"w": jnp.ones(3)}, "llm": {"w": jnp.ones(3)}}
    config = dataclasses.replace(OPTIM, scale=((r"img/.*", 0.1),), clip_norm=1e9)
    tx = optim.make(config, 10)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["img"]["w"], 0.1 * updates["llm"]["w"], rtol=1e-6)
