"""From observations to rows of the network: resizing and noise are those of training and evaluation, to the bit."""

import jax
import numpy as np
import pytest

from qdepth_jax import planner
from qdepth_jax.models import images, policy


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
