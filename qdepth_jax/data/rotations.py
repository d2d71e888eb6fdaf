"""Rotations in numpy, for the data sets whose actions are quaternions."""

import numpy as np

# Within this of |sin(pitch)| = 1 roll and yaw turn about the same axis and only their sum or difference is defined.
_GIMBAL = 1e-6


def euler_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternions xyzw [..., 4] -> f32 [..., 3]: angles about x, y, z in radians, R = Rz @ Ry @ Rx.

    The convention of tensorflow_graphics `euler.from_quaternion`, which octo and OpenVLA call: pitch in [-pi/2, pi/2],
    and at |pitch| = pi/2 the yaw is 0. Computed in float64, so within about 1e-6 of the float32 original away from the
    gimbal lock. The input is not normalised, as in the original.
    """
    x, y, z, w = np.moveaxis(np.asarray(quaternion, np.float64), -1, 0)
    # Entry of the rotation matrix: row, column.
    m00, m01, m02 = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
    m10 = 2 * (x * y + z * w)
    m20, m21, m22 = np.clip(2 * (x * z - y * w), -1, 1), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    locked = 1 - np.abs(m20) < _GIMBAL
    sign = np.where(m20 >= 0, 1.0, -1.0)
    roll = np.where(locked, np.arctan2(-sign * m01, -sign * m02), np.arctan2(m21, m22))
    pitch = np.where(locked, -sign * np.pi / 2, -np.arcsin(m20))
    yaw = np.where(locked, 0.0, np.arctan2(m10, m00))
    return np.stack([roll, pitch, yaw], -1).astype(np.float32)
