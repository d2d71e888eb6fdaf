"""The step: any mesh = one device, accumulation = none, a bad batch changes nothing, frozen parts stand still.

Gradients themselves are compared, leaf by leaf: the optimiser's first link stores them.
"""

import dataclasses
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synthetic
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import optim, sharding, train_loop, train_step
from qdepth_jax.models import objective as objective_lib
from qdepth_jax.models import policy, tokenizer
from qdepth_jax.models.siglip import SiglipConfig

# Every size divides by 8, so that it fits every mesh of eight.
VISION = SiglipConfig(image_size=28, patch=14, width=32, depth=2, heads=8, mlp=32)
TINY = policy.sized("tiny", layers=2, heads=8, siglip=VISION)
OPTIM = config_lib.OptimConfig(
    learning_rate=1e-2, schedule="constant", warmup_steps=0, ema_decay=0.9, weight_decay=0.1, moment_dtype="bfloat16"
)
KEY = jax.random.key(0)
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
)


def compiled(objective, tx, batch, mesh, micro_batches=1, frozen=(), ema=True, rules=(), placed=None):
    """The step ahead of time as the loop builds it, and the shardings of its state; nothing that is donated is lost."""
    init = functools.partial(train_step.init_state, objective=objective, tx=tx, ema=ema)
    shapes = jax.eval_shape(init, KEY)
    places = sharding.state_shardings(mesh, shapes, rules)
    step = functools.partial(
        train_step.train_step,
        objective=objective,
        tx=tx,
        frozen=frozen,
        micro_batches=micro_batches,
        ema_decay=0.9,
        learning_rate=optim.schedule(OPTIM, 100),
        placed=placed or places.params,
    )
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*donated")
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        step = step.lower(target, train_loop.put_batch(batch, mesh), KEY).compile()
    parts = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(target)]
    assert step.memory_analysis().alias_size_in_bytes == sum(parts), "every byte of the state is donated"
    return step, init, places


