"""The loader: pure in the step, the same for any hosts and threads, every value traceable, every failure named."""

import dataclasses
import errno
import hashlib
import itertools
import os
import pathlib
import pickle
import time

import numpy as np
import pytest
from libero_writer import HEIGHT, WIDTH, make_libero

from qdepth_jax import errors
from qdepth_jax.data import (
    data_config,
    definitions,
    frame_reader,
    index,
    loader,
    normalise,
    order,
    sidecar,
)

TOKENIZER = str(pathlib.Path(__file__).parents[2] / "data" / "text_tokenizer" / "libero.model")
FEATURES = (
    "image_main", "image_wrist", "proprio", "action", "action_mask", "text", "depth", "depth_scale", "depth_offset",
    "position", "frame", "dataset",
)  # fmt: skip
TOKENS = ("depth_tokens", "depth_tokens_mask")


def _config(*directories, **more) -> data_config.DataConfig:
    datasets = tuple(
        d if isinstance(d, data_config.DatasetConfig) else data_config.DatasetConfig(path=str(d)) for d in directories
    )
    defaults = dict(views=("main", "wrist"), text_tokenizer=TOKENIZER, threads=2, horizon=4)
    return data_config.DataConfig(datasets=datasets, **(defaults | more))


def _hash(batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(name.encode() + batch[name].tobytes())
    return digest.hexdigest()


@pytest.fixture
def mix(tmp_path):
    return [make_libero(tmp_path), make_libero(tmp_path, (6, 11), name="libero_spatial", seed=3)]


def test_keys_shapes_and_types_are_the_contract(libero_dir):
    reader = loader.Loader(_config(libero_dir), FEATURES, 8)
    expected = {
        "image_main": ((8, HEIGHT, WIDTH, 3), np.uint8),
        "image_wrist": ((8, HEIGHT, WIDTH, 3), np.uint8),
        "proprio": ((8, 1, 8), np.float32),
        "action": ((8, 4, 7), np.float32),
        "action_mask": ((8, 4), np.bool_),
        "text": ((8, 20), np.int32),
        "depth": ((8, HEIGHT, WIDTH), np.uint16),
        "depth_scale": ((8,), np.float32),
        "depth_offset": ((8,), np.float32),
        "position": ((8,), np.uint32),
        "frame": ((8,), np.int32),
        "dataset": ((8,), np.int32),
    }
    batch = reader.batch(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s, np.dtype(t)) for k, (s, t) in expected.items()}
    assert reader.shapes() == {k: (v.shape, v.dtype) for k, v in batch.items()}
    assert set(loader.Loader(_config(libero_dir), ("proprio",), 8).batch(3)) == {"proprio"}


def test_every_row_holds_the_values_of_its_frame(libero_dir):
    reader = loader.Loader(_config(libero_dir, horizon=3), FEATURES, 6)
    split = index.open_index(libero_dir).split("train")
    state, action = split.column("steps/observation/state"), split.column("steps/action")
    seen = []
    for step in range(reader.steps_per_epoch):
        batch = reader.batch(step)
        assert batch["position"].tolist() == list(range(step * 6, step * 6 + 6))
        for row, frame in enumerate(batch["frame"].tolist()):
            seen.append(frame)
            episode = int(split.episode_of(np.array(frame)))
            start, length = split.episodes["start"][episode], split.episodes["length"][episode]
            assert (batch["depth"][row] == episode * 100 + frame - start + 1).all()
            assert batch["depth_scale"][row] == np.float32(0.001) and batch["depth_offset"][row] == 0
            np.testing.assert_array_equal(
                batch["proprio"][row, 0], normalise.normalise(state[frame], reader.sources[0].proprio)
            )
            wanted = frame + np.arange(3)
            assert batch["action_mask"][row].tolist() == (wanted < start + length).tolist()
            raw = np.array(action[np.minimum(wanted, start + length - 1)])
            raw[:, 6] = 1 - np.clip(raw[:, 6], 0, 1)
            np.testing.assert_array_equal(batch["action"][row], normalise.normalise(raw, reader.sources[0].action))
            assert set(batch["action"][row, :, 6]) <= {0.0, 1.0}
            text = batch["text"][row]
            assert text[0] == 2 and text[(text != 0).sum() - 1] == 4  # bos first, newline last
    assert sorted(seen) == list(range(24))


