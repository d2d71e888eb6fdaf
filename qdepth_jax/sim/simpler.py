"""SIMPLER's robots in the conventions of open-pi-zero's policies (its src/agent/env_adapter/simpler.py).

The pose that SIMPLER gives is `eef_pos` f32 [8]: xyz (m), quaternion wxyz, gripper opening (1 open), in the frame of
the robot's base. Only the fork that open-pi-zero uses has it.

  widowx (Bridge)        state f32 [7]: xyz, roll-pitch-yaw against a gripper that points down, opening
  google_robot (Fractal) state f32 [8]: xyz, quaternion xyzw, closedness
  actions f32 [7]        xyz, axis times angle, gripper: widowx +1 open, -1 closed; google_robot +1 close, -1 open
"""

import numpy as np

# Bridge's data has rotations relative to this pose, the gripper pointing down (bridge_data_robot's default rotation).
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
STICKY_STEPS = 15  # a gripper command of the google robot lasts so many actions (Octo's evaluation)
STICKY_FROM = 0.5


def bridge_state(eef_pos: np.ndarray) -> np.ndarray:
    """eef_pos [8] -> f32 [7]."""
    euler = euler_of(matrix_of_wxyz(eef_pos[3:7]) @ DOWN.T)
    return np.concatenate([eef_pos[:3], euler, eef_pos[7:]]).astype(np.float32)


def fractal_state(eef_pos: np.ndarray) -> np.ndarray:
    """eef_pos [8] -> f32 [8]."""
    return np.concatenate([eef_pos[:3], np.roll(eef_pos[3:7], -1), 1.0 - eef_pos[7:]]).astype(np.float32)


def bridge_actions(chunk: np.ndarray) -> np.ndarray:
    """Standardised f32 [k, 7] (xyz, roll-pitch-yaw, gripper 1 open) -> SIMPLER's f32 [k, 7]."""
    gripper = 2.0 * (chunk[:, 6:] > 0.5) - 1.0
    return np.concatenate([_motion(chunk), gripper], axis=1).astype(np.float32)


class FractalActions:
    """The same for the google robot, whose gripper command sticks; one for each episode.

    A command beyond 0.5 in size is held for 15 actions. The rule runs over every action of a chunk, also those that are
    not executed [open-pi-zero]: with 2 of 4 executed it lasts for about 8 steps.
    """

    def __init__(self) -> None:
        self._held, self._count = None, 0

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        gripper = [self._sticky(1.0 - 2.0 * float(opening)) for opening in chunk[:, 6]]
        return np.concatenate([_motion(chunk), np.asarray(gripper)[:, None]], axis=1).astype(np.float32)

    def _sticky(self, command: float) -> float:
        if self._held is None and abs(command) > STICKY_FROM:
            self._held = command
        if self._held is None:
            return command
        command, self._count = self._held, self._count + 1
        if self._count == STICKY_STEPS:
            self._held, self._count = None, 0
        return command


def _motion(chunk: np.ndarray) -> np.ndarray:
    """xyz and roll-pitch-yaw [k, 6] -> xyz and axis times angle [k, 6]."""
    turns = np.stack([axis_angle_of(matrix_of_euler(*angles)) for angles in np.asarray(chunk[:, 3:6], np.float64)])
    return np.concatenate([chunk[:, :3], turns], axis=1)


def matrix_of_wxyz(quaternion: np.ndarray) -> np.ndarray:
    """[4] -> rotation matrix [3, 3]."""
    w, x, y, z = np.asarray(quaternion, np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def matrix_of_euler(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Angles about the fixed axes x, y, z in this order (transforms3d's sxyz) -> rotation matrix [3, 3]."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def euler_of(rotation: np.ndarray) -> np.ndarray:
    """Inverse of `matrix_of_euler`, f64 [3]; at a pitch of a quarter turn yaw is 0, as in transforms3d."""
    cosine = np.hypot(rotation[0, 0], rotation[1, 0])
    pitch = np.arctan2(-rotation[2, 0], cosine)
    if cosine > 4 * np.finfo(np.float64).eps:
        return np.array([np.arctan2(rotation[2, 1], rotation[2, 2]), pitch, np.arctan2(rotation[1, 0], rotation[0, 0])])
    return np.array([np.arctan2(-rotation[1, 2], rotation[1, 1]), pitch, 0.0])


def axis_angle_of(rotation: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] -> axis times angle, angle in [0, pi]."""
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    sine, cosine = np.linalg.norm(skew) / 2, (np.trace(rotation) - 1) / 2
    angle = np.arctan2(sine, cosine)
    if sine > 1e-8:
        return skew / (2 * sine) * angle
    if cosine > 0:
        return skew / 2
    # Half a turn: the axis is the eigenvector of 1, its sign is free.
    values, vectors = np.linalg.eigh((rotation + rotation.T) / 2)
    return vectors[:, np.argmax(values)] * angle
