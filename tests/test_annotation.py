"""Annotation of odd input: what cannot be depth is masked and counted, what does not fit together is refused."""

import dataclasses
import pathlib

import libero_writer
import numpy as np
import pytest

from qdepth_jax import annotation, errors, tokenisation, video_depth
from qdepth_jax.data import definitions, depth_labels, episode_reader, index, sidecar

LIBERO = definitions.find("libero_object")


def annotate(path, root, estimator, share=(0, 1), view="main", split="train"):
    opened = index.open_index(path)
    return annotation.annotate_split(opened, LIBERO, opened.split(split), view, str(root), estimator, *share)


def made(maps, kind="relative", **more) -> depth_labels.Estimator:
    """An estimator whose maps are maps(number of the call, frames)."""
    return depth_labels.Estimator(
        "made", kind, lambda episodes: (maps(i, frames) for i, frames in enumerate(episodes)), **more
    )


def ramp(frames) -> np.ndarray:
    return np.broadcast_to(np.arange(1.0, 1.0 + frames.shape[2], dtype=np.float32), frames.shape[:3]).copy()


def test_constant_and_broken_estimates_are_masked_and_counted(libero_dir, tmp_path):
    def maps(number, frames):
        out = ramp(frames)
        if number == 0:
            out[:] = 5.0  # no depth in it
        if number == 1:
            out[:] = np.nan
        if number == 2:
            out[1, 2, 3:5] = [np.nan, np.inf]
        return out

    found = annotate(libero_dir, tmp_path, made(maps, window=6, computed=lambda t: 32))
    values = sidecar.open_sidecar(str(tmp_path), "train").values
    assert (values[:10] == 0).all()  # episodes 0 and 1, of 7 and 3 frames
    assert np.argwhere(values[10:] == 0).tolist() == [[1, 2, 3], [1, 2, 4]]
    size = 24 * 32
    expected = {
        "frames": 24,
        "annotated_frames": 24,
        "pixels": 24 * size,
        "invalid_pixels": 10 * size + 2,
        "not_finite_pixels": 3 * size + 2,
        "constant_episodes": 1,
        "short_episodes": 2,  # of 3 and of 5 frames
        "computed_frames": 4 * 32,
    }
    assert {name: found[name] for name in expected} == expected


def test_metric_estimates_without_depth_are_counted_by_reason(libero_dir, tmp_path):
    def maps(number, frames):
        out = ramp(frames)
        out[0, 0, :5] = [0.0, -1.0, np.nan, 65.6, 65.5]
        return out

    found = annotate(libero_dir, tmp_path, made(maps, "metric"))
    counted = [found[f"{name}_pixels"] for name in ("invalid", "not_finite", "not_positive", "too_far")]
    assert counted == [16, 4, 8, 4]
    opened = sidecar.open_sidecar(str(tmp_path), "train")
    assert opened.values[0, 0, :6].tolist() == [0, 0, 0, 0, 65500, 6000] and (opened.scale == np.float32(0.001)).all()


@pytest.mark.parametrize("name", ["dataset", "simulator"])
def test_depth_that_the_data_set_carries_is_copied(libero_dir, tmp_path, name):
    found = annotate(libero_dir, tmp_path, depth_labels.find(name))
    opened = sidecar.open_sidecar(str(tmp_path), "train")
    assert opened.metadata.details["depth_kind"] == "metric" and name in opened.metadata.identity
    assert opened.values[:, 3, 3].tolist() == [e * 100 + t + 1 for e, n in enumerate((7, 3, 9, 5)) for t in range(n)]
    assert found["invalid_pixels"] == 0 and found["annotated_frames"] == 24
    with pytest.raises(errors.UserError, match="carries no depth feature 'steps/observation/depth_wrist'"):
        annotate(libero_dir, tmp_path / "wrist", depth_labels.find(name), view="wrist")


def test_shares_in_any_order_give_the_bytes_of_one_process(libero_dir, tmp_path):
    estimator = depth_labels.find("stand_in")
    whole = annotate(libero_dir, tmp_path / "one", estimator)
    second = annotate(libero_dir, tmp_path / "two", estimator, (1, 2))
    assert second["directory"] is None and second["unfinished_episodes"] == 2 and second["annotated_now"] == 2
    first = annotate(libero_dir, tmp_path / "two", estimator, (0, 2))
    assert first["annotated_now"] == 2
    for name in ("directory", "annotated_now"):
        whole.pop(name), first.pop(name)
    assert first == whole
    for file in pathlib.Path(tmp_path, "one", "train").iterdir():
        assert file.read_bytes() == pathlib.Path(tmp_path, "two", "train", file.name).read_bytes()
    assert annotate(libero_dir, tmp_path / "two", estimator, (3, 5))["annotated_now"] == 0


