"""The loader: pure in the step, the same for any hosts and threads, every value traceable, every failure named."""

import dataclasses
import hashlib
import itertools
import pathlib
import time

import numpy as np
import pytest
from libero_writer import HEIGHT, WIDTH, make_libero

from qdepth_jax import errors
from qdepth_jax.data import data_config, definitions, index, loader, normalise, order, sidecar, source

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
    np.testing.assert_array_equal(later["depth_tokens"][:, 5], np.minimum(later["frame"] + 2, ends - 1))
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


def _define(monkeypatch, name="libero_object", **changes):
    """The definition of a data set with some fields changed, for one test."""
    changed = dataclasses.replace(definitions.DEFINITIONS[name], **changes)
    monkeypatch.setitem(definitions.DEFINITIONS, name, changed)


def test_windows_repeat_the_first_observation_and_say_so(libero_dir):
    keys = ("image_main", "proprio", "proprio_mask", "frame")
    config = _config(libero_dir, proprio_steps=3, image_steps=2)
    batch = loader.Loader(config, keys, 24).batch(0)
    single = loader.Loader(_config(libero_dir), ("image_main", "proprio", "frame"), 24).batch(0)
    order_of = {frame: row for row, frame in enumerate(single["frame"].tolist())}
    assert batch["image_main"].shape == (24, 2, HEIGHT, WIDTH, 3) and batch["proprio"].shape == (24, 3, 8)
    starts = np.repeat([0, 7, 10, 19], [7, 3, 9, 5])
    for row, frame in enumerate(batch["frame"].tolist()):
        seen = [max(frame - back, starts[frame]) for back in (2, 1, 0)]
        assert batch["proprio_mask"][row].tolist() == [frame - back >= starts[frame] for back in (2, 1, 0)]
        for step, other in enumerate(seen):
            np.testing.assert_array_equal(batch["proprio"][row, step], single["proprio"][order_of[other], 0])
        for step, other in enumerate(seen[1:]):
            np.testing.assert_array_equal(batch["image_main"][row, step], single["image_main"][order_of[other]])


def test_truncate_leaves_out_frames_and_counts_them(libero_dir):
    reader = loader.Loader(_config(libero_dir, horizon=4, chunk_end="truncate"), ("action", "action_mask", "frame"), 8)
    assert reader.sources[0].frames.valid.tolist() == [*range(0, 4), *range(10, 16), *range(19, 21)]
    assert "12 fewer than 4 actions to the end of the episode" in reader.summary()[0]
    assert reader.batch(0)["action_mask"].all()
    neutral = loader.Loader(_config(libero_dir, chunk_end="neutral"), ("action", "action_mask", "frame"), 24).batch(0)
    outside = ~neutral["action_mask"]
    centre = normalise.normalise(np.zeros((1, 7), np.float32), reader.sources[0].action)[0, :6]
    assert outside.sum() == 4 * 6
    rows = neutral["action"][outside][:, :6]
    np.testing.assert_allclose(rows, np.broadcast_to(rows[0], rows.shape), atol=0)
    assert set(neutral["action"][outside][:, 6]) <= {0.0, 1.0}
    assert centre.shape == (6,)


def test_goals_lie_ahead_in_the_same_episode(libero_dir):
    ends = np.repeat([7, 10, 19, 24], [7, 3, 9, 5])
    plain = loader.Loader(_config(libero_dir), ("image_main", "frame"), 24).batch(0)
    frame_of = {image.tobytes(): int(frame) for image, frame in zip(plain["image_main"], plain["frame"])}

    def goals(step, **more):
        batch = loader.Loader(_config(libero_dir, **more), ("goal_main", "frame"), 24).batch(step)
        return batch["frame"], np.array([frame_of[image.tobytes()] for image in batch["goal_main"]])

    frame, goal = goals(0, goal="final")
    np.testing.assert_array_equal(goal, ends[frame] - 1)
    ahead = []
    for step in range(40):
        frame, goal = goals(step, goal="uniform", goal_max_steps=3)
        assert ((goal >= frame) & (goal < ends[frame])).all()
        ahead += (goal - frame)[ends[frame] - frame > 3].tolist()
    counts = np.bincount(ahead)
    assert len(counts) == 4 and np.abs(counts / len(ahead) - 0.25).max() < 0.08
    with pytest.raises(errors.UserError, match=r"data.goal is empty"):
        goals(0)


