"""Exports of every format: what is in them, that they are the run's model to the bit, and what is refused."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_runs
import synthetic

from qdepth_jax import checkpoint, earlier_stages, errors, export_model, exported, stored_model
from qdepth_jax import config as config_lib
from qdepth_jax.data import normalise
from qdepth_jax.eval import robot
from qdepth_jax.models import gemma, paligemma, policy, sampling, tokenizer
from qdepth_jax.weights import hf_paligemma, importing, open_pi_zero, table

quiet = functools.partial(export_model.write_export, say=lambda line: None)


def options(**fields):
    return export_model.Options(**fields)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs `qdepth/policy` (with `qdepth/tokenizer`) and `baseline`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "qdepth").mkdir()
    states = {"qdepth": stored_runs.write_qdepth(folder / "qdepth")}
    states["baseline"] = stored_runs.write(folder / "baseline", "policy", stored_runs.BASELINE)
    return folder, states


@pytest.fixture(scope="module")
def safetensors(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "one"
    quiet(str(runs[0] / "qdepth" / "policy"), str(out), options(format="safetensors", shard_bytes=40_000))
    return out


def weight_bytes(folder):
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).glob("model*") if p.name != "model.json"}


@pytest.mark.parametrize("form", [pytest.param("orbax", marks=pytest.mark.slow), "safetensors"])
def test_what_is_loaded_is_the_run_s_model(runs, tmp_path, form):
    workdir, state = str(runs[0] / "qdepth" / "policy"), runs[1]["qdepth"]
    result = quiet(workdir, str(tmp_path / "out"), options(format=form))
    assert result["averaged"] and result["step"] == 7
    assert result["parameters"] == sum(x.size for x in jax.tree.leaves(state.params))
    loaded = exported.load_export(str(tmp_path / "out"))
    assert loaded.kind == "policy" and loaded.model == stored_runs.QDEPTH
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], state.ema)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["state"], state.state)
    # The folder serves where a workdir does.
    kind, model, variables, meta = earlier_stages.load_model(str(tmp_path / "out"))
    assert (kind, model, meta["step"]) == ("policy", stored_runs.QDEPTH, 7)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], state.ema)
    # Statistics undo what the run's own did.
    given = normalise.Normaliser.from_json(stored_runs.normaliser(7, 1))
    assert loaded.statistics["libero_object"]["action"] == given
    # The text tokenizer and the depth tokenizer came along.
    assert pathlib.Path(loaded.text_tokenizer).read_bytes() == pathlib.Path(stored_runs.WORDS).read_bytes()
    assert loaded.max_text_tokens == 24
    assert loaded.pictures == exported.load(workdir).pictures == {"main": [128, 128]}
    decoder = exported.load_export(loaded.depth_tokenizer)
    assert decoder.kind == "tokenizer" and decoder.model == stored_runs.TOKENIZER
    found, _, _ = earlier_stages.load_tokenizer(loaded.depth_tokenizer)
    assert found == stored_runs.TOKENIZER


@pytest.mark.parametrize("form", [pytest.param("orbax", marks=pytest.mark.slow), "safetensors"])
def test_a_frozen_tokenizer_keeps_its_identity_and_its_tokens(runs, tmp_path, form):
    workdir, out = runs[0] / "qdepth" / "tokenizer", str(tmp_path / "frozen")
    result = quiet(str(workdir), out, options(format=form))
    config, variables, _ = earlier_stages.load_tokenizer(str(workdir))
    identity = tokenizer.identity(config, variables["params"], variables["state"])
    assert result["identity"] == stored_model.read_manifest(out)["identity"] == identity
    assert identity in (tmp_path / "frozen" / "README.md").read_text()
    again, frozen, meta = earlier_stages.load_tokenizer(out)
    assert again == config and tokenizer.identity(again, frozen["params"], frozen["state"]) == identity
    # Where its data lies is known, so that tools/tokenize_depth.py --tokenizer=EXPORT needs no more than the folder.
    assert meta["config"]["datasets"] == stored_model.find(str(workdir)).meta["config"]["datasets"]
    raw = np.random.default_rng(0).integers(500, 3500, (3, 8, 8)).astype(np.uint16)
    x, valid = tokenizer.preprocess(config, jnp.asarray(raw), jnp.full((3,), 1e-3), jnp.zeros(3))
    codes = [tokenizer.encode(config, v["params"], v["state"], x, valid) for v in (variables, frozen)]
    np.testing.assert_array_equal(*codes)


def test_what_is_asked_of_a_policy_is_not_asked_of_its_tokenizer(tmp_path):
    stored_runs.write(tmp_path / "codes", "tokenizer", stored_runs.TOKENIZER)  # with averaged parameters
    config, variables, _ = earlier_stages.load_tokenizer(str(tmp_path / "codes"))
    identity = tokenizer.identity(config, variables["params"], variables["state"])
    run = stored_runs.experiment("policy", stored_runs.QDEPTH, tokenizer=str(tmp_path / "codes"))
    stored_runs.write(tmp_path / "policy", "policy", stored_runs.QDEPTH, run, tokenizer=identity)
    asked = options(format="safetensors", average=False, text_tokenizer=stored_runs.WORDS, origin=("openpi",))
    quiet(str(tmp_path / "policy"), str(tmp_path / "out"), asked)
    nested = str(tmp_path / "out" / exported.DEPTH)
    frozen, found, _ = earlier_stages.load_tokenizer(nested)
    assert tokenizer.identity(frozen, found["params"], found["state"]) == identity
    manifests = [stored_model.read_manifest(path) for path in (str(tmp_path / "out"), nested)]
    assert [m["origin"] for m in manifests] == [["openpi"], []]
    assert [m["weights"]["averaged"] for m in manifests] == [False, True] and manifests[1]["identity"] == identity


def test_how_far_ahead_its_depth_lies_goes_along(tmp_path):
    run = stored_runs.experiment("policy", stored_runs.BASELINE)
    run.data.depth_offset = 16
    stored_runs.write(tmp_path / "run", "policy", stored_runs.BASELINE, run)
    quiet(str(tmp_path / "run"), str(tmp_path / "out"), options(format="safetensors"))
    assert [exported.load(str(tmp_path / name)).depth_ahead for name in ("run", "out")] == [16, 16]


def test_a_tokenizer_in_half_precision_is_refused(runs, tmp_path):
    with pytest.raises(errors.UserError, match="would change which tokens"):
        quiet(str(runs[0] / "qdepth" / "tokenizer"), str(tmp_path / "x"), options(dtype="bfloat16"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_predictions_are_those_of_the_workdir_to_the_bit(runs, safetensors):
    workdir = str(runs[0] / "qdepth" / "policy")
    loaded = exported.load_export(str(safetensors))
    _, model, variables, _ = earlier_stages.load_model(workdir)
    batch = synthetic.policy_batch(model, 2)
    noise = jax.random.normal(jax.random.key(1), (2, model.horizon, model.action_dim))

    @jax.jit
    def predict(v):
        depth = sampling.predict_depth(model, v["params"], v["state"], batch)
        return sampling.sample_actions(model, v["params"], v["state"], batch, noise), depth

    for ours, theirs in zip(predict(loaded.variables), predict(variables)):
        np.testing.assert_array_equal(ours, theirs)
        assert np.std(ours) > 0.01
    # And what moves the robot: from the folder alone, moved away from everything it was made from.
    size = model.siglip.image_size
    rng = np.random.default_rng(0)
    observation = {f"{name}image": rng.integers(0, 255, (size, size, 3), np.uint8) for name in ("", "wrist_")}
    observation |= {"state": rng.normal(size=model.proprio_dim).astype(np.float32), "instruction": "open the drawer"}
    moved = shutil.copytree(safetensors, safetensors.parent / "moved")
    given = [robot.libero_policy(path, "libero_object")(observation) for path in (workdir, str(moved))]
    np.testing.assert_array_equal(*given)
    assert given[0].shape == (model.horizon, 7)


def test_export_import_export_is_the_same_to_the_byte(safetensors, tmp_path):
    first = weight_bytes(safetensors)
    assert len(first) > 2 and "model.safetensors.index.json" in first
    again = options(format="safetensors", shard_bytes=40_000)
    quiet(str(safetensors), str(tmp_path / "orbax"))
    quiet(str(tmp_path / "orbax"), str(tmp_path / "second"), again)
    everything = [
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (safetensors, tmp_path / "second")
    ]
    assert everything[0] == everything[1]


def test_bfloat16_is_rounded_once_and_stays(runs, tmp_path):
    workdir, state = str(runs[0] / "qdepth" / "policy"), runs[1]["qdepth"]
    narrow = options(format="safetensors", dtype="bfloat16", average=False)
    result = quiet(workdir, str(tmp_path / "one"), narrow)
    assert not result["averaged"]
    loaded = exported.load_export(str(tmp_path / "one"))
    for ours, theirs in zip(jax.tree.leaves(loaded.variables["params"]), jax.tree.leaves(state.params)):
        assert ours.dtype == jnp.float32
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(np.float32))
        assert np.max(np.abs(ours - theirs) / np.abs(theirs)) <= 2**-8
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["state"], state.state)  # codes are not rounded
    quiet(str(tmp_path / "one"), str(tmp_path / "wide"), options(format="safetensors"))
    quiet(str(tmp_path / "wide"), str(tmp_path / "two"), narrow)
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")
    assert "at most 2^-8" in (tmp_path / "one" / "README.md").read_text()


def test_open_pi_zero_keys_are_its_own(runs, tmp_path):
    state = runs[1]["baseline"]
    quiet(str(runs[0] / "baseline"), str(tmp_path / "one"), options(format="open_pi_zero"))
    read = stored_model.open_files(stored_model.find(str(tmp_path / "one"))).read
    expected = open_pi_zero.save(state.ema)
    header = json.loads(header_of(tmp_path / "one" / "model.safetensors"))
    assert header.pop("__metadata__") == {"format": "pt"} and header.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(read(key), value)
    loaded = exported.load_export(str(tmp_path / "one"))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], state.ema)
    opened = importing.open_weights("open_pi_zero", str(tmp_path / "one"), changes=["head_dim=8", "siglip.heads=2"])
    np.testing.assert_array_equal(opened.weights.read("action_decoder.weight"), expected["action_decoder.weight"])
    opened.weights.close()
    quiet(str(tmp_path / "one"), str(tmp_path / "two"), options(format="open_pi_zero"))
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")


@pytest.mark.slow
def test_open_pi_zero_as_torch_saves_it(runs, tmp_path):
    torch = pytest.importorskip("torch")
    state = runs[1]["baseline"]
    for dtype in ("float32", "bfloat16"):
        quiet(str(runs[0] / "baseline"), str(tmp_path / dtype), options(format="open_pi_zero_pt", dtype=dtype))
        found = torch.load(tmp_path / dtype / "model.pt", weights_only=True)["model"]
        expected = open_pi_zero.save(state.ema)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == getattr(torch, dtype)
            np.testing.assert_array_equal(found[key].float().numpy(), value.astype(dtype).astype(np.float32))
        loaded = exported.load_export(str(tmp_path / dtype)).variables["params"]
        rounded = jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d).astype(np.float32), state.ema)
        jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_open_pi_zero_refuses_what_it_cannot_express(runs, tmp_path):
    with pytest.raises(errors.UserError, match="a depth expert"):
        quiet(str(runs[0] / "qdepth" / "policy"), str(tmp_path / "x"), options(format="open_pi_zero"))
    model = policy.sized("tiny", depth=None, views=("main", "wrist"), image_steps=2)
    with pytest.raises(errors.UserError, match=r"views=\('main', 'wrist'\)\n  image_steps=2"):
        export_model.check_open_pi_zero(model)
    with pytest.raises(errors.UserError, match="proprio_steps=0"):
        export_model.check_open_pi_zero(policy.sized("tiny", depth=None, proprio_steps=0))
    export_model.check_open_pi_zero(policy.sized("tiny", depth=None, proprio_steps=2))
    with pytest.raises(errors.UserError, match="none"):
        export_model.check_open_pi_zero(stored_runs.TOKENIZER)
    assert not list(tmp_path.iterdir())


def header_of(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    return content[8 : 8 + size]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_paligemma_goes_out_and_comes_back_by_import(version, tmp_path):
    expert = gemma.ExpertConfig(width=32, mlp=48, post_norms=version == 2)
    extra = {"softcap": 50.0, "final_softcap": 30.0, "window": 0, "query_scale": 16.0} if version == 2 else {}
    model = paligemma.PaligemmaConfig(
        siglip=stored_runs.BASELINE.siglip,
        vlm=expert,
        layers=2,
        heads=4,
        head_dim=8,
        vocabulary=64,
        scan=False,
        **extra,
    )
    params = stored_runs.random_like(stored_runs.shapes("paligemma", model)["params"], 3)
    meta = {"config": config_lib.to_json(stored_runs.experiment("paligemma", model))}
    meta["source"] = {"format": "big_vision", "files": {}}
    checkpoint.save_params(str(tmp_path / "run"), jax.device_put(params, jax.devices()[0]), meta)
    quiet(str(tmp_path / "run"), str(tmp_path / "hf"), options(format="hf_paligemma"))
    opened = importing.open_weights("hf_paligemma", str(tmp_path / "hf"))
    found = table.load(
        opened.weights, hf_paligemma.rows(opened.config), opened.shapes, hf_paligemma.TITLE, hf_paligemma.clean
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert dataclasses.replace(opened.config, scan=False) == model and not found.missing and not found.unused
    again = {"config": importing.experiment(opened), "source": {"format": "hf_paligemma", "files": {}}}
    checkpoint.save_params(str(tmp_path / "back"), jax.device_put(found.params, jax.devices()[0]), again)
    quiet(str(tmp_path / "back"), str(tmp_path / "hf2"), options(format="hf_paligemma"))
    assert weight_bytes(tmp_path / "hf") == weight_bytes(tmp_path / "hf2")
    assert "Gemma Terms of Use" in (tmp_path / "hf2" / "NOTICE.md").read_text()
    jax.tree.map(np.testing.assert_array_equal, exported.load_export(str(tmp_path / "hf2")).variables["params"], params)
    with pytest.raises(errors.UserError, match="hold policies"):
        quiet(str(tmp_path / "run"), str(tmp_path / "x"), options(format="open_pi_zero"))


def test_files_are_what_the_format_s_own_library_reads(safetensors):
    library = pytest.importorskip("safetensors.numpy")
    found = {}
    for path in sorted(safetensors.glob("*.safetensors")):
        found |= library.load_file(path)
    index = json.loads((safetensors / "model.safetensors.index.json").read_text())
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    loaded = exported.load_export(str(safetensors)).variables
    np.testing.assert_array_equal(found["state.codebook"], loaded["state"]["codebook"])
    np.testing.assert_array_equal(found["params.action_decoder.kernel"], loaded["params"]["action_decoder"]["kernel"])


def test_the_card_says_what_the_checkpoint_records(safetensors):
    card = (safetensors / "README.md").read_text()
    for text in (
        "# tiny_policy",
        "7 steps of 32 examples (224 in all)",
        "| libero_object | 1,234 | 100.0% | train | ffffffffffffffff |",
        "| val/depth_accuracy | 0.5 |",
        "| loss | 0.1429 |",  # of step 7, not of the rows after it
        "| softcap | 50 |",
        "exported.load_export",
        "averaged (EMA)",
        "No foreign weights are recorded",
    ):
        assert text in card, text
    assert str(safetensors.parent) not in card
    assert "trained from random ones" in (safetensors / "NOTICE.md").read_text()


@pytest.mark.slow
def test_terms_follow_the_weights_through_the_stages(runs, tmp_path):
    source = {"source": {"format": "big_vision", "files": {"pt_224.npz": 5}}}
    stored_runs.write(tmp_path / "imported", "policy", stored_runs.BASELINE, **source)
    config = stored_runs.experiment("policy", stored_runs.BASELINE, init_from=str(tmp_path / "imported"))
    stored_runs.write(tmp_path / "stage", "policy", stored_runs.BASELINE, config)
    quiet(str(tmp_path / "stage"), str(tmp_path / "out"))
    notice = (tmp_path / "out" / "NOTICE.md").read_text()
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in notice
    assert "PaliGemma" in (tmp_path / "out" / "README.md").read_text()
    quiet(str(tmp_path / "out"), str(tmp_path / "again"), options(format="safetensors"))
    assert (tmp_path / "again" / "NOTICE.md").read_text() == notice
    shutil.rmtree(tmp_path / "imported")
    quiet(str(tmp_path / "stage"), str(tmp_path / "lost"))
    assert "could not be read" in (tmp_path / "lost" / "NOTICE.md").read_text()
    quiet(str(tmp_path / "stage"), str(tmp_path / "told"), options(origin=("openpi",)))
    assert "openpi weights" in (tmp_path / "told" / "NOTICE.md").read_text()
    # What a user tells never takes the place of what is recorded.
    quiet(str(tmp_path / "out"), str(tmp_path / "both"), options(origin=("openpi",)))
    assert all(text in (tmp_path / "both" / "NOTICE.md").read_text() for text in ("openpi weights", "big_vision's"))
    with pytest.raises(errors.UserError, match="--derived_from=foo is unknown: use big_vision"):
        options(origin=("foo",))


def test_what_a_killed_process_left_is_named(runs, tmp_path):
    (tmp_path / ".out.1.tmp").mkdir()
    said = []
    export_model.write_export(
        str(runs[0] / "baseline"), str(tmp_path / "out"), options(format="safetensors"), said.append
    )
    assert any(".out.1.tmp" in line for line in said)
    with pytest.raises(errors.UserError, match="cannot be written"):
        quiet(str(runs[0] / "baseline"), "/proc/x/out", options(format="safetensors"))


def test_an_existing_output_is_never_touched(runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(errors.UserError, match="exists: choose another folder"):
        quiet(str(runs[0] / "baseline"), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.slow
def test_what_fails_halfway_leaves_nothing(runs, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_model.model_card, "card", fail)
    with pytest.raises(errors.UserError, match="is full"):
        quiet(str(runs[0] / "baseline"), str(tmp_path / "out"), options(format="safetensors"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tokenizers_must_be_those_of_the_run(runs, tmp_path):
    folder = runs[0]
    with pytest.raises(errors.UserError, match=r"no text tokenizer at .*paligemma_tokenizer.model"):
        quiet(str(folder / "baseline"), str(tmp_path / "x"), options(text_tokenizer=str(tmp_path / "absent.model")))
    config = stored_runs.experiment("policy", stored_runs.BASELINE)
    data = stored_runs.meta_of(config, stored_runs.BASELINE)["data"] | {"text_tokenizer": "0" * 16}
    stored_runs.write(tmp_path / "other", "policy", stored_runs.BASELINE, config, data=data)
    with pytest.raises(errors.UserError, match="another text tokenizer"):
        quiet(str(tmp_path / "other"), str(tmp_path / "x"))
    stored_runs.write(tmp_path / "depth", "tokenizer", stored_runs.TOKENIZER, ema=False, seed=5)
    qdepth = str(folder / "qdepth" / "policy")
    with pytest.raises(errors.UserError, match="another depth tokenizer"):
        quiet(qdepth, str(tmp_path / "x"), options(tokenizer=str(tmp_path / "depth")))
    with pytest.raises(errors.UserError, match="--nodepth_tokenizer"):
        quiet(qdepth, str(tmp_path / "x"), options(tokenizer=str(tmp_path / "absent")))
    assert not (tmp_path / "x").exists()
    quiet(qdepth, str(tmp_path / "without"), options(tokenizer="absent", without_depth_tokenizer=True))
    assert exported.load_export(str(tmp_path / "without")).depth_tokenizer == ""
    assert "No depth tokenizer is included" in (tmp_path / "without" / "README.md").read_text()


def damage_manifest(folder):
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))


def damage_truncated(folder):
    path = next(folder.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-4])


def damage_bit(folder):
    path = next(folder.glob("model-00002*"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def damage_missing(folder):
    next(folder.glob("model-00001*")).unlink()


def damage_words(folder):
    (folder / "text_tokenizer.model").write_bytes(b"else")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_manifest, "CRC"),
        (damage_truncated, r"model-00002-of-\d+.safetensors has \d+ bytes, \d+ were written"),
        (damage_bit, "other numbers than were saved in params/"),
        (damage_missing, "model-00001-of-.* is missing"),
        (damage_words, "is not the text tokenizer of this model"),
    ],
)
def test_a_damaged_export_is_refused(safetensors, tmp_path, damage, message):
    shutil.copytree(safetensors, tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(errors.UserError, match=message):
        exported.load_export(str(tmp_path / "bad"))


def test_options_and_steps_that_are_not_there(runs, tmp_path):
    with pytest.raises(errors.UserError, match="use one of orbax, safetensors"):
        options(format="gguf")
    with pytest.raises(errors.UserError, match="use one of float32, bfloat16"):
        options(dtype="float16")
    with pytest.raises(errors.UserError, match=r"no complete checkpoint of step 3; there are \[7\]"):
        quiet(str(runs[0] / "baseline"), str(tmp_path / "x"), options(step=3))


def test_the_command_prints_json(runs, tmp_path, capsys):
    with stored_runs.command("export_checkpoint") as export:
        assert export(f"--workdir={runs[0] / 'baseline'}", f"--output={tmp_path / 'out'}", "--noaverage") == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["format"] == "orbax" and "README.md" in result["files"] and not result["averaged"]
        with pytest.raises(errors.UserError, match="unexpected arguments"):
            export("--workdir=a", "--output=b", "surplus")
