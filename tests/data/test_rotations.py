"""Euler angles from quaternions: closed forms, scipy, and the original code."""

import pathlib

import numpy as np
import pytest
from scipy.spatial import transform

from qdepth_jax.data import rotations

HALF = np.sqrt(0.5)


@pytest.mark.parametrize(
    ("quaternion", "angles"),
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([HALF, 0, 0, HALF], [np.pi / 2, 0, 0]),
        ([0, 0, HALF, HALF], [0, 0, np.pi / 2]),
        ([0, np.sin(0.2), 0, np.cos(0.2)], [0, 0.4, 0]),
        ([0, HALF, 0, HALF], [0, np.pi / 2, 0]),  # gimbal lock: yaw 0
        ([0, -HALF, 0, HALF], [0, -np.pi / 2, 0]),
    ],
)
def test_closed_forms(quaternion, angles):
    np.testing.assert_allclose(rotations.euler_from_quaternion(np.array(quaternion)), angles, atol=1e-6)


def test_random_rotations_equal_scipy_and_come_back():
    quaternion = np.random.default_rng(0).normal(size=(200, 2, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    ours = rotations.euler_from_quaternion(quaternion)
    assert ours.shape == (200, 2, 3) and ours.dtype == np.float32
    theirs = transform.Rotation.from_quat(quaternion.reshape(-1, 4))
    np.testing.assert_allclose(ours.reshape(-1, 3), theirs.as_euler("xyz"), atol=1e-5)
    back = transform.Rotation.from_euler("xyz", ours.reshape(-1, 3))
    assert (back.inv() * theirs).magnitude().max() < 1e-5


def test_gimbal_lock_is_still_the_same_rotation():
    for sign in (1, -1):
        wanted = transform.Rotation.from_euler("xyz", [0.3, sign * np.pi / 2, 0.5])
        angles = rotations.euler_from_quaternion(wanted.as_quat())
        assert angles[2] == 0
        assert (transform.Rotation.from_euler("xyz", angles).inv() * wanted).magnitude() < 1e-5


def test_equals_tensorflow_graphics():
    golden = np.load(pathlib.Path(__file__).parent.parent / "golden" / "oxe_standardise.npz")
    ours = rotations.euler_from_quaternion(golden["rotations|quaternion"])
    # float32 there; near the poles its arcsine loses half of the digits.
    np.testing.assert_allclose(ours[:40], golden["rotations|euler"][:40], atol=1e-5)
    np.testing.assert_allclose(ours[40:], golden["rotations|euler"][40:], atol=1e-3)
