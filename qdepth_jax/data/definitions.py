"""The table of data sets: one row of facts each, and the recipes (recipes.py) it names.

Here are the sets that people train on alone; the rest of the Open X-Embodiment mixes is in definitions_oxe.py, with the
conventions that hold for both. Where a row departs from its source on purpose, a comment says DEVIATION and why.
"""

import difflib

from qdepth_jax import errors
from qdepth_jax.data import definition, definitions_oxe, recipes

Definition = definition.Definition
depth_of = definition.depth_of
swapped_channels = definition.swapped_channels

_STATE = "observation/state"
_EULER = (6,)  # the empty place of "xyz, roll-pitch-yaw, 0, gripper"


def _bridge(name: str, **differs) -> Definition:
    return Definition(
        name=name,
        views={"main": "observation/image_0", "secondary": "observation/image_1"},
        action=recipes.bridge_action,
        drop_last=True,
        rate_hz=5.0,
        **differs,
    )


def _libero(name: str) -> Definition:
    # xyz, axis-angle, two fingers. DEVIATION: OpenVLA puts an empty place before the fingers (9 numbers).
    return Definition(
        name=name,
        views={"main": "observation/image", "wrist": "observation/wrist_image"},
        action=recipes.clipped_inverted_gripper,
        proprio=recipes.pieces((_STATE, None, None)),
        rate_hz=20.0,
        source="OpenVLA oxe/transforms.py libero_dataset_transform",
    )


def _droid(name: str, **differs) -> Definition:
    return Definition(
        name=name,
        views={
            "main": "observation/exterior_image_1_left",
            "secondary": "observation/exterior_image_2_left",
            "wrist": "observation/wrist_image_left",
        },
        language=("language_instruction", "language_instruction_2", "language_instruction_3"),
        swap=("main", "secondary"),
        rate_hz=15.0,
        **differs,
    )


def _droid_joint(kind: str) -> Definition:
    # DEVIATION: openpi keeps the file's gripper (1 closed) in the action; ours is 1 open as everywhere here.
    return _droid(
        f"droid_joint_{kind}",
        action=recipes.droid_joint_action(kind),
        proprio=recipes.pieces(
            ("observation/joint_position", None, None), ("observation/gripper_position", None, None)
        ),
        raw_action_dims=(7,),
        absolute_action_dims=tuple(range(8)) if kind == "position" else (7,),
        keep=recipes.droid_success,
        keep_reason="episode without success",
        source="openpi training/droid_rlds_dataset.py",
    )


_LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

_ROWS = (
    _bridge(
        "bridge_dataset",
        proprio=recipes.pieces((_STATE, None, None)),  # 7 numbers, as octo and open-pi-zero have it
        source="octo oxe_standardization_transforms.py bridge_dataset_transform",
    ),
    # The same files as OpenVLA reads them: the first action is all zero.
    _bridge(
        "bridge_orig",
        proprio=recipes.pieces((_STATE, 0, 6), 1, (_STATE, -1, None)),
        proprio_padding=_EULER,
        drop_first=True,
        source="OpenVLA oxe/transforms.py bridge_orig_dataset_transform",
    ),
    Definition(
        name="fractal20220817_data",
        views={"main": "observation/image"},
        language=("observation/natural_language_instruction",),
        action=recipes.delta_relative_gripper,
        # xyz, quaternion xyzw, gripper (1 closed)
        proprio=recipes.pieces(
            ("observation/base_pose_tool_reached", None, None), ("observation/gripper_closed", None, None)
        ),
        rate_hz=3.0,
        source="octo oxe_standardization_transforms.py rt1_dataset_transform",
    ),
    # The published RLDS copies are called libero_*_no_noops; both names mean the same layout.
    *(_libero(suite + ending) for suite in _LIBERO_SUITES for ending in ("", "_no_noops")),
    # DEVIATION: OpenVLA's seven numbers of proprioception get the empty place before the gripper.
    _droid(
        "droid",
        action=recipes.droid_action,
        proprio=recipes.pieces(
            ("observation/cartesian_position", 0, 6), 1, ("observation/gripper_position", None, None)
        ),
        proprio_padding=_EULER,
        keep=recipes.droid_moving,
        keep_reason="the arm does not move",
        source="OpenVLA oxe/transforms.py droid_baseact_transform, droid_utils.py zero_action_filter",
    ),
    _droid_joint("position"),
    _droid_joint("velocity"),
    # Our own demonstrations (tools/collect_demos.py). The last number of an action is gripper effort, +1 closes: no
    # position, so it is normalised as the others are.
    Definition(
        name="metaworld",
        views={"main": "observation/image"},
        action=recipes.stored_action,
        proprio=recipes.pieces((_STATE, None, None)),
        raw_action_dims=(),
        absolute_action_dims=(3,),
        rate_hz=80.0,
        source="Meta-World 3.1.1, SawyerXYZEnv.step",
    ),
)

DEFINITIONS: dict[str, Definition] = {row.name: row for row in (*_ROWS, *definitions_oxe.ROWS)}


def find(name: str) -> Definition:
    """The definition of a data set; an unknown name is an error that suggests the nearest."""
    if name in DEFINITIONS:
        return DEFINITIONS[name]
    near = difflib.get_close_matches(name, DEFINITIONS, 1)
    raise errors.UserError(
        f"no definition for data set {name!r}"
        + (f", did you mean {near[0]!r}?" if near else "")
        + f" Defined: {', '.join(DEFINITIONS)}. Add a row in qdepth_jax/data/definitions.py."
    )
