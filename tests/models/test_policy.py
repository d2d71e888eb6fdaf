"""The policy as a whole: one model in many guises gives one result, and the objective keeps its promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from jax._src.ad_checkpoint import saved_residuals  # public only as print_saved_residuals

from qdepth_jax import errors
from qdepth_jax.models import depth_expert, policy, sampling, stack
from qdepth_jax.models.siglip import SiglipConfig

TINY = policy.sized("tiny", views=("main", "wrist"), layers=2)
KEY = jax.random.key(7)


@functools.cache
def variables(config=TINY):
    """Fresh parameters with norms and biases that matter."""
    fresh = jax.jit(lambda: policy.init(config, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), fresh["params"])
    return params, fresh["state"]


@functools.cache
def batch(config=TINY, size=4):
    with jax.ensure_compile_time_eval():  # the first caller may be under a trace
        return synthetic.policy_batch(config, size, image_size=40)


def loss_function(config):
    """params -> (loss, metrics) on the fixed batch, and params."""
    params, state = variables()

    def loss(p):
        out = policy.loss(config, p, state, batch(), KEY, jnp.int32(3))
        return out.loss, out.metrics

    return loss, params


@functools.cache
def reference():
    loss, params = loss_function(TINY)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))


FAST = [{"scan": False}]  # remat is in the equality of eight devices and one too (test_train_step.py)
ALL = [{"scan": scan, "remat": remat} for remat in stack.REMAT if remat != "none" for scan in (True, False)]
SLOW = [changes for changes in ALL if changes not in FAST]


@pytest.mark.parametrize(
    "changes", [*FAST, *(pytest.param(changes, marks=pytest.mark.slow) for changes in SLOW)], ids=str
)
def test_scan_unrolled_and_remat_agree(changes):
    """Loss and every gradient; and the programs really are different ones."""
    config = dataclasses.replace(TINY, **changes)
    loss, params = loss_function(config)
    function = jax.value_and_grad(loss, has_aux=True)
    text = str(jax.make_jaxpr(function)(params))
    assert ("scan" in text) == config.scan
    assert ("remat" in text or "checkpoint" in text) == (config.remat != "none")
    close(jax.jit(function)(params), reference(), 2e-6)


def test_remat_policies_keep_what_they_say():
    """From nothing to everything; of attention its four arrays and no weights, whose size is quadratic."""

    def kept(remat):
        loss, params = loss_function(dataclasses.replace(TINY, remat=remat))
        residuals = saved_residuals(lambda p: loss(p)[0], params)
        return sum(aval.size for aval, where in residuals if "argument" not in where)

    full, attention, dots, none = (kept(name) for name in ("full", "attention", "dots", "none"))
    assert full < attention < dots < none
    c, (b, layers) = TINY, (4, 2)
    tokens = sum(c.sizes.values())
    mixture = b * layers * tokens * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    vision = b * c.pictures * c.siglip.depth * c.siglip.tokens * 4 * c.siglip.width
    assert attention - full == mixture + vision


def test_metrics_are_named_and_add_up():
    (loss, metrics), _ = reference()
    assert set(metrics) == {"loss", "flow_loss", "depth_loss", "depth_accuracy", "lambda_t"}
    assert float(metrics["lambda_t"]) == pytest.approx(0.01 * 0.9999**3, rel=1e-6)
    assert float(loss) == pytest.approx(
        float(metrics["flow_loss"] + metrics["lambda_t"] * metrics["depth_loss"]), rel=1e-6
    )


def test_frozen_parts_have_no_gradient():
    """The corrected table freezes nothing that could learn; the faithful one freezes v_proj, which could."""
    _, gradient = reference()
    vlm = gradient["llm"]["layers"]["vlm"]
    assert not gradient["llm"]["embedder"]["input_embedding"].any()
    for leaf in (
        vlm["attn"]["q_einsum"]["w"],
        vlm["attn"]["attn_vec_einsum"]["w"],
        vlm["mlp"]["gating_einsum"],
        vlm["mlp"]["linear"],
        vlm["pre_ffw_norm"]["scale"],
    ):
        assert not leaf[-1].any() and leaf[:-1].any()
    assert vlm["attn"]["kv_einsum"]["w"][-1, 1].any()
    paths = dict(policy.frozen_table(TINY))
    assert paths["llm/layers/vlm/attn/q_einsum/w"] == "last_layer" and "llm/layers/vlm/attn/kv_einsum/w" not in paths
    faithful = dict(policy.frozen_table(dataclasses.replace(TINY, faithful=True)))
    assert faithful["llm/layers/vlm/attn/kv_einsum/w"] == "last_layer_value"
    assert "llm/layers/vlm/attn/q_einsum/w" not in faithful


@pytest.mark.parametrize("scan", [True, False])
def test_cached_sampling_is_uncached_sampling(scan):
    config = dataclasses.replace(TINY, scan=scan)
    params, state = variables()
    noise = jax.random.normal(KEY, (4, config.horizon, config.action_dim))
    cached, uncached = (
        jax.jit(lambda n, c=c: sampling.sample_actions(config, params, state, batch(), n, cached=c))(noise)
        for c in (True, False)
    )
    assert (np.abs(cached) < 1).mean() > 0.3  # not everything sits on the clamp
    np.testing.assert_allclose(cached, uncached, atol=1e-5)


def test_predicted_depth_is_that_of_training():
    params, state = variables()
    logits = jax.jit(lambda: sampling.predict_depth(TINY, params, state, batch()))()
    inputs = (policy.prepare_images(TINY, batch()), batch()["text"], batch()["proprio"])
    noise = jnp.zeros((4, TINY.horizon, TINY.action_dim))
    out = jax.jit(policy.Policy(TINY).apply)({"params": params}, *inputs, noise, jnp.zeros(4))
    expected = depth_expert.code_logits(out.depth, state["codebook"], TINY.depth.temperature)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_baseline_is_the_same_network_without_depth():
    """With the depth columns of the table empty, the depth expert cannot matter, whatever its weights."""
    params, _ = variables()
    blind = policy.visibility.with_rows(policy.visibility.TABLES["r1"], action=("image", "text", "proprio", "action"))
    inputs = (policy.prepare_images(TINY, batch()), batch()["text"], batch()["proprio"], batch()["action"])

    def velocity(config):
        return policy.Policy(config).apply({"params": params}, *inputs, jnp.full(4, 0.5)).velocity

    with_depth = dataclasses.replace(TINY, visibility=blind)
    without = dataclasses.replace(TINY, depth=None)
    outs = [jax.jit(velocity, static_argnums=0)(c) for c in (with_depth, without)]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-6)


def test_loss_is_a_mean_of_independent_examples():
    """Halves of the batch average to the whole, in any order: nothing depends on micro-batches or devices."""
    params, state = variables()
    loss = jax.jit(lambda b: policy.loss(TINY, params, state, b, KEY, jnp.int32(0)).metrics)
    parts = [jax.tree.map(lambda x, rows=rows: x[jnp.array(rows)], batch()) for rows in ([3, 0], [2, 1])]
    whole, halves = loss(batch()), [loss(part) for part in parts]
    for name in ("loss", "flow_loss", "depth_loss", "depth_accuracy"):
        assert float(whole[name]) == pytest.approx(float((halves[0][name] + halves[1][name]) / 2), rel=1e-5), name


def test_padded_actions_count_only_when_faithful():
    params, state = variables()
    changed = dict(batch())
    changed["action"] = jnp.where(batch()["action_mask"][..., None], batch()["action"], 5.0)
    assert not batch()["action_mask"].all()
    t, noise = jnp.full(4, 0.5), jnp.zeros(batch()["action"].shape)

    @functools.partial(jax.jit, static_argnums=0)
    def flow_loss(config, b):
        return policy.loss_at(config, params, state, b, noise, t, 0).metrics["flow_loss"]

    faithful = dataclasses.replace(TINY, faithful=True)
    assert "action_mask" in policy.features(TINY) and "action_mask" not in policy.features(faithful)
    corrected, copied = flow_loss(TINY, changed), flow_loss(faithful, changed)
    assert copied > 3 * corrected


@pytest.mark.parametrize("head", ["pixels", "none", "weight 0"])
def test_depth_variants(head):
    changes = {"pixels": {"head": "pixels"}, "weight 0": {"loss_weight": 0.0}}
    depth = None if head == "none" else dataclasses.replace(TINY.depth, **changes[head])
    config = dataclasses.replace(TINY, depth=depth)
    objective = policy.make_objective(config)
    fresh = jax.eval_shape(objective.init, jax.random.key(0))
    assert fresh["state"] == {}
    asked = {name: batch()[name] for name in objective.features}
    assert ("depth" in asked) == (head == "pixels") and "depth_tokens" not in asked
    # By shape alone: a key that the loss reads and `features` lacks would raise.
    out = jax.eval_shape(objective.loss, fresh["params"], fresh["state"], asked, KEY, jnp.int32(0))
    assert out.loss.shape == ()
    assert ("depth_loss" in out.metrics) == (head == "pixels")


def test_bfloat16_activations_stay_close_and_parameters_stay_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    function, params = loss_function(config)
    gradient, _ = jax.eval_shape(jax.grad(function, has_aux=True), params)
    assert {x.dtype for x in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}
    loss, _ = jax.jit(function)(params)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(reference()[0][0]), rel=0.03)
    assert float(loss) != float(reference()[0][0])
    assert "bf16" in str(jax.make_jaxpr(function)(params))


def test_full_size_shapes():
    shapes = jax.eval_shape(lambda: policy.init(policy.sized("full"), jax.random.key(0)))
    params = shapes["params"]
    assert params["llm"]["layers"]["vlm"]["attn"]["kv_einsum"]["w"].shape == (18, 2, 1, 2048, 256)
    assert params["llm"]["layers"]["depth"]["mlp"]["gating_einsum"].shape == (18, 2, 1024, 4096)
    query = params["img"]["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]["query"]
    assert query["kernel"].shape == (27, 1152, 16, 72)
    assert params["depth_decoder"]["conv_2"]["kernel"].shape == (3, 3, 384, 160)
    assert shapes["state"]["codebook"].shape == (256, 160)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"siglip": SiglipConfig(42, 14, 24, 2, 2, 32)}, r"2x2 = 4 tokens, but the main view has 3x3 = 9 .*grid=3"),
        ({"remat": "all"}, "remat policy 'all' is unknown"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"views": ("main", "main")}, "none twice"),
        ({"kv_heads": 3}, "heads 4 is no multiple of kv_heads 3"),
        ({"visibility": "r9"}, "'r9' is unknown"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(errors.UserError, match=message):
        dataclasses.replace(TINY, **changes)


def test_wrong_inputs_name_the_numbers():
    wrong = {**batch(), "text": batch()["text"][:, :3]}
    params, state = variables()
    with pytest.raises(errors.UserError, match=r"2 images .* 5 text tokens, got 2 and 3"):
        sampling.predict_depth(TINY, params, state, wrong)
    with pytest.raises(errors.UserError, match="depth=None"):
        sampling.predict_depth(dataclasses.replace(TINY, depth=None), params, state, batch())


def test_a_masked_view_changes_nothing_and_older_pictures_do():
    """What stands in a view that an example lacks has no influence; a view or step that is there has."""
    config = dataclasses.replace(TINY, layers=1, image_steps=2, missing_views=True, proprio_steps=2, depth=None)
    params, _ = variables(config)
    batch = synthetic.policy_batch(config, 2) | {"view_mask": jnp.array([[True, True], [True, False]])}
    noise = jax.random.normal(jax.random.key(1), batch["action"].shape)
    actions = jax.jit(lambda batch, cached=True: sampling.sample_actions(config, params, {}, batch, noise, cached),
                      static_argnums=1)  # fmt: skip
    base = actions(batch)
    np.testing.assert_allclose(base, actions(batch, False), atol=1e-5)
    other = actions(batch | {"image_wrist": 255 - batch["image_wrist"]})
    np.testing.assert_array_equal(other[1], base[1])
    assert np.abs(other[0] - base[0]).max() > 1e-6
    earlier = batch["image_main"].at[:, 0].set(255 - batch["image_main"][:, 0])
    assert (np.abs(actions(batch | {"image_main": earlier}) - base).max((1, 2)) > 1e-6).all()


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_main_view_that_is_missing_is_not_seen_through_the_depth_tokens(cached):
    config = dataclasses.replace(TINY, layers=1, missing_views=True)
    params, _ = variables(config)
    batch = synthetic.policy_batch(config, 2) | {"view_mask": jnp.array([[True, True], [False, True]])}
    noise = jax.random.normal(jax.random.key(1), batch["action"].shape)
    actions = jax.jit(lambda batch: sampling.sample_actions(config, params, {}, batch, noise, cached))
    base, other = actions(batch), actions(batch | {"image_main": 255 - batch["image_main"]})
    np.testing.assert_array_equal(other[1], base[1])
    assert np.abs(other[0] - base[0]).max() > 1e-6
