"""The converter: what it keeps to the byte, what it adds, what it refuses, and that it continues where it stopped."""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import tracemalloc

import libero_writer
import numpy as np
import pytest
import sidecar_writer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qdepth_jax import errors
from qdepth_jax.convert import rlds, rlds_claim, rlds_features, rlds_record, rlds_run, rlds_shard
from qdepth_jax.data import (
    data_config,
    definitions,
    example,
    frame_reader,
    index,
    loader,
    sidecar,
    spec,
    tfrecord,
    write_rlds,
)

DEPTH = "steps/observation/relative_depth_new"
TOKENS = "steps/observation/depth_tokens"


def convert_all(directory, output, workers=1, **options):
    plan = rlds.plan(directory, str(output), rlds.Options(**options))
    with rlds_claim.claimed(plan.target) as finished:
        if finished:
            return rlds_claim.read_notes(plan.output, "metadata.json")["counts"]
        return rlds_run.finish(plan, rlds_run.run_local(plan, workers))


def payloads(directory, split="train"):
    """Records of a split, and their shard names."""
    dataset = spec.read_spec(directory)
    shards = dataset.splits[split].shards
    return [record.payload for shard in shards for record in tfrecord.scan_records(dataset.shard_path(shard))]


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()
    }


def entries(payload):
    return {name: payload[start:end] for name, (start, end) in example.entries(payload).items()}


def test_without_options_every_record_stays_as_it_is(libero_dir, tmp_path):
    counts = convert_all(libero_dir, tmp_path / "new" / "1.2.0")
    new = spec.read_spec(tmp_path / "new" / "1.2.0")
    old = spec.read_spec(libero_dir)
    assert new.version == "1.2.0" and new.name == old.name and new.features == old.features
    for split in old.splits:
        assert payloads(new.directory, split) == payloads(libero_dir, split)
        assert new.splits[split].declared == old.splits[split].declared
    info = json.loads((tmp_path / "new" / "1.2.0" / "dataset_info.json").read_text())
    assert int(info["splits"][0]["numBytes"]) == sum(map(len, payloads(libero_dir, info["splits"][0]["name"])))
    assert counts["episodes"] == sum(sum(split.declared) for split in old.splits.values())
    assert counts["bytes_in"] == counts["bytes_out"] and counts["images_resized"] == 0
    assert not (tmp_path / "new" / "1.2.0" / rlds_claim.STATE).exists()


@pytest.mark.parametrize("encoding", ["none", "bytes"])
def test_depth_and_tokens_are_those_of_the_sidecars(libero_dir, tmp_path, encoding):
    opened = index.open_index(libero_dir)
    depth = sidecar_writer.make_sidecar(tmp_path / "depth", opened, "depth")
    tokens = sidecar_writer.make_sidecar(tmp_path / "tokens", opened, "depth_tokens", seed=1)
    counts = convert_all(
        libero_dir,
        tmp_path / "new",
        depth=(f"relative_depth_new={depth}",),
        depth_tokens=(tokens,),
        token_encoding=encoding,
    )
    assert counts["depth_maps"] == counts["token_rows"] == counts["frames"]
    new = index.open_index(tmp_path / "new")
    assert new.dataset.feature(DEPTH).shape == (6, 8, 1) and new.dataset.feature(TOKENS).encoding == encoding
    for name, split in new.splits.items():
        maps, codes = sidecar.open_sidecar(depth, name), sidecar.open_sidecar(tokens, name)
        reader, frame = frame_reader.ShardFiles(), 0
        for at, (old, payload) in enumerate(
            zip(payloads(libero_dir, name), payloads(tmp_path / "new", name), strict=True)
        ):
            before, after = entries(old), entries(payload)
            assert {key: after[key] for key in before} == before  # bytes, not values
            names = {"relative_depth_new_scale", "relative_depth_new_offset", "relative_depth_new_kind"}
            assert set(after) - set(before) == {DEPTH, TOKENS, *(f"episode_metadata/{n}" for n in names)}
            scanned = example.scan(payload)
            assert scanned["episode_metadata/relative_depth_new_scale"].value.tolist() == [0.5 + at]
            assert scanned["episode_metadata/relative_depth_new_offset"].value.tolist() == [-at]
            length = len(scanned[DEPTH].value)
            for step, (offset, size) in enumerate(scanned[DEPTH].value.tolist()):
                np.testing.assert_array_equal(
                    Image.open(io.BytesIO(payload[offset : offset + size])), maps.values[frame + step]
                )
            frame += length
        spans = split.spans(DEPTH)
        shards = split.episodes["shard"][split.episode_of(np.arange(split.frames))]
        for row in range(split.frames):
            out = np.zeros((6, 8), np.uint16)
            frame_reader.decode_depth(reader.read(split.shard_path(shards[row]), *spans[row].tolist()), out)
            np.testing.assert_array_equal(out, maps.values[row])
        np.testing.assert_array_equal(split.column(TOKENS), codes.values)


