"""Data sets written by TFDS itself: every encoding that Open-X sets use, read through the index and through TFDS."""

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
        }
        action = {
            "world_vector": f.Tensor(shape=(3,), dtype=np.float32),
            "rotation_delta": f.Tensor(shape=(3,), dtype=np.float32),
            "gripper_closedness_action": f.Tensor(shape=(1,), dtype=np.float32),
            "terminate_episode": f.Tensor(shape=(3,), dtype=np.int32),
        }
        steps = f.Dataset({"observation": observation, "action": action, "is_first": f.Scalar(dtype=np.bool_)})
        return self.dataset_info_from_configs(
            features=f.FeaturesDict({"steps": steps, "label": f.ClassLabel(num_classes=3)})
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
                }
                action = {
                    "world_vector": rng.normal(size=3).astype(np.float32),
                    "rotation_delta": rng.normal(size=3).astype(np.float32),
                    "gripper_closedness_action": np.float32([[0, 1, 0, -1, 0, 0][t]]),
                    "terminate_episode": np.int32([0, 0, -1]),
                }
                steps.append({"observation": observation, "action": action, "is_first": t == 0})
            yield number, {"steps": steps, "label": number}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    builder = Fractal20220817Data(data_dir=str(tmp_path_factory.mktemp("tfds")))
    builder.download_and_prepare()
    return str(builder.data_dir)


def _frames(directory):
    builder = tfds.builder_from_directory(directory)
    config = tfds.ReadConfig(interleave_cycle_length=1)
    return [list(episode["steps"]) for episode in tfds.as_numpy(builder.as_dataset("train", read_config=config))]


def test_every_column_equals_tfds(directory):
    opened = index.open_index(directory)
    split = opened.split("train")
    episodes = _frames(directory)
    assert split.episodes["length"].tolist() == [len(episode) for episode in episodes]
    frames = [step for episode in episodes for step in episode]
    for name in ("zipped", "plain_bytes", "double", "small", "big", "base_pose_tool_reached", "gripper_closed"):
        theirs = np.stack([step["observation"][name] for step in frames])
        mine = split.column(f"steps/observation/{name}")
        np.testing.assert_array_equal(mine, theirs.astype(mine.dtype), err_msg=name)
    for name in ("world_vector", "terminate_episode"):
        np.testing.assert_array_equal(
            split.column(f"steps/action/{name}"), np.stack([step["action"][name] for step in frames])
        )
    assert sorted(split.column("label").tolist()) == [0, 1, 2]
    assert list(opened.left_out) == ["steps/observation/natural_language_embedding"]
    wide = opened.dataset.feature("steps/observation/wide_zipped")
    files, spans = frame_reader.ShardFiles(), split.spans(wide.name)
    for span, step in zip(spans.tolist(), frames):
        mine = shard_scan.decode_tensor(wide, files.read(split.shard_path(0), *span))
        np.testing.assert_array_equal(mine, step["observation"]["wide_zipped"])


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
