"""Observation windows and action chunks, against plain loops."""

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.data import windows

LENGTHS = (5, 1, 4)
START = np.repeat([0, 5, 6], LENGTHS)
END = np.repeat([5, 6, 10], LENGTHS)
FRAMES = np.array([9, 0, 5, 3, 6, 1])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_observed_steps_end_at_the_frame_and_stay_in_the_episode(steps):
    ids, mask = windows.observed(FRAMES, START[FRAMES], steps)
    for row, frame in enumerate(FRAMES):
        wanted = [frame - back for back in range(steps - 1, -1, -1)]
        assert ids[row].tolist() == [max(w, START[frame]) for w in wanted]
        assert mask[row].tolist() == [w >= START[frame] for w in wanted]


@pytest.mark.parametrize("ending", windows.CHUNK_ENDS)
def test_chunks_by_hand(ending):
    action = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    chunk, mask = windows.chunk(action, FRAMES, END[FRAMES], 3, ending, absolute_dims=(2,))
    for row, frame in enumerate(FRAMES):
        for z in range(3):
            inside = frame + z < END[frame]
            last = action[END[frame] - 1]
            expected = action[frame + z] if inside else last
            if ending == "neutral" and not inside:
                expected = np.array([0, 0, last[2]], np.float32)
            assert mask[row, z] == inside
            np.testing.assert_array_equal(chunk[row, z], expected)


def test_unknown_ending():
    with pytest.raises(errors.UserError, match=r"data.chunk_end='cut' is unknown"):
        windows.check_ending("cut")