def test_wide_tokens_as_bytes_can_be_read_frame_by_frame(libero_dir, tmp_path):
    opened = index.open_index(libero_dir)
    tokens = sidecar_writer.make_sidecar(tmp_path / "tokens", opened, "depth_tokens", shape=(256,))
    convert_all(libero_dir, tmp_path / "new", depth_tokens=(tokens,), token_encoding="bytes", splits=("train",))
    split = index.open_index(tmp_path / "new").split("train")
    values = sidecar.open_sidecar(tokens, "train").values
    for payload, row in zip(payloads(tmp_path / "new"), split.episodes, strict=True):
        for step, (offset, size) in enumerate(example.scan(payload)[TOKENS].value.tolist()):
            np.testing.assert_array_equal(
                np.frombuffer(payload[offset : offset + size], "<u2"), values[row["start"] + step]
            )


def test_names_follow_the_camera():
    names = {"image": "depth", "image_0": "depth_0", "wrist_image": "depth_wrist", "rgb": "depth_rgb"}
    names["exterior_image_1_left"] = "depth_exterior_1_left"
    for camera, expected in names.items():
        assert rlds_features.feature_leaf("depth", f"steps/observation/{camera}") == expected


@settings(max_examples=15, deadline=None)
@given(keep=st.lists(st.booleans(), min_size=7, max_size=7).filter(any))
def test_any_subset_is_kept_in_order_and_shards_without_episodes_go(keep, seven_episodes, tmp_path_factory):
    text = ",".join(str(number) for number in np.flatnonzero(keep))
    output = tmp_path_factory.mktemp("subset") / "new"
    counts = convert_all(seven_episodes, output, splits=("train",), episodes=text)
    assert payloads(output) == [payload for payload, kept in zip(payloads(seven_episodes), keep) if kept]
    lengths = spec.read_spec(output).splits["train"].declared
    # Shards hold episodes 0-1, 2-4, 5-6: output shard k comes from one of them alone.
    expected = [sum(part) for part in (keep[:2], keep[2:5], keep[5:])]
    assert lengths == tuple(count for count in expected if count)
    assert counts["dropped"].get("outside of --episodes", 0) == keep.count(False)


@pytest.fixture(scope="module")
def seven_episodes(tmp_path_factory):
    source = libero_writer.make_libero(
        tmp_path_factory.mktemp("source"), (2, 1, 1, 3, 1, 1, 2), instructions=("a", " ", "b")
    )
    return reshard(source, tmp_path_factory.mktemp("seven"), [2, 3, 2])


