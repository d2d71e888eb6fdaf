"""Every recipe against what the original transforms of octo and OpenVLA make of the same random trajectories.

tests/golden/oxe_standardise.npz holds inputs (NAME|in|FEATURE, episodes of NAME|lengths steps end to end) and outputs
(NAME|octo|action, NAME|openvla|proprio, ...; NAME|octo|images: feature of the primary, secondary and wrist view) of the
repositories' own code: octo 241fb35, OpenVLA c8f03f4, tensorflow_graphics ad932c3, run under TensorFlow 2.21.
"""

import pathlib

import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.convert import rlds_features
from qdepth_jax.data import definitions, example, index, mixes, recipes, spec, standardise, write_rlds

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "oxe_standardise.npz")
NAMES = sorted({key.split("|")[0] for key in GOLDEN if key.endswith("|lengths")})
# Rotations made from quaternions, in float64 here and float32 there.
ROUNDED = (
    "furniture_bench_dataset_converted_externally_to_rlds",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
)


def _columns(name):
    prefix = f"{name}|in|"
    found = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}
    return standardise.Columns(found.__getitem__, GOLDEN[f"{name}|lengths"])


def _sampled(name):
    """bool [F]: what remains of the episodes without their first or last step."""
    definition, lengths = definitions.find(name), GOLDEN[f"{name}|lengths"]
    kept = [np.arange(n) for n in lengths]
    first, last = int(definition.drop_first), int(definition.drop_last)
    return np.concatenate([(t >= first) & (t < len(t) - last) for t in kept])


@pytest.mark.parametrize("name", NAMES)
def test_actions_equal_the_originals(name):
    ours = definitions.find(name).action(_columns(name))[_sampled(name)]
    assert ours.dtype == np.float32
    compared = 0
    for who in ("octo", "openvla"):
        if f"{name}|{who}|action" in GOLDEN:
            theirs = GOLDEN[f"{name}|{who}|action"]
            # Near the poles the arcsine of the float32 original is off by some 1e-6.
            np.testing.assert_allclose(ours[:, 3:6], theirs[:, 3:6], atol=1e-5 if name in ROUNDED else 0, rtol=0)
            np.testing.assert_array_equal(np.delete(ours, [3, 4, 5], 1), np.delete(theirs, [3, 4, 5], 1))
            compared += 1
    assert compared


@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}|octo|proprio" in GOLDEN])
def test_proprioception_equals_octo_without_the_empty_places(name):
    definition = definitions.find(name)
    ours = definition.proprio(_columns(name))[_sampled(name)]
    assert not ours[:, definition.proprio_padding].any()
    ours, theirs = np.delete(ours, definition.proprio_padding, 1), GOLDEN[f"{name}|octo|proprio"]
    if not ours.shape[1]:
        assert not theirs.any()  # no proprioception: one zero there
        return
    if name == "cmu_stretch":
        assert not theirs[:, 3:6].any()
        theirs = np.delete(theirs, [3, 4, 5], 1)
    if name == "taco_play":
        # DEVIATION: the gripper's width instead of the first joint.
        state = GOLDEN["taco_play|in|observation/robot_obs"]
        np.testing.assert_array_equal(theirs[:, 6], state[:, 7])
        np.testing.assert_array_equal(ours[:, 6], state[:, 6])
        ours, theirs = ours[:, :6], theirs[:, :6]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}|openvla|proprio" in GOLDEN])
def test_proprioception_has_the_places_of_openvla(name):
    definition = definitions.find(name)
    ours, theirs = definition.proprio(_columns(name))[_sampled(name)], GOLDEN[f"{name}|openvla|proprio"]
    if name in ("droid", "dobbe"):  # DEVIATION: an empty place before the gripper
        assert theirs.shape[1] == 7 and definition.proprio_padding == (6,)
        ours = np.delete(ours, 6, 1)
    if name.startswith("libero"):  # DEVIATION: none before the fingers
        assert not theirs[:, 6].any()
        theirs = np.delete(theirs, 6, 1)
    if name == "taco_play":  # DEVIATION: the gripper's width instead of the first joint
        ours, theirs = ours[:, :7], theirs[:, :7]
    np.testing.assert_array_equal(ours, theirs)


def _names(features):
    return {view: f"observation/{name}" for view, name in zip(("main", "secondary", "wrist"), features) if name}


