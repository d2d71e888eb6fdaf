"""The sample data that ships: opens with plain TFDS, follows the published conventions, depth is sharp at edges."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from qdepth_jax.data import example, tfrecord

DATA = pathlib.Path(__file__).parents[2] / "data"
SUITES = ("libero_object", "libero_spatial")
COUNTS = {"libero_object": {"train": 8, "val": 4}, "libero_spatial": {"train": 12, "val": 4}}
SIZE = 128


class Episode:
    """One record, decoded on demand with our own scanner."""

    def __init__(self, payload: bytes):
        self._payload, self._features = payload, example.scan(payload)

    def numbers(self, name: str, width: int) -> np.ndarray:
        return np.array(self._features[name].value).reshape(-1, width)

    def encoded(self, name: str) -> list[bytes]:
        return [self._payload[o : o + n] for o, n in self._features[name].value]

    def frame(self, name: str, t: int) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(self.encoded(f"steps/observation/{name}")[t])))

    @property
    def instruction(self) -> str:
        return self.encoded("steps/language_instruction")[0].decode()


def load(suite: str, split: str) -> list[Episode]:
    shards = sorted((DATA / suite / "1.0.0").glob(f"{suite}-{split}.tfrecord-*"))
    return [Episode(record.payload) for shard in shards for record in tfrecord.scan_records(shard)]


@pytest.fixture(scope="module", params=SUITES)
def episodes(request) -> dict[str, list[Episode]]:
    return {split: load(request.param, split) for split in ("train", "val")}


@pytest.mark.parametrize("suite", SUITES)
def test_plain_tfds_opens_it(suite):
    tfds = pytest.importorskip("tensorflow_datasets", reason="extra 'test' is not installed")
    builder = tfds.builder_from_directory(str(DATA / suite / "1.0.0"))
    for split, count in COUNTS[suite].items():
        assert builder.info.splits[split].num_examples == count
    first = next(iter(builder.as_dataset(split="val")))
    step = next(iter(first["steps"]))
    assert first["episode_metadata"]["success"].numpy()
    assert step["observation"]["image"].shape == (SIZE, SIZE, 3)
    assert step["observation"]["wrist_image"].shape == (SIZE, SIZE, 3)
    assert step["observation"]["depth"].shape == (SIZE, SIZE, 1)
    assert step["observation"]["depth"].dtype.name == "uint16"
    assert step["observation"]["state"].shape == (8,)
    assert step["observation"]["joint_state"].shape == (7,)
    assert step["action"].shape == (7,)


def test_size_and_counts():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 30e6
    for suite in SUITES:
        info = json.loads((DATA / suite / "1.0.0" / "dataset_info.json").read_text())
        shipped = {s["name"]: sum(map(int, s["shardLengths"])) for s in info["splits"]}
        assert shipped == COUNTS[suite]


def test_every_task_is_in_both_splits_with_other_placements(episodes):
    instructions = {split: {e.instruction for e in listed} for split, listed in episodes.items()}
    assert instructions["train"] == instructions["val"]
    assert len(instructions["train"]) >= 4
    starts = [e.numbers("episode_metadata/initial_state", 1).tobytes() for s in episodes.values() for e in s]
    assert len(set(starts)) == len(starts)


def test_flags_rewards_and_success(episodes):
    for episode in episodes["train"] + episodes["val"]:
        count = len(episode.numbers("steps/action", 7))
        last = np.arange(count) == count - 1
        np.testing.assert_array_equal(episode.numbers("steps/is_first", 1)[:, 0], np.arange(count) == 0)
        np.testing.assert_array_equal(episode.numbers("steps/is_last", 1)[:, 0], last)
        np.testing.assert_array_equal(episode.numbers("steps/is_terminal", 1)[:, 0], last)
        np.testing.assert_array_equal(episode.numbers("steps/reward", 1)[:, 0], last)
        np.testing.assert_array_equal(episode.numbers("steps/discount", 1)[:, 0], np.ones(count))
        assert episode.numbers("episode_metadata/success", 1).all()
        assert len(set(episode.encoded("steps/language_instruction"))) == 1


def test_actions_move_the_hand_as_published(episodes):
    """Gripper -1 opens, +1 closes; action 0..2 is a translation along the axes of state 0..2."""
    for episode in episodes["train"] + episodes["val"]:
        action, state = episode.numbers("steps/action", 7), episode.numbers("steps/observation/state", 8)
        assert np.abs(action).max() <= 1.0
        assert set(np.unique(action[:, 6])) == {-1.0, 1.0}
        opening = state[:, 6] - state[:, 7]
        close = int(np.flatnonzero(action[:, 6] > 0)[0])
        assert opening[close] > 0.07
        assert opening[close + 6] < opening[close] - 0.01  # a can holds the fingers 62 mm apart
        moved = np.diff(state[:, :3], axis=0)
        for axis in range(3):
            assert np.corrcoef(action[1:-1, axis], moved[1:, axis])[0, 1] > 0.7


def test_views_are_upright_and_mirrored_as_published(episodes):
    """The near edge of the table is at the bottom; the hand at y > 0 appears left of the middle."""
    for episode in episodes["train"] + episodes["val"]:
        first, last = episode.frame("depth", 0).astype(int), episode.frame("depth", -1).astype(int)
        assert np.median(first[-10:]) + 300 < np.median(first[:10])
        y = episode.numbers("steps/observation/state", 8)[-1, 1]
        arm = np.argwhere(last < first - 100)  # where the arm came to be
        assert abs(y) > 0.1
        assert np.sign(SIZE / 2 - arm[:, 1].mean()) == np.sign(y)


def mixed_edge_fraction(depth: np.ndarray) -> float:
    """Of all jumps between two surfaces over two pixels: how often the pixel between lies on neither.

    depth: u16 [H, W] in millimetres. A jump is more than 300 mm; on neither surface is more than 60 mm off both.
    """
    d = depth.astype(int)
    jumps = mixed = 0
    for left, middle, right in ((d[:, :-2], d[:, 1:-1], d[:, 2:]), (d[:-2], d[1:-1], d[2:])):
        jump = np.abs(left - right) > 300
        between = np.minimum(np.abs(middle - left), np.abs(middle - right)) > 60
        between &= (middle - left) * (right - middle) > 0
        jumps, mixed = jumps + jump.sum(), mixed + (jump & between).sum()
    return mixed / max(jumps, 1)


def test_depth_is_plausible_and_holds_no_mixtures_of_two_surfaces(episodes):
    """Multisampled depth would put a value between foreground and background on most edge pixels."""
    sharp, blurred = [], []
    for episode in episodes["train"] + episodes["val"]:
        for t in (0, -1):
            depth = episode.frame("depth", t)
            assert depth.dtype == np.uint16 and depth.shape == (SIZE, SIZE)
            assert (depth > 0).all()
            assert 300 < depth.min() < 1000 and 2000 < depth.max() < 6000
            sharp.append(mixed_edge_fraction(depth))
            # What multisampling does, imitated at half the resolution: four samples averaged.
            averaged = depth.reshape(SIZE // 2, 2, SIZE // 2, 2).mean(axis=(1, 3)).astype(np.uint16)
            blurred.append(mixed_edge_fraction(averaged))
    assert np.mean(sharp) < 0.05
    assert np.mean(blurred) > 5 * np.mean(sharp)
