"""Requests: what is wrong with one is said with what is expected and what came."""

import dataclasses
import pathlib
import tracemalloc

import numpy as np
import pytest

from qdepth_jax import errors, exported, planner
from qdepth_jax.data import normalise, text
from qdepth_jax.models import policy
from qdepth_jax.serve import observation

WORDS = str(pathlib.Path(__file__).resolve().parents[2] / "data" / "text_tokenizer" / "libero.model")
STATE = 8


def reader(**changes):
    """Of a policy with two cameras that was never run."""
    config = policy.sized("tiny", **({"views": ("main", "wrist"), "text_length": 24, "proprio_dim": 10} | changes))
    values = np.random.default_rng(0).uniform(-1, 1, (50, STATE)).astype(np.float32)
    statistics = {
        "proprio": normalise.Normaliser(normalise.compute(values)),
        "action": normalise.Normaliser(normalise.compute(values[:, :7]), raw_dims=(6,)),
    }
    found = exported.Exported("policy", config, {}, {}, WORDS, 24, "raw", 10, "", {})
    loaded = planner.Planner(config, {}, found, "libero_object", statistics["action"], statistics["proprio"],
                             text.TextTokenizer(WORDS), None)  # fmt: skip
    keys = observation.keys_of(config.views, [])
    return observation.Reader(loaded, keys, observation.UNITS["libero"], 64, False, True)


@pytest.fixture(scope="module")
def plain():
    return reader()


def good(**changes):
    side = policy.sized("tiny").siglip.image_size
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    message = {"observation/image": picture, "observation/wrist_image": picture[::-1],
               "observation/state": np.linspace(-0.5, 0.5, STATE), "prompt": "open the drawer"}  # fmt: skip
    return {key: value for key, value in (message | changes).items() if value is not None}


def test_a_request_becomes_a_row(plain):
    message = good()
    row = plain.read(message, 3, 4).row
    np.testing.assert_array_equal(row.batch["image_main"], message["observation/image"])
    np.testing.assert_array_equal(row.batch["image_wrist"], message["observation/wrist_image"])
    assert row.noise.tolist() == [3, 4] and row.previous is None
    # Filled up to what the policy takes, as in training.
    wanted = normalise.normalise(message["observation/state"].astype(np.float32), plain.planner.proprio)
    np.testing.assert_array_equal(row.batch["proprio"], np.r_[wanted, 0, 0][None].astype(np.float32))
    assert row.batch["text"].shape == (24,) and row.batch["text"][0] == text.BOS
    # Lists of numbers are as good as arrays; a seed of its own replaces the server's.
    listed = plain.read(good(**{"observation/state": message["observation/state"].tolist(), "seed": 5}), 3, 4).row
    np.testing.assert_array_equal(listed.batch["proprio"], row.batch["proprio"])
    assert listed.noise.tolist() == [5, 0]
    assert plain.read(good(seed=np.asarray([5, 6])), 3, 4).row.noise.tolist() == [5, 6]


def test_what_is_left_of_a_chunk(plain):
    old = np.asarray([[0.5, 0, 0, 0, 0, 0.25, 1], [0.1, 0, 0, 0, 0, 0, -1]], np.float32)
    request = plain.read(good(**{"rtc/prefix": old, "rtc/frozen": 1}), 0, 0)
    standard = observation.actions.from_libero(old)
    np.testing.assert_allclose(
        request.row.previous[:2], normalise.normalise(standard, plain.planner.action), atol=1e-6
    )  # fmt: skip
    np.testing.assert_array_equal(request.row.previous[2:], 0)
    weights = request.row.weights
    assert weights[0] == 1 and 0 < weights[1] < 1 and (weights[2:] == 0).all()
    # What is frozen goes back to the bit, whatever normalisation made of it; the gripper is LIBERO's.
    planned = np.full((4, 7), 0.7, np.float32)
    answer = plain.actions(request, planned)
    np.testing.assert_array_equal(answer[0], old[0])
    np.testing.assert_array_equal(answer[1:], np.asarray([[0.7] * 6 + [-1]] * 3, np.float32))
    assert len(plain.read(good(**{"rtc/prefix": old}), 0, 0).prefix) == 2


