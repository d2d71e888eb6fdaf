"""Tokens by shares, devices and restarts; tokenizers that do not fit the data; figures that add up."""

import dataclasses
import json
import pathlib
import re

import jax
import libero_writer
import numpy as np
import pytest
import stored_runs

from qdepth_jax import annotation, depth, errors, tokenisation
from qdepth_jax.data import definitions, depth_labels, index, sidecar
from qdepth_jax.eval import depth_metrics
from qdepth_jax.models import tokenizer

LIBERO = definitions.find("libero_object")
CONFIG = tokenizer.TokenizerConfig(
    depth_size=32,
    grid=4,
    num_codes=16,
    code_dim=8,
    widths=(8, 8),
    blocks=1,
    range=depth.DepthRange("metric", 0.05, 0.6),
)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda key: tokenizer.init(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return libero_writer.make_libero(tmp_path_factory.mktemp("data"), lengths=(7, 3, 40, 5))


def source_of(path, depth_root="", view="main"):
    opened = index.open_index(path)
    return tokenisation.open_source(opened, LIBERO, opened.split("train"), view, str(depth_root))


def tokenise(source, root, variables, devices=1, share=(0, 1), config=CONFIG):
    return tokenisation.tokenise_split(config, variables, source, str(root), jax.devices()[:devices], *share)


@pytest.mark.slow
def test_bytes_and_figures_by_shares_devices_and_restarts(data, variables, tmp_path, monkeypatch):
    source = source_of(data)
    one = tokenise(source, tmp_path / "one", variables)
    parts = [tokenise(source, tmp_path / "two", variables, 3, (i, 3)) for i in (2, 0, 1)]
    assert [part["directory"] is None for part in parts] == [True, True, False]
    assert sum(part["encoded_now"] for part in parts) == 4
    # Killed after two episodes, then continued: what is done is not encoded again, and the figures are those of all.
    written = []
    write = sidecar.Writer.write

    def killed(self, episode, *arguments, **named):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(episode)
        write(self, episode, *arguments, **named)

    monkeypatch.setattr(sidecar.Writer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenise(source, tmp_path / "three", variables)
    monkeypatch.undo()
    three = tokenise(source, tmp_path / "three", variables, 3)
    assert three["encoded_now"] == 2 and written == [0, 1]
    again = tokenise(source, tmp_path / "three", variables)
    assert again["encoded_now"] == 0
    for name in ("two", "three"):
        for file in pathlib.Path(tmp_path, "one", "train").iterdir():
            assert file.read_bytes() == pathlib.Path(tmp_path, name, "train", file.name).read_bytes(), (name, file)
    left_out = ("directory", "encoded_now")
    texts = {json.dumps({k: v for k, v in row.items() if k not in left_out}) for row in (one, parts[-1], three, again)}
    assert len(texts) == 1 and one["frames"] == 55 and one["episodes"] == 4


def test_tokens_are_those_of_the_model(data, variables, tmp_path):
    source = source_of(data)
    found = tokenise(source, tmp_path, variables)
    opened = index.open_index(data).split("train")
    millimetres = [e * 100 + t + 1 for e, n in enumerate(opened.episodes["length"]) for t in range(n)]
    raw = np.broadcast_to(np.array(millimetres, np.uint16)[:, None, None], (len(millimetres), 24, 32))
    scale = np.full(len(raw), 0.001, np.float32)
    codes, x_hat, _, _ = tokenizer.compiled_roundtrip(CONFIG)(variables, raw, scale, np.zeros_like(scale))
    codes = np.asarray(codes)
    usable = (np.array(millimetres) >= 50) & (np.array(millimetres) <= 600)
    stored = sidecar.open_sidecar(str(tmp_path), "train").values
    assert (stored[~usable] == sidecar.INVALID_TOKEN).all() and 0 < usable.sum() < len(usable)
    assert (stored[usable] == codes[usable]).mean() > 0.99  # ties within float32 may fall either way
    assert found["masked_share"] == pytest.approx((~usable).mean())
    error = (
        np.asarray(depth.denormalise(x_hat, CONFIG.range))[usable] - np.array(millimetres)[usable, None, None] / 1000
    )
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-3)
    assert depth_metrics.row_size(16) == sidecar.open_sidecar(str(tmp_path), "train").figures.shape[1]


def test_tokenizers_of_other_data_are_refused(data, variables, tmp_path):
    source = source_of(data)

    def refused(match, **changed):
        with pytest.raises(errors.UserError, match=match):
            tokenise(source, tmp_path / "out", variables, config=dataclasses.replace(CONFIG, **changed))

    refused(
        "range is 5 to 9, but the depth of libero_object train runs from 0.001 to 0.301",
        range=depth.DepthRange("metric", 5, 9),
    )
    refused("is 'relative', but libero_object train has 'metric'", range=depth.DepthRange("relative", 1.0, 0.0))
    refused("leaves room for 65535", num_codes=65536)
    assert not (tmp_path / "out").exists()


def test_depth_of_other_data_or_another_camera_is_refused(data, variables, tmp_path):
    opened, carried = index.open_index(data), depth_labels.find("dataset")
    annotation.annotate_split(opened, LIBERO, opened.split("train"), "main", str(tmp_path / "depth"), carried)
    more = libero_writer.make_libero(tmp_path / "more", seed=1)
    with pytest.raises(errors.UserError, match="fingerprint"):
        source_of(more, tmp_path / "depth")
    with pytest.raises(errors.UserError, match="camera 'steps/observation/image', but 'steps/observation/wrist_image'"):
        source_of(data, tmp_path / "depth", "wrist")
    with pytest.raises(errors.UserError, match="no depth feature"):
        tokenise(source_of(data, view="wrist"), tmp_path / "wrist", variables)
    # Half by the data set's own depth, then from a sidecar: equal here, but nobody can know that.
    assert tokenise(source_of(data), tmp_path / "tokens", variables, share=(0, 2))["directory"] is None
    with pytest.raises(errors.UserError, match=r"details.depth .*own.*, not 'dataset \(depth that"):
        tokenise(source_of(data, tmp_path / "depth"), tmp_path / "tokens", variables, share=(1, 2))


def test_processes_with_depth_of_one_name_and_other_settings_are_refused(data, variables, tmp_path):
    opened = index.open_index(data)
    for size in (28, 56):
        one = depth_labels.Estimator(
            "one name", "metric", lambda episodes: (np.full(f.shape[:3], 0.3) for f in episodes),
            details={"input_size": size},
        )  # fmt: skip
        annotation.annotate_split(opened, LIBERO, opened.split("train"), "main", str(tmp_path / str(size)), one)
    found = tokenise(source_of(data, tmp_path / "28"), tmp_path / "tokens", variables, share=(0, 2))
    assert found["directory"] is None and len(found["depth_digest"]) == 16
    with pytest.raises(errors.UserError, match=r"details\.depth_digest"):
        tokenise(source_of(data, tmp_path / "56"), tmp_path / "tokens", variables, share=(1, 2))


def test_a_split_without_any_depth_gets_invalid_tokens(data, variables, tmp_path):
    opened = index.open_index(data)
    split = opened.split("train")
    blank = depth_labels.Estimator("blank", "metric", lambda episodes: (np.zeros(f.shape[:3]) for f in episodes))
    annotation.annotate_split(opened, LIBERO, split, "main", str(tmp_path / "depth"), blank)
    found = tokenise(source_of(data, tmp_path / "depth"), tmp_path / "tokens", variables)
    assert found["invalid_token_share"] == 1 and found["masked_share"] == 1 and found["codes_used"] == 0
    assert (sidecar.open_sidecar(str(tmp_path / "tokens"), "train").values == sidecar.INVALID_TOKEN).all()


def test_labels_of_another_estimator_or_sidecar_are_told(data, tmp_path):
    opened = index.open_index(data)
    for name in ("dataset", "simulator"):
        annotation.annotate_split(opened, LIBERO, opened.split("train"), "main", str(tmp_path / name),
                                  depth_labels.find(name))  # fmt: skip
    own, one, other = (source_of(data, root) for root in ("", tmp_path / "dataset", tmp_path / "simulator"))
    row = {"name": "libero_object", "split": "train[:95%]", "fingerprint": opened.fingerprint}
    learnt = [row | {"depth": one.identity, "depth_digest": one.digest}]
    assert tokenisation.other_labels(one, learnt) == "" == tokenisation.other_labels(other, [])
    assert tokenisation.other_labels(own, [row | {"depth": ""}]) == ""
    assert re.search(
        r"learnt depth of dataset .*, this is depth of simulator", tokenisation.other_labels(other, learnt)
    )
    assert re.search(
        r"learnt depth of the data set's own, .* of simul", tokenisation.other_labels(other, [row | {"depth": ""}])
    )
    assert "this is depth of the data set's own" in tokenisation.other_labels(own, learnt)
    changed = [learnt[0] | {"depth_digest": "0" * 16}]
    assert "another sidecar" in tokenisation.other_labels(one, changed)
    # Another split, other data, a run of an older version: nothing to compare the digest with.
    for more in ({"split": "val"}, {"fingerprint": "x"}):
        assert tokenisation.other_labels(one, [changed[0] | more]) == ""
    assert tokenisation.other_labels(one, [row | {"depth": one.identity}]) == ""


@pytest.mark.slow
def test_several_views_in_one_run_and_what_it_warns_of(data, tmp_path, capsys):
    stored_runs.write_tokenizer(tmp_path / "run")
    scaled = depth_labels.Estimator(
        "scaled", stored_runs.TOKENIZER.range.kind,
        lambda episodes: (np.broadcast_to(np.linspace(0.2, 0.9, 32), f.shape[:3]) for f in episodes),
    )  # fmt: skip
    opened = index.open_index(data)
    for view in ("main", "wrist"):
        for split in ("train", "val"):
            annotation.annotate_split(opened, LIBERO, opened.split(split), view, str(tmp_path / "depth" / view), scaled)
    with stored_runs.command("tokenize_depth") as run:
        run(
            f"--tokenizer={tmp_path}/run", f"--dataset=libero_object={data}", f"--depth=libero_object={tmp_path}/depth",
            f"--output={tmp_path}/tokens", "--views=main,wrist",
        )  # fmt: skip
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    for view, camera in (("main", "image"), ("wrist", "wrist_image")):
        made = sidecar.open_sidecar(str(tmp_path / "tokens" / view / "libero_object"), "train")
        assert made.metadata.camera == f"steps/observation/{camera}"
        row = found["views"][view]["libero_object"]["train"]
        assert any("best constant" in warning for warning in row["warnings"])  # random weights
    assert err.count("floor / RMSE 0.") == 4
    titles = json.loads((tmp_path / "tokens" / "report" / "summary.json").read_text())
    assert {f"libero_object train, camera {view}" for view in ("main", "wrist")} < set(titles)
    assert all(row["labels"]["identity"] == "scaled" for row in titles.values())