@pytest.mark.parametrize("name", NAMES)
def test_views_and_depth_are_those_of_the_originals(name):
    row = definitions.find(name)
    who = "octo" if f"{name}|octo|images" in GOLDEN else "openvla"
    views, depth = (_names(GOLDEN[f"{name}|{who}|{kind}s"]) for kind in ("image", "depth"))
    if name == "dobbe":
        views = _names(GOLDEN["dobbe|openvla|images"])
    if name == "berkeley_autolab_ur5":  # renamed by the original before it is looked up
        assert depth == {"main": "observation/depth"}
        depth = {"main": "observation/image_with_depth"}
    assert row.views == views
    # A copy with depth of our own making has it where the row says, so rows may name more than the original has.
    assert set(depth) <= set(row.depth) and all(row.depth[view] == feature for view, feature in depth.items())


def _write(directory, name):
    """A data set on disk with the layout of `name`: the golden's columns, images of one pixel, one instruction."""
    row = definitions.find(name)
    prefix = f"{name}|in|"
    found = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}
    lengths = GOLDEN[f"{name}|lengths"].tolist()
    steps, flat = {}, {}
    for feature, values in found.items():
        flat[f"steps/{feature}"] = write_rlds.Tensor(values.shape[1:], values.dtype.name)
        steps[f"steps/{feature}"] = np.split(values, np.cumsum(lengths)[:-1])
    for feature in row.views.values():
        flat[f"steps/{feature}"] = write_rlds.Image((1, 1, 3))
        steps[f"steps/{feature}"] = [[b"image"] * n for n in lengths]
    for feature in row.language:
        if feature in found:  # language_table's is a row of numbers
            continue
        flat[f"steps/{feature}"] = write_rlds.Text()
        steps[f"steps/{feature}"] = [[b"do it"] * n for n in lengths]
    extra = [{} for _ in lengths]
    if name == "kuka":
        flat["success"] = write_rlds.Tensor((), "bool")
        extra = [{"success": np.bool_(number != 1)} for number in range(len(lengths))]
    tree = {}
    for path, feature in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = feature
    payloads = [
        example.encode({path: parts[number] for path, parts in steps.items()} | extra[number])
        for number in range(len(lengths))
    ]
    folder = directory / name / "0.1.0"
    folder.mkdir(parents=True)
    write_rlds.write_metadata(
        folder, name, "0.1.0", tree, [write_rlds.write_split(folder, name, "train", [payloads])], "synthetic"
    )
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_of_that_layout_is_read_from_disk(name, tmp_path):
    """The features a row names are found through the index, those outside the steps as well."""
    row, columns, lengths = definitions.find(name), _columns(name), GOLDEN[f"{name}|lengths"]
    split = index.open_index(_write(tmp_path, name)).split("train")
    got = standardise.standardise(
        split, row.action, row.proprio, drop_first=row.drop_first, drop_last=row.drop_last, keep=row.keep,
        keep_reason=row.keep_reason, language=[f"steps/{feature}" for feature in row.language], skip_unlabelled=True,
    )  # fmt: skip
    np.testing.assert_array_equal(got.action, row.action(columns))
    np.testing.assert_array_equal(got.proprio, row.proprio(columns))
    kept = _sampled(name)
    if name == "kuka":
        kept = np.repeat([True, False, True], lengths)
        assert got.dropped == {"grasp failed": lengths[1]}
    if name == "droid":
        kept = GOLDEN["droid|openvla|keep"]
    np.testing.assert_array_equal(got.valid, np.flatnonzero(kept))
    assert all(len(split.spans(f"steps/{feature}")) == sum(lengths) for feature in row.views.values())


def test_a_mix_has_one_width_of_action_and_proprioception():
    widths = {}
    for name in NAMES:
        definition, columns = definitions.find(name), _columns(name)
        widths[name] = (definition.action(columns).shape[1], definition.proprio(columns).shape[1])
    # OpenVLA's mixes agree; octo's read Bridge with seven numbers, as the published checkpoints do.
    for mix in ("magic_soup", "magic_soup_plus", "magic_soup_plus_minus", "rtx_openvla", "bridge_rt_1"):
        assert {widths[name] for name, _ in mixes.find(mix)} == {(7, 8)}
    assert widths["bridge_dataset"] == (7, 7)


def test_idle_frames_of_droid_equal_openvla():
    keep = recipes.droid_moving(_columns("droid"))
    np.testing.assert_array_equal(keep, GOLDEN["droid|openvla|keep"])
    assert 0 < keep.sum() < len(keep)


def test_instructions_stored_as_code_units(tmp_path):
    split = index.open_index(_write(tmp_path, "language_table")).split("train")
    ids, strings = split.texts("steps/observation/instruction")
    assert [strings[i] for i in ids] == GOLDEN["language_table|octo|text"].tolist()