def reshard(source, folder, lengths):
    """A copy of all episodes of all splits as split `train`, in shards of `lengths`."""
    old = spec.read_spec(source)
    records = [payload for split in old.splits for payload in payloads(source, split)][: sum(lengths)]
    assert len(records) == sum(lengths)
    bounds = np.cumsum([0, *lengths])
    parts = [records[low:high] for low, high in itertools.pairwise(bounds)]
    split = write_rlds.write_split(folder, old.name, "train", parts)
    features = json.loads(pathlib.Path(source, "features.json").read_text())
    info = {"name": old.name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": write_rlds.splits_json([split])}
    pathlib.Path(folder, "features.json").write_text(json.dumps(features))
    pathlib.Path(folder, "dataset_info.json").write_text(json.dumps(info))
    return str(folder)


def test_a_shard_depends_on_its_input_shard_alone(seven_episodes, tmp_path):
    (tmp_path / "other").mkdir()
    other = reshard(seven_episodes, tmp_path / "other", [2, 3, 1])
    convert_all(seven_episodes, tmp_path / "a", resize=(12, 16))
    convert_all(other, tmp_path / "b", resize=(12, 16))
    for shard in range(2):
        name = write_rlds.shard_name("libero_object", "train", shard, 3)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_labelled_episodes(seven_episodes, tmp_path):
    opened = index.open_index(seven_episodes)
    ids, strings = opened.split("train").texts("steps/language_instruction")
    blank = [not strings[ids[row["start"]]].strip() for row in opened.split("train").episodes]
    assert 0 < sum(blank) < 7
    counts = convert_all(seven_episodes, tmp_path / "new", keep_labelled=True)
    assert counts["dropped"] == {"no instruction": sum(blank)}
    assert payloads(tmp_path / "new") == [p for p, b in zip(payloads(seven_episodes), blank) if not b]


def test_ranges_round_as_tfds_does(seven_episodes, tmp_path):
    convert_all(seven_episodes, tmp_path / "new", splits=("train[30%:]",))
    assert payloads(tmp_path / "new") == payloads(seven_episodes)[2:]  # 2.1 episodes


def test_resize_reencodes_colour_and_picks_depth(libero_dir, tmp_path):
    counts = convert_all(libero_dir, tmp_path / "new", resize=(12, 16))
    assert counts["images_resized"] == 3 * counts["frames"] and counts["images_untouched"] == 0
    new = spec.read_spec(tmp_path / "new")
    assert new.feature("steps/observation/image").shape == (12, 16, 3)
    assert new.feature("steps/observation/depth").shape == (12, 16, 1)
    old, changed = example.scan(payloads(libero_dir)[0]), example.scan(payloads(tmp_path / "new")[0])

    def load(payload, scanned, name, step=0):
        offset, size = scanned[name].value[step]
        return Image.open(io.BytesIO(payload[offset : offset + size]))

    before, after = payloads(libero_dir)[0], payloads(tmp_path / "new")[0]
    wrist = load(before, old, "steps/observation/wrist_image").resize((16, 12), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(load(after, changed, "steps/observation/wrist_image"), wrist)  # PNG: exact
    image = load(after, changed, "steps/observation/image")
    expected = load(before, old, "steps/observation/image").resize((16, 12), Image.Resampling.LANCZOS)
    assert image.format == "JPEG" and np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 6
    depth = np.asarray(load(before, old, "steps/observation/depth"))
    np.testing.assert_array_equal(load(after, changed, "steps/observation/depth"), depth[1::2, 1::2])
    # A second resize to the same size touches nothing.
    again = convert_all(tmp_path / "new", tmp_path / "again", resize=(12, 16))
    assert again["images_resized"] == 0 and payloads(tmp_path / "again") == payloads(tmp_path / "new")


@pytest.mark.parametrize(
    ("old", "new", "picked"), [(4, 2, [1, 3]), (6, 2, [1, 4]), (2, 4, [0, 0, 1, 1]), (5, 3, [0, 2, 4])]
)
def test_nearest_takes_the_pixel_at_the_centre(old, new, picked):
    values = np.arange(old, dtype=np.uint16)[None, :, None]
    assert rlds_record.nearest(values, (new, 1))[0, :, 0].tolist() == picked
    assert rlds_record.nearest(values.transpose(0, 2, 1), (1, new))[0, 0].tolist() == picked


def test_sixteen_bits_survive_a_resize():
    values = np.array([[0, 1], [300, 65535]], np.uint16)
    data = rlds_record.resize_nearest(rlds_record.png(values), (4, 4))
    np.testing.assert_array_equal(Image.open(io.BytesIO(data)), values.repeat(2, 0).repeat(2, 1))


def test_restart_continues_and_ends_alike(seven_episodes, tmp_path, monkeypatch):
    convert_all(seven_episodes, tmp_path / "whole", resize=(12, 16))
    original, calls = rlds_record.convert, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3 + 4:  # three for the estimate, two of the first shard, one of the second
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(rlds_record, "convert", failing)
    with pytest.raises(KeyboardInterrupt):
        convert_all(seven_episodes, tmp_path / "cut", resize=(12, 16))
    monkeypatch.setattr(rlds_record, "convert", original)
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {rlds_claim.STATE, write_rlds.shard_name("libero_object", "train", 0, 3)}
    with pytest.raises(errors.UserError, match=r"other options \(resize was \[12, 16\], is \[6, 8\]"):
        convert_all(seven_episodes, tmp_path / "cut", resize=(6, 8))
    (tmp_path / "cut" / "x.tfrecord.partial.1").write_bytes(b"left by a killed run")
    plan = rlds.plan(seven_episodes, str(tmp_path / "cut"), rlds.Options(resize=(12, 16)))
    with rlds_claim.claimed(plan.target) as finished:
        results = rlds_run.run_local(plan, 1)
        rlds_run.finish(plan, results)
    assert not finished and [result["kept"] for result in results] == [True, False, False]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with rlds_claim.claimed(plan.target) as finished:
        assert finished
    with pytest.raises(errors.UserError, match="other options"):
        convert_all(seven_episodes, tmp_path / "cut")


def test_a_finished_shard_that_changed_is_refused(seven_episodes, tmp_path):
    plan = rlds.plan(seven_episodes, str(tmp_path / "new"), rlds.Options())
    with rlds_claim.claimed(plan.target):
        rlds_shard.convert_shard(plan.tasks[1])
        with open(plan.tasks[1].output, "ab") as file:
            file.write(b"x")
        with pytest.raises(errors.UserError, match="not what an earlier run finished"):
            rlds_run.run_local(plan, 1)
        with pytest.raises(ValueError, match="not finished"):
            rlds_run.finish(plan, [])


def test_two_commands_do_not_write_one_folder(seven_episodes, tmp_path):
    plan = rlds.plan(seven_episodes, str(tmp_path / "new"), rlds.Options())
    with (
        rlds_claim.claimed(plan.target),
        pytest.raises(errors.UserError, match="another command"),
        rlds_claim.claimed(plan.target),
    ):
        pass


def test_damage_is_named_and_leaves_no_shard(seven_episodes, tmp_path):
    (tmp_path / "source").mkdir()
    source = reshard(seven_episodes, tmp_path / "source", [1, 6])
    opened = index.open_index(source)
    row = opened.split("train").episodes[2]
    path = pathlib.Path(opened.split("train").shard_path(1))
    data = bytearray(path.read_bytes())
    data[row["offset"] + 50] ^= 4
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # else opening the index finds it already
    plan = rlds.plan(source, str(tmp_path / "new"), rlds.Options())
    message = r"00001-of-00002: record 1 .*episode 2\): the checksum does not match"
    with rlds_claim.claimed(plan.target), pytest.raises(ValueError, match=message):
        rlds_run.run_local(plan, 1)
    assert [path.name for path in (tmp_path / "new").glob("*.tfrecord*")] == [os.path.basename(plan.tasks[0].output)]


def test_full_disk_is_a_plain_message(seven_episodes, tmp_path, monkeypatch):
    plan = rlds.plan(seven_episodes, str(tmp_path / "new"), rlds.Options())
    with rlds_claim.claimed(plan.target):

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(errors.UserError, match="free space and run the same command again"):
            rlds_run.run_local(plan, 1)
    assert not list((tmp_path / "new").glob("*.tfrecord*"))
    monkeypatch.undo()
    monkeypatch.setattr(rlds_claim.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with (
        pytest.raises(errors.UserError, match=r"GB are needed .* 0.000 GB are free"),
        rlds_claim.claimed(plan.target),
    ):
        pass


def test_memory_is_one_episode(tmp_path):
    source = libero_writer.make_libero(tmp_path, (12,) * 12)
    plan = rlds.plan(source, str(tmp_path / "new"), rlds.Options(splits=("train",), resize=(20, 20)))
    largest = max(int(task.rows["size"].max()) for task in plan.tasks)
    assert plan.bytes_in > 8 * largest
    tracemalloc.start()
    for task in plan.tasks:
        rlds_shard.convert_shard(task)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("test",)}, "has no split 'test'; it has: train, val"),
        ({"splits": ("train[:900]",)}, r"--split='train\[:900\]' reaches episode 900"),
        ({"splits": ("train[:1]", "train[2:]")}, "names 'train' twice"),
        ({"splits": ("train[1:1]",)}, "no episode of split 'train' is left"),
        ({"episodes": "0"}, "train, val are chosen: use --split"),
        ({"splits": ("train",), "episodes": "0-99"}, "'0-99' is not within the split's 0-"),
        ({"splits": ("train",), "episodes": "one"}, "'one' is not understood"),
        ({"resize": (0, 4)}, "between 1 and 4096"),
        ({"keep_labelled": True, "language": ("action",)}, "is no text; there is steps/language_instruction"),
        ({"version": "2"}, "MAJOR.MINOR.PATCH"),
        ({"depth": ("nowhere",)}, r"no sidecar .*--split"),
    ],
)
def test_bad_options_name_the_fix(libero_dir, tmp_path, options, message):
    with pytest.raises(errors.UserError, match=message):
        rlds.plan(libero_dir, str(tmp_path / "new"), rlds.Options(**options))
    assert not (tmp_path / "new").exists()