def test_same_batches_for_hosts_threads_resume_and_prefetch(mix):
    config = _config(*mix)
    whole = loader.Loader(config, FEATURES, 8, seed=5)
    expected = [_hash(whole.batch(step)) for step in range(12)]
    assert len(set(expected)) == 12
    for hosts in (2, 4, 8):
        parts = [loader.Loader(config, FEATURES, 8, seed=5, process_index=h, process_count=hosts) for h in range(hosts)]
        for step in (0, 7):
            pieces = [part.batch(step) for part in parts]
            joined = {k: np.concatenate([piece[k] for piece in pieces]) for k in FEATURES}
            assert _hash(joined) == expected[step]
    other = loader.Loader(dataclasses.replace(config, threads=5), FEATURES, 8, seed=5)
    assert [_hash(other.batch(step)) for step in reversed(range(12))] == expected[::-1]
    for start in (0, 3, 11):
        ahead = other.iterate(start, prefetch=3)
        assert [_hash(b) for b in itertools.islice(ahead, 12 - start)] == expected[start:]
        ahead.close()
    assert _hash(loader.Loader(config, FEATURES, 8, seed=6).batch(0)) != expected[0]


def test_mix_draws_by_frames_and_identity_says_what_it_is(mix):
    reader = loader.Loader(_config(*mix), ("frame", "dataset"), 41)
    batch = reader.batch(0)
    assert abs((batch["dataset"] == 0).sum() - 24) <= 1  # 24 and 17 frames, balanced
    assert reader.frames == 41
    a, b = reader.identity(), loader.Loader(_config(*mix), ("frame",), 8).identity()
    assert a == b  # batch size and keys do not change what a position means
    assert loader.Loader(_config(*mix), ("frame",), 8, seed=1).identity() != a
    assert loader.Loader(_config(mix[0]), ("frame",), 8).identity() != a
    assert set(reader.normalisers) == {"libero_object", "libero_spatial"}


def test_picture_sizes_are_those_before_the_device_resizes(libero_dir):
    assert loader.Loader(_config(libero_dir), ("frame",), 8).picture_sizes == {}
    reader = loader.Loader(_config(libero_dir), ("image_main",), 8)
    assert reader.picture_sizes == {"main": list(reader.batch(0)["image_main"].shape[1:3])}
    resized = _config(libero_dir, image_size=(20, 30), image_steps=2)
    assert loader.Loader(resized, ("image_main",), 8).picture_sizes == {"main": [20, 30]}


def test_held_out_episodes_never_train_and_never_count_in_statistics(libero_dir):
    config = _config(libero_dir, held_out_every=2, horizon=2)
    train = loader.Loader(config, ("frame",), 4)
    held = loader.Loader(dataclasses.replace(config, held_out=True, shuffle=False), ("frame",), 2)
    assert train.sources[0].frames.valid.tolist() == [*range(7), *range(10, 19)]
    assert held.sources[0].frames.valid.tolist() == [7, 8, 9, *range(19, 24)]
    assert train.normalisers == held.normalisers
    assert train.normalisers["libero_object"]["proprio"].statistics.count == 16
    assert [held.batch(s)["frame"].tolist() for s in range(2)] == [[7, 8], [9, 19]]


def test_split_slices_count_episodes_as_tfds_does(libero_dir):
    def frames(split):
        return loader.Loader(_config(libero_dir, split=split, horizon=1), ("frame",), 1).sources[0].frames.valid

    assert frames("train[:50%]").tolist() == list(range(10))
    assert frames("train[75%:]").tolist() == list(range(19, 24))
    assert frames("train[1:2]").tolist() == [7, 8, 9]
    for bad, message in (
        ("train[:9]", "split 'train' has 4"),
        ("trian", "no split 'trian'"),
        ("a[b]", "not understood"),
    ):
        with pytest.raises(errors.UserError, match=message):
            frames(bad)


def _tokens(directory, root, *, identity="tok-1", fingerprint=None, camera="steps/observation/image"):
    opened = index.open_index(directory)
    split = opened.split("train")
    metadata = sidecar.Metadata(
        "depth_tokens", fingerprint or opened.fingerprint, "train", camera, identity, (6,), split.frames, 4,
        {"grid": [2, 3], "codes": 9},
    )  # fmt: skip
    writer = sidecar.Writer(str(root), metadata)
    for episode in writer.pending():
        row = split.episodes[episode]
        ids = np.arange(row["start"], row["start"] + row["length"], dtype=np.uint16)
        writer.write(episode, int(row["start"]), np.repeat(ids[:, None], 6, 1))
    writer.finish()
    return data_config.DatasetConfig(path=directory, depth_tokens=str(root))


