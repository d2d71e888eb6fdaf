"""The optimiser: schedules, tables by path, clipping over devices, moments stored in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import errors, optim, sharding
from qdepth_jax.models import policy, tokenizer

OPTIM = config_lib.OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
HALF = dataclasses.replace(OPTIM, moment_dtype="bfloat16")
KEY = jax.random.key(0)
WORDS = np.asarray([1234567, 89], np.uint32)


@pytest.mark.parametrize(("schedule", "late"), [("cosine", (0.55, 0.1)), ("constant", (1.0, 1.0)), ("rsqrt", None)])
def test_schedule_values(schedule, late):
    config = config_lib.OptimConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=10, min_learning_rate=0.1, rsqrt_steps=50
    )
    at = optim.schedule(config, 110)
    late = late or (2**-0.5, 3**-0.5)  # 50 and 100 steps after warm-up
    for step, value in ((0, 0.1), (5, 0.55), (10, 1.0), (60, late[0]), (110, late[1])):
        assert float(at(step)) == pytest.approx(value, abs=1e-6), step


def test_rsqrt_is_big_visions():
    """lr * sqrt(timescale) / sqrt(timescale + step - warm-up), there with a zero start."""
    at = optim.schedule(config_lib.OptimConfig(learning_rate=3e-4, schedule="rsqrt", warmup_steps=0), 10)
    for step in (0, 1, 10_000, 1_000_000):
        assert float(at(step)) == pytest.approx(3e-4 * (10_000 / (10_000 + step)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "optim.schedule='linear' is unknown: use 'cosine', 'constant' or 'rsqrt'"),
        ({"schedule": "rsqrt", "rsqrt_steps": 0}, "optim.rsqrt_steps=0 must be at least 1"),
        ({"moment_dtype": "float16"}, r"optim.moment_dtype='float16' is unknown: use one of \('float32', 'bfloat16'\)"),
        ({"frozen": (("llm/.*", "most"),)}, r"frozen row \('llm/.\*', 'most'\)"),
    ],
)
def test_what_is_unknown_is_refused(changes, message):
    with pytest.raises(errors.UserError, match=message):
        optim.make(dataclasses.replace(OPTIM, **changes), 10)


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


def test_clipping_on_eight_devices_is_by_the_norm_of_all_parts():
    mesh = sharding.make_mesh(config_lib.MeshConfig(2, 2, 2))
    specs = {"both": P("fsdp", "tensor"), "one": P(None, "fsdp"), "none": P()}
    rng = np.random.default_rng(0)
    grads = {name: rng.normal(size=(8, 6)).astype(np.float32) * 10**i for i, name in enumerate(specs)}
    placed = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = optim.make(dataclasses.replace(OPTIM, clip_norm=0.5), 10)

    @jax.jit
    def first_moments(grads):
        return optax.tree.get(tx.update(grads, tx.init(grads), grads)[1], "mu")

    found = first_moments(jax.device_put(grads, placed))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    for name, g in grads.items():
        np.testing.assert_allclose(found[name], 0.1 * g * (0.5 / norm), rtol=2e-6)


def test_group_norms_are_those_of_their_leaves_and_the_first_row_wins():
    grads = {"img": {"w": jnp.full((4,), 3.0)}, "llm": {"w": jnp.full((9,), 2.0), "b": jnp.full((1,), 8.0)}}
    norms = optim.group_norms(grads, (("vision", "img/.*"), ("rest", ".*")))
    assert {k: float(v) for k, v in norms.items()} == {"vision": 6.0, "rest": 10.0}
    with pytest.raises(errors.UserError, match=r"gradient groups \['depth'\] hold no parameter"):
        optim.group_norms(grads, (("depth", "depth/.*"),))


@pytest.mark.parametrize(
    "objective",
    [
        policy.make_objective(policy.sized("tiny")),
        policy.make_objective(policy.sized("tiny", depth=None)),
        *(tokenizer.make_objective(tokenizer.TokenizerConfig(quantiser=q)) for q in ("ema", "plain")),
    ],
)
def test_every_parameter_is_in_one_group_and_every_group_has_parameters(objective):
    shapes = jax.eval_shape(objective.init, KEY)["params"]
    paths = [sharding.path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    rows = [[name for name, pattern in objective.groups if optim.re.fullmatch(pattern, path)] for path in paths]
    assert [path for path, names in zip(paths, rows) if len(names) != 1] == []
    assert {names[0] for names in rows} == {name for name, _ in objective.groups}


def test_rounding_at_random_is_right_on_average_and_takes_a_neighbour():
    x = np.float32(1.0) + np.float32(2**-7) * np.linspace(0, 1, 17, dtype=np.float32)  # from 1 to the next bfloat16
    x = np.stack([x, -100 * x, 1e-30 * x])
    rounded = np.asarray(optim.round_at_random(jnp.broadcast_to(x[..., None], (3, 17, 20_000)), WORDS), np.float64)
    spacing = np.spacing(np.abs(x).astype(jnp.bfloat16)).astype(np.float64)[..., None]
    assert (np.abs(rounded - x[..., None]) < spacing * (1 + 1e-6)).all()
    # Standard error of the mean: at most half a spacing over sqrt(20,000).
    assert (np.abs(rounded.mean(-1) - x) < 5 * 0.5 / 20_000**0.5 * spacing[..., 0]).all()
    assert (rounded[0, 0] == 1.0).all(), "what bfloat16 can hold stays"


def test_rounding_at_random_depends_on_key_and_index_alone():
    x = np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32)
    mesh = sharding.make_mesh(config_lib.MeshConfig(2, 2, 2))
    round_it = jax.jit(optim.round_at_random)
    one = np.asarray(round_it(x, WORDS))
    eight = round_it(jax.device_put(x, NamedSharding(mesh, P("fsdp", ("replica", "tensor")))), WORDS)
    np.testing.assert_array_equal(one, np.asarray(eight))
    assert 0.2 < np.mean(one != np.asarray(round_it(x, WORDS + 1))) < 0.8
    assert np.mean(one[0] != one[1]) > 0.9


def run_adam(config, gradients):
    """Second moment of the last step, updates of all steps, of a stack of gradients [T, n]."""
    tx = optim.make(config, 10)
    params = {"w": jnp.zeros(gradients.shape[1])}

    def step(state, g):
        updates, state = tx.update({"w": g}, state, params, key=KEY)
        return state, updates["w"]

    state, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(params), gradients))()
    return optax.tree.get(state, "nu")["w"], updates


def test_half_moments_follow_gradients_that_shrink():
    """Rounded to nearest, the second moment would stay where it was: a thousandth is less than half a bfloat16 step."""
    gradients = jnp.where(jnp.arange(1200) < 200, 1.0, 0.1)[:, None] * jnp.ones((1, 512))
    exact, updates = run_adam(OPTIM, gradients)
    half, others = run_adam(HALF, gradients)
    assert half.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    ratio = np.asarray(half, np.float64) / np.asarray(exact, np.float64)
    assert abs(ratio.mean() - 1) < 0.01 and ratio.std() < 0.1
    np.testing.assert_array_equal(others[0], updates[0], "the first update is computed in float32")
    assert abs(float(others[-1].mean() / updates[-1].mean()) - 1) < 0.02

    def to_nearest(nu, g):
        return (0.999 * nu.astype(jnp.float32) + 0.001 * g * g).astype(jnp.bfloat16), None

    stuck, _ = jax.lax.scan(to_nearest, jnp.zeros(512, jnp.bfloat16), gradients)
    assert float(stuck.mean()) > 2 * float(exact.mean()), "and that is what this test would catch"