def test_sidecars_that_do_not_fit_are_refused(libero_dir, tmp_path):
    opened = index.open_index(libero_dir)
    strange = sidecar_writer.make_sidecar(tmp_path / "strange", opened, "depth", fingerprint="0" * 32)
    depth = sidecar_writer.make_sidecar(tmp_path / "depth", opened, "depth", details={"depth_kind": "metric"})
    train = sidecar_writer.make_sidecar(tmp_path / "train", opened, "depth_tokens", splits=["train"])
    for options, message in (
        ({"depth": (strange,)}, "has fingerprint '0000"),
        ({"depth_tokens": (depth,)}, "has kind 'depth'"),
        ({"depth": (depth,)}, r"has 'steps/observation/depth' already: .*--depth=NAME="),
        ({"depth_tokens": (train,)}, "convert other splits only"),
        ({"depth": (f"a={depth}", f"a={depth}")}, "already"),
    ):
        with pytest.raises(errors.UserError, match=message):
            rlds.plan(libero_dir, str(tmp_path / "new"), rlds.Options(**options))
    assert not (tmp_path / "new").exists()


def test_tokens_of_every_split_name_their_own_depth(libero_dir, tmp_path):
    opened, root = index.open_index(libero_dir), str(tmp_path / "tokens")
    for name in opened.splits:  # as tools/tokenize_depth.py makes them from a depth sidecar
        details = {"grid": 4, "codes": 256, "depth_digest": f"of {name}"}
        sidecar_writer.make_sidecar(root, opened, "depth_tokens", splits=[name], details=details)
    convert_all(libero_dir, tmp_path / "new", depth_tokens=(root,))
    (added,) = rlds_claim.read_notes(str(tmp_path / "new"), "metadata.json")["added"]
    assert added["depth_digest"] == {"train": "of train", "val": "of val"}
    assert added["details"] == {"grid": 4, "codes": 256}
    other = str(tmp_path / "other")
    for name in opened.splits:
        sidecar_writer.make_sidecar(other, opened, "depth_tokens", splits=[name], details={"grid": 4, "codes": name})
    with pytest.raises(errors.UserError, match=r"differ between splits \(val\)"):
        rlds.plan(libero_dir, str(tmp_path / "no"), rlds.Options(depth_tokens=(other,)))