def test_depth_tokens_of_this_and_of_later_frames(libero_dir, tmp_path):
    entry = _tokens(libero_dir, tmp_path / "tokens")
    now = loader.Loader(_config(entry), (*TOKENS, "frame"), 24).batch(0)
    np.testing.assert_array_equal(now["depth_tokens"][:, 0], now["frame"])
    assert now["depth_tokens_mask"].all() and now["depth_tokens"].dtype == np.int32
    later = loader.Loader(_config(entry, depth_offset=2), (*TOKENS, "frame", "depth"), 24).batch(0)
    ends = np.repeat([7, 10, 19, 24], [7, 3, 9, 5])[later["frame"]]
    inside = later["frame"] + 2 < ends
    assert inside.sum() == 24 - 8
    np.testing.assert_array_equal(later["depth_tokens_mask"], np.repeat(inside[:, None], 6, 1))
    np.testing.assert_array_equal(later["depth_tokens"][:, 5], np.where(inside, later["frame"] + 2, 0))
    assert (later["depth"][~inside] == 0).all() and (later["depth"][inside] > 0).all()


def test_sidecars_of_other_data_or_cameras_are_refused(libero_dir, tmp_path):
    for name, more in (
        ("fingerprint", {"fingerprint": "f" * 32}),
        ("camera", {"camera": "steps/observation/wrist_image"}),
    ):
        entry = _tokens(libero_dir, tmp_path / name, **more)
        with pytest.raises(errors.UserError, match=f"has {name}"):
            loader.Loader(_config(entry), TOKENS, 4)
    with pytest.raises(errors.UserError, match="tokenize_depth"):
        loader.Loader(_config(libero_dir), TOKENS, 4)
    entry = data_config.DatasetConfig(path=libero_dir, depth_tokens=str(tmp_path / "none"))
    with pytest.raises(errors.UserError, match="no sidecar"):
        loader.Loader(_config(entry), TOKENS, 4)


def test_depth_of_another_view_than_the_first_is_refused(libero_dir, tmp_path):
    entry = _tokens(libero_dir, tmp_path / "tokens")
    for features in (("image_wrist", "depth"), ("image_wrist", *TOKENS)):
        with pytest.raises(errors.UserError, match=r"belong to its view 'main'.*'wrist': set model.views .*'main'"):
            loader.Loader(_config(entry, views=("wrist", "main")), features, 4)
    loader.Loader(_config(entry, views=("wrist", "main")), ("depth",), 4)  # a tokenizer sees no picture


def test_mixes_that_do_not_fit_are_refused(libero_dir, tmp_path):
    other = make_libero(tmp_path, (4, 4, 5, 6), name="libero_goal")
    tokens = [_tokens(libero_dir, tmp_path / "a"), _tokens(other, tmp_path / "b", identity="tok-2")]
    with pytest.raises(errors.UserError, match="different tokenizers"):
        loader.Loader(_config(*tokens), TOKENS, 4)
    with pytest.raises(errors.UserError, match="positive"):
        loader.Loader(_config(dataclasses.replace(tokens[0], weight=0.0), other), ("frame",), 4)


def test_missing_things_are_named_with_the_fix(libero_dir, tmp_path):
    no_depth = make_libero(tmp_path, (5, 6), name="libero_goal", depth=False)
    cases = [
        (_config(no_depth), ("depth",), 4, "tools/annotate_depth.py"),
        (_config(libero_dir, horizon=10), ("action",), 4, "longest: 9 actions"),
        (_config(libero_dir, max_text_tokens=3), ("text",), 4, "data.max_text_tokens=6 or more"),
        (_config(libero_dir, text_tokenizer="nowhere.model"), ("text",), 4, "nowhere.model"),
        (_config(libero_dir, views=("main",)), ("image_wrist",), 4, "image_wrist"),
        (_config(libero_dir, normalisation="zscore"), ("action",), 4, "zscore"),
        (_config(libero_dir, held_out_every=1), ("action",), 4, "n >= 2"),
        (_config(), ("action",), 4, "datasets is empty"),
        (_config(libero_dir, libero_dir), ("action",), 4, "names a data set twice"),
        (_config(tmp_path / "gone"), ("action",), 4, "no data set folder"),
    ]
    for config, features, batch, message in cases:
        with pytest.raises(errors.UserError, match=message):
            loader.Loader(config, features, batch)
    with pytest.raises(errors.UserError, match="divide over 3 hosts"):
        loader.Loader(_config(libero_dir), ("action",), 4, process_count=3)