def test_a_missing_view_is_refused_or_masked_and_never_read(libero_dir, tmp_path, monkeypatch):
    other = make_libero(tmp_path, (6, 11), name="libero_spatial", seed=3)
    _define(monkeypatch, "libero_spatial", views={"main": "observation/image"})
    keys = ("image_main", "image_wrist", "view_mask", "dataset")
    with pytest.raises(errors.UserError, match=r"\['libero_spatial'\] have no view 'wrist'.*missing_views='mask'"):
        loader.Loader(_config(libero_dir, other), keys, 8)
    reader = loader.Loader(_config(libero_dir, other, missing_views="mask"), keys, 41)
    reads, real = [], reader._files.start
    monkeypatch.setattr(reader._files, "start", lambda path, *span: reads.append(path) or real(path, *span))
    batch = reader.batch(0)
    lacks = batch["dataset"] == 1
    assert batch["view_mask"].tolist() == [[True, not gone] for gone in lacks]
    assert (batch["image_wrist"][lacks] == 0).all() and batch["image_wrist"][~lacks].any((1, 2, 3)).all()
    assert sum("libero_spatial" in path for path in reads) == lacks.sum()  # one image a row, the main view's
    with pytest.raises(errors.UserError, match="no data set of the mix has a view 'top'"):
        loader.Loader(_config(other, views=("main", "top"), missing_views="mask"), ("image_top",), 4)


def test_instruction_variants_are_drawn_among_those_that_say_something(libero_dir, monkeypatch):
    # The sample has one instruction feature; texts of a second one stand in for DROID's three.
    real = index.SplitIndex.texts

    def texts(self, name):
        ids, strings = real(self, "steps/language_instruction")
        if name.endswith("_2"):
            return np.where(self.episode_of(np.arange(len(ids))) == 0, 1, 0).astype(np.int32), ["go on", ""]
        return ids, strings

    monkeypatch.setattr(index.SplitIndex, "texts", texts)
    monkeypatch.setattr(source, "present_instructions", lambda _, d: [f"steps/{name}" for name in d.language])
    _define(monkeypatch, language=("language_instruction", "language_instruction_2"))
    keys = ("text", "frame")
    first = loader.Loader(_config(libero_dir), keys, 24).batch(0)
    assert len({row.tobytes() for row in first["text"]}) == 2
    drawn = loader.Loader(_config(libero_dir, instructions="random"), keys, 24)
    seen = {}
    for step in range(30):
        batch = drawn.batch(step)
        for frame, row in zip(batch["frame"].tolist(), batch["text"]):
            seen.setdefault(frame < 7, []).append(row.tobytes())
    assert len(set(seen[True])) == 1  # episode 0 has no second instruction
    other = [text for text in seen[False] if text not in {row.tobytes() for row in first["text"]}]
    assert 0.42 < len(other) / len(seen[False]) < 0.58


def test_swapped_views_and_blue_first_channels(libero_dir, monkeypatch):
    keys = ("image_main", "image_wrist", "frame")
    plain = loader.Loader(_config(libero_dir), keys, 24).batch(0)
    _define(monkeypatch, bgr=("wrist",), swap=("main", "wrist"))
    batch = loader.Loader(_config(libero_dir), keys, 24).batch(0)
    np.testing.assert_array_equal(batch["frame"], plain["frame"])
    swapped = np.array([not np.array_equal(a, b) for a, b in zip(batch["image_main"], plain["image_main"])])
    assert 4 <= swapped.sum() <= 20
    wrist = plain["image_wrist"][..., ::-1]
    np.testing.assert_array_equal(
        batch["image_main"], np.where(swapped[:, None, None, None], wrist, plain["image_main"])
    )
    np.testing.assert_array_equal(
        batch["image_wrist"], np.where(swapped[:, None, None, None], plain["image_main"], wrist)
    )


def test_shorter_proprioception_is_filled_only_when_asked(libero_dir, tmp_path, monkeypatch):
    other = make_libero(tmp_path, (6, 11), name="libero_spatial", seed=3)
    recipe = definitions.DEFINITIONS["libero_spatial"].proprio
    _define(monkeypatch, "libero_spatial", proprio=lambda columns: recipe(columns)[:, :5])
    with pytest.raises(errors.UserError, match=r"data.proprio_dim=8 fills shorter"):
        loader.Loader(_config(libero_dir, other), ("proprio",), 8)
    with pytest.raises(errors.UserError, match=r"data.proprio_dim=6, but"):
        loader.Loader(_config(libero_dir, other, proprio_dim=6), ("proprio",), 8)
    batch = loader.Loader(_config(libero_dir, other, proprio_dim=9), ("proprio", "dataset"), 41).batch(0)
    short = batch["dataset"] == 1
    assert (batch["proprio"][short][..., 5:] == 0).all() and (batch["proprio"][short][..., :5] != 0).any()
    assert (batch["proprio"][..., 8] == 0).all() and (batch["proprio"][~short][..., 5:8] != 0).any()


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
        ValueError, match=r"libero_object train: shard .*00001-of-00002, record 0 \(episode 2\), step 2"
    ):
        reader.batch(0)


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
