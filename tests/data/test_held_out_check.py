"""Held-out episodes: none of them is trained on, and it is said where they are read more than once."""

import pathlib

import pytest
import tiny_runs
from libero_writer import make_libero

from qdepth_jax import errors, experiment
from qdepth_jax.data import data_config, held_out_check, loader, order

TOKENIZER = str(pathlib.Path(__file__).parents[2] / "data" / "text_tokenizer" / "libero.model")


def sources(directory, split, **more):
    config = data_config.DataConfig(
        datasets=(data_config.DatasetConfig(path=str(directory)),), split=split, horizon=2, threads=1,
        text_tokenizer=TOKENIZER, **more,
    )  # fmt: skip
    reader = loader.Loader(config, ("action",), 2)
    reader.close()
    return reader.sources


@pytest.fixture(scope="module")
def libero(tmp_path_factory):
    return make_libero(tmp_path_factory.mktemp("libero"), (7, 3, 9, 5, 6, 4))


@pytest.mark.parametrize(
    ("training", "held_out", "shared"),
    [
        ("train", "train", "6 of the 6"),
        ("train[:4]", "train[3:]", "1 of the 3"),
        ("train[:67%]", "train[50%:]", "1 of the 3"),
        ("train[:4]", "train[4:]", ""),
    ],
)
def test_splits_and_slices(libero, training, held_out, shared):
    pair = sources(libero, training), sources(libero, held_out)
    if not shared:
        assert held_out_check.check(*pair) == []
        return
    with pytest.raises(errors.UserError, match=f"{shared} held-out episodes of libero_object .*are trained on too"):
        held_out_check.check(*pair)


def test_every_nth_episode(libero):
    every = {"held_out_every": 3}
    training, aside = sources(libero, "train", **every), sources(libero, "train", held_out=True, **every)
    held_out_check.check(training, aside)
    # An eval_split beside it reads all of them.
    with pytest.raises(errors.UserError, match="4 of the 6 held-out episodes"):
        held_out_check.check(training, sources(libero, "train"))


def test_another_split_that_holds_the_same_episodes(libero):
    """The writer gives its last episode to "val" too."""
    training = sources(libero, "train")
    (line,) = held_out_check.check(training, sources(libero, "val"))
    assert "1 of the 1 held-out episodes" in line and "episode 0 of 'val', which is episode 5 of 'train'" in line
    assert held_out_check.check(sources(libero, "train[:5]"), sources(libero, "val")) == []
    (line,) = held_out_check.check(sources(libero, "val"), training)
    assert "1 of the 6 held-out episodes" in line


def test_samples_beyond_the_held_out_frames_are_told():
    def repeats(size: int) -> list[str]:
        return held_out_check.repeats(["x"], order.Order((size,), (1.0,), shuffle=False), 4, 16)

    assert repeats(64) == []
    (line,) = repeats(63)
    assert "reads 64 samples of x, of which 63 frames are held out" in line and "train.eval_batches=3" in line
    assert "train.eval_batches=1 reads one batch" in repeats(5)[0]


def test_a_small_data_set_of_a_mix_repeats_before_the_mix_does():
    # 64 samples of 1,010 frames; but half of them, 32, come from the ten of "small".
    mix = order.Order((1000, 10), (0.5, 0.5), shuffle=False)
    (line,) = held_out_check.repeats(["large", "small"], mix, 4, 16)
    assert "reads 32 samples of small, of which 10 frames" in line and "train.eval_batches=1 reads as many" in line
    assert held_out_check.repeats(["large", "small"], mix, 1, 16) == []


def test_a_run_is_refused_and_told(capsys):
    with pytest.raises(errors.UserError, match="held-out episodes of libero_object"):
        experiment.assemble(tiny_runs.config(train__eval_every=1, eval_split="train"))
    experiment.assemble(tiny_runs.config(train__eval_every=1, train__eval_batches=1000))
    assert "train.eval_batches=1000" in capsys.readouterr().err
