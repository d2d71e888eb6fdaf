"""Packed parameters: the numbers of the trained ones, and a program that copies neither weights nor cache."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import stored_runs
import synthetic

from qdepth_jax import errors, sharding
from qdepth_jax.models import flow, gemma, inference, int8, policy, real_time, sampling, siglip
from qdepth_jax.plan import hlo

# No two sizes are equal: an array's dimensions say what it is.
CONFIG = policy.sized(
    "tiny",
    siglip=siglip.SiglipConfig(image_size=28, patch=14, width=24, depth=1, heads=2, mlp=36),
    vlm=gemma.ExpertConfig(width=40, mlp=56),
    action=gemma.ExpertConfig(width=16, mlp=20),
    depth=None,
    layers=2,
    heads=4,
    head_dim=8,
    horizon=3,
    text_length=6,
    scan=False,
)
CACHED = CONFIG.siglip.tokens + CONFIG.text_length + 1  # 11
PREFIX_WIDTHS = {24, 36, 40, 56}


@functools.cache
def params(config=CONFIG):
    return stored_runs.random_like(stored_runs.shapes("policy", config), 0)["params"]


def flow_loop(given, cached=True):
    """Instructions of the compiled loop over flow steps, its plumbing left out, fused ones too."""
    batch = synthetic.policy_batch(CONFIG, 1)
    noise = np.zeros((1, CONFIG.horizon, CONFIG.action_dim), np.float32)
    sample = jax.jit(lambda p, b, n: sampling.sample_actions(CONFIG, p, {}, b, n, cached=cached))
    lowered = sample.lower(given, {key: batch[key] for key in ("image_main", "text", "proprio")}, noise)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    found = hlo.parse(text).computations
    loops = [i for computation in found.values() for i in computation.values() if i.opcode == "while"]
    assert len(loops) == 1
    body = next(found[name] for name in found if f"body=%{name}," in f"{loops[0].attributes},")
    skipped = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast")
    return [instruction for instruction in body.values() if instruction.opcode not in skipped]


def dims(instructions):
    return [set(array.dims) for instruction in instructions for array in instruction.shape]


def copied_weights(instructions):
    """Arrays of the loop with two dimensions of an action expert's kernel: width, and mlp, heads times head_dim, ..."""
    return [d for d in dims(instructions) if 16 in d and d & {20, 32, 8}]


def copied_cache(instructions):
    return [d for d in dims(instructions) if 8 in d and d & {CACHED, CACHED + CONFIG.horizon}]


def prefix_work(instructions):
    return [d for d in dims(instructions) if d & PREFIX_WIDTHS]


def test_the_flow_runs_the_action_stream_alone_and_copies_nothing():
    found = flow_loop(inference.pack(CONFIG, params()))
    assert len(found) > 40  # it is the loop
    assert not prefix_work(found) and not copied_cache(found) and not copied_weights(found)


@pytest.mark.slow
def test_stacked_weights_are_copied_in_the_flow_and_an_uncached_prefix_runs_in_it():
    assert copied_weights(flow_loop(params())) and prefix_work(flow_loop(params(), cached=False))


@pytest.mark.parametrize(("config", "changes"), [(CONFIG, {}), (stored_runs.QDEPTH, {"dtype": "bfloat16"})])
def test_unpacked_is_what_was_packed(config, changes):
    given, config = params(config), dataclasses.replace(config, **changes)
    found = jax.jit(inference.unpack)(inference.pack(config, given))
    assert jax.tree.structure(found) == jax.tree.structure(given)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(found), strict=True):
        path = sharding.path_of(path)
        # Norms are computed in f32 and keep their digits; kernels lose those that the network never reads.
        rounded = config.dtype == "bfloat16" and "scale" not in path and "bias" not in path and "pos_" not in path
        assert y.dtype == ("bfloat16" if rounded else "float32"), path
        np.testing.assert_array_equal(x.astype(y.dtype), y, err_msg=path)


