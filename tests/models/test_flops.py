"""FLOPs by formula = XLA's own count, where XLA can count: unrolled layers."""

import dataclasses

import jax
import pytest
import synthetic

from qdepth_jax.models import depth_expert, flops, gemma, policy, siglip, tokenizer

EXPERT = gemma.ExpertConfig(256, 1024)
# Wide enough that products outweigh norms and activations, which the formula leaves out.
MEDIUM = policy.sized(
    "full",
    siglip=siglip.SiglipConfig(image_size=112, patch=14, width=256, depth=1, heads=4, mlp=1024),
    vlm=gemma.ExpertConfig(512, 2048),
    action=EXPERT,
    depth=depth_expert.DepthConfig(expert=EXPERT, grid=8, conv_width=128),
    layers=2,
    heads=4,
    head_dim=64,
    vocabulary=512,
    scan=False,
)
BATCH = 4


def counted(objective, batch, backward=True):
    """XLA's FLOPs of one example."""
    variables = jax.eval_shape(objective.init, jax.random.key(0))
    loss = lambda p, s, b: objective.loss(p, s, b, jax.random.key(0), 0).loss  # noqa: E731
    run = jax.grad(loss) if backward else loss
    lowered = jax.jit(run).lower(variables["params"], variables["state"], batch)
    return lowered.cost_analysis()["flops"] / BATCH


def batch_for(config):
    return {k: v for k, v in synthetic.policy_batch(config, BATCH).items() if k in policy.features(config)}


@pytest.mark.parametrize(
    "config",
    [
        MEDIUM,
        pytest.param(dataclasses.replace(MEDIUM, depth=None), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(MEDIUM, views=("a", "b"), horizon=16), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(MEDIUM, remat="full"), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(MEDIUM, remat="dots"), marks=pytest.mark.slow),
    ],
)
def test_policy_formula_is_what_xla_counts(config):
    parts = flops.policy(config)
    expected = flops.model_flops(parts) + flops.recomputed(parts, config.remat)
    assert counted(policy.make_objective(config), batch_for(config)) == pytest.approx(expected, rel=0.015)


@pytest.mark.slow
def test_forward_formula_is_what_xla_counts():
    expected = sum(part.forward for part in flops.policy(MEDIUM).values())
    assert counted(policy.make_objective(MEDIUM), batch_for(MEDIUM), False) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("quantiser", ["fsq", pytest.param("ema", marks=pytest.mark.slow)])
def test_tokenizer_formula_is_what_xla_counts(quantiser):
    config = tokenizer.TokenizerConfig(
        depth_size=64, grid=8, widths=(64, 128), blocks=1, num_codes=64, code_dim=32, quantiser=quantiser, start_step=0
    )
    objective = tokenizer.make_objective(config)
    batch = {
        "depth": jax.ShapeDtypeStruct((BATCH, 64, 64), "uint16"),
        "depth_scale": jax.ShapeDtypeStruct((BATCH,), "float32"),
        "depth_offset": jax.ShapeDtypeStruct((BATCH,), "float32"),
    }
    assert counted(objective, batch) == pytest.approx(objective.flops, rel=0.015)


def test_full_size_against_figures_of_others():
    # openpi's pi0 has the same experts, three views, 48 text tokens and a chunk of 50: 12.1 TFLOP a sample, counted
    # with all 18 layers of the vlm. Our formula leaves out what the last of them computes for nobody.
    pi0 = policy.sized("full", depth=None, views=("a", "b", "c"), text_length=48, horizon=50, action_dim=32)
    parts = flops.policy(pi0)
    assert flops.model_flops(parts) + flops.unread(parts, "none") == pytest.approx(12.1e12, rel=0.01)
    # Six FLOPs a weight and token, the rule of thumb, for the vlm's 1.98 B weights and 276 tokens, last layer aside.
    vlm = flops.policy(policy.sized("full"))["vlm expert"]
    assert vlm.model + vlm.unread == pytest.approx(6 * 1.9818e9 * 276, rel=1e-3)
    assert policy.make_objective(policy.sized("full")).flops == pytest.approx(4.382e12, rel=1e-3)


def test_recomputation_follows_the_policy():
    parts = flops.policy(policy.sized("full"))
    forward = sum(part.forward for part in parts.values())
    assert flops.recomputed(parts, "none") == 0
    assert 0 < flops.recomputed(parts, "dots") < 0.05 * forward
    assert 0.6 * forward < flops.recomputed(parts, "full") < forward
    assert flops.recomputed(parts, "dots") < flops.recomputed(parts, "attention") < flops.recomputed(parts, "full")
    with pytest.raises(ValueError, match=r"'some'.*full"):
        flops.recomputed(parts, "some")


def test_every_remat_policy_has_a_count():
    from qdepth_jax.models import stack

    assert set(flops.RECOMPUTE) == set(stack.REMAT)
