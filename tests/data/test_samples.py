"""What the rows of a batch show: windows, goals, views, instructions, and never a quarantined picture."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from libero_writer import HEIGHT, WIDTH, make_libero
from test_loader import _config, _define, _hash

from qdepth_jax import errors
from qdepth_jax.data import definitions, index, loader, normalise, shard_scan, source, spec, text, tfrecord


def test_random_choices_do_not_depend_on_hosts_threads_or_position(tmp_path, monkeypatch):
    """Goals, swapped cameras, drawn instructions and windows, in both reading modes."""
    mix = [make_libero(tmp_path), make_libero(tmp_path, (6, 11), name="libero_spatial", seed=3)]
    real = index.SplitIndex.texts

    def texts(self, name):
        ids, strings = real(self, "steps/language_instruction")
        return (1 - ids, strings) if name.endswith("_2") else (ids, strings)

    monkeypatch.setattr(index.SplitIndex, "texts", texts)
    monkeypatch.setattr(source, "present_instructions", lambda _, d: [f"steps/{name}" for name in d.language])
    for name in ("libero_object", "libero_spatial"):
        _define(monkeypatch, name, swap=("main", "wrist"), language=("language_instruction", "language_instruction_2"))
    keys = ("image_main", "image_wrist", "goal_main", "proprio", "proprio_mask", "action", "text", "frame")
    for read in ("frames", "blocks"):
        config = _config(
            *mix, goal="uniform", instructions="random", proprio_steps=2, image_steps=2, chunk_end="neutral", read=read,
            block_mib=0.03, block_window_mib=0.2,
        )  # fmt: skip
        whole = loader.Loader(config, keys, 8, seed=5)
        expected = [_hash(whole.batch(step)) for step in range(14)]
        assert len(set(expected)) == 14
        for hosts in (2, 8):
            parts = [
                loader.Loader(
                    dataclasses.replace(config, threads=1 + h % 3),
                    keys,
                    8,
                    seed=5,
                    process_index=h,
                    process_count=hosts,
                )
                for h in range(hosts)
            ]
            for step in (11, 0):
                pieces = [part.batch(step) for part in parts]
                assert _hash({k: np.concatenate([p[k] for p in pieces]) for k in keys}) == expected[step]


def test_quarantined_pictures_are_never_read(tmp_path):
    """Not as the row's own, not as an earlier step, not as a goal, not as the depth of a later frame."""
    folder = make_libero(tmp_path, (7, 3, 9, 5))
    whole = index.open_index(folder).split("train")
    bad = [2, 6, 12, 18, 23]  # inside and at the end of episodes
    for feature in ("observation/image", "observation/depth"):
        for frame in bad:
            offset, size = whole.spans(f"steps/{feature}")[frame].tolist()
            shard = pathlib.Path(whole.shard_path(int(whole.episodes["shard"][whole.episode_of(np.array(frame))])))
            data = bytearray(shard.read_bytes())
            data[offset : offset + size] = bytes(size)
            shard.write_bytes(data)
    for number in range(2):  # right checksums: only the pictures are damaged
        shard = pathlib.Path(whole.shard_path(number))
        rows = whole.episodes[whole.episodes["shard"] == number]
        data = shard.read_bytes()
        with shard.open("wb") as file:
            for row in rows:
                tfrecord.write_record(file, data[row["offset"] : row["offset"] + row["size"]])
    checks = shard_scan.Checks(tolerate=True, images=True)
    index.rebuild(spec.read_spec(folder), checks=checks)
    keys = ("image_main", "goal_main", "depth", "depth_scale", "frame", "action")
    for goal in ("final", "uniform"):
        reader = loader.Loader(_config(folder, image_steps=2, goal=goal, depth_offset=2), keys, 6)
        assert any("5 quarantined" in line and "an observed image is quarantined" in line for line in reader.summary())
        for step in range(30):
            batch = reader.batch(step)
            assert not set(batch["frame"]) & {*bad, *(b + 1 for b in bad if b + 1 not in (7, 10, 19, 24))}
            assert (batch["depth"][np.isin(batch["frame"] + 2, bad)] == 0).all()


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
    # Every target counts for the normalisation: the last three actions of an episode too, a short episode not at all.
    found, frames = reader.normalisers["libero_object"], reader.sources[0].frames
    assert found["action"].statistics == normalise.compute(frames.action, np.r_[0:7, 10:24])
    assert found["proprio"].statistics == normalise.compute(frames.proprio, frames.valid)
    neutral = loader.Loader(_config(libero_dir, chunk_end="neutral"), ("action", "action_mask", "frame"), 24).batch(0)
    outside = ~neutral["action_mask"]
    assert outside.sum() == 4 * 6
    still = loader.Loader(_config(libero_dir), ("action",), 24).normalisers["libero_object"]["action"]
    zero = normalise.normalise(np.zeros((1, 7), np.float32), still)[0, :6]  # no motion is no zero after normalisation
    rows = neutral["action"][outside]
    np.testing.assert_array_equal(rows[:, :6], np.broadcast_to(zero, rows[:, :6].shape))
    assert np.abs(zero).max() > 1e-3 and set(rows[:, 6]) <= {0.0, 1.0}


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
    with pytest.raises(errors.UserError, match=r"\['libero_spatial'\] have no view 'wrist'.*model\.missing_views=True"):
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
    plain = loader.Loader(_config(libero_dir, shuffle=False), keys, 24).batch(0)
    _define(monkeypatch, bgr=("wrist",), swap=("main", "wrist"))
    wrist = plain["image_wrist"][..., ::-1]
    seen = set()
    for epoch in range(8):
        batch = loader.Loader(_config(libero_dir, shuffle=False), keys, 24).batch(epoch)
        swapped = (batch["image_main"] != plain["image_main"]).any((1, 2, 3))
        mask = swapped[:, None, None, None]
        np.testing.assert_array_equal(batch["image_main"], np.where(mask, wrist, plain["image_main"]))
        np.testing.assert_array_equal(batch["image_wrist"], np.where(mask, plain["image_main"], wrist))
        episodes = [set(swapped[part]) for part in np.split(np.arange(24), [7, 10, 19])]
        assert all(len(found) == 1 for found in episodes)  # an episode is seen by one camera
        seen.add(tuple(swapped[[0, 7, 10, 19]]))
        alone = loader.Loader(_config(libero_dir, shuffle=False, views=("main",)), ("image_main",), 24).batch(epoch)
        np.testing.assert_array_equal(alone["image_main"], batch["image_main"])
    assert len(seen) > 3  # drawn anew for every epoch
    with pytest.raises(errors.UserError, match=r"data.swap_views=False"):
        loader.Loader(_config(libero_dir), ("depth",), 8)
    fixed = loader.Loader(_config(libero_dir, swap_views=False, shuffle=False), (*keys, "depth"), 24).batch(5)
    np.testing.assert_array_equal(fixed["image_main"], plain["image_main"])


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


