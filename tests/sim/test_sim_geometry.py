"""What the simulator side computes without a simulator: rotations, units, actions."""

import numpy as np
import pytest

from qdepth_jax.sim import actions, expert, libero, render


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))[None, :]
    return q if np.linalg.det(q) > 0 else -q


def test_quaternion_and_matrix_invert_each_other_also_at_half_turns():
    rng = np.random.default_rng(0)
    rotations = [random_rotation(rng) for _ in range(50)]
    rotations += [np.diag([1.0, -1, -1]), np.diag([-1.0, 1, -1]), np.diag([-1.0, -1, 1]), np.eye(3)]
    for rotation in rotations:
        back = expert.rotation_matrix(expert.quaternion_of(rotation))
        np.testing.assert_allclose(back, rotation, atol=1e-12)


def test_axis_angle_keeps_the_published_range():
    # A quarter turn about z, and its negated quaternion: the same rotation, but published as 3/2 pi about -z.
    half = np.sqrt(0.5)
    np.testing.assert_allclose(libero.axis_angle(np.array([0, 0, half, half])), [0, 0, np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(libero.axis_angle(np.array([0, 0, -half, -half])), [0, 0, -3 * np.pi / 2], atol=1e-12)
    np.testing.assert_array_equal(libero.axis_angle(np.array([0, 0, 0, 1.0])), np.zeros(3))


@pytest.mark.parametrize("yaw", [-3.0, -1.0, 0.2, 1.5, 3.1])
def test_gripper_points_down_and_turns_at_most_a_quarter_from_home(yaw):
    rotation = expert.gripper_down(yaw, home_yaw=0.3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation[:, 2], [0, 0, -1])
    fingers = np.arctan2(rotation[1, 1], rotation[0, 1])
    assert abs(np.angle(np.exp(1j * (fingers - 0.3)))) <= np.pi / 2 + 1e-9
    assert np.sin(fingers - yaw) == pytest.approx(0.0, abs=1e-9)  # the same axis, perhaps the other way round


def test_millimetres_round_and_mark_what_cannot_be_stored():
    metres = np.array([0.0004, 0.0006, 1.2344, 65.535, 65.6, np.inf, np.nan, -1.0], np.float32)
    np.testing.assert_array_equal(render.millimetres(metres), [0, 1, 1234, 65535, 0, 0, 0, 0])


def test_published_view_mirrors_left_and_right_only():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    # The simulator stores rows bottom-up; the published data rotate that by 180 degrees.
    np.testing.assert_array_equal(libero.published_view(image), np.rot90(image[::-1], 2))


@pytest.mark.parametrize(
    ("suite", "cap"),
    [
        ("libero_spatial", 220),
        ("libero_object", 280),
        ("libero_goal_lan", 300),
        ("libero_10_swap", 520),
        ("libero_90", 400),
    ],
)
def test_step_caps_are_the_published_ones_also_for_variants(suite, cap):
    assert libero.step_cap(suite) == cap


def test_unknown_suite_has_no_silent_cap():
    with pytest.raises(ValueError, match="libero_1000"):
        libero.step_cap("libero_1000")


def test_metaworld_actions_are_clipped_and_keep_the_effort_of_the_gripper():
    given = np.asarray([[2.0, -0.5, 0.0, 0.6], [0.0, -3.0, 0.1, -1.5]], np.float32)
    np.testing.assert_array_equal(actions.to_metaworld(given), np.float32([[1, -0.5, 0, 0.6], [0, -1, 0.1, -1]]))
