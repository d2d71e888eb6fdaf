"""Augmentation: TensorFlow's values, independent draws, and images that depend on nothing but (key, position)."""

import dataclasses
import functools
import types

import augment_by_tensorflow as by_tf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from experiments import baseline, bridge, demo, no_depth_loss
from qdepth_jax import config as config_lib
from qdepth_jax import errors, experiment, optim, sharding, train_loop, train_step
from qdepth_jax.models import augment, augment_config, objective, policy

KEY = jax.random.key(11)
ADJUST = {name: jax.jit(getattr(augment, f"adjust_{name}")) for name in by_tf.FACTORS}
# Compiled once for all tests: programs with random numbers take seconds to compile.
CROP = jax.jit(augment.crop_and_resize, static_argnums=2)
APPLY = jax.jit(augment.apply, static_argnums=2)
AUGMENT = jax.jit(augment.augment_views, static_argnums=(1, 2, 3))
UNIFORMS = jax.jit(augment.uniforms)
RECIPE = augment_config.PUBLISHED["open_pi_zero"]
BRIGHT = augment_config.AugmentConfig(main=augment_config.ViewAugment(brightness=0.2))


@pytest.fixture(scope="module")
def golden():
    return np.load(by_tf.GOLDEN)


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(by_tf.picture()[None], jnp.float32) / 255


# ---- the operations ----


@pytest.mark.parametrize("size", [(12, 14), (7, 5)])
def test_crop_and_resize_is_tensorflows(golden, image, size):
    boxes = jnp.asarray(by_tf.BOXES)
    ours = CROP(jnp.repeat(image, len(boxes), 0), boxes, size)
    for i in range(len(boxes)):
        np.testing.assert_allclose(ours[i], golden[f"crop_{size[0]}_{i}"][0], atol=2e-6)


@pytest.mark.parametrize(("name", "number"), [(n, i) for n, f in by_tf.FACTORS.items() for i in range(len(f))])
def test_colours_are_tensorflows(golden, image, name, number):
    ours = ADJUST[name](image, jnp.float32([by_tf.FACTORS[name][number]]))
    np.testing.assert_allclose(ours, golden[f"{name}_{number}"], atol=3e-6)
    assert np.abs(np.asarray(ours - image)).max() > 0.01, "the change is one"


def chain_draws(box, *factors):
    """The uniform numbers that lead to these parameters, and ranges that hold them."""
    top, left, bottom, right = box
    height, width = bottom - top, right - left
    config = augment_config.ViewAugment((0.5, 1.0), (0.5, 2.0), 0.2, (0.5, 1.5), (0.5, 1.5), 0.2)
    values = [
        (height * width - 0.5) / 0.5,
        (np.log(width / height) - np.log(0.5)) / np.log(4.0),
        top / (1 - height),
        left / (1 - width),
        *(
            (f + d) / (2 * d) if centre == 0 else (f - 0.5)
            for f, d, centre in zip(factors, (0.2, 0, 0, 0.2), (0, 1, 1, 0))
        ),
    ]
    return {name: jnp.float32([v]) for name, v in zip(augment.DRAWS, values)}, config


@pytest.mark.parametrize("number", range(len(by_tf.CHAINS)))
def test_the_whole_chain_is_dlimps(golden, number):
    """Order, clipping after each operation, and the way back to grey values."""
    u, config = chain_draws(*by_tf.CHAINS[number])
    ours = np.asarray(APPLY(jnp.asarray(by_tf.picture()[None]), u, config)).astype(int)
    off = np.abs(ours - golden[f"chain_{number}"].astype(int))
    # A value on the border of two grey values may fall on either side.
    assert off.max() <= 1 and (off > 0).mean() < 0.01


