"""Parameters and codes of earlier runs: straight into the shardings of the state that takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_runs
from checkpoint_states import flip_in_array, make_state, mesh_of, on_devices, write

from qdepth_jax import (
    checkpoint,
    checkpoint_read,
    checkpoint_sum,
    earlier_stages,
    errors,
    export_model,
    same_conventions,
)
from qdepth_jax import config as config_lib
from qdepth_jax.models import flow, gemma, paligemma, policy_config


def fresh_state(mesh, **params):
    """Another seed than the checkpoints, f32 parameters `b`, `img/w` and what is given."""
    state = make_state(seed=5)
    params = state.params | params
    return on_devices(state.replace(params=params, ema=jax.tree.map(lambda x: x * 1, params)), mesh)


def test_parameters_arrive_in_the_shardings_of_the_fresh_ones(tmp_path, capsys):
    saved = write(tmp_path, [4], mesh_of(1, 4, 2))
    for mesh in (mesh_of(1, 2, 2),):
        state = fresh_state(mesh, extra=np.ones((3, 3), np.float32))
        placed, moments = jax.tree.map(lambda x: x.sharding, state.params), jax.device_get(state.opt_state)
        taken = earlier_stages.take_parameters(state, str(tmp_path))
        for path in (("img", "w"), ("b",)):
            there, here, average, want = saved.ema, taken.params, taken.ema, placed
            for name in path:
                there, here, average, want = there[name], here[name], average[name], want[name]
            np.testing.assert_array_equal(here, there)  # the averaged parameters of the run before
            np.testing.assert_array_equal(average, there)
            assert here.sharding == average.sharding == want
        np.testing.assert_array_equal(taken.params["extra"], np.ones((3, 3)))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(taken.opt_state), moments)
        assert state.params["b"].is_deleted() and not taken.ema["extra"].is_deleted(), "memory was given back before"
        assert "step 4; fresh: ['extra (3, 3)']; unused: none" in capsys.readouterr().err


def test_other_shapes_stay_fresh_and_other_types_are_cast(tmp_path, capsys):
    saved = write(tmp_path, [4])
    state = fresh_state(mesh_of(1, 1, 1), b=np.zeros(9, np.float32))
    narrow = state.params["img"]["w"].astype(jnp.bfloat16)
    state = state.replace(params=state.params | {"img": {"w": narrow}}, ema=None)
    taken = earlier_stages.take_parameters(state, str(tmp_path))
    assert taken.params["img"]["w"].dtype == jnp.bfloat16 and taken.ema is None
    np.testing.assert_array_equal(taken.params["img"]["w"], saved.ema["img"]["w"].astype(jnp.bfloat16))
    assert taken.params["b"].shape == (9,) and not taken.params["b"].is_deleted()
    assert "fresh: ['b (9,) (there (8,))']" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(tmp_path, capsys):
    write(tmp_path, [4, 5])
    flip_in_array(tmp_path / "checkpoints" / "5", "ema", "b/")
    earlier_stages.take_parameters(fresh_state(mesh_of(1, 2, 1)), str(tmp_path))
    err = capsys.readouterr().err
    assert "DAMAGED CHECKPOINT" in err and "checkpoints/5: other numbers" in err and "step 4; fresh: none" in err
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "5"}


def test_a_run_that_shares_nothing_is_refused(tmp_path):
    write(tmp_path, [4])
    state = on_devices(make_state().replace(params={"other": np.zeros(2, np.float32)}, ema=None), mesh_of(1, 1, 1))
    with pytest.raises(errors.UserError, match="shares no parameter with this model"):
        earlier_stages.take_parameters(state, str(tmp_path))
    assert not state.params["other"].is_deleted()


def test_codes_arrive_in_their_sharding():
    state = on_devices(make_state(), mesh_of(1, 4, 2))
    codes = np.arange(32, dtype=np.float32).reshape(4, 8)
    placed = earlier_stages.place_codebook(state, codes).state["codebook"]
    np.testing.assert_array_equal(placed, codes)
    assert placed.sharding == state.state["codebook"].sharding


def test_a_host_that_cannot_read_stops_all(tmp_path):
    write(tmp_path, [4])
    with pytest.raises(errors.UserError, match="another process says why"):
        earlier_stages.take_parameters(fresh_state(mesh_of(1, 1, 1)), str(tmp_path), agree=lambda ok: False)
    assert checkpoint.read_meta(str(tmp_path))["step"] == 4


# ---- conventions, vocabularies, the depth expert's start, exports as a start ----


def policy_state(model, seed=0):
    variables = stored_runs.random_like(stored_runs.shapes("policy", model), seed)
    state = make_state().replace(params=variables["params"], state=variables["state"], ema=None)
    return jax.device_put(state, jax.devices()[0])


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    return str(folder), stored_runs.write(folder, "policy", stored_runs.BASELINE)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"softcap": 0.0}, "softcap: 50.0 there, 0.0 here"),
        ({"vlm": gemma.ExpertConfig(32, 48, rope_theta=500.0)}, "vlm.rope_theta: 10000.0 there, 500.0 here"),
        ({"flow": flow.FlowConfig(time_period=100.0)}, "flow.time_period: 10000.0 there, 100.0 here"),
        ({"positions": policy_config.PositionConfig(first=0)}, "positions.first: 1 there, 0 here"),
        ({"heads": 2, "head_dim": 16}, "head_dim: 8 there, 16 here\n  heads: 4 there, 2 here"),
        ({"norm_eps": 1e-5}, "norm_eps: 1e-06 there, 1e-05 here"),
        ({"vocabulary": 700}, r"vocabulary: 640 rows .* there, 700 here \(ids 640 to 699 only here\)"),
    ],
)
def test_other_conventions_are_refused(baseline, fields, line):
    model = dataclasses.replace(stored_runs.BASELINE, **fields)
    with pytest.raises(errors.UserError, match=line):
        earlier_stages.check_conventions(baseline[0], model)


def test_sizes_and_choices_of_training_are_no_conventions(baseline):
    model = dataclasses.replace(
        stored_runs.QDEPTH, horizon=9, proprio_dim=8, views=("main", "wrist"), dtype="bfloat16", remat="full",
        faithful=True, flow=flow.FlowConfig(time="uniform", steps=5),
    )  # fmt: skip
    earlier_stages.check_conventions(baseline[0], model)


def test_every_field_of_a_policy_is_a_size_or_is_compared():
    """A field that is added later is compared unless same_conventions.py says what it is."""
    compared = same_conventions.conventions(stored_runs.BASELINE).keys()
    assert {"softcap", "heads", "kv_heads", "head_dim", "norm_eps", "vlm.rope_theta", "action.rope_theta",
            "positions.first", "flow.sigma_min", "flow.time_period"} <= compared  # fmt: skip
    assert not {"horizon", "dtype", "remat", "siglip.width", "vlm.width", "flow.steps", "depth"} & compared


def test_ids_that_mean_other_words_are_refused_and_other_codes_are_said(tmp_path, capsys):
    before = {"text_tokenizer": "aa", "text_rule": "raw"}
    meta = {"config": config_lib.to_json(stored_runs.experiment("policy", stored_runs.BASELINE))}
    meta |= {"data": before, "tokenizer": "codes-1"}
    checkpoint.save_params(str(tmp_path), {"b": jnp.zeros(3)}, meta)
    with pytest.raises(errors.UserError, match="text tokenizer aa, this run reads its texts with bb"):
        earlier_stages.check_inputs(str(tmp_path), before | {"text_tokenizer": "bb"}, "codes-1")
    earlier_stages.check_inputs(str(tmp_path), before, "codes-1")
    assert capsys.readouterr().err == ""
    earlier_stages.check_inputs(str(tmp_path), before | {"text_rule": "openpi"}, "codes-2")
    err = capsys.readouterr().err
    assert "data.text_rule='raw' in" in err and "here by 'openpi'" in err
    assert "tokenizer codes-1, here those of codes-2" in err


@pytest.mark.slow
def test_a_policy_starts_from_paligemma_in_its_own_way(tmp_path, capsys):
    model = stored_runs.BASELINE
    there = paligemma.PaligemmaConfig(
        siglip=model.siglip, vlm=model.vlm, layers=3, heads=4, head_dim=8, vocabulary=model.vocabulary
    )
    params = stored_runs.random_like(stored_runs.shapes("paligemma", there)["params"], 3)
    config = config_lib.to_json(stored_runs.experiment("paligemma", there))
    checkpoint.save_params(str(tmp_path), jax.device_put(params, jax.devices()[0]), {"config": config})
    taken = earlier_stages.take_parameters(policy_state(model), str(tmp_path), model=model)
    jax.tree.map(np.testing.assert_array_equal, taken.params["llm"]["layers"]["vlm"], params["llm"]["layers"]["vlm"])
    err = capsys.readouterr().err
    assert "differ by design: softcap: 0.0 there, 50.0 here" in err and "unused: ['llm/final_norm_vlm/scale']" in err
    for fields, line in (
        ({"vlm": gemma.ExpertConfig(32, 48, post_norms=True)}, "vlm.post_norms: False there, True here"),
        ({"vocabulary": 704}, r"vocabulary: 640 rows .* set model.vocabulary=640"),
    ):
        with pytest.raises(errors.UserError, match=line):
            earlier_stages.check_conventions(str(tmp_path), dataclasses.replace(model, **fields))


def test_refusal_comes_before_any_memory_is_given_back(baseline):
    model = dataclasses.replace(stored_runs.BASELINE, softcap=0.0)
    state = policy_state(model)
    with pytest.raises(errors.UserError, match="softcap"):
        earlier_stages.take_parameters(state, baseline[0], model=model)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("form", [pytest.param("orbax", marks=pytest.mark.slow), "safetensors", "open_pi_zero"])
def test_a_stage_starts_from_an_export(baseline, form, tmp_path, capsys):
    folder, saved = baseline
    options = export_model.Options(format=form)
    export_model.write_export(folder, str(tmp_path / "out"), options, lambda line: None)
    state = policy_state(stored_runs.QDEPTH, seed=1)
    codebook = np.asarray(state.state["codebook"])
    taken = earlier_stages.take_parameters(state, str(tmp_path / "out"), model=stored_runs.QDEPTH)
    there, here = checkpoint_read.by_path(saved.ema), checkpoint_read.by_path(taken.params)
    for path, leaf in there.items():
        np.testing.assert_array_equal(here[path], leaf)
    assert all("depth" in path for path in here.keys() - there.keys())
    np.testing.assert_array_equal(taken.state["codebook"], codebook)
    assert "unused: none" in capsys.readouterr().err


def test_no_sum_waits_for_a_process_that_could_not_read_an_export(baseline, tmp_path, monkeypatch):
    """Sums of arrays on several hosts are collective: all would wait in them for the one whose read failed."""
    options = export_model.Options(format="safetensors")
    export_model.write_export(baseline[0], str(tmp_path / "out"), options, lambda line: None)
    asked, summed = [], []
    own = checkpoint_sum.sums
    monkeypatch.setattr(checkpoint_sum, "sums", lambda leaves: (summed.append(len(asked)), own(leaves))[1])

    def agree(ok):  # the other process cannot read
        asked.append(ok)
        return False

    with pytest.raises(errors.UserError, match=r"cannot be read at the moment.*another process says why"):
        earlier_stages.take_parameters(policy_state(stored_runs.QDEPTH), str(tmp_path / "out"), agree=agree)
    assert asked and not summed
    answers = []

    def agree_read(ok):  # the other one reads, and finds other numbers
        answers.append(ok)
        return len(answers) < 3

    with pytest.raises(errors.UserError, match="another process read other numbers"):
        earlier_stages.take_parameters(policy_state(stored_runs.QDEPTH), str(tmp_path / "out"), agree=agree_read)
    assert len(summed) == 1


def test_the_depth_expert_starts_as_the_action_expert(baseline):
    model = stored_runs.QDEPTH
    state = policy_state(model, seed=1)
    state = state.replace(ema=jax.tree.map(lambda x: x.copy(), state.params))
    taken = earlier_stages.take_parameters(state, baseline[0], model=model)
    copied = earlier_stages.copy_action_expert(taken)
    for tree in (copied.params, copied.ema):
        layers = tree["llm"]["layers"]
        jax.tree.map(np.testing.assert_array_equal, layers["depth"], layers["action"])
        np.testing.assert_array_equal(
            tree["llm"]["final_norm_depth"]["scale"], tree["llm"]["final_norm_action"]["scale"]
        )
        np.testing.assert_array_equal(
            layers["action"]["mlp"]["linear"], baseline[1].ema["llm"]["layers"]["action"]["mlp"]["linear"]
        )
        assert (
            layers["depth"]["mlp"]["linear"].unsafe_buffer_pointer()
            != layers["action"]["mlp"]["linear"].unsafe_buffer_pointer()
        )
    encoder = copied.params["depth_encoder"]
    jax.tree.map(np.testing.assert_array_equal, encoder, stored_runs.random_like(
        stored_runs.shapes("policy", model), 1)["params"]["depth_encoder"])  # fmt: skip


@pytest.mark.slow
def test_a_depth_expert_of_another_size_cannot_start_so():
    other = dataclasses.replace(stored_runs.QDEPTH.depth, expert=gemma.ExpertConfig(width=20, mlp=24))
    state = policy_state(dataclasses.replace(stored_runs.QDEPTH, depth=other))
    with pytest.raises(errors.UserError, match=r"llm/final_norm_depth/scale \(20,\): the action expert has \(16,\)"):
        earlier_stages.copy_action_expert(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    with pytest.raises(errors.UserError, match="no depth expert"):
        earlier_stages.copy_action_expert(policy_state(stored_runs.BASELINE))


def test_the_start_of_the_depth_expert_is_checked(baseline, tmp_path):
    with pytest.raises(errors.UserError, match="init_depth_from='vlm' is unknown: use one of fresh, action"):
        earlier_stages.check_depth_start("vlm", stored_runs.QDEPTH)
    with pytest.raises(errors.UserError, match="no depth expert"):
        earlier_stages.check_depth_start("action", stored_runs.BASELINE)
    earlier_stages.check_depth_start("action", stored_runs.QDEPTH)
    stored_runs.write(tmp_path, "policy", stored_runs.QDEPTH, ema=False)
    state = policy_state(stored_runs.QDEPTH)
    assert earlier_stages.start_depth_expert(state, "fresh", str(tmp_path)) is state
    with pytest.raises(errors.UserError, match="would overwrite the depth expert that init_from="):
        earlier_stages.start_depth_expert(state, "action", str(tmp_path))
    depth = earlier_stages.start_depth_expert(state, "action", baseline[0]).params["llm"]["layers"]["depth"]
    np.testing.assert_array_equal(depth["mlp"]["linear"], state.params["llm"]["layers"]["action"]["mlp"]["linear"])
