"""The windows of a video: which frames they see, scale and shift, short videos."""

import numpy as np
import pytest

from qdepth_jax import errors, video_depth


def test_windows_see_every_frame_and_begin_with_frames_of_the_one_before():
    rows = video_depth.plan_windows(50)
    assert rows.shape == (3, 32)
    assert rows[0].tolist() == list(range(32))
    assert rows[1].tolist() == [0, 12, *range(24, 54)][:10] + list(range(32, 50)) + [49] * 4
    assert rows[2][:2].tolist() == [0, rows[1][12]]
    assert set(rows.ravel()) == set(range(50))


@pytest.mark.parametrize("frames", [1, 2, 9, 22, 23, 31, 32, 33, 44, 45, 100])
def test_any_length_comes_back_on_one_scale(frames):
    """A network whose scale and shift change from window to window: the joined depth is the truth, but for them."""
    truth = 2.0 + np.random.default_rng(0).random((frames, 4, 5), np.float32)
    rows = video_depth.plan_windows(frames)
    factors = np.random.default_rng(1).uniform(0.5, 2.0, (len(rows), 2)).astype(np.float32)
    factors[0] = 1.0, 0.0
    windows = (truth[row] * a + b for row, (a, b) in zip(rows, factors))
    found = video_depth.join_windows(windows, frames)
    assert found.shape == truth.shape
    np.testing.assert_allclose(found, truth, rtol=2e-4)


def test_metric_depth_is_neither_scaled_nor_shifted():
    rows = video_depth.plan_windows(40)
    depth = np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    found = video_depth.join_windows((depth[row] * (1 + n) for n, row in enumerate(rows)), 40, metric=True)
    np.testing.assert_allclose(found[36:], depth[36:] * 2)


def test_scale_and_shift():
    x = np.random.default_rng(0).random((3, 4), np.float32)
    scale, shift = video_depth.scale_and_shift(x, 3 * x - 1)
    assert scale == pytest.approx(3, rel=1e-5) and shift == pytest.approx(-1, rel=1e-4)
    assert video_depth.scale_and_shift(np.full((3, 4), 0.7), x) == (1.0, 0.0)  # constant depth says nothing


def test_the_size_the_network_sees():
    assert video_depth.network_size(256, 256) == (518, 518)
    assert video_depth.network_size(480, 640) == (518, 686)
    assert video_depth.network_size(200, 640) == (280, 896)  # longer than 16:9: made smaller
    with pytest.raises(errors.UserError, match="without frames"):
        video_depth.plan_windows(0)


def test_pixels_without_a_number_leave_the_others_on_one_scale(caplog):
    truth = 2.0 + np.random.default_rng(0).random((70, 4, 5), np.float32)
    rows = video_depth.plan_windows(70)
    windows = [truth[row] * (1 + n) + n for n, row in enumerate(rows)]
    windows[0][12, 1, 2] = np.nan  # of an anchor of the second window
    windows[1][0, 3, 3] = np.inf  # and the second window's own view of the first anchor
    found = video_depth.join_windows(iter(windows), 70)
    assert np.argwhere(~np.isfinite(found)).tolist() == [[12, 1, 2]]
    finite = np.isfinite(found)
    np.testing.assert_allclose(found[finite], truth[finite], rtol=2e-4)
    assert "70 frames: 2 pixels" in caplog.text
    few = np.where(np.arange(200) < 1, 1.0, np.nan)
    assert np.isnan(video_depth.scale_and_shift(few, np.arange(200.0))).all()


def test_a_video_too_long_for_the_input_size_is_refused():
    with pytest.raises(errors.UserError, match=r"--input_size=70: of a video of 10x500 .*raise it to 406"):
        video_depth.network_size(10, 500, 70)
    assert video_depth.network_size(10, 500, 406)[0] == 14
    assert video_depth.network_size(10, 500, 70, video=False) == (70, 3500)
