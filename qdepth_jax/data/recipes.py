"""Recipes: from the columns of one data set to actions, proprioception and the frames worth keeping.

A recipe is a pure function of a whole split (F frames, episode borders as arrays). What several data sets share is one
function; which data set uses which stands in definitions.py. Facts are from the standardisation code of octo
(octo/data/oxe/oxe_standardization_transforms.py) and OpenVLA (prismatic/vla/datasets/rlds/oxe/transforms.py), checked
against their outputs in tests/data/test_definitions.py.

Actions come out as motion and an absolute gripper, 1 open, 0 closed.
"""

import numpy as np

from qdepth_jax.data import rotations, standardise

Columns = standardise.Columns
Recipe = standardise.Recipe
# (feature, first, last) = columns first..last of a feature (None = its border); a number = that many zero columns.
Piece = tuple[str, int | None, int | None] | int


# ---- gripper: source convention -> absolute, 1 open, 0 closed ----


def binarise(gripper: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Continuous opening -> {0, 1}: above 0.95 open, below 0.05 closed, between takes the state reached next.

    Values between at the end of an episode, with no state reached after them, take the episode's last raw value (octo's
    rule). gripper f32 [F], end i64 [F] (one past the episode's last frame) -> f32 [F].
    """
    frames = len(gripper)
    decided = (gripper > 0.95) | (gripper < 0.05)
    # Position of the next decided frame at or after each frame, over the whole split; beyond the episode = none.
    at = np.where(decided, np.arange(frames), frames)
    following = np.minimum.accumulate(at[::-1])[::-1]
    reached = following < end
    opened = (gripper > 0.95).astype(np.float32)
    return np.where(reached, opened[np.where(reached, following, 0)], gripper[end - 1]).astype(np.float32)


def relative_to_absolute(gripper: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Commands (+1 close, -1 open, about 0 keep; threshold 0.1) -> held state, 1 open, 0 closed.

    Before its first command an episode is in the opposite state; without any command it is open. f32 [F] -> f32 [F].
    """
    frames = len(gripper)
    command = np.where(gripper < -0.1, 1, np.where(gripper > 0.1, -1, 0))
    given = command != 0
    last = np.maximum.accumulate(np.where(given, np.arange(frames), -1))
    following = np.minimum.accumulate(np.where(given, np.arange(frames), frames)[::-1])[::-1]
    held = last >= start
    coming = following < end
    before = np.where(coming, -command[np.where(coming, following, 0)], 1)
    state = np.where(held, command[np.where(held, last, 0)], before)
    return (state.astype(np.float32) + 1) / 2


def invert(gripper: np.ndarray) -> np.ndarray:
    """1 - g."""
    return (1 - gripper).astype(np.float32)


def successive_difference(state: np.ndarray, end: np.ndarray) -> np.ndarray:
    """state[t+1] - state[t] inside an episode, 0 on its last frame (which such recipes drop). [F, n] -> f32 [F, n].

    Angles are not wrapped: that is the published recipe, outliers of up to 2 pi included.
    """
    frames = len(state)
    following = np.minimum(np.arange(1, frames + 1), end - 1)
    return (state[following] - state).astype(np.float32)


# ---- shapes shared by several data sets ----


def join(*parts: np.ndarray) -> np.ndarray:
    """Columns [F] and [F, n] side by side, f32 [F, sum of n]."""
    return np.concatenate([part.reshape(len(part), -1) for part in parts], 1, dtype=np.float32)


def pieces(*wanted: Piece) -> Recipe:
    """A recipe that puts pieces of features side by side, as stored."""

    def recipe(columns: Columns) -> np.ndarray:
        found = {piece[0]: columns.read(piece[0]) for piece in wanted if not isinstance(piece, int)}
        frames = len(columns.start) if not found else len(next(iter(found.values())))
        return join(
            *(
                np.zeros((frames, piece), np.float32)
                if isinstance(piece, int)
                else found[piece[0]].reshape(frames, -1)[:, piece[1] : piece[2]]
                for piece in wanted
            )
        )

    return recipe


def stored_action(columns: Columns) -> np.ndarray:
    """The file's action is in our convention already."""
    return join(columns.read("action"))


def without_last(columns: Columns) -> np.ndarray:
    """The last number of the file's action says that the episode terminates."""
    return join(columns.read("action")[:, :-1])


def inverted_gripper(columns: Columns) -> np.ndarray:
    """The file's gripper is 0 open, 1 closed."""
    action = columns.read("action")
    return join(action[:, :6], invert(action[:, -1:]))


def clipped_inverted_gripper(columns: Columns) -> np.ndarray:
    """The file's gripper is -1 (or 0) open, +1 closed."""
    action = columns.read("action")
    return join(action[:, :6], invert(np.clip(action[:, -1:], 0, 1)))


def _delta(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    return columns.read("action/world_vector"), columns.read("action/rotation_delta")


def _held_gripper(columns: Columns) -> np.ndarray:
    command = columns.read("action/gripper_closedness_action").reshape(-1)
    return relative_to_absolute(command, columns.start, columns.end)


def delta_relative_gripper(columns: Columns) -> np.ndarray:
    """Motion as stored; the gripper holds its last relative command (RT-1's layout)."""
    return join(*_delta(columns), _held_gripper(columns))


def delta_closing_gripper(columns: Columns) -> np.ndarray:
    """Motion as stored; the gripper command is absolute, 1 closed."""
    closed = np.clip(columns.read("action/gripper_closedness_action"), 0, 1)
    return join(*_delta(columns), invert(closed))


# ---- single data sets ----


def bridge_action(columns: Columns) -> np.ndarray:
    """Motion relabelled as the difference of reached poses; commands in the file are noisy and reach 80 metres."""
    gripper = binarise(columns.read("action")[:, 6], columns.end)
    motion = successive_difference(columns.read("observation/state")[:, :6], columns.end)
    return join(motion, gripper)


def taco_action(columns: Columns) -> np.ndarray:
    """Gripper -1 closed, +1 open."""
    action = columns.read("action/rel_actions_world")
    return join(action[:, :6], np.clip(action[:, -1:], 0, 1))


def jaco_action(columns: Columns) -> np.ndarray:
    """The arm is driven in translation alone."""
    motion = columns.read("action/world_vector")
    return join(motion, np.zeros_like(motion), _held_gripper(columns))


def cable_routing_action(columns: Columns) -> np.ndarray:
    """The gripper holds the cable throughout: closed."""
    motion, turn = _delta(columns)
    return join(motion, turn, np.zeros(len(motion), np.float32))


def toto_action(columns: Columns) -> np.ndarray:
    return join(*_delta(columns), columns.read("action/open_gripper"))


def language_table_action(columns: Columns) -> np.ndarray:
    """A push in the plane; there is no gripper, 1 stands for it."""
    motion = columns.read("action")
    return join(motion, np.zeros((len(motion), 4), np.float32), np.ones(len(motion), np.float32))


def nyu_franka_action(columns: Columns) -> np.ndarray:
    """Joint velocities (7), motion (6), gripper, terminate: the middle is ours."""
    action = columns.read("action")
    return join(action[:, -8:-2], np.clip(action[:, -2:-1], 0, 1))


def furniture_bench_action(columns: Columns) -> np.ndarray:
    """Translation, rotation as a quaternion xyzw, gripper -1 open, +1 closed."""
    action = columns.read("action")
    turn = rotations.euler_from_quaternion(action[:, 3:7])
    return join(action[:, :3], turn, invert(np.clip(action[:, -1:], 0, 1)))


def iamlab_action(columns: Columns) -> np.ndarray:
    """End-effector pose (absolute) with a quaternion xyzw, gripper."""
    action = columns.read("action")
    return join(action[:, :3], rotations.euler_from_quaternion(action[:, 3:7]), action[:, 7:8])


def bc_z_action(columns: Columns) -> np.ndarray:
    """The file holds ten actions per frame; the first is the one taken."""
    return join(
        columns.read("action/future/xyz_residual")[:, :3],
        columns.read("action/future/axis_angle_residual")[:, :3],
        invert(columns.read("action/future/target_close")[:, :1].astype(np.float32)),
    )


def fanuc_action(columns: Columns) -> np.ndarray:
    """The file has no gripper action: the gripper's state stands for it."""
    return join(columns.read("action"), invert(columns.read("observation/state")[:, 6:7]))


# ---- DROID ----


def droid_action(columns: Columns) -> np.ndarray:
    """Cartesian velocity in the robot's base frame (OpenVLA); the file's gripper position is 0 open, 1 closed."""
    motion = columns.read("action_dict/cartesian_velocity")[:, :6]
    return join(motion, invert(columns.read("action_dict/gripper_position")))


def droid_joint_action(kind: str) -> Recipe:
    """Joint "position" or "velocity" (7) and the gripper (openpi)."""

    def recipe(columns: Columns) -> np.ndarray:
        joints = columns.read(f"action_dict/joint_{kind}")
        return join(joints, invert(columns.read("action_dict/gripper_position")))

    return recipe


# OpenVLA's statistics of DROID's cartesian velocity, from which its filter of idle frames computes "normalised zero"
# (prismatic/vla/datasets/rlds/oxe/utils/droid_utils.py).
DROID_Q01 = (-0.7776297926902771, -0.5803514122962952, -0.5795090794563293)
DROID_Q01 += (-0.6464047729969025, -0.7041108310222626, -0.8895104378461838)
DROID_Q99 = (0.7597932070493698, 0.5726242214441299, 0.7351000607013702)
DROID_Q99 += (0.6705610305070877, 0.6464948207139969, 0.8897542208433151)


def droid_moving(columns: Columns) -> np.ndarray:
    """bool [F]: some dimension of the motion differs from zero by more than 1e-5 after normalisation.

    OpenVLA compares normalised actions with a normalised zero; the difference is linear, so the offset cancels.
    """
    motion = columns.read("action_dict/cartesian_velocity")[:, :6]
    limit = 0.5e-5 * (np.array(DROID_Q99) - np.array(DROID_Q01))
    return (np.abs(motion) > limit.astype(np.float32)).any(1)


def droid_success(columns: Columns) -> np.ndarray:
    """bool [F]: the path of the raw episode says "success" (openpi's rule; DROID has no other label)."""
    ids, strings = columns.episode_text("episode_metadata/file_path")
    return np.array(["success" in path for path in strings], bool)[ids]


# ---- kuka ----


def kuka_success(columns: Columns) -> np.ndarray:
    """bool [F]: the grasp succeeded (rlds_dataset_mod `filter_success`; most of the raw episodes failed)."""
    return columns.episode_read("success").astype(bool).reshape(-1)
