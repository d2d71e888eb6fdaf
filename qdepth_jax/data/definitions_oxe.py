"""Rows of the table of data sets (definitions.py): the sets of the Open X-Embodiment mixes.

Feature names are from the TFDS catalogue and the data sets' features.json; which camera is which view, gripper
conventions and the composition of the state from octo (octo/data/oxe/) and OpenVLA (prismatic/vla/datasets/rlds/oxe/);
control rates from the Open X-Embodiment overview. Two conventions hold for the sets of the OXE mixes:

* Proprioception has OpenVLA's eight places, with zeros where a robot lacks one, so that a mix has one width:
  xyz, roll-pitch-yaw, 0, gripper | xyz, quaternion xyzw, gripper | joints (7), gripper.
* Instructions are kept where the file has them, as OpenVLA does. (octo blanks them as uninformative in kuka,
  berkeley_cable_routing, roboturk, nyu_door_opening, viola, toto, stanford_hydra, austin_*, nyu_franka_play, mutex.)

Where a row departs from its source on purpose, a comment says DEVIATION and why.
"""

from qdepth_jax.data import definition, recipes

Definition = definition.Definition

_NATURAL = ("observation/natural_language_instruction",)
_STATE = "observation/state"
_NO_PROPRIO = {"proprio": recipes.pieces(8), "proprio_padding": tuple(range(8))}
_FRONT = {"main": "observation/image"}
_FRONT_AND_WRIST = {"main": "observation/image", "wrist": "observation/wrist_image"}
_OCTO = "octo oxe_standardization_transforms.py"
_OPENVLA = "OpenVLA oxe/transforms.py"
_EULER = (6,)  # the empty place of "xyz, roll-pitch-yaw, 0, gripper"


def _fmb(name: str) -> Definition:
    return Definition(
        name=name,
        views={
            "main": "observation/image_side_1",
            "secondary": "observation/image_side_2",
            "wrist": "observation/image_wrist_1",
        },
        action=recipes.stored_action,
        proprio=recipes.pieces(("observation/eef_pose", None, None), ("observation/state_gripper_pose", None, None)),
        depth={
            "main": "observation/image_side_1_depth",
            "secondary": "observation/image_side_2_depth",
            "wrist": "observation/image_wrist_1_depth",
        },
        depth_metres=1.0,  # float32 in the file; the unit is documented nowhere
        rate_hz=10.0,
        source=f"{_OCTO} fmb_dataset_transform; TFDS catalogue fmb",
    )


