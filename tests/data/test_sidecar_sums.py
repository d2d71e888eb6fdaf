"""Damage inside of a sidecar is seen, older ones without sums open, and a digest tells two sidecars apart."""

import dataclasses
import logging
import os
import shutil
import zlib

import numpy as np
import pytest
import sidecar_child
import sidecar_writer

from qdepth_jax import config as config_lib
from qdepth_jax import errors, same_experiment
from qdepth_jax.data import data_config, episode_reader, index, loader, sidecar, sidecar_sums

EPISODES = np.rec.fromarrays([sidecar_child.STARTS, sidecar_child.LENGTHS], names="start,length")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    sidecar_child.write(str(root), 0, 1)
    return root


@pytest.fixture
def root(written, tmp_path) -> str:
    return str(shutil.copytree(written, tmp_path / "made"))


def flip(root, file: str, at: int) -> None:
    with open(os.path.join(root, "train", file), "r+b") as opened:
        opened.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def test_a_sum_is_the_crc_of_what_is_stored(root):
    opened = sidecar.open_sidecar(root, "train")
    rows = sidecar_child.values(7).astype("<u2").tobytes() + np.array([8, -1], "<f4").tobytes()
    figures = np.array([7, sidecar_child.LENGTHS[7], 0.1 * 7], "<f8").tobytes()
    assert int(opened.sums[7]) == zlib.crc32(rows + figures)
    sidecar_sums.check(opened, EPISODES)


@pytest.mark.parametrize(
    ("file", "at", "episode"), [("values.npy", -1, 39), ("values.npy", 128, 0), ("figures.npy", -25, 38),
                                ("scale.npy", -5, 39), ("sums.npy", -1, 39)]
)  # fmt: skip
def test_one_bit_anywhere_is_seen(root, file, at, episode):
    flip(root, file, at)
    opened = sidecar.open_sidecar(root, "train")
    with pytest.raises(errors.UserError, match=rf"train is damaged: the bytes of episode {episode} \(frames"):
        sidecar_sums.check(opened, EPISODES)


def test_scales_that_are_not_finite_are_refused(root):
    scale = np.load(os.path.join(root, "train", "scale.npy"))
    scale[3, 1] = np.nan
    np.save(os.path.join(root, "train", "scale.npy"), scale)
    with pytest.raises(errors.UserError, match=r"damaged: scale and offset of episode 3 are .*nan.*1 of 40"):
        sidecar.open_sidecar(root, "train")
    with pytest.raises(ValueError, match="must be finite"):
        sidecar.Writer(f"{root}2", sidecar_child.METADATA).write(0, 0, sidecar_child.values(0), scale=np.inf)


def test_sidecars_without_sums_open_and_say_it_once(root, caplog):
    os.unlink(os.path.join(root, "train", "sums.npy"))
    flip(root, "values.npy", -1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sidecar_sums.check_at_start(sidecar.open_sidecar(root, "train"), EPISODES)
    (said,) = caplog.messages
    assert "older version, without sums" in said
    before = sidecar_sums.digest(sidecar.open_sidecar(root, "train"))
    flip(root, "scale.npy", -1)
    assert sidecar_sums.digest(sidecar.open_sidecar(root, "train")) != before


def test_a_large_one_is_not_read_at_the_start_and_that_is_said(root, caplog):
    flip(root, "values.npy", -1)
    opened = sidecar.open_sidecar(root, "train")
    with caplog.at_level(logging.WARNING):
        sidecar_sums.check_at_start(opened, EPISODES, limit=opened.values.nbytes - 1)
    assert "check_sidecar.py" in caplog.text
    with pytest.raises(errors.UserError, match="damaged"):
        sidecar_sums.check_at_start(opened, EPISODES, limit=opened.values.nbytes)


def test_a_digest_names_settings_and_content(root):
    opened = sidecar.open_sidecar(root, "train")
    details = dataclasses.replace(opened.metadata, details=opened.metadata.details | {"input_size": 140})
    other = dataclasses.replace(opened, metadata=details)
    found = {sidecar_sums.digest(opened), sidecar_sums.digest(other)}
    flip(root, "sums.npy", -1)
    found.add(sidecar_sums.digest(sidecar.open_sidecar(root, "train")))
    assert len(found) == 3 and all(len(text) == 16 for text in found)


def test_training_and_readers_of_episodes_see_damage_and_another_sidecar(libero_dir, tmp_path):
    opened = index.open_index(libero_dir)
    roots = [sidecar_writer.make_sidecar(tmp_path / str(seed), opened, "depth", seed=seed, identity="one maker")
             for seed in (0, 1)]  # fmt: skip

    def identity(root) -> dict:
        entry = data_config.DatasetConfig(path=libero_dir, depth=root)
        return loader.Loader(data_config.DataConfig(datasets=(entry,), threads=1), ("depth",), 4).identity()

    before, after = (identity(root) for root in roots)
    with pytest.raises(errors.UserError, match="the data changed") as refused:
        same_experiment.check_data({"data": before | {"position": 0}}, {"data": after}, "runs/x", 0)
    assert len(config_lib.differences(before, after)) == 1 and "depth_digest" in str(refused.value)
    old = {k: v for k, v in before["datasets"][0].items() if k != "depth_digest"}  # of a run of an older version
    same_experiment.check_data({"data": before | {"datasets": [old], "position": 0}}, {"data": after}, "runs/x", 0)
    flip(roots[0], "values.npy", -1)
    with pytest.raises(errors.UserError, match="is damaged: the bytes of episode 3"):
        identity(roots[0])
    split = opened.split("train")
    reader, annotated = episode_reader.EpisodeReader(split), sidecar.open_sidecar(roots[0], "train")
    raw, scale, offset = reader.depth_of("", 1.0, annotated, 2, np.array([1, 4]))
    assert raw.shape == (2, 6, 8) and (scale, offset) == (2.5, -2.0)
    with pytest.raises(errors.UserError, match="is damaged: the bytes of episode 3"):
        reader.depth_of("", 1.0, annotated, 3, np.array([0]))