def test_statistics_that_were_changed_are_refused(libero_dir):
    reader = loader.Loader(_config(libero_dir), ("action",), 4)
    assert loader.Loader(_config(libero_dir), ("action",), 4).normalisers == reader.normalisers
    (path,) = pathlib.Path(libero_dir).glob("qdepth_index/statistics-*.json")
    content = json.loads(path.read_text())
    content["statistics"]["action"]["q01"][0] -= 9
    path.write_text(json.dumps(content))
    with pytest.raises(errors.UserError, match="changed by hand or is damaged: delete it"):
        loader.Loader(_config(libero_dir), ("action",), 4)
    path.write_text(path.read_text()[:100])
    with pytest.raises(errors.UserError, match="is damaged"):
        loader.Loader(_config(libero_dir), ("action",), 4)
    path.unlink()
    assert loader.Loader(_config(libero_dir), ("action",), 4).normalisers == reader.normalisers


def test_the_state_stands_in_the_text_where_the_rule_says_so(libero_dir):
    """pi0.5 reads its state as bins in the prompt: the same numbers that the batch holds as proprio."""
    config = _config(libero_dir, text_rule="openpi_state", max_text_tokens=200)
    batches = loader.Loader(config, ("text", "proprio", "frame"), 8)
    batch, tokenizer = batches.batch(0), text.TextTokenizer(config.text_tokenizer)
    ids, strings = batches.sources[0].instructions()[0]
    seen = set()
    for row, state, frame in zip(batch["text"], batch["proprio"][:, 0], batch["frame"]):
        prompt = text.prompt_with_state(strings[ids[frame]], state)
        assert row.tolist() == (tokenizer.encode_prompt(prompt) + [0] * 200)[:200]
        seen.add(prompt)
    assert len(seen) > 1
    assert batches.identity()["text_rule"] == "openpi_state"
    # That the longest would not fit is known before the first batch.
    with pytest.raises(errors.UserError, match=r"exceed data\.max_text_tokens=20"):
        loader.Loader(_config(libero_dir, text_rule="openpi_state", max_text_tokens=20), ("text",), 8)
    with pytest.raises(errors.UserError, match="text_rule='pi0' is unknown"):
        _config(libero_dir, text_rule="pi0")
