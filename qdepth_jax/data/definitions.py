"""What we know about each data set: one table row, and the two small recipes it names.

Sources of the recipes: the published standardisation code of octo, OpenVLA and open-pi-zero. Actions come out as 7
numbers, 6 of motion and an absolute gripper (1 open, 0 closed).
"""

import dataclasses
import difflib

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import standardise

Columns = standardise.Columns


@dataclasses.dataclass(frozen=True)
class Definition:
    """One data set.

    Attributes:
      name: name in dataset_info.json.
      views: view name ("main", "wrist") -> image feature below `steps/`.
      language: instruction feature below `steps/`.
      action, proprio: recipes, f32 [F, A] and f32 [F, Dp].
      depth: depth image feature of the main view below `steps/`; a copy of the data set may lack it.
      depth_metres: metres per unit of a stored depth image.
      raw_action_dims: action dimensions that normalisation leaves as they are (the gripper).
      drop_last: the last step has no action.
      rate_hz: control rate.
      version: part of the identity of statistics; raise it when a recipe changes.
    """

    name: str
    views: dict[str, str]
    language: tuple[str, ...]
    action: standardise.Recipe
    proprio: standardise.Recipe
    depth: dict[str, str] = dataclasses.field(default_factory=lambda: {"main": "observation/depth"})
    bgr: tuple[str, ...] = ()
    swap: tuple[str, str] | None = None
    absolute_action_dims: tuple[int, ...] = (6,)
    depth_metres: float = 0.001
    raw_action_dims: tuple[int, ...] = (6,)
    drop_last: bool = False
    rate_hz: float = 0.0
    version: int = 1

    @property
    def main_depth(self) -> str:
        return self.depth.get("main", "")


def bridge_action(columns: Columns) -> np.ndarray:
    """Motion relabelled as the difference of reached poses; commands in the file are noisy and reach 80 metres."""
    gripper = standardise.binarise(columns.read("action")[:, 6], columns.end)
    motion = standardise.successive_difference(columns.read("observation/state")[:, :6], columns.end)
    return np.concatenate([motion, gripper[:, None]], 1)


def bridge_proprio(columns: Columns) -> np.ndarray:
    """xyz, roll-pitch-yaw, gripper (1 open): 7."""
    return columns.read("observation/state")


def fractal_action(columns: Columns) -> np.ndarray:
    gripper = columns.read("action/gripper_closedness_action")[:, 0]
    gripper = standardise.relative_to_absolute(gripper, columns.start, columns.end)
    parts = [columns.read("action/world_vector"), columns.read("action/rotation_delta"), gripper[:, None]]
    return np.concatenate(parts, 1)


def fractal_proprio(columns: Columns) -> np.ndarray:
    """xyz, quaternion xyzw, gripper (1 closed): 8."""
    parts = [columns.read("observation/base_pose_tool_reached"), columns.read("observation/gripper_closed")]
    return np.concatenate(parts, 1)


def libero_action(columns: Columns) -> np.ndarray:
    """The file's gripper is -1 open, +1 close."""
    action = columns.read("action")
    gripper = standardise.invert(np.clip(action[:, 6:], 0, 1))
    return np.concatenate([action[:, :6], gripper], 1)


def libero_proprio(columns: Columns) -> np.ndarray:
    """xyz, axis-angle, two finger positions: 8."""
    return columns.read("observation/state")


def _libero(name: str) -> Definition:
    return Definition(
        name=name,
        views={"main": "observation/image", "wrist": "observation/wrist_image"},
        language=("language_instruction",),
        action=libero_action,
        proprio=libero_proprio,
        rate_hz=20.0,
    )


_LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

DEFINITIONS: dict[str, Definition] = {
    definition.name: definition
    for definition in (
        Definition(
            name="bridge_dataset",
            views={"main": "observation/image_0"},
            language=("language_instruction",),
            action=bridge_action,
            proprio=bridge_proprio,
            depth={"main": "observation/depth_0"},
            drop_last=True,
            rate_hz=5.0,
        ),
        Definition(
            name="fractal20220817_data",
            views={"main": "observation/image"},
            language=("observation/natural_language_instruction",),
            action=fractal_action,
            proprio=fractal_proprio,
            rate_hz=3.0,
        ),
        # The published RLDS copies are called libero_*_no_noops; both names mean the same layout.
        *(_libero(suite + ending) for suite in _LIBERO_SUITES for ending in ("", "_no_noops")),
    )
}


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