@pytest.mark.slow
def test_golden_values_are_tensorflows():
    golden, fresh = np.load(by_tf.GOLDEN), by_tf.compute()
    assert set(golden) == set(fresh) and by_tf.GOLDEN.stat().st_size < 200_000
    for name, value in fresh.items():
        np.testing.assert_allclose(golden[name].astype(np.float64), value.astype(np.float64), atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_octo_draws_are_correlated_as_in_tensorflow():
    """The premise of `compat`: one stateless seed gives one number, whatever the range."""
    import tensorflow as tf

    seeds = [(7, n) for n in range(200)]
    four = np.array([[float(tf.random.stateless_uniform((1,), s, 0, hi)[0]) / hi for hi in (1.0, 0.5)]
                     + [float(tf.random.stateless_uniform((), s, -0.1, 0.1)) * 5 + 0.5] for s in seeds])  # fmt: skip
    np.testing.assert_allclose(four, four[:, :1].repeat(3, 1), atol=1e-5)


# ---- the draws ----


POSITIONS = jnp.arange(4096, dtype=jnp.uint32)


def correlation(compat):
    views = [augment.assign(UNIFORMS(KEY, POSITIONS, view), compat) for view in (0, 1)]
    rows = np.stack([np.asarray(u[name]) for u in views for name in augment.DRAWS])
    assert rows.min() >= 0 and rows.max() < 1
    np.testing.assert_allclose(rows.mean(1), 0.5, atol=0.03)
    np.testing.assert_allclose(rows.var(1), 1 / 12, atol=0.005)
    return np.corrcoef(rows)


def test_draws_are_independent_over_operations_and_views():
    assert np.abs(correlation("none") - np.eye(16)).max() < 0.08  # five standard deviations


@pytest.mark.parametrize(("compat", "shared"), [("open_pi_zero", 4), ("octo", 8)])
def test_compat_repeats_the_published_correlation(compat, shared):
    found = correlation(compat)
    one = np.eye(8)
    one[:shared, :shared] = 1
    expected = np.kron(np.eye(2), one)  # views have draws of their own
    assert np.abs(found - expected).max() < 0.08


def test_crops_keep_to_their_ranges_and_to_the_image():
    u = augment.assign(UNIFORMS(KEY, POSITIONS, 0))
    boxes = np.asarray(augment.crop_boxes(u, RECIPE.main), np.float64)
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    free = (height < 0.9999) & (width < 0.9999)  # a crop wider than the image is cut to it
    area, ratio = (height * width)[free], (width / height)[free]
    assert 0.8 - 1e-4 <= area.min() < 0.81 and 0.97 < area.max() <= 1
    assert 0.9 - 1e-4 <= ratio.min() < 0.91 and 1.09 < ratio.max() <= 1.1 + 1e-4
    # Published pipelines: one number behind all, so every crop that fits lies on one diagonal.
    u = augment.assign(UNIFORMS(KEY, POSITIONS, 0), "open_pi_zero")
    boxes = np.asarray(augment.crop_boxes(u, augment_config.OPENVLA))
    np.testing.assert_allclose(boxes[:, 0], boxes[:, 1], atol=1e-6)
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], 0.9**0.5, atol=1e-6)


# ---- images of a batch ----


def batch(positions):
    """The same picture at every position, 20x24, for a size of 16."""
    picture = jnp.asarray(by_tf.photograph(20, 24))
    tiled = jnp.broadcast_to(picture, (len(positions), *picture.shape))
    return {"image_main": tiled, "image_wrist": tiled, "position": jnp.asarray(positions, jnp.uint32)}


def run(values, config=RECIPE, key=KEY):
    return AUGMENT(values, ("main", "wrist"), 16, config, key)


def test_an_image_is_a_function_of_key_and_position():
    one, other = run(batch([5, 900, 5, 6])), run(batch([6, 5, 0, 1]))
    for name in ("image_main", "image_wrist"):
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert a.shape == (4, 16, 16, 3) and a.dtype == np.uint8
        np.testing.assert_array_equal(a[0], a[2])
        np.testing.assert_array_equal(a[[3, 0]], b[:2])
        assert (a[0] != a[1]).mean() > 0.5 and (a[0] != a[3]).mean() > 0.5
    assert (np.asarray(one["image_main"]) != np.asarray(one["image_wrist"])).mean() > 0.5
    again = run(batch([5, 5, 5, 5]), key=jax.random.key(12))
    assert (np.asarray(again["image_main"][0]) != np.asarray(one["image_main"][0])).mean() > 0.5


def test_devices_do_not_matter():
    values = {k: np.asarray(v) for k, v in batch(np.arange(100, 108)).items()}
    parts = [run({k: v[i : i + 4] for k, v in values.items()}) for i in (0, 4)]
    alone = {k: np.concatenate([part[k] for part in parts]) for k in values}
    mesh = sharding.make_mesh(config_lib.MeshConfig(2, 4, 1), jax.devices()[:8])
    with jax.set_mesh(mesh):
        spread = run(train_loop.put_batch(values, mesh))
    assert len(spread["image_main"].sharding.device_set) == 8 and not spread["image_main"].is_fully_replicated
    for name in ("image_main", "image_wrist"):
        np.testing.assert_array_equal(np.asarray(alone[name]), np.asarray(spread[name]))


def test_none_changes_nothing_and_wrist_keeps_its_frame():
    values = batch([1, 2, 3, 4])
    same = run(values, augment_config.AugmentConfig())
    np.testing.assert_array_equal(same["image_main"], values["image_main"])
    only_main = run(values, BRIGHT)
    assert (np.asarray(only_main["image_main"]) != np.asarray(run(values)["image_main"])).any()
    np.testing.assert_array_equal(only_main["image_wrist"], values["image_wrist"])
    for recipe in augment_config.PUBLISHED.values():
        assert not recipe.others.crops
    with pytest.raises(ValueError, match="float32"):
        run(values | {"image_main": values["image_main"].astype(jnp.float32)})


