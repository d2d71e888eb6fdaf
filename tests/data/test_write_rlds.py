"""The RLDS writer against TensorFlow Datasets itself: the same features.json, and every value read back."""

import json

import numpy as np
import pytest

from qdepth_jax.data import tfrecord, write_rlds

FEATURES = {
    "steps": {
        "observation": {
            "image": write_rlds.Image((8, 6, 3), "png"),
            "depth": write_rlds.Image((8, 6, 1), "png", "uint16"),
            "state": write_rlds.Tensor((8,)),
        },
        "reward": write_rlds.Tensor(),
        "is_first": write_rlds.Tensor((), "bool"),
        "language_instruction": write_rlds.Text(),
    },
    "episode_metadata": {
        "file_path": write_rlds.Text(),
        "seed": write_rlds.Tensor((), "int64"),
        "initial_state": write_rlds.Tensor((None,)),
    },
}


def episode(length: int, rng: np.random.Generator) -> tuple[dict, dict, dict]:
    """(steps, metadata, decoded arrays)"""
    import io

    from PIL import Image

    def png(array):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return buffer.getvalue()

    raw = {
        "image": rng.integers(0, 256, (length, 8, 6, 3), np.uint8),
        "depth": rng.integers(0, 65536, (length, 8, 6), np.uint16),
        "state": rng.normal(size=(length, 8)).astype(np.float32),
    }
    steps = {
        "observation/image": [png(frame) for frame in raw["image"]],
        "observation/depth": [png(frame) for frame in raw["depth"]],
        "observation/state": raw["state"],
        "reward": np.arange(length, dtype=np.float32),
        "is_first": np.arange(length) == 0,
        "language_instruction": ["pick üp the bowl"] * length,
    }
    metadata = {"file_path": "a/b", "seed": np.int64(-3), "initial_state": np.arange(length + 2, dtype=np.float32)}
    return steps, metadata, raw


def test_features_json_is_what_tfds_itself_writes(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="extra 'test' is not installed")
    f = tfds.features
    theirs = f.FeaturesDict(
        {
            "steps": f.Dataset(
                {
                    "observation": f.FeaturesDict(
                        {
                            "image": f.Image(shape=(8, 6, 3), encoding_format="png"),
                            "depth": f.Image(shape=(8, 6, 1), dtype=np.uint16, encoding_format="png"),
                            "state": f.Tensor(shape=(8,), dtype=np.float32),
                        }
                    ),
                    "reward": f.Scalar(dtype=np.float32),
                    "is_first": f.Scalar(dtype=np.bool_),
                    "language_instruction": f.Text(),
                }
            ),
            "episode_metadata": f.FeaturesDict(
                {
                    "file_path": f.Text(),
                    "seed": f.Scalar(dtype=np.int64),
                    "initial_state": f.Tensor(shape=(None,), dtype=np.float32),
                }
            ),
        }
    )
    theirs.save_config(str(tmp_path))
    assert write_rlds.features_json(FEATURES) == json.loads((tmp_path / "features.json").read_text())


def test_plain_tfds_reads_every_value_back(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="extra 'test' is not installed")
    rng = np.random.default_rng(0)
    directory = tmp_path / "mine" / "1.0.0"
    directory.mkdir(parents=True)
    written = [episode(length, rng) for length in (3, 1, 5)]
    payloads = [write_rlds.encode_episode(FEATURES, steps, metadata) for steps, metadata, _ in written]
    train = write_rlds.write_split(directory, "mine", "train", [payloads[:2], payloads[2:]])
    assert train == write_rlds.Split("train", (2, 1), sum(map(len, payloads)))
    write_rlds.write_metadata(directory, "mine", "1.0.0", FEATURES, [train], "what it is")

    builder = tfds.builder_from_directory(str(directory))
    assert builder.info.splits["train"].num_examples == 3
    config = tfds.ReadConfig(interleave_cycle_length=1)
    for example, (steps, metadata, raw) in zip(
        builder.as_dataset(split="train", read_config=config), written, strict=True
    ):
        assert example["episode_metadata"]["file_path"].numpy() == b"a/b"
        assert example["episode_metadata"]["seed"].numpy() == -3
        np.testing.assert_array_equal(example["episode_metadata"]["initial_state"], metadata["initial_state"])
        rows = list(example["steps"])
        assert len(rows) == len(raw["image"])
        for t, row in enumerate(rows):
            np.testing.assert_array_equal(row["observation"]["image"], raw["image"][t])
            np.testing.assert_array_equal(row["observation"]["depth"][..., 0], raw["depth"][t])
            np.testing.assert_array_equal(row["observation"]["state"], raw["state"][t])
            assert row["reward"].numpy() == steps["reward"][t]
            assert row["is_first"].numpy() == (t == 0)
            assert row["language_instruction"].numpy().decode() == "pick üp the bowl"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("observation/state", np.zeros((3, 7), np.float32), "declared float32"),
        ("observation/state", np.zeros((3, 8)), "float64"),
        ("observation/image", [np.zeros((8, 6, 3))] * 3, "encoded bytes"),
        ("reward", np.zeros(2, np.float32), "same number of steps"),
        ("extra", np.zeros(3, np.float32), "not declared"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(name, value, message):
    steps, metadata, _ = episode(3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        write_rlds.encode_episode(FEATURES, {**steps, name: value}, metadata)


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def payloads():
        yield b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rlds.write_shard(tmp_path / "x.tfrecord-00000-of-00001", payloads())
    assert list(tmp_path.iterdir()) == []


def test_two_tries_at_one_shard_do_not_write_into_each_other(tmp_path):
    shard = tmp_path / "new-train.tfrecord-00000-of-00001"

    def first():
        yield b"one"
        assert write_rlds.write_shard(shard, [b"one", b"two"]) == (2, 6)  # of a host with the same process number
        yield b"two"

    assert write_rlds.write_shard(shard, first()) == (2, 6)
    assert [record.payload for record in tfrecord.scan_records(str(shard))] == [b"one", b"two"]
    assert [path.name for path in tmp_path.iterdir()] == [shard.name]
