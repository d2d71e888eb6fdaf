"""From standardised actions back to the robot's: the exact inverse of how the data was standardised."""

import numpy as np

from qdepth_jax.data import recipes
from qdepth_jax.sim import actions


class Columns:
    """Stands for the columns of a data set: one feature."""

    def __init__(self, action):
        self._action = action

    def read(self, name):
        assert name == "action"
        return self._action


def test_to_libero_inverts_the_standardisation():
    rng = np.random.default_rng(0)
    stored = rng.uniform(-1, 1, (20, 7)).astype(np.float32)
    stored[:, 6] = rng.choice([-1.0, 1.0], 20)
    standard = recipes.clipped_inverted_gripper(Columns(stored))
    assert set(np.unique(standard[:, 6])) == {0.0, 1.0}
    np.testing.assert_allclose(actions.to_libero(standard), stored, atol=1e-7)


def test_to_libero_clips_motion_and_decides_the_gripper():
    got = actions.to_libero(np.asarray([[2.0, -3.0, 0, 0, 0, 0, 0.51], [0, 0, 0, 0, 0, 0, 0.49]], np.float32))
    np.testing.assert_array_equal(got[:, [0, 1, 6]], [[1, -1, -1], [0, 0, 1]])
