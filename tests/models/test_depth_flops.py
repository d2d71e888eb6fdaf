"""FLOPs of depth networks by formula = XLA's own count, where XLA can count: unrolled layers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qdepth_jax.models import depth_anything, depth_flops, dinov2, dpt

# Wide enough that products outweigh norms, resizing and activations, which the formula leaves out; odd grids.
WIDE = depth_anything.DepthAnythingConfig(
    trunk=dinov2.Dinov2Config(depth=4, taps=(0, 1, 2, 3), trained_size=70),
    head=dpt.DptConfig(frames=32),
    scan=False,
)
IMAGES = dataclasses.replace(WIDE, head=dpt.DptConfig())
SWIGLU = dataclasses.replace(IMAGES, trunk=dataclasses.replace(WIDE.trunk, mlp="swiglu"))


def counted(run, config, frames, height, width):
    params = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    pictures = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    return jax.jit(run).lower(params, pictures).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("config", "frames"),
    [
        (WIDE, 6),
        pytest.param(IMAGES, 1, marks=pytest.mark.slow),
        pytest.param(SWIGLU, 1, marks=pytest.mark.slow),
    ],
)
def test_the_formula_is_what_xla_counts(config, frames):
    found = counted(lambda p, x: depth_anything.estimate(config, p, x), config, frames, 56, 98)
    assert found == pytest.approx(depth_flops.total(config, frames, 56, 98), rel=0.02)


@pytest.mark.slow
def test_the_trunk_alone():
    network = depth_anything.DepthAnything(WIDE)
    run = lambda p, x: network.apply({"params": p}, x[0], method="tokens")  # noqa: E731
    parts = depth_flops.parts(WIDE, 2, 70, 70)
    expected = sum(value for name, value in parts.items() if name.startswith("trunk"))
    assert counted(run, WIDE, 2, 70, 70) == pytest.approx(expected, rel=0.015)


def test_parts_scale_as_they_should():
    config = depth_anything.sized("vitl", video=True)
    small, large = (depth_flops.parts(config, 32, side, side) for side in (252, 504))
    assert large["trunk projections"] / small["trunk projections"] == pytest.approx(4, rel=0.01)
    assert large["trunk attention"] / small["trunk attention"] == pytest.approx(16, rel=0.02)
    half = depth_flops.parts(config, 16, 252, 252)
    assert small["head fusion"] == 2 * half["head fusion"]
    assert small["temporal modules"] > 2 * half["temporal modules"], "attention over frames grows with their square"
