"""Standardised values against the recipes written again as plain loops, on real Bridge data and on random columns;
which frames may be sampled, and what a sample reads."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from libero_writer import make_libero

from qdepth_jax import errors
from qdepth_jax.data import definitions, index, recipes, standardise


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
        recipes.binarise(flat, end), np.concatenate([np.array(_binarise_loop(e), np.float32) for e in split])
    )
    np.testing.assert_array_equal(
        recipes.relative_to_absolute(flat, start, end), np.concatenate([_absolute_loop(e) for e in split])
    )


def test_difference_stays_inside_episodes():
    state = np.array([[0.0], [1], [3], [10], [20]], np.float32)
    _, end = _borders(np.array([3, 2]))
    np.testing.assert_array_equal(recipes.successive_difference(state, end)[:, 0], [1, 2, 0, 10, 0])


@pytest.mark.parametrize("name", ["bridge_dataset", "bridge_orig"])
def test_bridge_equals_the_documented_recipe(name, bridge_dir, tmp_path):
    """bridge_dataset as octo and open-pi-zero read it, bridge_orig as OpenVLA does; values from tfds, plain loops."""
    tfds = pytest.importorskip("tensorflow_datasets")
    definition = definitions.find(name)
    skipped = int(name == "bridge_orig")
    split = index.open_index(bridge_dir, str(tmp_path)).split("train")
    ours = standardise.standardise(
        split, definition.action, definition.proprio, drop_first=definition.drop_first, drop_last=definition.drop_last
    )
    builder = tfds.builder_from_directory(bridge_dir)
    at = 0
    valid = set(ours.valid.tolist())
    for episode in builder.as_dataset("train", decoders={"steps": tfds.decode.SkipDecoding()}):
        state = episode["steps"]["observation"]["state"].numpy()
        action = episode["steps"]["action"].numpy()
        gripper = _binarise_loop(action[:, 6].tolist())
        for t in range(len(state)):
            places = state[t] if not skipped else [*state[t][:6], 0, state[t][6]]
            np.testing.assert_array_equal(ours.proprio[at + t], places)
            assert ours.end[at + t] == at + len(state) - 1 and ours.start[at + t] == at + skipped
            if t + 1 < len(state):
                expected = np.append(state[t + 1, :6] - state[t, :6], np.float32(gripper[t]))
                np.testing.assert_array_equal(ours.action[at + t], expected)
            assert (at + t in valid) == (skipped <= t < len(state) - 1)
        at += len(state)
    assert at == split.frames
    lost = {"first step, action undefined": 25} if skipped else {}
    assert ours.dropped == lost | {"last step, action undefined": 25}


def _standardise(directory, quarantined=None, **more):
    definition = definitions.find("libero_object")
    split = index.open_index(directory).split("train")
    if quarantined is not None:
        object.__setattr__(split, "quarantined", np.array(quarantined, np.int64))
    arguments = {"action": definition.action, "proprio": definition.proprio} | more
    return standardise.standardise(split, language="steps/language_instruction", **arguments)


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


def test_every_reason_counts_its_frames_once(tmp_path):
    directory = make_libero(tmp_path, (4, 3, 5))
    kept = _standardise(
        directory,
        quarantined=[6, 8],
        drop_first=True,
        drop_last=True,
        keep=lambda columns: columns.read("observation/state")[:, 0] < 2.02,  # frames 9.. are episode 2, step 2..
        keep_reason="too late",
        whole_chunks=True,
        horizon=2,
    )
    # Frames 0-3, 4-6, 7-11; first and last go; chunks of two need one more action before the border.
    assert kept.dropped == {
        "quarantined": 2,
        "first step, action undefined": 3,
        "last step, action undefined": 2,  # frame 6 is gone by then
        "too late": 2,
        "fewer than 2 actions to the end of the episode": 2,
    }
    assert kept.valid.tolist() == [1] and 12 - sum(kept.dropped.values()) == 1
    assert kept.start[np.array([0, 5, 11])].tolist() == [1, 5, 8] and kept.end[np.array([0, 11])].tolist() == [3, 11]
    assert len(kept.start) == 12 and kept.start.values.shape == (3,)


def test_the_part_of_the_split_and_one_step_episodes(tmp_path):
    directory = make_libero(tmp_path, (1, 3, 2))
    kept = _standardise(directory, episodes=np.array([True, True, False]), drop_last=True)
    assert kept.valid.tolist() == [1, 2]
    assert kept.dropped == {"episode of another part of the split": 2, "last step, action undefined": 2}
    with pytest.raises(errors.UserError, match=r"no frame left to sample \(.*fewer than 4 actions"):
        _standardise(directory, whole_chunks=True, horizon=4)
    with pytest.raises(errors.UserError, match=r"6 no instruction; data\.skip_unlabelled=False keeps"):
        standardise.standardise(
            index.open_index(directory).split("train"), recipes.stored_action, recipes.stored_action,
            skip_unlabelled=True,
        )  # fmt: skip


def test_frames_with_any_instruction_stay(tmp_path):
    split = index.open_index(make_libero(tmp_path, (4, 3), instructions=("go", ""))).split("train")
    both = ["steps/language_instruction", "steps/language_instruction"]
    kept = standardise.standardise(
        split, recipes.stored_action, recipes.stored_action, language=both, skip_unlabelled=True
    )
    assert kept.valid.tolist() == [0, 1, 2, 3] and kept.dropped == {"no instruction": 3}


def test_values_beside_a_quarantined_frame(tmp_path):
    """A frame set aside for its values also takes the samples along that would read them."""
    directory = make_libero(tmp_path, (6, 6))
    broken = np.zeros((12, 2), np.float32)
    broken[3, 1] = np.inf

    def run(name, **more):
        recipe = {name: lambda _: broken}
        kept = _standardise(directory, quarantined=[3], **recipe, **more)
        assert len(kept.valid) + sum(kept.dropped.values()) == 12 and kept.dropped["quarantined"] == 1
        return kept.valid.tolist()

    others = list(range(6, 12))
    assert run("action") == [0, 1, 2, 4, 5, *others]
    assert run("action", horizon=3) == [0, 4, 5, *others]
    assert run("proprio", window=2) == [0, 1, 2, 5, *others]
    with pytest.raises(errors.UserError, match="--quarantine"):
        _standardise(directory, action=lambda _: broken)
    # Where nothing is sampled nothing is read.
    away = _standardise(directory, action=lambda _: broken, episodes=np.array([False, True]))
    assert away.valid.tolist() == others


def test_values_that_are_not_finite_are_named(tmp_path):
    split = index.open_index(make_libero(tmp_path, (4, 3))).split("train")
    broken = np.zeros((7, 2), np.float32)
    broken[5, 1] = np.nan
    with pytest.raises(errors.UserError, match=r"action is not finite in 1 frames.*\(episode 1\), step 1"):
        standardise.standardise(split, lambda _: broken, lambda _: np.zeros((7, 1)))
