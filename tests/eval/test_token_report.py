"""The report of a token sidecar: its figures are those of the sidecar, its pictures and videos are there."""

import base64
import dataclasses
import io
import json
import pathlib
import re

import jax
import libero_writer
import numpy as np
import pytest
from PIL import Image, ImageDraw

from qdepth_jax import annotation, depth, errors, tokenisation
from qdepth_jax.data import definitions, depth_labels, index, sidecar
from qdepth_jax.eval import depth_metrics, token_report
from qdepth_jax.models import tokenizer

CONFIG = tokenizer.TokenizerConfig(
    depth_size=32, grid=4, num_codes=16, code_dim=8, widths=(8, 8), blocks=1,
    range=depth.DepthRange("metric", 0.05, 0.6),
)  # fmt: skip
slow = pytest.mark.slow


def test_no_line_of_a_video_is_wider_than_its_panel():
    words = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    for ends, inverse in (((0.0, 1.0), True), ((0.12, 123.46), False)):
        lines = token_report.header(1234, ends, inverse)
        assert max(words.textlength(text) for pair in lines for text in pair) <= token_report.PANEL - 2
        assert f"{ends[0]:.2f}..{ends[1]:.2f}" in lines[1][1]


def test_panels_keep_the_aspect_of_the_camera_and_ends_are_round():
    values = np.linspace(1.01e-6, 0.9987, 1000)
    assert token_report.colour_ends(values) == (0.01, 0.99)
    assert token_report.colour_ends(np.full(9, 2.5)) == (2.5, 2.5)
    for height, width, size in ((48, 96, (128, 64)), (96, 48, (64, 128)), (24, 24, (128, 128))):
        maps = np.full((2, 32, 32), 0.5)
        drawn = token_report.Drawn(np.arange(2), np.zeros((2, height, width, 3), np.uint8), maps, maps)
        with Image.open(io.BytesIO(token_report.video(drawn, (0.0, 1.0), True))) as found:
            frame = np.asarray(found.convert("L")) < 250
        text = 2 * token_report.LINE + 2
        assert frame.shape[0] == text + size[1]
        assert frame[text:, : size[0]].all() and not frame[text:, size[0] : token_report.PANEL + 4].any()


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    opened = index.open_index(libero_writer.make_libero(folder, lengths=(7, 3, 5)))
    source = tokenisation.open_source(opened, definitions.find("libero_object"), opened.split("train"), "main", "")
    variables = jax.jit(lambda key: tokenizer.init(CONFIG, key))(jax.random.key(0))
    codes = jax.random.normal(jax.random.key(1), (16, 8))
    variables = variables | {"state": variables["state"] | {"codebook": codes}}
    tokenisation.tokenise_split(CONFIG, variables, source, str(folder / "tokens"), jax.devices()[:1])
    return token_report.Part(source, sidecar.open_sidecar(str(folder / "tokens"), "train")), variables


def test_what_is_no_depth_says_so_in_the_report(libero_dir, tmp_path):
    opened, definition = index.open_index(libero_dir), definitions.find("libero_object")
    stand_in = depth_labels.find("stand_in")
    annotation.annotate_split(opened, definition, opened.split("val"), "main", str(tmp_path), stand_in)
    source = tokenisation.open_source(opened, definition, opened.split("val"), "main", str(tmp_path))
    assert source.labels["notice"] == stand_in.notice and source.labels["identity"] == stand_in.name
    text = token_report._labels(source.labels)
    assert "NO depth" in text and stand_in.name in text and "licence none needed" in text


@slow
def test_page_figures_pictures_and_videos(part, tmp_path):
    made, variables = part
    path = token_report.write(str(tmp_path / "report"), CONFIG, variables, [made], episodes=2, frames=2)
    found = json.loads((tmp_path / "report" / "summary.json").read_text())
    (title,) = found
    assert title == "libero_object train, camera main"
    expected = depth_metrics.figures(depth_metrics.from_rows(made.tokens.figures))
    labels = {
        "identity": "the data set's own",
        "kind": "metric",
        "licence": "of the data set",
        "notice": "",
        "digest": "",
    }
    assert found[title]["labels"] == labels
    assert found[title]["rmse"] == expected["rmse"] and found[title]["interval_95"] == expected["interval_95"]
    page = pathlib.Path(path).read_text()
    low, high = expected["interval_95"]["rmse"]
    assert f"{expected['rmse']:.4f} [{low:.4f}, {high:.4f}]" in page
    assert "src=" in page and not re.search(r'src="(?!data:)', page), "nothing outside of the page"
    assert page.count("<tr><td>episode ") == 4 and "error, RMSE" in page and "Code usage" in page
    videos = sorted((tmp_path / "report" / "videos").iterdir())
    assert [v.name for v in videos] == [f"libero_object_train_main_{episode}.gif" for episode in (0, 2)]
    with Image.open(io.BytesIO(videos[0].read_bytes())) as video:
        assert video.n_frames == 7 and video.size[0] > 3 * token_report.PANEL
    assert base64.b64encode(videos[1].read_bytes()).decode() in page


@slow
def test_several_data_sets_have_their_figures_together_too(part, tmp_path):
    made, variables = part
    token_report.write(str(tmp_path), CONFIG, variables, [made, made], episodes=1, frames=1)
    found = json.loads((tmp_path / "summary.json").read_text())
    one, both = found["libero_object train, camera main"], found["all 2 data sets, train, camera main"]
    assert both["frames"] == 2 * one["frames"] and both["rmse"] == pytest.approx(one["rmse"])
    assert both["episodes"] == 2 * one["episodes"]


@slow
def test_what_is_drawn_is_what_the_sidecar_holds(part):
    made, variables = part
    reader = token_report.episode_reader.EpisodeReader(made.source.split)
    decode = jax.jit(lambda v, codes: tokenizer.decode(CONFIG, v["params"], v["state"], codes))
    drawn = token_report._draw(CONFIG, variables, decode, made, reader, 1, np.asarray([0, 2]))
    start = int(made.source.split.episodes["start"][1])
    values = made.tokens.values[start + np.asarray([0, 2])]
    kept = values != sidecar.INVALID_TOKEN
    decoded = depth.denormalise(decode(variables, np.where(kept, values, 0).astype(np.int32)), CONFIG.range)
    pixels = sidecar.token_pixels(kept, 32)
    np.testing.assert_allclose(drawn.decoded[pixels], np.asarray(decoded)[pixels], rtol=1e-5)
    assert np.isnan(drawn.decoded[~pixels]).all()
    raw, scale, offset = made.source.read(reader, 1, np.asarray([0, 2]))
    _, valid = tokenizer.preprocess(CONFIG, raw, np.full(2, scale, np.float32), np.full(2, offset, np.float32))
    np.testing.assert_array_equal(np.isfinite(drawn.truth), valid)


@slow
def test_tokens_of_another_tokenizer_and_of_an_older_version_are_refused(part, tmp_path):
    made, variables = part
    other = dataclasses.replace(CONFIG, beta=0.5)
    with pytest.raises(errors.UserError, match="not of"):
        token_report.write(str(tmp_path / "a"), other, variables, [made])
    old = dataclasses.replace(made, tokens=dataclasses.replace(made.tokens, figures=None))
    with pytest.raises(errors.UserError, match="without figures"):
        token_report.write(str(tmp_path / "b"), CONFIG, variables, [old])
