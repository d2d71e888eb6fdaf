"""The page of a data set: every planted fault is named, a clean set has none, and figures are NumPy's own."""

import base64
import dataclasses
import html.parser
import io
import json
import pathlib
import re
import subprocess
import sys

import libero_writer
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from qdepth_jax import errors
from qdepth_jax.data import normalise, quarantine, sidecar, write_rlds
from qdepth_jax.eval import data_facts, data_figures, data_warnings, inspect

ROOT = pathlib.Path(__file__).parents[2]
SIZE = (24, 32)
FEATURES = {
    "steps": {
        "observation": {
            "image": write_rlds.Image((*SIZE, 3)),
            "wrist_image": write_rlds.Image((*SIZE, 3)),
            "state": write_rlds.Tensor((8,)),
            "depth": write_rlds.Image((*SIZE, 1), "png", "uint16"),
        },
        "action": write_rlds.Tensor((7,)),
        "is_last": write_rlds.Tensor((), "bool"),
        "language_instruction": write_rlds.Text(),
    }
}


def make_episode(number, length=12, text="pick up", **planted):
    """LIBERO-shaped steps; `planted` replaces features."""
    rng = np.random.default_rng(number)
    frames = rng.integers(60, 200, (length, *SIZE, 3), np.uint8)
    depth = rng.integers(500, 3000, (length, *SIZE)).astype(np.uint16)
    action = rng.normal(0, 0.2, (length, 7)).astype(np.float32)
    action[:, 6] = rng.choice([-1, 1], length)
    return {
        "observation/image": [simplejpeg.encode_jpeg(f, 90) for f in frames],
        "observation/wrist_image": [simplejpeg.encode_jpeg(f, 90) for f in frames],
        "observation/depth": [libero_writer.png(d) for d in depth],
        "observation/state": rng.normal(size=(length, 8)).astype(np.float32),
        "action": action,
        "is_last": np.arange(length) == length - 1,
        "language_instruction": [text] * length,
        **planted,
    }


def write_set(directory, episodes, name="libero_object"):
    folder = pathlib.Path(directory) / name / "1.0.0"
    folder.mkdir(parents=True)
    payloads = [write_rlds.encode_episode(FEATURES, steps, {}) for steps in episodes]
    splits = [write_rlds.write_split(folder, name, "train", [payloads])]
    write_rlds.write_metadata(folder, name, "1.0.0", FEATURES, splits, "synthetic")
    return str(folder)


def look(directory, tmp_path, **options):
    subject = data_facts.open_subject(directory)
    summary = inspect.write(subject, str(tmp_path / "page"), inspect.Options(**{"episodes": 2, **options}))
    return subject, summary, pathlib.Path(summary["page"]).read_text()