ROWS = (
    Definition(
        name="kuka",
        views=_FRONT,
        language=_NATURAL,
        action=recipes.delta_relative_gripper,
        proprio=recipes.pieces(
            ("observation/clip_function_input/base_pose_tool_reached", None, None),
            ("observation/gripper_closed", None, None),
        ),
        keep=recipes.kuka_success,
        keep_reason="grasp failed",
        rate_hz=10.0,
        source=f"{_OCTO} kuka_dataset_transform; rlds_dataset_mod filter_success",
    ),
    Definition(
        name="taco_play",
        views={"main": "observation/rgb_static", "wrist": "observation/rgb_gripper"},
        language=_NATURAL,
        action=recipes.taco_action,
        # DEVIATION: the gripper is column 6, its width (TFDS catalogue); octo and OpenVLA take 7, the first joint.
        proprio=recipes.pieces(("observation/robot_obs", 0, 6), 1, ("observation/robot_obs", 6, 7)),
        proprio_padding=_EULER,
        depth={"main": "observation/depth_static", "wrist": "observation/depth_gripper"},
        depth_metres=1.0,  # float32 in the file; the unit is documented nowhere
        rate_hz=15.0,
        source=f"{_OCTO} taco_dataset_transform; TFDS catalogue taco_play",
    ),
    Definition(
        name="jaco_play",
        views={"main": "observation/image", "wrist": "observation/image_wrist"},
        language=_NATURAL,
        action=recipes.jaco_action,
        proprio=recipes.pieces(
            ("observation/end_effector_cartesian_pos", 0, 6), 1, ("observation/end_effector_cartesian_pos", -1, None)
        ),
        proprio_padding=_EULER,
        rate_hz=10.0,
        source=f"{_OCTO} jaco_play_dataset_transform",
    ),
    Definition(
        name="berkeley_cable_routing",
        views={
            "main": "observation/image",
            "secondary": "observation/top_image",
            "wrist": "observation/wrist45_image",
        },
        language=_NATURAL,
        action=recipes.cable_routing_action,
        proprio=recipes.pieces(("observation/robot_state", None, None), 1),
        proprio_padding=(7,),
        rate_hz=10.0,
        source=f"{_OCTO} berkeley_cable_routing_dataset_transform",
    ),
    Definition(
        name="roboturk",
        views={"main": "observation/front_rgb"},
        language=_NATURAL,
        action=recipes.delta_closing_gripper,
        **_NO_PROPRIO,
        rate_hz=10.0,
        source=f"{_OCTO} roboturk_dataset_transform",
    ),
    Definition(
        name="nyu_door_opening_surprising_effectiveness",
        views={"wrist": "observation/image"},
        language=_NATURAL,
        action=recipes.delta_relative_gripper,
        **_NO_PROPRIO,
        rate_hz=3.0,
        source=f"{_OCTO} nyu_door_opening_dataset_transform",
    ),
    Definition(
        name="viola",
        views={"main": "observation/agentview_rgb", "wrist": "observation/eye_in_hand_rgb"},
        language=_NATURAL,
        action=recipes.delta_closing_gripper,
        proprio=recipes.pieces(("observation/joint_states", None, None), ("observation/gripper_states", None, None)),
        rate_hz=20.0,
        source=f"{_OCTO} viola_dataset_transform",
    ),
    Definition(
        name="berkeley_autolab_ur5",
        views={"main": "observation/image", "wrist": "observation/hand_image"},
        language=_NATURAL,
        action=recipes.delta_relative_gripper,
        proprio=recipes.pieces(("observation/robot_state", 6, 14)),
        depth={"main": "observation/image_with_depth"},
        depth_metres=1.0,  # float32 in the file; the unit is documented nowhere
        bgr=("wrist",),
        rate_hz=5.0,
        source=f"{_OCTO} berkeley_autolab_ur5_dataset_transform; rlds_dataset_mod",
    ),
    Definition(
        name="toto",
        views=_FRONT,
        language=_NATURAL,
        action=recipes.toto_action,
        proprio=recipes.pieces((_STATE, None, None), 1),
        proprio_padding=(7,),
        rate_hz=30.0,
        source=f"{_OCTO} toto_dataset_transform",
    ),
    Definition(
        name="language_table",
        views={"main": "observation/rgb"},
        language=("observation/instruction",),
        action=recipes.language_table_action,
        proprio=recipes.pieces(("observation/effector_translation", None, None), 6),
        proprio_padding=tuple(range(2, 8)),
        rate_hz=10.0,
        source=f"{_OCTO} language_table_dataset_transform",
    ),
    Definition(
        name="stanford_hydra_dataset_converted_externally_to_rlds",
        views=_FRONT_AND_WRIST,
        action=recipes.inverted_gripper,
        proprio=recipes.pieces((_STATE, 0, 3), (_STATE, 7, 10), 1, (_STATE, -3, -2)),
        proprio_padding=_EULER,
        bgr=("main", "wrist"),
        rate_hz=10.0,
        source=f"{_OCTO} stanford_hydra_dataset_transform; rlds_dataset_mod",
    ),
    Definition(
        name="austin_buds_dataset_converted_externally_to_rlds",
        views=_FRONT_AND_WRIST,
        action=recipes.clipped_inverted_gripper,
        proprio=recipes.pieces((_STATE, 0, 8)),
        rate_hz=20.0,
        source=f"{_OCTO} austin_buds_dataset_transform",
    ),
    Definition(
        name="nyu_franka_play_dataset_converted_externally_to_rlds",
        views={"main": "observation/image", "secondary": "observation/image_additional_view"},
        action=recipes.nyu_franka_action,
        proprio=recipes.pieces((_STATE, -6, None), 2),
        proprio_padding=(6, 7),
        depth={"main": "observation/depth", "secondary": "observation/depth_additional_view"},
        rate_hz=3.0,
        source=f"{_OCTO} nyu_franka_play_dataset_transform",
    ),
    Definition(
        name="furniture_bench_dataset_converted_externally_to_rlds",
        views=_FRONT_AND_WRIST,
        action=recipes.furniture_bench_action,
        proprio=recipes.pieces((_STATE, 0, 7), (_STATE, -1, None)),
        rate_hz=10.0,
        source=f"{_OCTO} furniture_bench_dataset_transform",
    ),
    Definition(
        name="ucsd_kitchen_dataset_converted_externally_to_rlds",
        views=_FRONT,
        action=recipes.without_last,
        proprio=recipes.pieces((_STATE, 0, 7), 1),
        proprio_padding=(7,),
        # DEVIATION: the file's action is a pose (TFDS catalogue), which octo and OpenVLA call relative.
        absolute_action_dims=tuple(range(7)),
        rate_hz=2.0,
        source=f"{_OCTO} ucsd_kitchen_dataset_transform; TFDS catalogue",
    ),
    Definition(
        name="austin_sailor_dataset_converted_externally_to_rlds",
        views=_FRONT_AND_WRIST,
        action=recipes.clipped_inverted_gripper,
        proprio=recipes.pieces((_STATE, None, None)),
        rate_hz=20.0,
        source=f"{_OCTO} austin_sailor_dataset_transform",
    ),
    Definition(
        name="austin_sirius_dataset_converted_externally_to_rlds",
        views=_FRONT_AND_WRIST,
        action=recipes.clipped_inverted_gripper,
        proprio=recipes.pieces((_STATE, None, None)),
        rate_hz=20.0,
        source=f"{_OCTO} austin_sirius_dataset_transform",
    ),
    # Use version 0.1.0; later ones are broken (OpenVLA oxe/mixtures.py).
    Definition(
        name="bc_z",
        views=_FRONT,
        language=_NATURAL,
        action=recipes.bc_z_action,
        proprio=recipes.pieces(
            ("observation/present/xyz", None, None),
            ("observation/present/axis_angle", None, None),
            1,
            ("observation/present/sensed_close", None, None),
        ),
        proprio_padding=_EULER,
        rate_hz=10.0,
        source=f"{_OCTO} bc_z_dataset_transform",
    ),
    Definition(
        name="dlr_edan_shared_control_converted_externally_to_rlds",
        views=_FRONT,
        action=recipes.inverted_gripper,
        proprio=recipes.pieces((_STATE, None, None), 1),
        proprio_padding=(7,),
        rate_hz=5.0,
        source=f"{_OCTO} dlr_edan_shared_control_dataset_transform",
    ),
    Definition(
        name="iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        views=_FRONT_AND_WRIST,
        action=recipes.iamlab_action,
        proprio=recipes.pieces((_STATE, 0, 8)),
        # DEVIATION: the file's action is a pose (TFDS catalogue), which octo and OpenVLA call relative.
        absolute_action_dims=tuple(range(7)),
        rate_hz=20.0,
        source=f"{_OCTO} iamlab_pick_insert_dataset_transform; TFDS catalogue",
    ),
    Definition(
        name="utaustin_mutex",
        views=_FRONT_AND_WRIST,
        action=recipes.clipped_inverted_gripper,
        proprio=recipes.pieces((_STATE, 0, 8)),
        bgr=("main", "wrist"),
        rate_hz=20.0,
        source=f"{_OCTO} utaustin_mutex_dataset_transform; rlds_dataset_mod",
    ),
    Definition(
        name="berkeley_fanuc_manipulation",
        views=_FRONT_AND_WRIST,
        action=recipes.fanuc_action,
        proprio=recipes.pieces((_STATE, 0, 6), 1, (_STATE, 6, 7)),
        proprio_padding=_EULER,
        bgr=("main", "wrist"),
        rate_hz=10.0,
        source=f"{_OCTO} berkeley_fanuc_dataset_transform; rlds_dataset_mod",
    ),
    Definition(
        name="cmu_stretch",
        views=_FRONT,
        action=recipes.without_last,
        proprio=recipes.pieces((_STATE, 0, 3), 4, (_STATE, -1, None)),
        proprio_padding=(3, 4, 5, 6),
        rate_hz=10.0,
        source=f"{_OCTO} cmu_stretch_dataset_transform",
    ),
    _fmb("fmb_dataset"),
    _fmb("fmb"),  # its name in the OXE bucket
    Definition(
        name="dobbe",
        views={"main": "observation/wrist_image"},  # its only camera; octo files it under wrist, OpenVLA under main
        action=recipes.stored_action,
        # DEVIATION: OpenVLA's seven numbers get the empty place before the gripper.
        proprio=recipes.pieces((_STATE, 0, 6), 1, (_STATE, 6, None)),
        proprio_padding=_EULER,
        rate_hz=3.75,
        source=f"{_OPENVLA} dobbe_dataset_transform",
    ),
)