def test_success_filters_use_the_value_of_the_episode():
    lengths = np.array([2, 3])
    success = np.array([True, False])
    paths = np.array([1, 0], np.int32), ["/raw/failure/a", "/raw/success/b"]
    columns = standardise.Columns(
        lambda _: np.zeros(5),
        lengths,
        episode_read={"success": np.repeat(success, lengths)}.__getitem__,
        episode_text={"episode_metadata/file_path": (np.repeat(paths[0], lengths), paths[1])}.__getitem__,
    )
    assert recipes.kuka_success(columns).tolist() == [True, True, False, False, False]
    assert recipes.droid_success(columns).tolist() == [True, True, False, False, False]


def test_joint_actions_of_droid_have_an_open_gripper_of_one():
    found = {"action_dict/joint_position": np.ones((3, 7)), "action_dict/gripper_position": np.array([[0.0], [1], [0]])}
    columns = standardise.Columns(found.__getitem__, np.array([3]))
    row = definitions.find("droid_joint_position")
    action = row.action(columns)
    assert action.shape == (3, 8) and action[:, 7].tolist() == [1, 0, 1] and action.dtype == np.float32
    assert row.absolute_action_dims == tuple(range(8)) and row.raw_action_dims == (7,)


def test_the_readme_counts_them():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    assert f"There are {len(definitions.DEFINITIONS)} definitions:" in readme
    assert f"{len(NAMES)} of these data sets are held against golden values" in readme


def test_rows_are_consistent():
    for name, row in definitions.DEFINITIONS.items():
        assert row.name == name and row.views and row.source and row.rate_hz > 0
        assert set(row.views) <= {"main", "secondary", "wrist"} and set(row.bgr) <= set(row.views)
        assert row.main_view in row.views.values()
        assert not row.swap or set(row.swap) <= set(row.views)
        assert bool(row.keep) == bool(row.keep_reason)
        assert row.language
        assert set(row.raw_action_dims) <= set(row.absolute_action_dims)
    assert definitions.find("nyu_door_opening_surprising_effectiveness").main_view == "observation/image"


def test_depth_of_a_converted_copy_is_found_and_is_in_millimetres():
    """The names that tools/convert_rlds.py gives to annotated depth go before depth of the original files."""

    def found(name, *there, view=""):
        features = {f"steps/observation/{leaf}": None for leaf in there}
        return definitions.depth_of(definitions.find(name), spec.DatasetSpec("", name, "0.1.0", features, {}), view)

    assert found("bridge_dataset") == ("steps/observation/depth_0", 0.001)
    assert found("libero_10", "depth") == ("steps/observation/depth", 0.001)
    assert found("libero_10", view="wrist") == ("steps/observation/depth_wrist", 0.001)
    assert found("droid") == ("steps/observation/depth_exterior_1_left", 0.001)
    assert found("nyu_door_opening_surprising_effectiveness") == ("steps/observation/depth", 0.001)
    assert found("taco_play", "depth_static", "depth_gripper") == ("steps/observation/depth_static", 1.0)
    assert found("taco_play", "depth_static", "depth_rgb_static") == ("steps/observation/depth_rgb_static", 0.001)
    assert found("fmb", "image_side_1_depth", "depth_side_1") == ("steps/observation/depth_side_1", 0.001)
    ur5 = ("image_with_depth", "depth_hand")
    assert found("berkeley_autolab_ur5", *ur5) == ("steps/observation/image_with_depth", 1.0)
    assert found("berkeley_autolab_ur5", *ur5, view="wrist") == ("steps/observation/depth_hand", 0.001)
    for row in definitions.DEFINITIONS.values():
        for view, feature in row.views.items():
            added = f"steps/observation/{rlds_features.feature_leaf('depth', feature)}"
            assert found(row.name, added.rpartition("/")[2], view=view) == (added, 0.001)


def test_repaired_copies_keep_their_channels():
    row = definitions.find("berkeley_autolab_ur5")

    def copy(size):
        name = f"steps/{row.views['wrist']}"
        feature = spec.FeatureSpec(name, "image", "uint8", (*size, 3), "jpeg", True)
        return spec.DatasetSpec("", row.name, "0.1.0", {name: feature}, {})

    assert definitions.swapped_channels(row, copy((480, 640))) == ("wrist",)
    assert definitions.swapped_channels(row, copy((256, 256))) == ()  # went through rlds_dataset_mod
    assert definitions.swapped_channels(definitions.find("viola"), copy((224, 224))) == ()


def test_unknown_data_set_suggests_the_nearest():
    with pytest.raises(errors.UserError, match="did you mean 'libero_object'"):
        definitions.find("libero_objects")
    assert definitions.find("libero_90_no_noops").rate_hz == 20
