"""Estimators from weights: sizes found in files, refusals that say what differs, bytes on any number of devices."""

import dataclasses
import importlib.util
import json

import conftest
import jax
import numpy as np
import pytest

from qdepth_jax import depth_weights, device_groups, errors, estimators, video_depth
from qdepth_jax.data import depth_labels
from qdepth_jax.weights import depth_anything as names
from qdepth_jax.weights import table

FIXTURE = conftest.SHARED / "fixtures" / "video_depth_anything_tiny.npz"


def write_safetensors(path, arrays) -> str:
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random tiny weights under the names of the authors' files, and of Hugging Face's."""
    folder, out = tmp_path_factory.mktemp("weights"), {}
    for name, video, rows in (
        ("video", True, names.TABLE),
        ("image", False, names.TABLE),
        ("hf", False, names.HF_TABLE),
    ):
        params = depth_weights.random_params(depth_weights.sized("tiny", video), seed=3)
        there = table.flatten(params)  # without the giant's gated mlp
        arrays = dict(table.save(params, tuple(row for row in rows if row.target in there)))
        out[name] = write_safetensors(folder / f"{name}.safetensors", arrays)
        out[f"{name}_arrays"] = arrays
    return out


def frames_of(*lengths, size=(28, 42), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (n, *size, 3), np.uint8) for n in lengths]


OPTIONS = estimators.Options(input_size=28)


@pytest.mark.parametrize(("file", "video"), [("video", True), ("image", False), ("hf", False)])
def test_size_and_identity_come_from_the_file(files, file, video):
    found = depth_weights.load(files[file], video)
    assert found.size == "tiny" and found.kind == "relative" and found.licence == "unknown"
    assert found.identity == "sha256:" + depth_weights.sha256_of(files[file]) and len(found.identity) == 71
    assert found.config.trunk.offset == (0.0 if file == "hf" else 0.1)
    wanted = depth_weights.random_params(depth_weights.sized("tiny", video), seed=3)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted)


def test_published_licences():
    sizes = {"vits": "Apache-2.0", "vitb": "CC-BY-NC-4.0", "vitl": "CC-BY-NC-4.0", "vitg": "CC-BY-NC-4.0"}
    for size, licence in sizes.items():
        assert depth_weights._licence(size).startswith(licence)


def test_wrong_files_are_named(files, tmp_path):
    def refused(match, path, video, kind=""):
        with pytest.raises(errors.UserError, match=match):
            depth_weights.load(str(path), video, kind)

    refused("is a video network .*use --estimator=video_depth_anything", files["video"], False)
    refused("is an image network .*use --estimator=depth_anything_v2", files["image"], True)
    refused("is no file", tmp_path / "gone.pth", True)
    refused("copy it to a disk", "gs://bucket/weights.pth", True)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused("name its folder", tmp_path / "model.safetensors.index.json", True)
    refused("random:SIZE.* tiny", "random:vitx", True)
    refused("random:SIZE", "random:tiny:x", True)
    refused("no giant Video-Depth-Anything .*use vits, vitb, vitl", "random:vitg", True)
    arrays = dict(files["image_arrays"])
    odd = write_safetensors(tmp_path / "odd.safetensors", {"pretrained.cls_token": np.zeros((1, 1, 100), np.float32)})
    refused(r"width 100 has no published size \(vits 384, vitb 768, vitl 1024, vitg 1536, tiny 64\)", odd, False)
    other = write_safetensors(tmp_path / "other.safetensors", {"a.weight": np.zeros(3, np.float32)})
    refused("holds no Depth Anything V2.*a.weight", other, False)
    # The trunk of one size with the head of another, and one array missing: all of it is said.
    arrays["head.projects.0.weight"] = np.zeros((48, 64, 1, 1), np.float32)
    del arrays["head.scratch.output_conv1.bias"]
    mixed = write_safetensors(tmp_path / "mixed.safetensors", arrays)
    refused(
        r"(?s)2 problems.*tiny.*projects.0.weight: shape \(48, 64, 1, 1\), the model needs \(32, .*bias: not in",
        mixed,
        False,
    )
    metric = write_safetensors(tmp_path / "metric_video.safetensors", files["video_arrays"])
    assert depth_weights.load(metric, True).kind == "metric"
    refused("names itself metric", metric, True, "relative")
    metric = write_safetensors(tmp_path / "metric_image.safetensors", files["image_arrays"])
    refused("metric checkpoint.*transformers:FOLDER", metric, False)
    refused("estimates relative depth", files["image"], False, "metric")


def test_config_json_beside_hugging_face_files_is_followed(files, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", files["hf_arrays"])
    (tmp_path / "config.json").write_text(json.dumps({"backbone_config": {"out_indices": [1, 2, 3, 4]}}))
    assert depth_weights.load(str(tmp_path), False).config.trunk.taps == (0, 1, 2, 3)
    (tmp_path / "config.json").write_text(json.dumps({"depth_estimation_type": "metric"}))
    with pytest.raises(errors.UserError, match="metric checkpoint"):
        depth_weights.load(str(tmp_path), False)
    one = depth_weights.sha256_of(str(tmp_path))
    (tmp_path / "more").write_text("x")
    assert depth_weights.sha256_of(str(tmp_path)) != one


def test_random_weights_say_so():
    found = depth_weights.load("random:tiny:5", True)
    assert "RANDOM" in found.identity and "seed 5" in found.identity and "NO depth" in found.notice
    assert found.identity != depth_weights.load("random:tiny", True).identity
    again = depth_weights.load("random:tiny:5", True)
    assert found.identity == again.identity and found.licence == "none needed (random weights)"


def test_options_and_names_are_checked():
    for changed, match in (
        ({"kind": "inverse"}, "use one of metric, relative"),
        ({"dtype": "float16"}, "use one of float32, bfloat16"),
        ({"input_size": 100}, "multiple of 14"),
        ({"device_batch": -1}, "positive"),
    ):
        with pytest.raises(errors.UserError, match=match):
            estimators.Options(**changed)
    with pytest.raises(errors.UserError, match="needs --weights=FILE"):
        estimators.make("video_depth_anything")
    with pytest.raises(errors.UserError, match=r"there is video_depth_anything, .* stand_in"):
        estimators.make("midas")
    with pytest.raises(errors.UserError, match="takes no --weights"):
        estimators.make("stand_in", "random:tiny")
    for name in depth_labels.ESTIMATORS:
        for flag, value in {"dtype": "bfloat16", "input_size": 518, "device_batch": 4}.items():
            with pytest.raises(errors.UserError, match=f"--estimator={name} takes no --{flag}={value}"):
                estimators.make(name, options=estimators.Options(**{flag: value}))
        kind = depth_labels.ESTIMATORS[name].kind
        other = {"metric": "relative", "relative": "metric"}[kind]
        assert estimators.make(name, options=estimators.Options(kind=kind)).kind == kind
        with pytest.raises(errors.UserError, match=f"takes no --depth_kind={other}: it gives {kind} depth"):
            estimators.make(name, options=estimators.Options(kind=other))
    with pytest.raises(errors.UserError, match="transformers:some/model takes no --input_size=140"):
        estimators.make("transformers:some/model", options=estimators.Options(input_size=140))
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(errors.UserError, match="pip install"):
            estimators.make("transformers:some/model")


def test_names_tell_what_decides_values():
    names_made = {
        estimators.make("depth_anything_v2", "random:tiny", dataclasses.replace(OPTIONS, **more)).name
        for more in ({}, {"dtype": "bfloat16"}, {"input_size": 56})
    }
    assert len(names_made) == 3
    bare = estimators.make("depth_anything_v2", "random:tiny")
    assert (bare.details["dtype"], bare.details["input_size"]) == ("float32", 518) and "input 518 float32" in bare.name


def test_groups_fill_devices_in_order_and_say_so():
    groups = [(np.full((2, 3), i, np.float32), np.arange(2, dtype=np.int32)) for i in range(10)]
    for count in (1, 3, 8):
        fills = []
        out = device_groups.stream(
            lambda c, a, b: {"sum": c * a.sum(1) + b}, 2.0, iter(groups), jax.devices()[:count], fills.append
        )
        found = [row["sum"].tolist() for row in out]
        assert found == [[6.0 * i, 6.0 * i + 1] for i in range(10)]
        assert sum(fills) == -10 % count
    assert list(device_groups.stream(lambda c, a: a, 0, iter([]), jax.devices()[:2])) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", estimators.NETWORKS)
def test_bytes_do_not_depend_on_devices_or_neighbours(name):
    """One device or three; after other episodes or before them. One frame, shorter than a window, two windows."""
    episodes, found = frames_of(1, 40, 5), {}
    for count in (1, 3):
        options = dataclasses.replace(OPTIONS, devices=jax.devices()[:count])
        estimator = estimators.make(name, "random:tiny", options)
        found[count] = list(estimator.estimate(iter(episodes)))
        assert [len(maps) for maps in found[count]] == [1, 40, 5] and found[count][1].shape[1:] == (28, 42)
    for maps in (found[3], list(estimator.estimate(reversed(episodes)))[::-1]):
        assert all((a == b).all() for a, b in zip(maps, found[1], strict=True))
    assert all(np.std(maps) > 1e-4 for maps in found[1])
    assert [estimator.computed(n) for n in (1, 32, 33)] == ([32, 32 * 2, 32 * 2] if "video" in name else [8, 32, 40])


@pytest.mark.slow
def test_a_file_of_the_original_gives_the_originals_depth(tmp_path):
    if not FIXTURE.is_file():
        pytest.skip(f"no golden vectors at {FIXTURE}; QDEPTH_SHARED names the folder that holds fixtures/")
    arrays = dict(np.load(FIXTURE, allow_pickle=False))
    weights = {name.removeprefix("w/"): x for name, x in arrays.items() if name.startswith("w/")}
    path = write_safetensors(tmp_path / "video_depth_anything_tiny.safetensors", weights)
    size = json.loads(str(arrays["ref/config"]))["input_size"]
    estimator = estimators.make("video_depth_anything", path, estimators.Options(input_size=size))
    assert "sha256:" in estimator.name and "RANDOM" not in estimator.name
    (found,) = estimator.estimate([arrays["ref/video_uint8"]])
    np.testing.assert_allclose(found, arrays["ref/video_depth"], atol=1e-4)


def test_wide_images_keep_their_size_and_wide_videos_are_made_smaller():
    assert video_depth.network_size(100, 300, 518, video=False) == (518, 1554)
    assert video_depth.network_size(100, 300, 518) == (308, 924)
    assert video_depth.network_size(180, 320, 518) == video_depth.network_size(180, 320, 518, video=False)


def test_a_pth_holds_what_the_safetensors_hold(files, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    state = {key: torch.from_numpy(np.array(array)) for key, array in files["video_arrays"].items()}
    torch.save(state, tmp_path / "video.pth")
    found, wanted = (depth_weights.load(str(path), True) for path in (tmp_path / "video.pth", files["video"]))
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert found.identity != wanted.identity  # of the bytes of the file
    torch.save({"model": state, "run": object}, tmp_path / "program.pth")
    with pytest.raises(errors.UserError, match="would run code"):
        depth_weights.load(str(tmp_path / "program.pth"), True)