def test_any_rows_of_the_global_batch(libero_dir):
    features = ("frame", "position", "proprio", "image_main")
    whole = loader.Loader(_config(libero_dir), features, 8, seed=5).batch(3)
    for rows in ([0, 1, 4, 5], [2, 3, 6], [7]):
        part = loader.Loader(_config(libero_dir), features, 8, seed=5, rows=np.array(rows))
        for reader in (part, pickle.loads(pickle.dumps(part))):
            batch = reader.batch(3)
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == reader.shapes()
            for name in features:
                np.testing.assert_array_equal(batch[name], whole[name][rows], err_msg=name)
    for rows in ([], [0, 8], [-1, 0], [1, 1], [3, 2]):
        with pytest.raises(ValueError, match="must ascend"):
            loader.Loader(_config(libero_dir), features, 8, rows=np.array(rows, np.int64))
    with pytest.raises(ValueError, match="give no process_index"):
        loader.Loader(_config(libero_dir), features, 8, rows=np.arange(4), process_index=0, process_count=2)


def test_resume_at_fifty_positions_with_other_hosts_and_threads(mix):
    config = _config(*mix)
    whole = loader.Loader(config, FEATURES, 8, seed=5)
    expected = [_hash(whole.batch(step)) for step in range(60)]
    four = [
        loader.Loader(dataclasses.replace(config, threads=1 + h), FEATURES, 8, seed=5, process_index=h, process_count=4)
        for h in range(4)
    ]
    for position in np.random.default_rng(0).integers(0, 59, 50).tolist():
        ahead = whole.iterate(position)
        assert _hash(next(ahead)) == expected[position]  # the same process, after any other position
        ahead.close()
        pieces = [part.batch(position + 1) for part in four]  # started by one host, continued by four
        assert _hash({k: np.concatenate([p[k] for p in pieces]) for k in FEATURES}) == expected[position + 1]


def test_steps_hosts_and_forks_that_cannot_be(libero_dir):
    for step in (-1, 1.5, "0"):
        with pytest.raises(ValueError, match="a whole number from 0 on"):
            loader.Loader(_config(libero_dir), ("frame",), 4).batch(step)
    for index_, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(errors.UserError, match="hosts"):
            loader.Loader(_config(libero_dir), ("frame",), 4, process_index=index_, process_count=count)
    with pytest.raises(errors.UserError, match="divide over 1 hosts"):
        loader.Loader(_config(libero_dir), ("frame",), 0)
    for bad, message in (
        ({"depth_offset": -1}, "depth_offset"), ({"goal_max_steps": -5}, "goal_max_steps"),
        ({"threads": -1}, "threads"),
        ({"views": ("main", "main")}, "twice"), ({"image_size": (0, 5)}, "image_size"), ({"block_mib": 0}, "block_mib"),
        ({"goal": "last"}, "goal"),
    ):  # fmt: skip
        with pytest.raises(errors.UserError, match=message):
            _config(libero_dir, **bad)
    with pytest.raises(errors.UserError, match="weights must be positive and below"):
        order.shares([float("inf"), 1], [1, 1], True)
    reader = loader.Loader(_config(libero_dir), ("frame", "image_main"), 4, seed=3)
    again = pickle.loads(pickle.dumps(reader))
    assert _hash(again.batch(7)) == _hash(reader.batch(7))
    reader._process += 1
    with pytest.raises(RuntimeError, match="before a fork"):
        reader.batch(0)


def _define(monkeypatch, name="libero_object", **changes):
    """The definition of a data set with some fields changed, for one test."""
    changed = dataclasses.replace(definitions.DEFINITIONS[name], **changes)
    monkeypatch.setitem(definitions.DEFINITIONS, name, changed)


