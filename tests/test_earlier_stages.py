"""Parameters and codes of earlier runs: straight into the shardings of the state that takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import flip_in_array, make_state, mesh_of, on_devices, write

from qdepth_jax import checkpoint, earlier_stages, errors


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