class Balanced(html.parser.HTMLParser):
    """Tags that are opened are closed; pictures are collected."""

    def __init__(self):
        super().__init__()
        self.open, self.pictures = [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(page):
    """Self-contained and well formed; returns its pictures."""
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(src|href)\s*=\s*['\"]?(?!data:)[a-z/]", page) and "<script" not in page
    pictures = []
    for source in parser.pictures:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", source).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format.lower() == kind
            pictures.append(image.size)
    return pictures


def test_a_clean_set_has_no_warning(tmp_path):
    directory = write_set(tmp_path, [make_episode(n, text=f"pick up <{n % 2}>") for n in range(4)])
    subject, summary, page = look(directory, tmp_path)
    assert summary["warnings"] == [] and "Nothing odd" in page
    assert (summary["episodes"], summary["frames"], summary["sampled_frames"]) == (4, 48, 48)
    assert (summary["instructions"], summary["unlabelled_frames"]) == (2, 0)
    assert len(check_page(page)) >= 2 * 3 + 5
    assert "pick up &lt;0&gt;" in page and "pick up <0>" not in page
    assert subject.item.definition.name in page and "steps/observation/depth" in page


def test_every_planted_fault_is_named(tmp_path):
    episodes = [make_episode(n, 40) for n in range(5)]
    episodes[1]["action"][7, 2] = 500.0  # frame 47
    for episode in episodes:
        episode["observation/state"][:, 3] = 0.25
    episodes.append(make_episode(9, 40, text=""))
    episodes.append(make_episode(10, 1))
    episodes.append(make_episode(11, 3))
    episodes.append(make_episode(2, 40))
    episodes[8]["observation/state"][:, 3] = 0.25
    for short in episodes[5:8]:
        short["observation/state"][:, 3] = 0.25
    dark = [simplejpeg.encode_jpeg(np.zeros((*SIZE, 3), np.uint8), 90)] * 40
    episodes[0]["observation/wrist_image"] = dark
    episodes[3]["observation/image"] = [simplejpeg.encode_jpeg(np.full((30, 40, 3), 99, np.uint8), 90)] * 40
    directory = write_set(tmp_path, episodes)
    _, summary, page = look(directory, tmp_path, episodes=1)
    check_page(page)
    found = summary["warnings"]

    def named(*parts):
        hits = [w for w in found if all(part in w for part in parts)]
        assert len(hits) == 1, (parts, found)

    named("action dimension 2: 1 of 244 values", "farthest 500", "record 1 (episode 1), step 7", "frames 47")
    named("proprio: dimensions [3]", "constant")
    named("have no instruction", "1 of 9 episodes", "40 of 284")
    named("1 of 9 episodes have one single frame: 6")
    named("2 of 9 episodes have fewer frames than the horizon of 4: 6, 7")
    named("1 episodes repeat another one", "[2, 8]")
    named("view main differ in size", "30x40 (1)", "24x32 (8)")
    named("nearly) black", "8 of the frames drawn", "wrist of episode 0 step 0")
    assert len(found) == 8, found


def test_quarantined_frames_and_several_languages_are_named(tmp_path):
    directory = write_set(tmp_path, [make_episode(n) for n in range(3)])
    subject = data_facts.open_subject(directory)
    shard = subject.opened.dataset.splits["train"].shards[0]
    subject.split.__dict__["quarantine"] = (
        quarantine.Row("train", shard, 0, 0, 3, quarantine.IMAGE, ""),
        quarantine.Row("train", shard, 1, 1, 5, quarantine.IMAGE, ""),
        quarantine.Row("train", shard, 2, 2, None, quarantine.NON_FINITE, ""),
        quarantine.Row("train", shard, 3, None, None, quarantine.DAMAGED, ""),
        quarantine.Row("train", shard, 4, None, None, quarantine.LOST, ""),
    )
    images = data_facts.Images(subject.split)
    assert data_warnings.find(subject, 4, images) == [
        "2 frames are quarantined and never sampled (damaged image): 3, 17",
        "12 frames are quarantined and never sampled (episode with a non-finite value): 24, 25, 26, 27, 28, 29, 30, 31 "
        "and 4 more",
        "2 records are quarantined and no episodes of the index (1 x damaged record, 1 x unreadable rest of a shard): "
        f"{shard} record 3, {shard} record 4",
    ]
    twice = dataclasses.replace(subject, languages=subject.languages * 2)
    rows, labelled = data_facts.instructions(twice)
    assert rows == [("pick up", 72, 6)] and labelled.all()


def test_nan_and_damaged_images_still_give_a_page(tmp_path):
    episodes = [make_episode(n) for n in range(3)]
    episodes[1]["action"][4, 0] = np.nan
    broken = bytearray(episodes[2]["observation/image"][0])
    episodes[2]["observation/image"][0] = bytes(broken[:40])
    directory = write_set(tmp_path, episodes)
    subject, summary, page = look(directory, tmp_path, episodes=3)
    check_page(page)
    assert subject.item is None and "does not fit this copy" in page and "Raw columns" in page
    assert any(
        "steps/action is not finite in 1 frames" in w and "(episode 1), step 4" in w for w in summary["warnings"]
    )
    assert any("cannot be decoded: steps/observation/image" in w and "episode 2" in w for w in summary["warnings"])


def test_a_set_without_definition_gets_its_raw_columns(tmp_path):
    episodes = [make_episode(n, 40) for n in range(3)]
    episodes[2]["observation/state"][5, 1] = -900
    for episode in episodes:
        episode["action"][:, 4] = 1
    directory = write_set(tmp_path, episodes, name="our_own_robot")
    subject, summary, page = look(directory, tmp_path)
    check_page(page)
    assert any("steps/action: dimensions [4]" in w for w in summary["warnings"])
    assert any("steps/observation/state dimension 1: 1 of 120" in w and "step 5" in w for w in summary["warnings"])
    assert summary["warnings"][0].startswith("no definition for 'our_own_robot'") and summary["sampled_frames"] is None
    assert set(subject.views) == {"image", "wrist_image"} and list(subject.depth) == ["depth"]
    assert "steps/observation/state" in page and "steps/language_instruction" in page
    with pytest.raises(errors.UserError, match="no definition"):
        data_facts.open_subject(directory, name="libero_objct")
    with pytest.raises(errors.UserError, match="no split 'vall'"):
        data_facts.open_subject(directory, split="vall")


def test_depth_and_tokens_of_sidecars(tmp_path):
    directory = write_set(tmp_path, [make_episode(n, 5) for n in range(3)])
    subject = data_facts.open_subject(directory)
    maps = np.random.default_rng(0).integers(0, 3, (15, 8, 8)).astype(np.uint16) * 20000
    tokens = (np.arange(15 * 4).reshape(15, 4) % 6).astype(np.uint16)
    tokens[3:6] = sidecar.INVALID_TOKEN  # two of each code
    roots = {}
    for kind, values, details in (
        ("depth", maps, {"depth_kind": "relative"}),
        ("depth_tokens", tokens, {"grid": 2, "codes": 8}),
    ):
        roots[kind] = str(tmp_path / kind)
        metadata = sidecar.Metadata(
            kind, subject.opened.fingerprint, "train", "steps/observation/image", "maker <1>", values.shape[1:], 15, 3,
            details,
        )  # fmt: skip
        writer = sidecar.Writer(roots[kind], metadata)
        for episode in range(3):
            writer.write(episode, 5 * episode, values[5 * episode : 5 * episode + 5], scale=2.5e-5)
        writer.finish()
    _, summary, page = look(directory, tmp_path, depth=roots["depth"], depth_tokens=roots["depth_tokens"])
    check_page(page)
    assert summary["warnings"] == []
    assert f"{(maps == 0).mean():.2%}" in page and "relative inverse depth" in page and "maker &lt;1&gt;" in page
    assert "6 of 8 codes in 15 frames of 4 tokens, perplexity 6.0" in page
    assert "20.0% of the tokens are invalid" in page
    with pytest.raises(errors.UserError, match="has kind 'depth_tokens'"):
        look(directory, tmp_path, depth=roots["depth_tokens"])
    other = write_set(tmp_path / "other", [make_episode(5)])
    with pytest.raises(errors.UserError, match="fingerprint"):
        look(other, tmp_path, depth=roots["depth"])


def test_figures_are_numpys():
    values = np.random.default_rng(1).normal(size=(data_facts.CHUNK + 1000, 3)).astype(np.float32)
    stats = normalise.compute(values)
    raw = data_facts.raw_statistics(values)
    for field in ("mean", "std", "low", "high", "q01", "q99"):
        np.testing.assert_allclose(getattr(raw, field), getattr(stats, field), rtol=1e-6)
    low, high = np.full(3, -2.0), np.full(3, 1.0)
    counts, outside = data_facts.histogram((part for _, part in data_facts.chunks(values)), low, high)
    for dim in range(3):
        np.testing.assert_array_equal(counts[dim], np.histogram(values[:, dim], 60, (-2, 1))[0])
    np.testing.assert_allclose(outside, ((values < -2) | (values > 1)).mean(0))
    normaliser = normalise.Normaliser(stats, "bounds", raw_dims=(2,))
    shares = data_facts.clipped_share(values, np.arange(len(values)), normaliser)
    assert 0.019 < shares[0] < 0.021 and shares[2] == 0


def test_a_strip_takes_frames_of_any_size():
    tag = data_figures.strip([np.zeros((10, 20, 3), np.uint8), None, np.full((40, 40, 3), 255, np.uint8)], height=30)
    with Image.open(io.BytesIO(base64.b64decode(tag.split("base64,")[1][:-2]))) as image:
        assert image.size == (60 + 60 + 30 + 4, 30)


@pytest.mark.slow
def test_command(tmp_path):
    directory = write_set(tmp_path, [make_episode(n) for n in range(2)])
    command = [sys.executable, str(ROOT / "tools" / "inspect_dataset.py")]
    arguments = [directory, f"--output={tmp_path}/out", "--episodes=1", "--horizon=20"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["page"] == f"{tmp_path}/out/libero_object-train.html" and pathlib.Path(summary["page"]).exists()
    assert ["horizon of 20" in w for w in summary["warnings"]] == [True]


@pytest.mark.slow
def test_real_bridge_and_shipped_data(bridge_dir, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "inspect_dataset.py")]
    for directory in (bridge_dir, ROOT / "data" / "libero_object"):
        arguments = [str(directory), f"--output={tmp_path}", f"--index_dir={tmp_path}/index"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout.strip().splitlines()[-1])
        check_page(pathlib.Path(summary["page"]).read_text())
    bad = subprocess.run([*command, str(tmp_path / "gone")], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and "no data set folder" in bad.stderr and "Traceback" not in bad.stderr


def test_invalid_tokens_are_not_decoded():
    import jax

    from qdepth_jax import depth
    from qdepth_jax.eval import inspect_depth
    from qdepth_jax.models import tokenizer

    metres = depth.DepthRange("metric", 0.1, 1.0)
    config = tokenizer.TokenizerConfig(
        depth_size=16, grid=2, num_codes=8, code_dim=4, widths=(8, 8), blocks=1, range=metres
    )
    variables = tokenizer.init(config, jax.random.key(0))
    raw = np.full((16, 16), 500, np.uint16)
    raw[:8, :8] = 0
    metadata = sidecar.Metadata("depth_tokens", "", "train", "", "", (4,), 1, 1, {})
    tokens = sidecar.Sidecar(
        metadata, "", np.asarray([[65535, 3, 65535, 1]], np.uint16), np.ones(1, np.float32), np.zeros(1, np.float32)
    )
    for coded, gone in ((tokens, [True, False, True, False]), (None, [True, False, False, False])):
        found = inspect_depth.Depth(None, "main", "", "", None, coded, (config, variables))
        values, decoded, said = found._reconstruct([(raw, 0.001, 0.0)], [0])
        expected = np.asarray(gone).reshape(2, 2).repeat(8, 0).repeat(8, 1)
        np.testing.assert_array_equal(np.isnan(decoded[0]), expected)
        np.testing.assert_array_equal(np.isnan(values[0]), expected)
        assert "tokens mostly without valid depth" in said