@pytest.mark.parametrize("view", ["main", "wrist"])
def test_damaged_image_names_shard_episode_and_step(libero_dir, view):
    reader = loader.Loader(_config(libero_dir), (f"image_{view}", "frame"), 24)
    split = reader.sources[0].split
    offset, size = split.spans(reader.sources[0].image_feature(view))[12].tolist()
    path = pathlib.Path(split.shard_path(1))
    data = bytearray(path.read_bytes())
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(data)
    with pytest.raises(
        errors.UserError, match=r"libero_object train: shard .*00001-of-00002, record 0 \(episode 2\), step 2"
    ) as found:
        reader.batch(0)
    # What is known, and no more: the file, the bytes, the decoder's own words.
    words = str(found.value.__cause__)
    assert words and f"{size} bytes at {offset} give no image: {words}. " in str(found.value)
    assert str(found.value).startswith(f"{path}: ") and "changed since" not in str(found.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["read", "decode"])
def test_a_disk_that_is_away_is_no_damaged_image(libero_dir, monkeypatch, where, number):
    reader = loader.Loader(_config(libero_dir), ("image_main", "frame"), 24)

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    if where == "read":
        monkeypatch.setattr(frame_reader.os, "pread", fail)
    else:
        monkeypatch.setattr(frame_reader.simplejpeg, "decode_jpeg_header", fail)
    with pytest.raises(errors.TryAgain, match=f"of-00002 cannot be read .{os.strerror(number)}") as found:
        reader.batch(0)
    assert "damaged" not in str(found.value) and "--verify" not in str(found.value)


def test_prefetch_runs_ahead_by_its_bound_and_no_further(libero_dir, monkeypatch):
    reader = loader.Loader(_config(libero_dir), ("frame",), 4)
    made, real = [], reader.batch
    monkeypatch.setattr(reader, "batch", lambda step: made.append(step) or real(step))
    ahead = reader.iterate(10, prefetch=3)
    next(ahead)
    time.sleep(0.2)
    assert made == [10, 11, 12]
    next(ahead)
    time.sleep(0.2)
    assert made == [10, 11, 12, 13]
    ahead.close()


def test_an_error_ahead_reaches_the_consumer_at_its_step(libero_dir, monkeypatch):
    reader = loader.Loader(_config(libero_dir), ("frame",), 4)
    real = reader.batch

    def batch(step):
        if step == 2:
            raise ValueError("step 2 is broken")
        return real(step)

    monkeypatch.setattr(reader, "batch", batch)
    ahead = reader.iterate(0, prefetch=4)
    next(ahead), next(ahead)
    with pytest.raises(ValueError, match="step 2 is broken"):
        next(ahead)


def test_image_size_resizes_on_the_host(libero_dir):
    batch = loader.Loader(_config(libero_dir, image_size=(12, 16)), ("image_main", "image_wrist"), 4).batch(0)
    assert batch["image_main"].shape == batch["image_wrist"].shape == (4, 12, 16, 3)
    assert 60 < batch["image_main"].mean() < 190


def test_statistics_of_a_checkpoint_are_used(libero_dir):
    reader = loader.Loader(_config(libero_dir), ("action", "proprio"), 24)
    given = {
        "libero_object": {
            name: normalise.Normaliser.from_json(dataclasses.replace(n, kind="normal").to_json())
            for name, n in reader.normalisers["libero_object"].items()
        }
    }
    other = loader.Loader(_config(libero_dir), ("action", "proprio"), 24, normalisers=given)
    assert other.normalisers == given
    np.testing.assert_allclose(other.batch(0)["proprio"].std((0, 1)), 1, rtol=0.05)


def test_bridge_sample_goes_through(bridge_dir, tmp_path):
    config = _config(bridge_dir, index_dir=str(tmp_path), views=("main",), max_text_tokens=24)
    reader = loader.Loader(config, ("image_main", "action", "text", "proprio", "frame"), 16)
    assert reader.frames == 225 and reader.order == order.Order((225,), (1.0,), 0)
    frames = np.concatenate([reader.batch(step)["frame"] for step in range(15)])
    assert len(set(frames[:225].tolist())) == 225 and not (frames[:225] % 10 == 9).any()


def test_a_mix_weighs_the_frames_that_thinning_leaves_out(mix):
    """As octo does it: shares by the length of the data sets, and then at most so many frames of an episode."""
    whole = loader.Loader(_config(*mix), ("frame",), 8)
    thinned = loader.Loader(_config(*mix, max_frames_per_episode=4), ("frame",), 8)
    assert whole.order.sizes == (24, 17) and thinned.order.sizes == (4 + 3 + 4 + 4, 4 + 4)
    assert thinned.order.shares == whole.order.shares == (24 / 41, 17 / 41)
    # A run that was started with other shares is refused by these, whatever the version of the order.
    assert thinned.identity()["shares"] == [24 / 41, 17 / 41]
