"""What was set aside when the index was built: dropped by the converters, invalid in sidecars, and counted."""

import io
import json
import pathlib
import subprocess
import sys

import libero_writer
import numpy as np
import pytest
from PIL import Image

from qdepth_jax import errors
from qdepth_jax.convert import rlds, rlds_claim, rlds_run
from qdepth_jax.data import (
    episode_reader,
    example,
    index,
    quarantine,
    shard_scan,
    sidecar,
    sidecar_sums,
    spec,
    tfrecord,
    write_rlds,
)

ROOT = pathlib.Path(__file__).parents[2]
LENGTHS = (7, 3, 9, 5, 4, 6)
BROKEN = {1: (1,), 4: (0, 3)}  # episode of the train split -> steps without a good image
NAN = 2
FRAMES = [8, 7 + 3 + 9 + 5, 7 + 3 + 9 + 5 + 3]  # ids of the broken frames


def _changed(payload, number, tail):
    features = {}
    for name, (kind, value, _) in example.scan(payload).items():
        features[name] = [payload[a : a + n] for a, n in value.tolist()] if kind == "bytes" else np.array(value)
    for step in BROKEN.get(number, ()):
        for camera in ("image", "depth"):
            feature = features[f"steps/observation/{camera}"]
            feature[step] = feature[step][: len(feature[step]) // 2]
    if number == NAN:
        features["steps/action"].reshape(-1, 7)[2, 3] = np.nan
    if tail:
        del features["steps/action"]
    return example.encode(features)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A set with broken images, a NaN, and a last record that is no episode; indexed with all of it set aside."""
    directory = libero_writer.make_libero(tmp_path_factory.mktemp("damaged"), LENGTHS)
    number = 0
    for path in sorted(pathlib.Path(directory).glob("*-train.tfrecord-*")):
        old = [record.payload for record in tfrecord.scan_records(path)]
        with open(path, "wb") as file:
            for payload in old:
                tfrecord.write_record(file, _changed(payload, number, tail=number == len(LENGTHS) - 1))
                number += 1
    checks = shard_scan.Checks(tolerate=True, images=True, finite=("steps/action",))
    opened = index.open_index(directory, checks=checks)
    bad = opened.split("train").quarantined_by_reason
    assert bad[quarantine.IMAGE].tolist() == FRAMES and len(bad[quarantine.NON_FINITE]) == LENGTHS[NAN]
    return directory


def _convert(directory, output, **options):
    plan = rlds.plan(directory, str(output), rlds.Options(**options))
    with rlds_claim.claimed(plan.target):
        return plan, rlds_run.finish(plan, rlds_run.run_local(plan, 1))


def _payloads(directory, split="train"):
    found = spec.read_spec(directory)
    return [r.payload for shard in found.splits[split].shards for r in tfrecord.scan_records(found.shard_path(shard))]


def test_the_converter_drops_whole_episodes_and_counts_them(damaged, tmp_path, caplog):
    plan, counts = _convert(damaged, tmp_path / "new")
    (said, *_) = counts["source_warnings"]
    assert "declares 6 episodes, the shards hold 5" in said and said in caplog.text
    old = _payloads(damaged)
    assert _payloads(tmp_path / "new") == [old[0], old[3]]
    assert counts["splits"]["train"]["dropped"] == {
        "outside of --split": 0,
        f"quarantined: {quarantine.IMAGE}": 2,
        f"quarantined: {quarantine.NON_FINITE}": 1,
    }
    assert counts["not_indexed"] == counts["splits"]["train"]["not_indexed"] == {quarantine.MISFIT: 1}
    assert plan.provenance["source"]["quarantine"] == index.open_index(damaged).quarantine_digest != ""
    # Nothing bad is left: the result can be indexed with every check.
    checks = shard_scan.Checks(images=True, finite=("steps/action",))
    assert index.open_index(tmp_path / "new", checks=checks).split("train").frames == 7 + 5
    assert _convert(damaged, tmp_path / "small", splits=("train",), resize=(12, 16))[1]["frames"] == 7 + 5
    with pytest.raises(errors.UserError, match=f"no episode of split 'train' is left.*{quarantine.IMAGE}"):
        rlds.plan(damaged, str(tmp_path / "x"), rlds.Options(splits=("train",), episodes="1"))


def test_without_quarantine_the_bad_image_names_the_way_on(damaged, tmp_path):
    plain = tmp_path / "index"
    plan = rlds.plan(damaged, str(tmp_path / "a"), rlds.Options())  # with it: nothing to complain about
    assert plan.dropped["train"]
    index.open_index(damaged, str(plain), checks=shard_scan.Checks(tolerate=True))
    with pytest.raises(ValueError, match=r"step 1: .*index_rlds.py .*--quarantine --check_images"):
        plan = rlds.plan(damaged, str(tmp_path / "b"), rlds.Options(splits=("train",), resize=(9, 9)), str(plain))
        rlds_run.run_local(plan, 1)


def test_lerobot_export_drops_them_too(damaged, tmp_path):
    pytest.importorskip("pyarrow", reason="extra 'lerobot' is not installed")
    pytest.importorskip("av", reason="extra 'lerobot' is not installed")
    from qdepth_jax.convert import lerobot_export

    plan = lerobot_export.plan(damaged, str(tmp_path / "new"))
    with rlds_claim.claimed(plan.target):
        counts = lerobot_export.finish(plan, rlds_run.run_tasks(lerobot_export.convert_file, plan.tasks, 1))
    assert (counts["episodes"], counts["frames"]) == (2, 7 + 5)
    assert counts["dropped"][f"quarantined: {quarantine.IMAGE}"] == 2 and counts["not_indexed"] == {
        quarantine.MISFIT: 1
    }
    assert plan.target.provenance["episodes"]["train"]["kept"] == 2
    # Without it the bad image is named; it must not look like a full disk.
    index.open_index(damaged, str(tmp_path / "index"), checks=shard_scan.Checks(tolerate=True))
    plan = lerobot_export.plan(damaged, str(tmp_path / "b"), index_dir=str(tmp_path / "index"))
    message = r"episode 1\): feature 'steps/observation/depth', step 1: damaged image.*--quarantine"
    with pytest.raises(ValueError, match=message):
        rlds_run.run_tasks(lerobot_export.convert_file, plan.tasks, 1)


def test_a_reader_of_good_steps_never_meets_a_bad_frame(damaged):
    split = index.open_index(damaged).split("train")
    reader = episode_reader.EpisodeReader(split)
    assert [reader.good_steps(e).tolist() for e in (0, 1, NAN, 4)] == [[*range(7)], [0, 2], [], [1, 2]]
    assert reader.image_size("steps/observation/image") == (24, 32)
    camera, depth = "steps/observation/image", "steps/observation/depth"
    assert reader.images(camera, 4, steps=reader.good_steps(4)).shape == (2, 24, 32, 3)
    raw, scale = reader.depth(depth, 0.001, 4, reader.good_steps(4))
    assert scale == 0.001 and raw[:, 0, 0].tolist() == [4 * 100 + 2, 4 * 100 + 3]
    with pytest.raises(ValueError, match=r"step 3: .*--quarantine"):
        reader.images(camera, 4, steps=np.array([1, 3]))


def _tool(name, *arguments):
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_annotation_leaves_them_invalid(damaged, tmp_path):
    made = _tool("annotate_depth", damaged, f"--output={tmp_path}/depth", "--splits=train", "--estimator=stand_in")
    bad = [*FRAMES[:1], *range(10, 19), *FRAMES[1:]]
    assert made["splits"]["train"]["quarantined_frames"] == len(bad)
    values = sidecar.open_sidecar(str(tmp_path / "depth"), "train").values
    assert np.flatnonzero((values == 0).all(axis=(1, 2))).tolist() == bad
    assert (np.delete(values, bad, axis=0) > 0).all()


# In a process of its own: the flags of two tools have one name each.
_TOKENIZE = """
import json, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
from qdepth_jax import depth
from qdepth_jax.models import tokenizer
from tools import tokenize_depth
config = tokenizer.TokenizerConfig(depth_size=32, grid=4, num_codes=16, code_dim=8, widths=(8, 8), blocks=1,
                                   range=depth.DepthRange("metric", 0.05, 0.6))
variables = jax.jit(lambda key: tokenizer.init(config, key))(jax.random.key(0))
print(json.dumps(tokenize_depth.tokenize(config, variables, "libero_object", *sys.argv[1:])))
"""


def test_tokens_without_depth_are_invalid_and_do_not_count(damaged, tmp_path):
    # Metres: episode e, frame t has (e * 100 + t + 1) / 1000 everywhere; the sidecar here has holes.
    split = index.open_index(damaged).split("train")
    metadata = sidecar.Metadata(
        "depth", index.open_index(damaged).fingerprint, "train", "steps/observation/image", "holes", (32, 32),
        split.frames, len(split.episodes), {"depth_kind": "metric"},
    )  # fmt: skip
    writer = sidecar.Writer(str(tmp_path / "depth"), metadata)
    for episode, row in enumerate(split.episodes):
        values = np.full((row["length"], 32, 32), 300, np.uint16)
        values[:, :8, :8] = 0  # the first token: nothing
        values[:, :8, 8:12] = 0  # the second: exactly half
        values[:, :8, 16:21] = 0  # the third: less than half
        values[:, 24:, :] = 40000  # the last row: outside of the range
        writer.write(episode, int(row["start"]), values, scale=0.001)
    writer.finish()
    val = index.open_index(damaged).split("val")
    metadata = sidecar.Metadata(**{**vars(metadata), "split": "val", "frames": val.frames, "episodes": 1})
    writer = sidecar.Writer(str(tmp_path / "depth"), metadata)
    writer.write(0, 0, np.zeros((val.frames, 32, 32), np.uint16))
    writer.finish()
    done = subprocess.run(
        [sys.executable, "-c", _TOKENIZE, damaged, str(tmp_path / "depth"), "", str(tmp_path / "tokens")],
        capture_output=True, text=True, timeout=180, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    tokens = sidecar.open_sidecar(str(tmp_path / "tokens" / "libero_object"), "train")
    found = sidecar_sums.digest(sidecar.open_sidecar(str(tmp_path / "depth"), "train"))
    details = {"grid": 4, "codes": 16, "invalid": 65535, "depth": "holes", "backend": "cpu", "depth_digest": found}
    assert tokens.metadata.details == details
    bad = split.quarantined
    invalid = tokens.values == sidecar.INVALID_TOKEN
    assert invalid[bad].all()
    good = np.delete(invalid, bad, axis=0)
    assert np.flatnonzero(good[0]).tolist() == [0, 2, 12, 13, 14, 15] and (good == good[0]).all()
    assert (tokens.values[~invalid] < 16).all()
    figures = made["train"]
    assert figures["quarantined_frames"] == len(bad) and figures["frames"] == len(good)
    assert figures["invalid_token_share"] == 6 / 16 and figures["invalid_tokens"] == 6 * len(good)
    assert figures["codes_used"] == len(np.unique(tokens.values[~invalid]))
    assert figures["pixels"] == len(good) * (9 * 64 + 32)  # the valid pixels of valid tokens
    assert (made["val"]["codes_used"], made["val"]["invalid_token_share"], made["val"]["pixels"]) == (0, 1.0, 0)
    # The converter keeps the mark and says what it is.
    _, counts = _convert(
        damaged, tmp_path / "new", splits=("train",), depth_tokens=(str(tmp_path / "tokens" / "libero_object"),)
    )
    name = "steps/observation/depth_tokens"
    new = index.open_index(tmp_path / "new").split("train")
    np.testing.assert_array_equal(new.column(name), tokens.values[[*range(7), *range(19, 24)]])
    assert (new.column(name) == 65535).any() and counts["token_rows"] == 12
    assert "65535 = too little valid depth" in (tmp_path / "new" / "features.json").read_text()
    notes = rlds_claim.read_notes(str(tmp_path / "new"), "metadata.json")
    assert notes["added"][0]["details"]["invalid"] == 65535


# ---- instructions that are kept as numbers ----


def _code_units(text, width=512):
    row = np.zeros(width, np.int32)
    row[: len(text.encode())] = list(text.encode())
    return row


@pytest.fixture
def numbers_for_text(tmp_path):
    """As language_table: int32[512] of UTF-8, zero-padded; the second episode has none."""
    folder = tmp_path / "language_table" / "1.0.0"
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(buffer, "png")
    features = {
        "steps": {
            "observation": {
                "rgb": write_rlds.Image((4, 6, 3), "png"),
                "instruction": write_rlds.Tensor((512,), "int32"),
            },
            "action": write_rlds.Tensor((2,)),
        }
    }
    texts, payloads = ("push the blöck", "", "slide it"), []
    for text in texts:
        steps = {
            "observation/rgb": [buffer.getvalue()] * 3,
            "observation/instruction": np.stack([_code_units(text)] * 3),
            "action": np.zeros((3, 2), np.float32),
        }
        payloads.append(write_rlds.encode_episode(features, steps, {}))
    splits = [write_rlds.write_split(folder, "language_table", "train", [payloads])]
    write_rlds.write_metadata(folder, "language_table", "1.0.0", features, splits, "synthetic")
    return str(folder)


def test_an_instruction_kept_as_numbers_is_an_instruction(numbers_for_text, tmp_path):
    _, counts = _convert(numbers_for_text, tmp_path / "new", keep_labelled=True)
    assert counts["episodes"] == 2 and counts["dropped"] == {"no instruction": 1}
    named = _convert(numbers_for_text, tmp_path / "b", keep_labelled=True, language=("observation/instruction",))
    assert named[1]["episodes"] == 2
    with pytest.raises(errors.UserError, match="is no text; there is steps/observation/instruction"):
        rlds.plan(numbers_for_text, str(tmp_path / "c"), rlds.Options(keep_labelled=True, language=("action",)))


def test_it_becomes_the_task_of_lerobot(numbers_for_text, tmp_path):
    pytest.importorskip("pyarrow", reason="extra 'lerobot' is not installed")
    pytest.importorskip("av", reason="extra 'lerobot' is not installed")
    import pyarrow.parquet as pq

    from qdepth_jax.convert import lerobot_export

    plan = lerobot_export.plan(numbers_for_text, str(tmp_path / "new"))
    with rlds_claim.claimed(plan.target):
        lerobot_export.finish(plan, rlds_run.run_tasks(lerobot_export.convert_file, plan.tasks, 1))
    rows = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["tasks"] for row in rows] == [["push the blöck"], [""], ["slide it"]]
    assert "observation.instruction" not in json.loads((tmp_path / "new/meta/info.json").read_text())["features"]