def picture(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation/image": picture(28, 28, 3, dtype=np.float32)}, "uint8.*float32 .28, 28, 3.*convert_to_uint8"),
        ({"observation/image": picture(3, 28, 28)}, "height, width, 3.*channels come last"),
        ({"observation/image": picture(28, 28)}, "height, width, 3"),
        ({"observation/image": picture(28, 65, 3)}, "8 to 64 pixels"),
        ({"observation/image": "a.png"}, "uint8.*the text 'a.png'"),
        ({"observation/wrist_image": None}, "lacks 'observation/wrist_image'; it has 'observation/image'"),
        ({"observation/state": None}, "lacks 'observation/state'"),
        ({"observation/state": np.zeros(7)}, r"must be \[8\], the state of libero_object, got an array float64 \[7\]"),
        ({"observation/state": np.full(8, np.nan)}, "not finite"),
        ({"observation/state": np.full(8, 1e300)}, "not finite"),
        ({"observation/state": [[1, 2], [3]]}, "must be numbers"),
        ({"observation/state": "0"}, "must be numbers"),
        ({"observation/state": ["0"] * 8}, "must be numbers"),
        ({"observation/state": [[[0.0]]]}, "must be numbers"),
        (
            {"observation/state": np.full(8, 3e38)},
            "holds 3e.38; states of libero_object are let in from -10 to 10: are",
        ),
        ({"prompt": 3}, "'prompt' must be text, got int 3"),
        ({"prompt": b"open"}, "must be text, got bytes"),
        ({"prompt": " "}, "1 to 4096 characters"),
        ({"prompt": "drawer " * 30}, r"comes to \d\d+ tokens, this policy takes 24: shorten 'drawer .*'\.\.\.$"),
        ({"observation/joints": np.zeros(3)}, "unknown keys 'observation/joints': this server reads 'observation/im"),
        ({"observation/joints": np.zeros(3)}, "--ignore=KEY,KEY"),
        ({"seed": -1}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"seed": [1, 2, 3]}, "seed, call"),
        ({"seed": np.zeros((1 << 40, 0))}, r"seed, call\], got an array float64 \[1099511627776, 0\]"),
        ({"seed": np.asarray([0.5, 1])}, "whole number"),
        ({"depth": True}, "--depth"),
        ({"depth": 1}, "true or false"),
        ({"rtc/frozen": 1}, "needs 'rtc/prefix'"),
        ({"rtc/prefix": np.zeros((5, 7))}, r"\[k, 7\] with 1 <= k <= 4"),
        ({"rtc/prefix": np.full((2, 7), -1e30)}, "holds -1e.30; actions of libero_object are let in from -10 to 10"),
        ({"rtc/prefix": np.zeros((2, 7)), "rtc/frozen": 3}, "3, but 'rtc/prefix' has 2"),
    ],
)
def test_says_what_is_expected_and_what_came(plain, changes, message):
    with pytest.raises(errors.UserError, match=message):
        plain.read(good(**changes), 0, 0)


def test_lists_of_text_take_no_more_room_than_they_have(plain):
    texts = [["x" * 60_000] + [""] * 999] * 60  # as an array 14 GB
    tracemalloc.start()
    for key in ("observation/state", "rtc/prefix"):
        with pytest.raises(errors.UserError, match="must be numbers"):
            plain.read(good(**{key: texts}), 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, peak


def test_a_policy_that_knows_missing_views_takes_them():
    both = reader(missing_views=True)
    row = both.read(good(**{"observation/wrist_image": None}), 0, 0).row
    assert row.batch["view_mask"].tolist() == [True, False] and not row.batch["image_wrist"].any()
    with pytest.raises(errors.UserError, match="lacks"):
        both.read(good(**{"observation/image": None, "observation/wrist_image": None}), 0, 0)


def test_keys_can_be_renamed():
    keys = observation.keys_of(("main", "side"), ["main=observation/exterior_image_1_left", "state=joints"])
    assert keys.views == {"main": "observation/exterior_image_1_left", "side": "observation/side_image"}
    assert (keys.state, keys.prompt) == ("joints", "prompt")
    for wrong, message in (("wrist=x", "NAME one of main"), ("main", "NAME=KEY"), ("main=prompt", "two things")):
        with pytest.raises(errors.UserError, match=message):
            observation.keys_of(("main",), [wrong])


def test_a_server_without_a_program_for_it_continues_no_chunk(plain):
    off = dataclasses.replace(plain, rtc=False)
    with pytest.raises(errors.UserError, match="--rtc=inpaint or guided"):
        off.read(good(**{"rtc/prefix": np.zeros((2, 7))}), 0, 0)