def one_step(objective, batch, mesh_config, devices, tx, start=None, **options):
    """(state before, state after, metrics) on the host; `start` on the host or None for a fresh one."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    step, init, places = compiled(objective, tx, batch, mesh, **options)
    with jax.set_mesh(mesh):
        start = jax.device_get(jax.jit(init)(KEY)) if start is None else start
        return jax.device_get((start, *step(jax.device_put(start, places), train_loop.put_batch(batch, mesh), KEY)))


def policy_step(config, mesh_config, devices, tx=None, **options):
    """One step of a policy on 16 examples, its frozen parts frozen; with no `tx` the whole optimiser."""
    objective, frozen = policy.make_objective(config), policy.frozen_table(config)
    tx = tx or optax.chain(KEEP_GRADIENTS, optim.make(OPTIM, 100, frozen))
    batch = {k: np.asarray(v) for k, v in synthetic.policy_batch(config, 16).items() if k in objective.features}
    return one_step(objective, batch, config_lib.MeshConfig(*mesh_config), devices, tx, frozen=frozen, **options)


@functools.lru_cache
def reference():
    """One device, no accumulation, no recomputation: (state before, state after, metrics)."""
    return policy_step(TINY, (1, 1, 1), 1)


def assert_close(a, b, tolerance=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1e-3, float(np.max(np.abs(x))))
        assert np.max(np.abs(x - y)) <= tolerance * scale, sharding.path_of(path)


# Zero but for rounding: a bias of the keys moves all logits of a row alike.
NO_GRADIENT = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"


def assert_same_gradients(found, expected):
    """Each leaf within 1e-5 of its own largest entry; the one without a gradient below 1e-8 of the largest of all."""
    leaves = {sharding.path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(expected)}
    largest = max(float(np.max(np.abs(x))) for x in leaves.values())
    assert len(leaves) > 40
    for (path, x), y in zip(leaves.items(), jax.tree.leaves(found), strict=True):
        if path == NO_GRADIENT:
            assert max(np.max(np.abs(x)), np.max(np.abs(y))) < 1e-8 * largest
        else:
            assert np.max(np.abs(x - y)) <= 1e-5 * np.max(np.abs(x)), path


def assert_same_losses(found, expected):
    # Accuracy under a mask is a ratio of sums, every loss is a mean over examples.
    names = [name for name in expected if name != "depth_accuracy"]
    assert set(found) == set(expected) and len(names) > 10
    assert_close({k: found[k] for k in names}, {k: expected[k] for k in names})


@pytest.mark.slow
def test_eight_devices_accumulating_and_recomputing_equal_one_in_everything():
    """Loss, gradients, updated and averaged parameters, and both moments in bfloat16."""
    _, end, metrics = reference()
    _, other, found = policy_step(dataclasses.replace(TINY, remat="full"), (2, 2, 2), 8, micro_batches=2)
    assert_same_losses(found, metrics)
    assert_same_gradients(other.opt_state[0], end.opt_state[0])
    # Adam's first update is the sign of the gradient: where that is rounding noise the parameters may differ.
    for a, b in ((end.params, other.params), (end.ema, other.ema)):
        differ = [np.abs(x - y) > 1e-4 * OPTIM.learning_rate for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
        assert np.mean(np.concatenate([x.ravel() for x in differ])) < 0.01
    for name in ("mu", "nu"):
        expected, found = optax.tree.get(end, name), optax.tree.get(other, name)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
            assert x.dtype == y.dtype == jnp.bfloat16
            if sharding.path_of(path) != NO_GRADIENT:
                x, y = x.astype(np.float32), y.astype(np.float32)
                assert np.mean(x != y) < 0.05, "the same noise, so hardly a rounding differs"
                np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-5 * np.max(np.abs(x)))


# Pairs of (mesh, accumulation) and (mesh, recomputation) rather than all 28 combinations, each of which compiles for
# ten seconds; benchmarks/sharded_gradients.py measures all of them.
MESHES = [
    ((1, 1, 1), 4, "none"),
    ((1, 8, 1), 1, "none"),
    ((1, 8, 1), 2, "full"),
    ((1, 1, 8), 4, "none"),
    ((8, 1, 1), 1, "full"),
    ((2, 4, 1), 2, "none"),
    ((1, 4, 2), 1, "full"),
    ((2, 2, 2), 1, "none"),
    ((1, 2, 4), 4, "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "micro_batches", "remat"), MESHES)
def test_loss_and_every_gradient_equal_one_device(mesh, micro_batches, remat):
    start, end, metrics = reference()
    start = start.replace(opt_state=start.opt_state[0], ema=None)
    config = dataclasses.replace(TINY, remat=remat)
    options = {"tx": KEEP_GRADIENTS, "start": start, "micro_batches": micro_batches, "ema": False}
    _, other, found = policy_step(config, mesh, math.prod(mesh), **options)
    assert_same_losses(found | {"param_norm": metrics["param_norm"]}, metrics)
    assert_same_gradients(other.opt_state, end.opt_state[0])


@pytest.mark.parametrize("faithful", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_parts_stand_still_and_the_rest_moves(faithful):
    """In spite of weight decay."""
    config = dataclasses.replace(TINY, faithful=faithful)
    start, end, _ = policy_step(config, (1, 1, 1), 1) if faithful else reference()
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
    start, end, _ = reference()
    for s, e, a in zip(*(jax.tree.leaves(t) for t in (start.params, end.params, end.ema)), strict=True):
        np.testing.assert_allclose(a, 0.9 * s + 0.1 * e, rtol=1e-5, atol=1e-7)
    # What is frozen has exactly its own value as average, after any number of steps.
    leaves = zip(*(jax.tree.leaves(t) for t in (start.params, end.params, end.ema)), strict=True)
    still = [(s, a) for s, e, a in leaves if (s == e).all() and s.any()]
    assert still
    for s, a in still:
        np.testing.assert_array_equal(a, s)


def test_metrics_are_the_norms_of_what_they_name():
    _, end, metrics = reference()
    norm = lambda tree: math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))  # noqa: E731
    grads = end.opt_state[0]
    assert metrics["grad_norm"] == pytest.approx(norm(grads), rel=1e-6)
    assert metrics["param_norm"] == pytest.approx(norm(end.params), rel=1e-6)
    depth = grads["llm"]["layers"]["depth"], grads["llm"]["final_norm_depth"]
    assert metrics["grad_norm/depth"] == pytest.approx(
        norm((depth, grads["depth_encoder"], grads["depth_decoder"])), rel=1e-6
    )
    parts = [float(v) for k, v in metrics.items() if k.startswith("grad_norm/")]
    assert len(parts) == 4 and math.hypot(*parts) == pytest.approx(float(metrics["grad_norm"]), rel=1e-6)


@pytest.mark.parametrize("quantiser", ["ema", pytest.param("l2", marks=pytest.mark.slow)])
def test_tokenizer_codebook_statistics_are_global(quantiser):
    config = tokenizer.TokenizerConfig(
        depth_size=32, grid=4, num_codes=64, code_dim=8, widths=(16,) * 2, blocks=1, start_step=0, quantiser=quantiser
    )
    objective = tokenizer.make_objective(config)
    raw = np.random.default_rng(0).integers(500, 3500, (8, 32, 32)).astype(np.uint16)
    batch = {
        "depth": raw,
        "depth_scale": np.full((8,), 0.001, np.float32),
        "depth_offset": np.zeros((8,), np.float32),
    }
    start, one, metrics = one_step(objective, batch, config_lib.MeshConfig(), 1, optax.identity())
    _, eight, other = one_step(objective, batch, config_lib.MeshConfig(8, 1, 1), 8, optax.identity(), start)
    assert_close(metrics, other)
    np.testing.assert_allclose(one.state["count"], eight.state["count"], atol=1e-4)
    np.testing.assert_allclose(one.state["codebook"], eight.state["codebook"], atol=1e-4)


# A model of two matrices with a running mean as its state: compiles in a second.
TOY_RULES = ((r"first$", P("fsdp", "tensor")), (r"second$", P("tensor", "fsdp")), (r".", P()))
WHOLE = ((r".", P()),)


def toy_loss(params, state, batch, key, step):
    hidden = jax.nn.relu(batch["x"] @ params["first"])
    # The root has an infinite slope at zero: a gradient can be bad where the loss is not.
    loss = jnp.mean(jnp.square(hidden @ params["second"])) + jnp.mean(jnp.sqrt(batch["y"] * params["root"] ** 2))
    seen = 0.9 * state["mean"] + 0.1 * jnp.mean(batch["x"])
    return objective_lib.LossOutput(loss, {"seen": seen}, {"mean": seen})


def toy_init(key):
    params = {"first": jax.random.normal(key, (64, 256)), "second": jax.random.normal(key, (256, 32))}
    return {"params": params | {"root": jnp.ones(())}, "state": {"mean": jnp.zeros(())}}


TOY = objective_lib.Objective(toy_init, toy_loss, ("x", "y"), groups=(("matrices", "first|second"), ("root", "root")))


def toy_batch(seed, **changes):
    x = np.random.default_rng(seed).normal(size=(32, 64)).astype(np.float32)
    batch = {"x": x, "y": np.ones((32,), np.float32)}
    for key, value in changes.items():
        batch[key][5] = value
    return batch


@functools.cache
def toy_step(micro_batches):
    mesh = sharding.make_mesh(config_lib.MeshConfig(2, 2, 2))
    tx = optim.make(dataclasses.replace(OPTIM, schedule="cosine"), 100)
    step, init, places = compiled(TOY, tx, toy_batch(0), mesh, micro_batches, rules=TOY_RULES)

    def run(seeds_and_changes):
        """State and metrics on the host after each batch."""
        with jax.set_mesh(mesh):
            state, rows = jax.jit(init, out_shardings=places)(KEY), []
            for seed, changes in seeds_and_changes:
                state, metrics = step(state, train_loop.put_batch(toy_batch(seed, **changes), mesh), KEY)
                rows.append(jax.device_get((state, metrics)))
        return rows

    return run


def all_but_counts(state):
    return state.replace(step=0, skipped=0, skipped_in_row=0)


def assert_equal(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, sharding.path_of(path))


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("bad", [{"x": np.nan}, {"x": np.inf}, {"y": 0.0}], ids=str)
def test_a_step_that_is_not_finite_changes_nothing_but_counts(bad, micro_batches):
    run = toy_step(micro_batches)
    with_bad = run([(1, {}), (2, bad), (3, bad), (4, {}), (5, {})])
    without = run([(1, {}), (4, {}), (5, {})])
    counts = [tuple(int(x) for x in (s.step, s.skipped, s.skipped_in_row)) for s, _ in with_bad]
    assert counts == [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 2, 0), (5, 2, 0)]
    for (a, _), (b, _) in (
        (with_bad[1], with_bad[0]),
        (with_bad[2], with_bad[0]),
        (with_bad[3], without[1]),
        (with_bad[4], without[2]),
    ):
        assert_equal(all_but_counts(a), all_but_counts(b))
    assert not np.isfinite(with_bad[1][1]["grad_norm"])
    assert np.isfinite(with_bad[1][1]["loss"]) == ("y" in bad)
    assert np.isfinite(with_bad[1][1]["param_norm"])
    assert [int(m["skipped_in_row"]) for _, m in with_bad] == [0, 1, 2, 0, 0]


def test_the_learning_rate_is_that_of_the_updates_made():
    rows = toy_step(1)([(1, {}), (2, {"x": np.nan}), (3, {})])
    schedule = optim.schedule(dataclasses.replace(OPTIM), 100)
    for (state, metrics), updates_before in zip(rows, (0, 1, 1)):
        assert metrics["learning_rate"] == schedule(updates_before)
        (count, *_) = {int(x) for x in optax.tree.get_all_with_path(state.opt_state, "count") for x in x[1:]}
        assert count == int(state.step - state.skipped)


def carried(step):
    """Shapes of what the loop over micro-batches carries, of the compiled program of one device."""
    loops = [x for x in re.findall(r"= \((.*?)\) while\(", step.as_text()) if "f32[" in x]  # others draw random bits
    assert len(loops) == 1
    return re.findall(r"f32\[([\d,]*)\]", loops[0])


def test_accumulated_gradients_lie_like_the_parameters():
    """Even where nothing but `placed` asks for it: here the state is whole on every device."""
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    tx = optim.make(OPTIM, 100)
    shapes = jax.eval_shape(toy_init, KEY)["params"]
    split = sharding.state_shardings(mesh, shapes, TOY_RULES)
    build = functools.partial(compiled, TOY, tx, toy_batch(0), mesh, 4, rules=WHOLE)
    apart, whole = build(placed=split)[0], build()[0]
    assert "8,256" in carried(apart) and "256,4" in carried(apart)
    assert "8,256" not in carried(whole) and carried(whole).count("64,256") == 1 + carried(apart).count("64,256")
    assert apart.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes
    sharded = compiled(TOY, tx, toy_batch(0), mesh, 4, rules=TOY_RULES)[0]
    assert "8,256" in carried(sharded) and "256,4" in carried(sharded)
