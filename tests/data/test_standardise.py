"""Standardised values against the recipes written again as plain loops, on real Bridge data and on random columns."""

import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from libero_writer import make_libero

from qdepth_jax import errors
from qdepth_jax.data import definitions, index, standardise


def _borders(lengths):
    start = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.repeat(start, lengths), np.repeat(start + lengths, lengths)


def _binarise_loop(episode):
    """Backward scan that starts from the last raw value (octo)."""
    carry, out = episode[-1], []
    for value in episode[::-1]:
        carry = 1.0 if value > 0.95 else 0.0 if value < 0.05 else carry
        out.append(carry)
    return out[::-1]


def _absolute_loop(episode):
    commands = [1 if v < -0.1 else -1 if v > 0.1 else 0 for v in episode]
    first = next((c for c in commands if c), None)
    carry, out = (1 if first is None else -first), []
    for command in commands:
        carry = command or carry
        out.append(carry / 2 + 0.5)
    return out


EPISODES = st.lists(
    st.lists(st.sampled_from([-1.0, -0.1, -0.05, 0.0, 0.04, 0.05, 0.3, 0.7, 0.95, 0.96, 1.0]), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(EPISODES)
def test_gripper_scans_equal_plain_loops(episodes):
    lengths = np.array([len(e) for e in episodes])
    start, end = _borders(lengths)
    flat = np.concatenate([np.array(e, np.float32) for e in episodes])
    split = np.split(flat, np.cumsum(lengths)[:-1])
    np.testing.assert_array_equal(
        standardise.binarise(flat, end), np.concatenate([np.array(_binarise_loop(e), np.float32) for e in split])
    )
    np.testing.assert_array_equal(
        standardise.relative_to_absolute(flat, start, end), np.concatenate([_absolute_loop(e) for e in split])
    )


def test_difference_stays_inside_episodes():
    state = np.array([[0.0], [1], [3], [10], [20]], np.float32)
    _, end = _borders(np.array([3, 2]))
    np.testing.assert_array_equal(standardise.successive_difference(state, end)[:, 0], [1, 2, 0, 10, 0])


def test_bridge_equals_the_documented_recipe(bridge_dir, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    definition = definitions.find("bridge_dataset")
    split = index.open_index(bridge_dir, str(tmp_path)).split("train")
    ours = standardise.standardise(split, definition.action, definition.proprio, drop_last=True)
    builder = tfds.builder_from_directory(bridge_dir)
    at = 0
    valid = set(ours.valid.tolist())
    for episode in builder.as_dataset("train", decoders={"steps": tfds.decode.SkipDecoding()}):
        state = episode["steps"]["observation"]["state"].numpy()
        action = episode["steps"]["action"].numpy()
        gripper = _binarise_loop(action[:, 6].tolist())
        for t in range(len(state)):
            np.testing.assert_array_equal(ours.proprio[at + t], state[t])
            assert ours.end[at + t] == at + len(state) - 1
            if t + 1 < len(state):
                expected = np.append(state[t + 1, :6] - state[t, :6], np.float32(gripper[t]))
                np.testing.assert_array_equal(ours.action[at + t], expected)
            assert (at + t in valid) == (t + 1 < len(state))
        at += len(state)
    assert ours.dropped == {"last step, action undefined": 25}


def test_fractal_and_libero_recipes():
    start, end = _borders(np.array([3]))
    columns = {
        "action/gripper_closedness_action": np.array([[0.0], [1], [0]]),
        "action/world_vector": np.arange(9.0).reshape(3, 3),
        "action/rotation_delta": -np.arange(9.0).reshape(3, 3),
        "observation/base_pose_tool_reached": np.arange(21.0).reshape(3, 7),
        "observation/gripper_closed": np.array([[0.0], [1], [1]]),
        "action": np.array([[1, 2, 3, 4, 5, 6, -1], [1, 2, 3, 4, 5, 6, 1.0], [0, 0, 0, 0, 0, 0, 0.25]]),
    }
    read = standardise.Columns(columns.__getitem__, start, end)
    fractal = definitions.fractal_action(read)
    np.testing.assert_array_equal(fractal[:, 6], [1, 0, 0])  # open before the first command, closed after it
    np.testing.assert_array_equal(fractal[1, :6], [3, 4, 5, -3, -4, -5])
    np.testing.assert_array_equal(definitions.fractal_proprio(read)[2], [14, 15, 16, 17, 18, 19, 20, 1])
    libero = definitions.libero_action(read)
    np.testing.assert_array_equal(libero[:, 6], [1, 0, 0.75])  # -1 open -> 1, +1 close -> 0
    np.testing.assert_array_equal(libero[0, :6], [1, 2, 3, 4, 5, 6])


def _standardise(directory, **more):
    definition = definitions.find("libero_object")
    split = index.open_index(directory).split("train")
    return standardise.standardise(
        split, definition.action, definition.proprio, language="steps/language_instruction", **more
    )


def test_unlabelled_frames_are_left_out_and_counted(tmp_path):
    directory = make_libero(tmp_path, (4, 3, 5), instructions=("go", " ", "stop"))
    kept = _standardise(directory, skip_unlabelled=True)
    assert kept.dropped == {"no instruction": 3} and kept.episode[kept.valid].tolist() == [0] * 4 + [2] * 5
    assert len(_standardise(directory, skip_unlabelled=False).valid) == 12


def test_frame_limit_per_episode(tmp_path):
    directory = make_libero(tmp_path, (40, 3, 5))
    kept = _standardise(directory, max_frames_per_episode=4, seed=1)
    assert np.bincount(kept.episode[kept.valid]).tolist() == [4, 3, 4]
    other = _standardise(directory, max_frames_per_episode=4, seed=2)
    assert kept.valid.tolist() != other.valid.tolist()


def test_values_that_are_not_finite_are_named(tmp_path):
    split = index.open_index(make_libero(tmp_path, (4, 3))).split("train")
    broken = np.zeros((7, 2), np.float32)
    broken[5, 1] = np.nan
    with pytest.raises(errors.UserError, match=r"action is not finite in 1 frames.*\(episode 1\), step 1"):
        standardise.standardise(split, lambda _: broken, lambda _: np.zeros((7, 1)))


def test_unknown_data_set_suggests_the_nearest():
    with pytest.raises(errors.UserError, match="did you mean 'libero_object'"):
        definitions.find("libero_objects")
    assert types.MappingProxyType(definitions.DEFINITIONS)["libero_90_no_noops"].rate_hz == 20