def test_damage_inside_of_a_sidecar_does_not_go_into_the_copy(libero_dir, tmp_path):
    root = sidecar_writer.make_sidecar(tmp_path / "tokens", index.open_index(libero_dir), "depth_tokens")
    plan = rlds.plan(libero_dir, str(tmp_path / "new"), rlds.Options(depth_tokens=(root,)))
    path = pathlib.Path(root, "train", "values.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with rlds_claim.claimed(plan.target), pytest.raises(errors.UserError, match="is damaged: the bytes of episode 3"):
        rlds_run.run_local(plan, 1)


def test_output_must_be_free(libero_dir, tmp_path):
    for output in (libero_dir, os.path.join(libero_dir, "new"), os.path.dirname(libero_dir)):
        with pytest.raises(errors.UserError, match="contain one another"):
            rlds.plan(libero_dir, output, rlds.Options())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(errors.UserError, match=r"other things \(thesis.tex\)"):
        convert_all(libero_dir, tmp_path / "full")
    other = libero_writer.make_libero(tmp_path / "other", seed=1)
    with pytest.raises(errors.UserError, match="not made by this command"):
        convert_all(libero_dir, other)


def test_a_size_that_would_hide_swapped_channels_is_refused(seven_episodes, tmp_path, monkeypatch):
    row = definitions.DEFINITIONS["libero_object"]
    monkeypatch.setitem(definitions.DEFINITIONS, "libero_object", dataclasses.replace(row, bgr=("wrist",)))
    with pytest.raises(errors.UserError, match=r"\('wrist',\) of libero_object hold blue before red"):
        rlds.plan(seven_episodes, str(tmp_path / "new"), rlds.Options(resize=(256, 256)))
    rlds.plan(seven_episodes, str(tmp_path / "new"), rlds.Options(resize=(128, 128)))


def test_metric_depth_comes_back_in_metres_and_relative_depth_never_as_metres(tmp_path):
    source = libero_writer.make_libero(tmp_path / "source", depth=False)
    opened = index.open_index(source)

    def written(root, kind, scale):
        for name, split in opened.splits.items():
            metadata = sidecar.Metadata(
                "depth", opened.fingerprint, name, "steps/observation/image", "test", (6, 8), split.frames,
                len(split.episodes), {"depth_kind": kind},
            )  # fmt: skip
            writer = sidecar.Writer(str(root), metadata)
            for episode in writer.pending():
                row = split.episodes[episode]
                raw = np.full((row["length"], 6, 8), 2000, np.uint16)
                raw[:, 0] = 0
                writer.write(episode, int(row["start"]), raw, scale=scale, offset=0.25)
            writer.finish()
        return str(root)

    metric = written(tmp_path / "metric", "metric", 0.0005)
    convert_all(source, tmp_path / "new" / "libero_object" / "1.1.0", depth=(metric,))
    config = data_config.DataConfig((data_config.DatasetConfig(path=str(tmp_path / "new" / "libero_object")),))
    batch = loader.Loader(config, ("depth", "depth_scale", "depth_offset"), 4).batch(0)
    metres = batch["depth"] * batch["depth_scale"][:, None, None] + batch["depth_offset"][:, None, None]
    np.testing.assert_allclose(metres[:, 1:], 1.25, atol=1e-6)
    assert (batch["depth"][:, 0] == 0).all()
    relative = written(tmp_path / "relative", "relative", 1e-5)
    with pytest.raises(errors.UserError, match="holds relative depth: a name that says so"):
        rlds.plan(source, str(tmp_path / "no"), rlds.Options(depth=(f"depth={relative}",)))
    convert_all(source, tmp_path / "other" / "1.1.0", depth=(relative,))
    assert "steps/observation/relative_depth" in spec.read_spec(str(tmp_path / "other")).features
    far = written(tmp_path / "far", "metric", 0.1)
    with pytest.raises(errors.UserError, match=r"depth of 200\.[23] m does not fit"):
        convert_all(source, tmp_path / "far_out", depth=(far,))
