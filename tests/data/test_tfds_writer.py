"""Against TFDS itself: the real Bridge sample, and a data set that TFDS wrote with every encoding of Open-X sets."""

import pathlib

import numpy as np
import pytest

from qdepth_jax.data import data_config, episode_reader, frame_reader, index, loader, shard_scan

tfds = pytest.importorskip("tensorflow_datasets")

LENGTHS = (4, 2, 6)


class Fractal20220817Data(tfds.core.GeneratorBasedBuilder):
    """Fractal's layout (nested actions, int32, bool) and encodings found elsewhere (zlib, bytes, float64, uint8)."""

    name = "fractal20220817_data"
    VERSION = tfds.core.Version("0.1.0")
    pkg_dir_path = tfds.core.Path(__file__).parent  # a test is no package to infer it from

    def _info(self):
        f = tfds.features
        observation = {
            "image": f.Image(shape=(8, 10, 3), encoding_format="jpeg"),
            "depth": f.Image(shape=(8, 10, 1), dtype=np.uint16, encoding_format="png"),
            "natural_language_instruction": f.Text(),
            "natural_language_embedding": f.Tensor(shape=(512,), dtype=np.float32),
            "base_pose_tool_reached": f.Tensor(shape=(7,), dtype=np.float32),
            "gripper_closed": f.Tensor(shape=(1,), dtype=np.float32),
            "zipped": f.Tensor(shape=(3,), dtype=np.float32, encoding="zlib"),
            "plain_bytes": f.Tensor(shape=(2, 2), dtype=np.int16, encoding="bytes"),
            "wide_zipped": f.Tensor(shape=(100,), dtype=np.float32, encoding="zlib"),
            "double": f.Tensor(shape=(2,), dtype=np.float64),
            "small": f.Tensor(shape=(), dtype=np.uint8),
            "big": f.Scalar(dtype=np.int64),
            "rgb_png": f.Image(shape=(8, 10, 3), encoding_format="png"),
            "instruction": f.Tensor(shape=(512,), dtype=np.int32),  # as language_table keeps it
            "tokens": f.Tensor(shape=(100,), dtype=np.uint16),
            "signed": f.Tensor(shape=(10, 7), dtype=np.int64),
            "flags": f.Tensor(shape=(3,), dtype=np.bool_),
            "zipped_double": f.Tensor(shape=(2,), dtype=np.float64, encoding="zlib"),
            "phrases": f.Tensor(shape=(2,), dtype=np.str_),
            "box": f.BBoxFeature(),
            "kind": f.ClassLabel(names=["a", "b"]),
        }
        action = {
            "world_vector": f.Tensor(shape=(3,), dtype=np.float32),
            "rotation_delta": f.Tensor(shape=(3,), dtype=np.float32),
            "gripper_closedness_action": f.Tensor(shape=(1,), dtype=np.float32),
            "terminate_episode": f.Tensor(shape=(3,), dtype=np.int32),
        }
        steps = f.Dataset({"observation": observation, "action": action, "is_first": f.Scalar(dtype=np.bool_)})
        return self.dataset_info_from_configs(
            features=f.FeaturesDict(
                {
                    "steps": steps,
                    "label": f.ClassLabel(num_classes=3),
                    "first": f.Image(shape=(8, 10, 3), encoding_format="png"),
                    "names": f.Tensor(shape=(2,), dtype=np.str_),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for number, length in enumerate(LENGTHS):
            steps = []
            for t in range(length):
                observation = {
                    "image": rng.integers(0, 256, (8, 10, 3), np.uint8),
                    "depth": rng.integers(0, 65536, (8, 10, 1)).astype(np.uint16),
                    "natural_language_instruction": f"pick {number}",
                    "natural_language_embedding": rng.normal(size=512).astype(np.float32),
                    "base_pose_tool_reached": rng.normal(size=7).astype(np.float32),
                    "gripper_closed": rng.normal(size=1).astype(np.float32),
                    "zipped": rng.normal(size=3).astype(np.float32),
                    "plain_bytes": rng.integers(-9, 9, (2, 2)).astype(np.int16),
                    "wide_zipped": rng.normal(size=100).astype(np.float32),
                    "double": rng.normal(size=2),
                    "small": np.uint8(250 + t),
                    "big": np.int64(-(2**50) + t),
                    "rgb_png": rng.integers(0, 256, (8, 10, 3), np.uint8),
                    "instruction": _code_units(f"push the bl\u00f6ck {number}"),
                    "tokens": rng.integers(0, 2**16, 100).astype(np.uint16),
                    "signed": rng.integers(-(2**62), 2**62, (10, 7)),
                    "flags": rng.integers(0, 2, 3).astype(np.bool_),
                    "zipped_double": rng.normal(size=2),
                    "phrases": np.array([f"phrase {t}", "\u00e9t\u00e9"], dtype=object),
                    "box": tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.3, xmax=0.5 + t / 10),
                    "kind": ["a", "b"][t % 2],
                }
                action = {
                    "world_vector": rng.normal(size=3).astype(np.float32),
                    "rotation_delta": rng.normal(size=3).astype(np.float32),
                    "gripper_closedness_action": np.float32([[0, 1, 0, -1, 0, 0][t]]),
                    "terminate_episode": np.int32([0, 0, -1]),
                }
                steps.append({"observation": observation, "action": action, "is_first": t == 0})
            first = np.full((8, 10, 3), number, np.uint8)
            yield number, {"steps": steps, "label": number, "first": first, "names": ["left", f"right {number}"]}


def _code_units(text: str) -> np.ndarray:
    data = text.encode()
    return np.pad(np.frombuffer(data, np.uint8), (0, 512 - len(data))).astype(np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    builder = Fractal20220817Data(data_dir=str(tmp_path_factory.mktemp("tfds")))
    builder.download_and_prepare()
    return str(builder.data_dir)


def _episodes(directory):
    builder = tfds.builder_from_directory(directory)
    config = tfds.ReadConfig(interleave_cycle_length=1)
    return list(tfds.as_numpy(builder.as_dataset("train", read_config=config)))


def _frames(directory):
    return [list(episode["steps"]) for episode in _episodes(directory)]


def test_every_kind_of_feature_equals_tfds(directory):
    opened = index.open_index(directory)
    split = opened.split("train")
    episodes = _episodes(directory)
    steps = [list(episode["steps"]) for episode in episodes]
    frames = [step for episode in steps for step in episode]
    assert split.episodes["length"].tolist() == [len(episode) for episode in steps]
    files = frame_reader.ShardFiles()

    def theirs(name: str) -> list:
        if not name.startswith("steps/"):
            return [episode[name] for episode in episodes]
        values = frames
        for part in name.split("/")[1:]:
            values = [value[part] for value in values]
        return values

    kinds = set()
    for name, feature in opened.dataset.features.items():
        kind = shard_scan.storage(feature)
        kinds.add((feature.kind, kind))
        if kind == "column":
            mine, expected = split.column(name), np.stack(theirs(name))
            np.testing.assert_array_equal(mine, expected.astype(mine.dtype), err_msg=name)
            # Only float64 loses anything, and it has lost it in the record already.
            assert mine.dtype == expected.dtype or expected.dtype == np.float64, name
        elif kind == "text":
            ids, strings = split.texts(name)
            expected = np.stack(theirs(name))
            if feature.kind == "tensor":
                expected = np.array([bytes(row[row > 0].astype(np.uint8)) for row in expected], object)
            mine = np.vectorize(lambda i, strings=strings: strings[i].encode(), otypes=[object])(ids)
            np.testing.assert_array_equal(mine, expected, err_msg=name)
        elif kind == "span":
            for span, expected in zip(split.spans(name).tolist(), theirs(name), strict=True):
                data = files.read(split.shard_path(0), *span)
                if feature.kind == "tensor":
                    mine = shard_scan.decode_tensor(feature, data)
                    assert mine.dtype == expected.dtype
                elif feature.dtype == "uint16":
                    mine = np.empty(expected.shape[:2], np.uint16)
                    frame_reader.decode_depth(data, mine)
                    mine = mine[..., None]
                elif feature.encoding == "png":
                    mine = np.empty(expected.shape, np.uint8)
                    frame_reader.decode_rgb(data, mine)
                else:
                    continue  # TensorFlow decodes JPEG by the fast DCT; see the test with the exact one
                np.testing.assert_array_equal(mine, expected, err_msg=name)
    pairs = [("image", "span"), ("tensor", "column"), ("tensor", "span"), ("tensor", "text"), ("text", "text")]
    assert sorted(kinds) == pairs
    assert not opened.left_out and not opened.warnings


def test_depth_and_recipe_equal_tfds(directory):
    episodes = _frames(directory)
    config = data_config.DataConfig(datasets=(data_config.DatasetConfig(directory),), shuffle=False, horizon=2)
    reader = loader.Loader(config, ("image_main", "depth", "action", "proprio"), 12)
    batch, frames = reader.batch(0), [step for episode in episodes for step in episode]
    np.testing.assert_array_equal(batch["depth"], np.stack([s["observation"]["depth"][..., 0] for s in frames]))
    raw = reader.sources[0].frames
    for at, step in enumerate(frames):
        np.testing.assert_array_equal(
            raw.action[at, :6], [*step["action"]["world_vector"], *step["action"]["rotation_delta"]]
        )
        expected = [*step["observation"]["base_pose_tool_reached"], *step["observation"]["gripper_closed"]]
        np.testing.assert_array_equal(raw.proprio[at], expected)
    states = [raw.action[raw.episode == e, 6].tolist() for e in range(3)]
    # Commands 0 +1 0 -1 0 0: open until the close at step 1, open again from step 3.
    assert {len(s): s for s in states} == {4: [1, 0, 0, 1], 2: [1, 0], 6: [1, 0, 0, 1, 1, 1]}
    images = episode_reader.EpisodeReader(reader.sources[0].split).images("steps/observation/image", 0)
    np.testing.assert_array_equal(images, batch["image_main"][: len(images)])


class Sequences(tfds.core.GeneratorBasedBuilder):
    """Sequences inside a step."""

    name = "sequences"
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = tfds.core.Path(__file__).parent

    def _info(self):
        f = tfds.features
        step = {
            "fixed": f.Sequence(f.Tensor(shape=(2,), dtype=np.float32), length=3),
            "parts": f.Sequence({"x": f.Scalar(dtype=np.int32), "y": f.Text()}, length=2),
            "ragged": f.Sequence(f.Scalar(dtype=np.float32)),
            "action": f.Tensor(shape=(7,), dtype=np.float32),
        }
        return self.dataset_info_from_configs(features=f.FeaturesDict({"steps": f.Dataset(step)}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"steps": [self.step(t) for t in range(4)]}

    @staticmethod
    def step(t):
        return {
            "fixed": np.arange(6, dtype=np.float32).reshape(3, 2) + t,
            "parts": [{"x": t, "y": "one"}, {"x": -t, "y": f"two {t}"}],
            "ragged": [1.0] * t,
            "action": np.full(7, t, np.float32),
        }


def test_sequences_inside_a_step(tmp_path):
    """Compared with what was given to TFDS: 4.9.10 writes them, but its own reader fails on them."""
    builder = Sequences(data_dir=str(tmp_path))
    builder.download_and_prepare()
    opened = index.open_index(str(builder.data_dir))
    split, expected = opened.split("train"), [Sequences.step(t) for t in range(4)]
    np.testing.assert_array_equal(split.column("steps/fixed"), [step["fixed"] for step in expected])
    np.testing.assert_array_equal(
        split.column("steps/parts/x"), [[part["x"] for part in step["parts"]] for step in expected]
    )
    ids, strings = split.texts("steps/parts/y")
    assert [[strings[i] for i in row] for row in ids] == [[part["y"] for part in step["parts"]] for step in expected]
    assert opened.left_out == {"steps/ragged": "a sequence of no fixed length"} and not opened.warnings


@pytest.fixture(scope="module")
def bridge(bridge_dir, tmp_path_factory):
    return index.open_index(bridge_dir, str(tmp_path_factory.mktemp("index")))


def test_bridge_every_value_equals_tfds(bridge):
    builder = tfds.builder_from_directory(bridge.dataset.directory)
    skip = {"steps": tfds.decode.SkipDecoding()}
    for name in ("train", "val"):
        split, files = bridge.split(name), frame_reader.ShardFiles()
        columns = [
            key
            for key, feature in bridge.dataset.features.items()
            if feature.per_step and shard_scan.storage(feature) == "column"
        ]
        images = [f"steps/observation/image_{i}" for i in range(4)]
        wide = bridge.dataset.feature("steps/language_embedding")
        ids, strings = split.texts("steps/language_instruction")
        paths, path_table = split.texts("episode_metadata/file_path")
        config = tfds.ReadConfig(interleave_cycle_length=1)
        count = frame = 0
        for number, theirs in enumerate(tfds.as_numpy(builder.as_dataset(name, decoders=skip, read_config=config))):
            steps, length = theirs["steps"], int(split.episodes["length"][number])
            assert split.episodes["start"][number] == frame
            assert path_table[paths[number]].encode() == theirs["episode_metadata"]["file_path"]
            assert split.column("episode_metadata/episode_id")[number] == theirs["episode_metadata"]["episode_id"]
            rows = slice(frame, frame + length)
            for key in columns:
                value = steps
                for part in key.split("/")[1:]:
                    value = value[part]
                np.testing.assert_array_equal(split.column(key)[rows], value, err_msg=key)
            for key in images:
                spans = split.spans(key)[rows]
                mine = [files.read(split.shard_path(0), offset, size) for offset, size in spans.tolist()]
                assert mine == list(steps["observation"][key.rsplit("/", 1)[1]])
            assert [strings[i].encode() for i in ids[rows]] == list(steps["language_instruction"])
            spans = split.spans(wide.name)[rows].tolist()
            mine = [shard_scan.decode_tensor(wide, files.read(split.shard_path(0), *span)) for span in spans]
            np.testing.assert_array_equal(mine, steps["language_embedding"])
            count, frame = count + 1, frame + length
        assert (count, frame) == (len(split.episodes), split.frames) == (25, 250)
    assert not bridge.left_out


def test_bridge_decoded_images_equal_tfds_with_the_exact_dct(bridge):
    tf = pytest.importorskip("tensorflow")
    split = bridge.split("train")
    reader = episode_reader.EpisodeReader(split)
    mine = reader.images("steps/observation/image_0", 3)
    row, spans = split.episodes[3], split.spans("steps/observation/image_0")
    data = pathlib.Path(split.shard_path(0)).read_bytes()
    for step, (offset, size) in enumerate(spans[row["start"] : row["start"] + row["length"]].tolist()):
        theirs = tf.io.decode_jpeg(data[offset : offset + size], dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(mine[step], theirs)


def test_tfds_still_reads_a_data_set_that_carries_an_index(libero_dir):
    index.open_index(libero_dir)
    builder = tfds.builder_from_directory(libero_dir)
    lengths = [len(list(episode["steps"])) for episode in tfds.as_numpy(builder.as_dataset("train"))]
    assert lengths == [7, 3, 9, 5]
