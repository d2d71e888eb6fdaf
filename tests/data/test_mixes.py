"""Mixes: the published weights, and how a mix is found on disk."""

import pytest
from libero_writer import make_libero

from qdepth_jax import errors
from qdepth_jax.data import definitions, mixes

_LONG = "{}_dataset_converted_externally_to_rlds".format
# Typed from octo octo/data/oxe/oxe_dataset_mixes.py OXE_MAGIC_SOUP, grouped by weight.
SOUP = {
    0.54087122203: ["fractal20220817_data"],
    0.8341046294: ["kuka"],
    1.0: [
        "bridge_dataset", "jaco_play", "berkeley_cable_routing", "nyu_door_opening_surprising_effectiveness", "toto",
        _LONG("austin_buds"), _LONG("austin_sailor"), _LONG("austin_sirius"),
        "dlr_edan_shared_control_converted_externally_to_rlds",
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds", "utaustin_mutex", "cmu_stretch",
    ],
    2.0: [
        "taco_play", "roboturk", "viola", "berkeley_autolab_ur5", _LONG("stanford_hydra"), _LONG("ucsd_kitchen"),
        "berkeley_fanuc_manipulation",
    ],
    3.0: [_LONG("nyu_franka_play")],
    0.1: ["language_table", _LONG("furniture_bench")],
    0.2: ["bc_z"],
}  # fmt: skip
SOUP = {name: weight for weight, names in SOUP.items() for name in names}


def test_octo_magic_soup():
    mix = mixes.find("oxe_magic_soup")
    assert dict(mix) == SOUP and len(mix) == 25


def test_openvla_magic_soups():
    base = dict(SOUP)
    del base["nyu_door_opening_surprising_effectiveness"], base["bc_z"]
    base["bridge_orig"] = base.pop("bridge_dataset")
    assert dict(mixes.find("magic_soup")) == base
    plus = base | {"bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
    assert dict(mixes.find("magic_soup_plus")) == plus and len(mixes.find("magic_soup_plus")) == 27
    minus = plus | {"fractal20220817_data": 1.0}
    del minus["language_table"], minus["droid"]
    assert dict(mixes.find("magic_soup_plus_minus")) == minus


def test_small_mixes():
    rtx = {
        "fractal20220817_data": 0.54087122203, "kuka": 0.8341046294, "bridge_dataset": 1.0, "taco_play": 2.0,
        "jaco_play": 2.0, "berkeley_cable_routing": 3.0, "roboturk": 1.0,
        "nyu_door_opening_surprising_effectiveness": 5.0, "viola": 2.0, "berkeley_autolab_ur5": 1.0, "toto": 1.0,
    }  # fmt: skip
    assert dict(mixes.find("rtx")) == rtx
    assert len(mixes.find("rtx_openvla")) == 10 and dict(mixes.find("rtx_openvla"))["bridge_orig"] == 1.0
    assert mixes.find("bridge") == (("bridge_dataset", 1.0),) and mixes.find("fractal")[0][1] == 1.0
    assert dict(mixes.find("bridge_rt_1")) == {"bridge_orig": 1.0, "fractal20220817_data": 1.0}
    assert dict(mixes.find("oxe_simple")) == {"fractal20220817_data": 1.0, "bridge_dataset": 1.0}
    assert [name for name, _ in mixes.find("libero")] == [
        "libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops",
    ]  # fmt: skip


def test_every_data_set_of_every_mix_is_defined_once():
    for mix in mixes.MIXES.values():
        names = [name for name, _ in mix]
        assert len(set(names)) == len(names) and all(weight > 0 for _, weight in mix)
        assert set(names) <= set(definitions.DEFINITIONS)


def test_unknown_mix_suggests_the_nearest():
    with pytest.raises(errors.UserError, match="no mix 'magic_soop', did you mean 'magic_soup'"):
        mixes.find("magic_soop")


def test_all_missing_folders_are_named_at_once(tmp_path):
    make_libero(tmp_path, name="libero_goal_no_noops")
    make_libero(tmp_path, name="libero_10")
    (tmp_path / "libero_object_no_noops").mkdir()
    with pytest.raises(errors.UserError) as caught:
        mixes.datasets("libero", tmp_path)
    text = str(caught.value)
    assert "needs 4 data sets" in text and "3 cannot be used" in text and "libero_goal" not in text
    assert "libero_spatial_no_noops: no folder" in text and "it holds nothing" in text
    assert "there is libero_10: link it" in text


def test_a_mix_on_disk(tmp_path):
    for name, _ in mixes.find("libero"):
        make_libero(tmp_path, name=name)
    found = mixes.datasets("libero", tmp_path)
    assert [entry.name for entry in found] == [name for name, _ in mixes.find("libero")]
    assert all(entry.path.endswith(f"{entry.name}/1.0.0") and entry.weight == 1 for entry in found)