# ---- in the training step ----


def loss_that_looks(params, state, batch, key, step):
    """A sum over the images that weighs every pixel and every position differently, as a metric."""
    weight = jnp.sin(jnp.arange(16 * 16 * 3, dtype=jnp.float32)).reshape(1, 16, 16, 3)
    rows = (batch["image_main"].astype(jnp.float32) * weight).sum((1, 2, 3))
    rows = rows * (1 + batch["position"] % 7)
    return objective.LossOutput(params["w"] * 0.0, {"seen": rows.mean()}, state)


LOOKS = objective.Objective(
    init=lambda key: {"params": {"w": jnp.zeros(())}, "state": {}},
    loss=loss_that_looks,
    features=("image_main",),
    augment=lambda b, key: augment.augment_views(b, ("main",), 16, BRIGHT, key),
)


@functools.cache
def looking_step(micro_batches):
    tx = optim.make(config_lib.OptimConfig(), 10)
    state = train_step.init_state(KEY, LOOKS, tx, False)
    step = functools.partial(
        train_step.train_step, objective=LOOKS, tx=tx, frozen=(), micro_batches=micro_batches, ema_decay=0.0
    )
    step = jax.jit(step)
    return lambda values: float(step(state, values, KEY)[1]["seen"])


def small(positions):
    values = batch(positions)
    return {"image_main": values["image_main"][:, :16, :16], "position": values["position"]}


def test_micro_batches_do_not_matter_and_validation_sees_the_plain_images():
    values = small(np.arange(8))
    whole, parts, moved = looking_step(1)(values), looking_step(4)(values), looking_step(1)(small(np.arange(8, 16)))
    assert abs(whole - parts) < 1e-4 * abs(whole)
    assert abs(whole - moved) > 1e-3 * abs(whole)
    plain = float(loss_that_looks({"w": jnp.zeros(())}, {}, values, KEY, 0).metrics["seen"])
    assert abs(whole - plain) > 1e-3 * abs(whole)
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    host = {k: np.asarray(v) for k, v in values.items()}
    stub = types.SimpleNamespace(
        objective=LOOKS, mesh=mesh, eval_batches=lambda: [host], train=types.SimpleNamespace(batch_size=8)
    )
    state = types.SimpleNamespace(params={"w": jnp.zeros(())}, ema=None, state={}, step=jnp.int32(0))
    with jax.set_mesh(mesh):
        held_out = train_loop.make_evaluate(stub, state, values, KEY)(state, KEY)["val/seen"]
    assert abs(held_out - plain) < 1e-4 * abs(plain)


def test_a_policy_step_runs_with_augmentation():
    config = policy.sized("tiny", views=("main", "wrist"), layers=1, scan=False, depth=None)
    made = policy.make_objective(config, RECIPE)
    values = synthetic.policy_batch(config, 2, image_size=40)
    out = jax.eval_shape(made.augment, values, KEY)
    assert {k: v.shape for k, v in out.items() if k.startswith("image")} == {
        f"image_{view}": (2, 28, 28, 3) for view in ("main", "wrist")
    }
    assert set(out) == set(values)


# ---- configuration ----


def test_a_crop_would_tear_image_and_depth_apart():
    config = bridge.get_config()
    assert config.augment.main.hue == 0.05 and config.augment.others.hue == 0.05
    experiment.check_keys(config)
    config.augment.main.crop_scale = (0.8, 1.0)
    with pytest.raises(errors.UserError, match=r"whole frame.*crop_scale and crop_ratio to"):
        experiment.check_keys(config)
    for free in (baseline.get_config("bridge"), no_depth_loss.get_config("bridge")):
        free.augment = config_lib.section(RECIPE)
        assert experiment.make_objective(free).augment is not None
    pixels = policy.sized("tiny", depth=dataclasses.replace(policy.sized("tiny").depth, head="pixels"))
    with pytest.raises(errors.UserError, match="depth pixels"):
        policy.make_objective(pixels, RECIPE)


def test_the_demo_and_tokenizers_are_not_augmented():
    assert experiment.make_objective(demo.get_config()).augment is None
    config = demo.get_config("tokenizer")
    assert experiment.make_objective(config).augment is None
    config.augment.main.hue = 0.1
    with pytest.raises(errors.UserError, match="a tokenizer reads no images"):
        experiment.check_keys(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (1.0, 0.8)),
        ("crop_scale", (0.8, 1.2)),
        ("contrast", (-0.1, 1.0)),
        ("hue", 0.7),
        ("brightness", -0.1),
    ],
)
def test_ranges_that_mean_nothing_are_refused(field, value):
    with pytest.raises(errors.UserError, match=field):
        augment_config.ViewAugment(**{field: value})


def test_an_unknown_compat_is_refused():
    with pytest.raises(errors.UserError, match="octo"):
        augment_config.AugmentConfig(compat="dlimp")
