"""Sidecars: restartable, atomic, refused when they belong to something else."""

import dataclasses
import os

import numpy as np
import pytest

from qdepth_jax import depth as depth_lib
from qdepth_jax import errors
from qdepth_jax.data import depth_labels, sidecar

LENGTHS = (3, 1, 4)
STARTS = (0, 3, 4)
METADATA = sidecar.Metadata("depth", "abc", "train", "cam", "maker-1", (2, 5), 8, 3, {"depth_kind": "relative"})


def _write(writer, episode):
    values = np.arange(LENGTHS[episode] * 10, dtype=np.uint16).reshape(-1, 2, 5) + 100 * episode
    writer.write(episode, STARTS[episode], values, scale=0.5 + episode, offset=-episode)


def test_interrupted_writer_continues(tmp_path):
    first = sidecar.Writer(str(tmp_path), METADATA)
    _write(first, 1)
    del first
    with pytest.raises(errors.UserError, match="unfinished one is there"):
        sidecar.open_sidecar(str(tmp_path), "train")
    second = sidecar.Writer(str(tmp_path), METADATA)
    assert second.pending() == [0, 2]
    _write(second, 2)
    with pytest.raises(ValueError, match="1 episodes are not written, first 0"):
        second.finish()
    _write(second, 0)
    second.finish()
    assert sidecar.Writer(str(tmp_path), METADATA).pending() == []
    opened = sidecar.open_sidecar(str(tmp_path), "train")
    assert opened.metadata == METADATA and opened.scale.tolist() == [0.5, 1.5, 2.5]
    np.testing.assert_array_equal(opened.values[3], 100 + np.arange(10).reshape(2, 5))
    assert not os.path.exists(tmp_path / "train" / "done.npy")


def test_other_metadata_and_shapes_are_refused(tmp_path):
    writer = sidecar.Writer(str(tmp_path), METADATA)
    with pytest.raises(errors.UserError, match="identity 'maker-1', not 'maker-2'"):
        sidecar.Writer(str(tmp_path), dataclasses.replace(METADATA, identity="maker-2"))
    with pytest.raises(ValueError, match=r"u16 \[2, 5\]"):
        writer.write(0, 0, np.zeros((3, 2, 4), np.uint16))
    with pytest.raises(ValueError, match=r"u16 \[2, 5\]"):
        writer.write(0, 0, np.zeros((3, 2, 5), np.int32))


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(errors.UserError, match="free space"):
        sidecar.Writer(str(tmp_path), METADATA)
    assert os.listdir(tmp_path) == []


def test_relative_labels_stay_valid_through_float32():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 20, 20)) * 7 + 3
    values[0, 0, 0] = np.nan
    raw, scale, offset = depth_labels.to_uint16(values, "relative")
    wide = depth_lib.DepthRange("relative", 1.0, 0.0)
    x, valid = depth_lib.normalise(raw, np.full(4, scale, np.float32), np.full(4, offset, np.float32), wide)
    assert np.array(valid).sum() == 4 * 400 - 1 and raw[0, 0, 0] == 0
    low, high = np.nanquantile(values, [0.02, 0.98])
    expected = 1 - 2 * np.clip((values - low) / (high - low), 0, 1)
    np.testing.assert_allclose(np.array(x)[1:], expected[1:], atol=1e-4)


def test_metric_labels_are_millimetres():
    raw, scale, offset = depth_labels.to_uint16(np.array([[[0.5, -1, np.inf, 65.535, 70]]]), "metric")
    assert raw.tolist() == [[[500, 0, 0, 65535, 0]]] and (scale, offset) == (0.001, 0.0)


def test_stand_in_says_what_it_is():
    estimator = depth_labels.find("stand_in")
    assert "no depth" in estimator.name and estimator.kind == "relative"
    (out,) = estimator.estimate([np.zeros((2, 6, 8, 3), np.uint8)])
    assert out.shape == (2, 6, 8) and (np.diff(out[0, :, 0]) > 0).all()
    with pytest.raises(errors.UserError, match="there is stand_in"):
        depth_labels.find("midas")


def test_a_token_is_valid_from_half_of_its_pixels_on():
    valid = np.zeros((2, 8, 8), bool)
    valid[0, :2, :4] = True  # token 0: 8 of 16 pixels
    valid[0, :4, 4:] = True  # token 1: all
    valid[0, 4:, :4].flat[:7] = True  # token 2: 7 of 16
    kept = sidecar.token_validity(valid, 2)
    assert kept.tolist() == [[True, True, False, False], [False] * 4]
    pixels = sidecar.token_pixels(kept, 8)
    assert pixels[0, :4].all() and not pixels[0, 4:].any() and not pixels[1].any()
    order = np.arange(9).reshape(1, 9) == 5  # row 1, column 2 of three
    assert np.argwhere(sidecar.token_pixels(order, 3)).tolist() == [[0, 1, 2]]