def test_int8_is_half_a_step_away_and_stacked_or_not_the_same_numbers():
    config = stored_runs.QDEPTH
    trees = [inference.pack(dataclasses.replace(config, scan=scan), params(config), "int8") for scan in (True, False)]
    scanned = int8.dequantise(jax.tree.map(np.asarray, trees[0]))
    apart = jax.tree.map(inference.on_host, trees[1], is_leaf=inference.is_layers)
    some = 0
    for (path, x), y, z in zip(
        jax.tree_util.tree_leaves_with_path(params(config)), *map(jax.tree.leaves, (scanned, apart)), strict=True
    ):
        path = sharding.path_of(path)
        np.testing.assert_array_equal(y, z, err_msg=path)
        # What the network computes with has the shapes and paths of the sharding table.
        assert y.shape == x.shape and sharding.rule_for("params/" + path, sharding.RULES)
        kernel = path.split("/")[-1] in ("w", "gating_einsum", "linear", "kernel")
        layers = "/layers/vlm/" in path or "/layers/depth/" in path or "encoderblock" in path
        some += (changed := bool((x != y).any()))
        assert changed == (kernel and layers), path
        # 127 steps on each side of 0, for each output channel: none is larger than the largest weight / 127.
        assert np.abs(x - y).max() <= np.abs(x).max() / 254 * 1.001
    assert some == 2 * 5 + 6  # q, kv, out, gate and up, down of two experts; q, k, v, out and two dense ones of SigLIP
    total = [inference.size_in_bytes(tree) for tree in trees]
    assert total[0] == total[1] < 0.75 * inference.size_in_bytes(params(config))


@pytest.mark.parametrize("axes", [(0,), (0, 1), (1,)])
def test_int8_has_a_scale_for_each_output(axes):
    weight = np.random.default_rng(0).standard_normal((5, 6, 7)).astype(np.float32)
    weight[..., 0] *= 1000.0  # one loud channel costs the others nothing
    weight[:, :, 3] = 0.0
    found = int8.quantise(weight, axes)
    assert found.values.dtype == np.int8 and found.scale.shape == tuple(
        1 if axis in axes else size for axis, size in enumerate(weight.shape)
    )
    largest = np.abs(weight).max(axis=axes, keepdims=True)
    assert (np.abs(found.values * found.scale - weight) <= largest / 254 * 1.001).all()
    assert (np.abs(found.values).max(axis=axes, keepdims=True) == np.where(largest > 0, 127, 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_a_network_in_int8_computes_with_the_dequantised_weights(scan):
    config = dataclasses.replace(stored_runs.QDEPTH, scan=scan)
    packed = inference.pack(config, params(config), "int8")
    plain = int8.dequantise(inference.pack(dataclasses.replace(config, scan=True), params(config), "int8"))
    batch, state = synthetic.policy_batch(config, 2), stored_runs.random_like(stored_runs.shapes("policy", config), 0)
    noise = jax.random.normal(jax.random.key(0), (2, config.horizon, config.action_dim))
    sample = jax.jit(lambda p: sampling.sample_actions(config, p, {}, batch, noise))
    depth = jax.jit(lambda p: sampling.predict_depth(config, p, state["state"], batch))
    found, wanted, original = sample(packed), sample(plain), sample(params(config))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert 1e-5 < np.abs(found - original).max() < 0.3
    np.testing.assert_allclose(depth(packed), depth(plain), rtol=1e-4, atol=1e-4)


def test_donated_arrays_are_freed():
    given = jax.tree.map(jax.numpy.asarray, {"img": {"head": {"kernel": np.ones((3, 4), np.float32)}}})
    packed = inference.pack(CONFIG, given, donate=True)
    assert given["img"]["head"]["kernel"].is_deleted()
    np.testing.assert_array_equal(packed["img"]["head"]["kernel"], np.ones((3, 4)))


def test_options_are_checked():
    with pytest.raises(errors.UserError, match="'rk4' is unknown: use one of"):
        inference.Inference(solver="rk4")
    with pytest.raises(errors.UserError, match="'int4' are unknown"):
        inference.Inference(weights="int4")
    with pytest.raises(errors.UserError, match="flow_steps=-1"):
        inference.Inference(flow_steps=-1)
    config = policy.sized("tiny")
    assert inference.configured(config, inference.Inference()) == config
    found = inference.configured(config, inference.Inference(flow_steps=3, unroll=True))
    assert (found.flow.steps, found.scan, config.scan) == (3, False, True)
    with pytest.raises(errors.UserError, match="heun's last evaluation"):
        real_time.continue_chunk(config, None, None, None, None, "inpaint", "heun")


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_the_solvers(noise_at, solver, order):
    """dx/dt = x + t (turned where the noise is at 1) against its exact solution: the error falls with steps^order."""

    def velocity(x, t):
        v = x + (1.0 - t if noise_at else t)[:, None, None]
        return -v if noise_at else v

    def error(steps):
        config = flow.FlowConfig(noise_at=noise_at, steps=steps, clip=0.0)
        x = flow.integrate(velocity, np.ones((1, 1, 1), np.float32), config, solver)
        return float(x[0, 0, 0]) - (2 * np.e - 2)  # x(0) = 1: x(t) = 2 e^t - t - 1

    assert error(8) / error(16) == pytest.approx(2**order, rel=0.15)
    assert abs(error(8)) < {1: 0.4, 2: 0.02}[order]