def test_other_weights_or_settings_on_another_host_are_refused(libero_dir, tmp_path):
    first = made(lambda i, frames: ramp(frames), details={"weights": "sha256:1", "dtype": "float32"})
    assert annotate(libero_dir, tmp_path, first, (0, 2))["directory"] is None
    other = dataclasses.replace(first, details={"weights": "sha256:2", "dtype": "bfloat16"})
    with pytest.raises(errors.UserError, match=r"details.weights 'sha256:1', not 'sha256:2'; details.dtype 'float32'"):
        annotate(libero_dir, tmp_path, other, (1, 2))
    with pytest.raises(errors.UserError, match="identity 'made', not 'stand_in"):
        annotate(libero_dir, tmp_path, depth_labels.find("stand_in"), (1, 2))
    more = libero_writer.make_libero(tmp_path / "more", seed=1)
    with pytest.raises(errors.UserError, match="fingerprint"):
        annotate(more, tmp_path, first, (1, 2))
    assert annotate(libero_dir, tmp_path, first, (1, 2))["directory"]


def test_a_window_without_numbers_masks_its_frames_and_the_next_goes_on():
    windows = [np.ones((32, 2, 3), np.float32) * np.arange(1, 4, dtype=np.float32) for _ in range(3)]
    windows[1][:] = np.nan
    joined = video_depth.join_windows(iter(windows), 70)
    assert np.isnan(joined[24:54]).all()
    np.testing.assert_allclose(joined[np.r_[:24, 54:70]], np.broadcast_to([1, 2, 3], (40, 2, 3)), rtol=1e-6)


def test_maps_of_another_size_are_refused(libero_dir, tmp_path):
    with pytest.raises(ValueError, match=r"maps \(7, 24, 31\) of 7 frames of \(24, 32\)"):
        annotate(libero_dir, tmp_path, made(lambda i, frames: ramp(frames)[..., :-1]))


def test_networks_see_red_green_blue_as_training_does(libero_dir, tmp_path):
    """A copy whose main camera is stored blue first: exchanged, said in the sidecar, and only where it is so."""
    seen = []

    def estimate(episodes):
        for frames in episodes:
            seen.append(frames)
            yield ramp(frames)

    estimator = depth_labels.Estimator("made", "relative", estimate)
    opened = index.open_index(libero_dir)
    split, blue_first = opened.split("train"), dataclasses.replace(LIBERO, bgr=("main",))

    def annotated(name, definition, view):
        seen.clear()
        annotation.annotate_split(opened, definition, split, view, str(tmp_path / name), estimator)
        return list(seen), sidecar.open_sidecar(str(tmp_path / name), "train").metadata.details

    (plain, before), (swapped, after) = (annotated(n, d, "main") for n, d in (("a", LIBERO), ("b", blue_first)))
    assert (
        all((x == y[..., ::-1]).all() for x, y in zip(plain, swapped, strict=True)) and (plain[0] != swapped[0]).any()
    )
    assert "channels" not in before and after == before | {"channels": after["channels"]}
    (wrist, details), (same, _) = (annotated(n, d, "wrist") for n, d in (("c", LIBERO), ("d", blue_first)))
    assert (wrist[0] == same[0]).all() and "channels" not in details
    # 256x256: the copy went through a tool that repaired the order.
    camera = f"steps/{LIBERO.main_view}"
    features = dict(split.dataset.features)
    features[camera] = dataclasses.replace(features[camera], shape=(256, 256, 3))
    split = dataclasses.replace(split, dataset=dataclasses.replace(split.dataset, features=features))
    repaired, details = annotated("e", blue_first, "main")
    assert (repaired[0] == plain[0]).all() and "channels" not in details
    source = tokenisation.Source(opened, split, blue_first, "main", None)  # what reports draw
    reader, steps = episode_reader.EpisodeReader(split), np.arange(3)
    assert (source.pictures(reader, 0, steps) == plain[0][:3]).all()
    source = dataclasses.replace(source, split=opened.split("train"))
    assert (source.pictures(reader, 0, steps) == swapped[0][:3]).all()


def test_a_notice_is_kept_and_another_maker_is_told_in_a_word(libero_dir, tmp_path):
    stand_in = depth_labels.find("stand_in")
    annotate(libero_dir, tmp_path, stand_in)
    assert sidecar.open_sidecar(str(tmp_path), "train").metadata.details["notice"] == stand_in.notice
    other = made(lambda i, frames: ramp(frames), licence="other", details={"weights": "sha256:1", "dtype": "float32"})
    with pytest.raises(errors.UserError, match=r"identity 'stand_in-v1 .*', not 'made': give every"):
        annotate(libero_dir, tmp_path, other)
