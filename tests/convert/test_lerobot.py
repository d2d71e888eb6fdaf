"""LeRobot v3 in and out: our own reader and writer against each other, against facts of the format, and, where it is
installed, against the lerobot package itself."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import libero_writer
import numpy as np
import pytest
import sidecar_writer

pa = pytest.importorskip("pyarrow", reason="extra 'lerobot' is not installed")
av = pytest.importorskip("av", reason="extra 'lerobot' is not installed")

import pyarrow.parquet as pq  # noqa: E402

from qdepth_jax import errors  # noqa: E402
from qdepth_jax.convert import (  # noqa: E402
    lerobot_export,
    lerobot_import,
    lerobot_read,
    lerobot_write,
    rlds,
    rlds_claim,
    rlds_run,
)
from qdepth_jax.data import definitions, example, index, spec, tfrecord, write_rlds  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
LENGTHS = (4, 3, 5, 2)


def run(module, plan):
    function = lerobot_export.convert_file if module is lerobot_export else lerobot_import.convert_shard
    with rlds_claim.claimed(plan.target) as finished:
        assert not finished
        return module.finish(plan, rlds_run.run_tasks(function, plan.tasks, 1))


def export(source, output, **options):
    return run(lerobot_export, lerobot_export.plan(source, str(output), **options))


def bring(source, output, **options):
    return run(lerobot_import, lerobot_import.plan(str(source), str(output), "libero_object", **options))


def payloads(directory, split="train"):
    dataset = spec.read_spec(directory)
    paths = [dataset.shard_path(shard) for shard in dataset.splits[split].shards]
    return [record.payload for path in paths for record in tfrecord.scan_records(path)]


@pytest.fixture
def source(tmp_path):
    return libero_writer.make_libero(tmp_path / "source", LENGTHS, instructions=("pick up", "", "put down"))


def test_there_and_back_every_value_is_the_same(source, tmp_path):
    counts = export(source, tmp_path / "lerobot", file_bytes=1)  # one episode per file
    assert (counts["episodes"], counts["files"], counts["frames"]) == (4, 4, sum(LENGTHS))
    back = bring(tmp_path / "lerobot", tmp_path / "back", episodes_per_shard=3)
    assert back["images_untouched"] == counts["images_untouched"] == 3 * sum(LENGTHS) and back["shards"] == 2
    for number, (old, new) in enumerate(zip(payloads(source), payloads(tmp_path / "back"), strict=True)):
        before, after = example.scan(old), example.scan(new)
        assert set(after) - set(before) == {"steps/is_first", "episode_metadata/episode_index"}
        assert after["episode_metadata/episode_index"].value.tolist() == [number]
        for name, feature in before.items():
            assert after[name].kind == feature.kind, name
            if feature.kind == "bytes":
                mine, theirs = (
                    [p[o : o + n] for o, n in f.value.tolist()] for p, f in ((new, after[name]), (old, feature))
                )
                assert mine == theirs, name
            else:
                np.testing.assert_array_equal(after[name].value, feature.value, err_msg=name)
    shapes = {f.name: f.shape for f in index.open_index(source).dataset.features.values()}
    again = index.open_index(tmp_path / "back").dataset.features
    assert all(again[name].shape == shape for name, shape in shapes.items())


def test_export_is_what_the_format_says(source, tmp_path):
    export(source, tmp_path / "new", split="train[1:]", leave_out=("observation/depth",))
    info = json.loads((tmp_path / "new/meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"], info["fps"]) == ("v3.0", 3, 10, 20)
    assert info["features"]["observation.state"] == {"dtype": "float32", "shape": [8], "names": None}
    assert info["features"]["is_last"]["shape"] == [1] and "observation.images.depth" not in info["features"]
    assert info["features"]["observation.images.image"]["dtype"] == "image" and info["splits"] == {"train": "0:3"}
    table = pq.read_table(tmp_path / "new/data/chunk-000/file-000.parquet")
    assert table.column("index").to_pylist() == list(range(10))
    assert table.column("episode_index").to_pylist() == [0] * 3 + [1] * 5 + [2] * 2
    np.testing.assert_array_equal(
        table.column("timestamp"), np.float32([*range(3), *range(5), *range(2)]) / np.float32(20)
    )
    tasks = pq.read_table(tmp_path / "new/meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    texts = dict(zip(tasks.column("task_index").to_pylist(), tasks.column("task").to_pylist()))
    named = [texts[number] for number in table.column("task_index").to_pylist()]
    assert named == [""] * 3 + ["put down"] * 5 + ["pick up"] * 2
    rows = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"], r["length"]) for r in rows] == [
        (0, 3, 3),
        (3, 8, 5),
        (8, 10, 2),
    ]
    assert [row["tasks"] for row in rows] == [[""], ["put down"], ["pick up"]]
    statistics = json.loads((tmp_path / "new/meta/stats.json").read_text())
    state = index.open_index(source).split("train").column("steps/observation/state")[LENGTHS[0] :].astype(np.float64)
    for name, expected in (
        ("mean", state.mean(0)),
        ("std", state.std(0)),
        ("min", state.min(0)),
        ("max", state.max(0)),
    ):
        np.testing.assert_allclose(statistics["observation.state"][name], expected, rtol=1e-6, atol=1e-7)
    assert np.shape(statistics["observation.images.image"]["mean"]) == (3, 1, 1)


def test_further_instructions_are_said_to_be_left_out(tmp_path):
    tree = {
        "steps": {
            "action": write_rlds.Tensor((2,)),
            **{name: write_rlds.Text() for name in ("language_instruction", "language_instruction_2")},
        },
        "episode_metadata": {},
    }
    steps = {
        "action": np.zeros((3, 2), np.float32),
        "language_instruction": ["", "lift", "lift"],
        "language_instruction_2": ["raise"] * 3,
    }
    folder = tmp_path / "robot" / "1.0.0"
    folder.mkdir(parents=True)
    split = write_rlds.write_split(folder, "robot", "train", [[write_rlds.encode_episode(tree, steps, {})]])
    write_rlds.write_metadata(folder, "robot", "1.0.0", tree, [split], "synthetic")
    language = ("language_instruction", "language_instruction_2")
    plan = lerobot_export.plan(str(folder), str(tmp_path / "new"), fps=5, language=language)
    assert list(plan.left_out) == ["steps/language_instruction_2"]
    run(lerobot_export, plan)
    table = pq.read_table(tmp_path / "new/data/chunk-000/file-000.parquet")
    assert len(set(table.column("task_index").to_pylist()[:2])) == 2
    assert "language_instruction_2" not in table.column_names


def test_only_known_millimetres_are_called_so(source, tmp_path):
    relative = sidecar_writer.make_sidecar(tmp_path / "relative", index.open_index(source), "depth")
    plan = rlds.plan(source, str(tmp_path / "rlds"), rlds.Options(depth=(relative,)))
    with rlds_claim.claimed(plan.target):
        rlds_run.finish(plan, rlds_run.run_local(plan, 1))
    export(str(tmp_path / "rlds"), tmp_path / "new")
    found = json.loads((tmp_path / "new/meta/info.json").read_text())["features"]
    assert found["observation.images.depth"]["info"] == {"is_depth_map": True, "depth_unit": "mm"}
    assert found["observation.images.relative_depth"]["info"] == {"is_depth_map": True}
    bring(tmp_path / "new", tmp_path / "back")
    assert index.open_index(tmp_path / "back").dataset.feature("steps/observation/relative_depth").dtype == "uint16"


def test_views_with_blue_first_do_not_leave_unmarked(source, tmp_path, monkeypatch):
    row = definitions.DEFINITIONS["libero_object"]
    monkeypatch.setitem(definitions.DEFINITIONS, "libero_object", dataclasses.replace(row, bgr=("wrist",)))
    with pytest.raises(errors.UserError, match="observation/wrist_image of libero_object hold blue before red"):
        lerobot_export.plan(source, str(tmp_path / "new"))
    lerobot_export.plan(source, str(tmp_path / "new"), leave_out=("observation/wrist_image",))


def test_a_text_that_is_null_comes_in_empty_and_is_counted(source, tmp_path):
    export(source, tmp_path / "new")
    path = tmp_path / "new/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    texts = pa.array([None, *["said"] * (table.num_rows - 1)], pa.string())
    pq.write_table(table.append_column("note", texts), path)
    info = json.loads((tmp_path / "new/meta/info.json").read_text())
    info["features"]["note"] = {"dtype": "string", "shape": [1], "names": None}
    (tmp_path / "new/meta/info.json").write_text(json.dumps(info))
    assert bring(tmp_path / "new", tmp_path / "back")["null_texts"] == 1
    ids, strings = index.open_index(tmp_path / "back").split("train").texts("steps/note")
    assert [strings[i] for i in ids[:2]] == ["", "said"]


def test_a_killed_export_and_import_continue(source, tmp_path, monkeypatch):
    export(source, tmp_path / "whole", file_bytes=1)
    plan = lerobot_export.plan(source, str(tmp_path / "cut"), file_bytes=1)
    with rlds_claim.claimed(plan.target):
        lerobot_export.convert_file(plan.tasks[2])
    (tmp_path / "cut/data/chunk-000/file-000.parquet.partial.1").write_bytes(b"of a killed run")
    with rlds_claim.claimed(plan.target):
        results = rlds_run.run_tasks(lerobot_export.convert_file, plan.tasks, 1)
        lerobot_export.finish(plan, results)
    assert [result["kept"] for result in results] == [False, False, True, False]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with pytest.raises(errors.UserError, match="other options"):
        export(source, tmp_path / "cut", fps=5)

    bring(tmp_path / "whole", tmp_path / "one", episodes_per_shard=1)
    plan = lerobot_import.plan(str(tmp_path / "whole"), str(tmp_path / "two"), "libero_object", episodes_per_shard=1)
    with rlds_claim.claimed(plan.target):
        lerobot_import.convert_shard(plan.tasks[1])
    with rlds_claim.claimed(plan.target):
        results = rlds_run.run_tasks(lerobot_import.convert_shard, plan.tasks, 1)
        lerobot_import.finish(plan, results)
    assert [result["kept"] for result in results] == [False, True, False, False]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def with_video(root, source, key="observation.images.image", fps=20):
    """Turns an image feature of an exported set into one video of all episodes; frame n is grey of level 16 n + 8."""
    export(source, root, leave_out=("observation/depth", "observation/wrist_image"))
    path = root / "videos" / key / "chunk-000" / "file-000.mp4"
    path.parent.mkdir(parents=True)
    total = sum(LENGTHS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 24, "yuv420p", 4_000_000
        stream.gop_size = 4  # episodes begin between key frames
        for number in range(total):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 16 * number + 8, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = json.loads((root / "meta/info.json").read_text())
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    info["features"][key]["dtype"] = "video"
    (root / "meta/info.json").write_text(json.dumps(info))
    data = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(data).drop_columns([key]), data)
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(episodes).to_pylist()
    for row in rows:
        begin, end = row["dataset_from_index"] / fps, row["dataset_to_index"] / fps
        row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
        row |= {f"videos/{key}/from_timestamp": begin, f"videos/{key}/to_timestamp": end}
    pq.write_table(pa.Table.from_pylist(rows), episodes)
    return root


@pytest.mark.parametrize("images", ["jpeg", "png"])
def test_each_step_gets_its_own_video_frame(source, tmp_path, images):
    with_video(tmp_path / "video", source)
    counts = bring(tmp_path / "video", tmp_path / "new", images=images)
    assert counts[f"video_frames_as_{images}"] == sum(LENGTHS)
    opened = index.open_index(tmp_path / "new")
    assert opened.dataset.feature("steps/observation/image").encoding == images
    from qdepth_jax.data import episode_reader

    reader = episode_reader.EpisodeReader(opened.split("train"))
    frame = 0
    for number, length in enumerate(LENGTHS):
        levels = reader.images("steps/observation/image", number).mean((1, 2, 3))
        np.testing.assert_allclose(levels, 16 * np.arange(frame, frame + length) + 8, atol=5)
        frame += length
    rows = pq.read_table(tmp_path / "video/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    rows[1]["videos/observation.images.image/from_timestamp"] += 0.021
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "video/meta/episodes/chunk-000/file-000.parquet")
    with pytest.raises(ValueError, match=r"episode 1, feature .* no frame at 0.2210 s \(episode 1, step 0\)"):
        bring(tmp_path / "video", tmp_path / "shifted")


def test_damaged_and_foreign_data_sets_are_refused(source, tmp_path):
    export(source, tmp_path / "good", file_bytes=1)

    def broken(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad")
        return lerobot_import.plan(str(tmp_path / "bad"), str(tmp_path / "new"), "name")

    def info(**fields):
        def change(root):
            path = root / "meta/info.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

        return change

    for change, message in (
        (info(codebase_version="v2.1"), "only v3 is read: convert it with lerobot"),
        (info(total_episodes=9), "declares 9 episodes, meta/episodes holds 4"),
        (info(splits={"train": "0:2"}), "do not cover the 4 episodes"),
        (info(fps=0), "make no data set"),
        (lambda root: (root / "data/chunk-000/file-002.parquet").unlink(), "1 files missing, first .*file-002"),
        (lambda root: (root / "meta/info.json").unlink(), "is no LeRobot data set"),
    ):
        with pytest.raises(errors.UserError, match=message):
            broken(change)

    def wrong_rows(root):
        path = root / "data/chunk-000/file-001.parquet"
        pq.write_table(pq.read_table(path).slice(0, 2), path)

    plan = broken(wrong_rows)
    with rlds_claim.claimed(plan.target), pytest.raises(ValueError, match=r"episode 1 has rows .* 0..2 expected"):
        rlds_run.run_tasks(lerobot_import.convert_shard, plan.tasks, 1)
    with pytest.raises(errors.UserError, match="no feature"):
        lerobot_export.plan(source, str(tmp_path / "x"), leave_out=("observation/nose",))
    other = libero_writer.make_libero(tmp_path / "other", name="my_robot")
    with pytest.raises(errors.UserError, match="give --fps"):
        lerobot_export.plan(other, str(tmp_path / "x"), language=("language_instruction",))


def test_episodes_are_found_inside_large_row_groups(source, tmp_path):
    export(source, tmp_path / "new")
    path = tmp_path / "new/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path)  # one row group: other writers do not cut at episodes
    dataset = lerobot_read.open_lerobot(tmp_path / "new")
    wanted = ["episode_index", "frame_index", "observation.state"]
    for first in range(4):
        for last in range(first, 4):
            found = list(lerobot_read.episode_tables(dataset, range(first, last + 1), wanted))
            assert [(number, t.num_rows) for number, t in found] == [(n, LENGTHS[n]) for n in range(first, last + 1)]


def test_numbers_of_every_shape_come_back(tmp_path):
    shapes = {"scalar": (), "one": (1,), "vector": (3,), "matrix": (2, 3), "block": (2, 1, 2)}
    features = {
        name: spec.FeatureSpec(f"steps/{name}", "tensor", "float32", s, "none", True) for name, s in shapes.items()
    }
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(4, *shape)).astype(np.float32) for name, shape in shapes.items()}
    with lerobot_write.DataFile(str(tmp_path / "x.parquet"), features) as writer:
        writer.write(values, 0, 0, 5.0, [0] * 4)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.schema.field("scalar").type == table.schema.field("one").type == pa.float32()
    for name, shape in shapes.items():
        np.testing.assert_array_equal(lerobot_read.numbers(table.column(name), "float32", shape), values[name])


def test_command_line(source, tmp_path):
    tool = [sys.executable, str(ROOT / "tools/convert_lerobot.py")]

    def command(*arguments):
        return subprocess.run([*tool, *map(str, arguments)], capture_output=True, text=True, timeout=120)

    done = command("export", source, f"--output={tmp_path}/lerobot", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["episodes"] == 4
    done = command("import", tmp_path / "lerobot", f"--output={tmp_path}/back", "--name=libero_object", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == sum(LENGTHS)
    for arguments, message in ((["import", source, "--name=x"], "is no LeRobot data set"), (["move", source], "usage")):
        done = command(*arguments, f"--output={tmp_path}/x")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# ---- the lerobot package itself ----


@pytest.mark.slow
def test_lerobot_opens_our_export(tmp_path):
    datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="lerobot is not installed")
    source = ROOT / "data" / "libero_object" / "1.0.0"
    opened = index.open_index(source, str(tmp_path / "index"))
    export(source, tmp_path / "new", index_dir=str(tmp_path / "index"), leave_out=("observation/depth",))
    found = datasets.LeRobotDataset("test/libero_object", root=tmp_path / "new")
    split = opened.split("train")
    assert (found.num_episodes, found.num_frames, found.fps) == (len(split.episodes), split.frames, 20)
    from qdepth_jax.data import episode_reader

    reader = episode_reader.EpisodeReader(split)
    ids, strings = split.texts("steps/language_instruction")
    for number, row in enumerate(split.episodes):
        pictures = reader.images("steps/observation/image", number)
        for step in (0, int(row["length"]) // 2, int(row["length"]) - 1):
            at = int(row["start"]) + step
            item = found[at]
            for key, name in (("observation.state", "steps/observation/state"), ("action", "steps/action")):
                np.testing.assert_array_equal(item[key].numpy(), split.column(name)[at], err_msg=key)
            assert item["task"] == strings[ids[at]]
            assert (int(item["episode_index"]), int(item["frame_index"])) == (number, step)
            assert bool(item["is_last"]) == bool(split.column("steps/is_last")[at])
            image = (item["observation.images.image"].numpy().transpose(1, 2, 0) * 255).round().astype(int)
            np.testing.assert_allclose(image, pictures[step], atol=3)  # two JPEG decoders
    assert set(found.meta.stats["observation.state"]) >= {"min", "max", "mean", "std", "count"}


@pytest.mark.slow
@pytest.mark.parametrize("use_videos", [False, True])
def test_what_lerobot_writes_comes_in(tmp_path, use_videos):
    datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="lerobot is not installed")
    dtype = "video" if use_videos else "image"
    features = {
        "observation.images.top": {"dtype": dtype, "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (6,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
        "observation.matrix": {"dtype": "float32", "shape": (2, 3), "names": None},
        "count": {"dtype": "int64", "shape": (1,), "names": None},
    }
    made = datasets.LeRobotDataset.create("test/made", 10, features, root=tmp_path / "made", use_videos=use_videos)
    rng, frames = np.random.default_rng(0), []
    for episode, length in enumerate((5, 8, 3)):
        for step in range(length):
            frame = {
                "observation.images.top": np.full((64, 96, 3), 40 * episode + 10 * step, np.uint8),
                "observation.state": rng.normal(size=6).astype(np.float32),
                "action": rng.normal(size=7).astype(np.float32),
                "observation.matrix": rng.normal(size=(2, 3)).astype(np.float32),
                "count": np.array([step], np.int64),
                "task": f"task {episode % 2}",
            }
            frames.append({key: np.copy(value) if key != "task" else value for key, value in frame.items()})
            made.add_frame(frame)
        made.save_episode()
    made.finalize()
    counts = bring(tmp_path / "made", tmp_path / "new")
    assert counts["frames"] == len(frames) == 16
    assert counts["video_frames_as_jpeg" if use_videos else "images_untouched"] == 16
    opened = index.open_index(tmp_path / "new")
    split = opened.split("train")
    assert split.episodes["length"].tolist() == [5, 8, 3]
    for name, key in (
        ("observation/state", "observation.state"),
        ("action", "action"),
        ("observation/matrix", "observation.matrix"),
        ("count", "count"),
    ):
        np.testing.assert_array_equal(split.column(f"steps/{name}"), np.stack([frame[key] for frame in frames]))
    ids, strings = split.texts("steps/language_instruction")
    assert [strings[number] for number in ids] == [frame["task"] for frame in frames]
    from qdepth_jax.data import episode_reader

    reader = episode_reader.EpisodeReader(split)
    pictures = np.concatenate([reader.images("steps/observation/top", episode) for episode in range(3)])
    expected = np.stack([frame["observation.images.top"] for frame in frames])
    difference = np.abs(pictures.astype(int) - expected.astype(int)).max()
    assert difference <= (8 if use_videos else 0)
    # And out again: matrices too are what lerobot reads.
    export(str(tmp_path / "new"), tmp_path / "again", fps=10, language=("language_instruction",))
    again = datasets.LeRobotDataset("test/again", root=tmp_path / "again")
    for at, frame in enumerate(frames):
        item = again[at]
        assert item["task"] == frame["task"] and int(item["count"]) == frame["count"]
        for key in ("observation.state", "action", "observation.matrix"):
            np.testing.assert_array_equal(np.asarray(item[key]), frame[key])
