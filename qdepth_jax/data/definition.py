"""The row type of the table of data sets: what a loader must know before it can read one."""

import dataclasses

from qdepth_jax.data import recipes, spec


@dataclasses.dataclass(frozen=True)
class Definition:
    """One data set. Features are named below `steps/`.

    Attributes:
      name: name in dataset_info.json, or a name of our own for a second reading of a data set.
      views: "main", "secondary", "wrist" -> image feature; a view that the robot lacks is absent.
      action, proprio: recipes, f32 [F, A] and f32 [F, Dp].
      language: instruction features, the default first; empty = the data set has no instructions.
      depth: view -> depth feature (image or tensor) of the original files; `depth_of` says what a copy is read with.
      depth_metres: metres per unit of it.
      raw_action_dims: action dimensions that normalisation leaves as they are (the gripper).
      absolute_action_dims: dimensions that are a target rather than a change: past the end of an episode the neutral
        action repeats them and zeroes the others.
      proprio_padding: places of proprio that are zero by construction.
      bgr: views whose channels the original files hold in the order blue, green, red; see `swapped_channels`.
      keep, keep_reason: bool [F]; frames with False are never sampled, and why.
      drop_first, drop_last: the first (last) step has no action and is never sampled.
      swap: two views that are exchanged at random per episode, when training on one exterior camera.
      rate_hz: control rate, 0 = unknown.
      version: part of the identity of statistics; raise it when a recipe changes.
      source: where the facts are from.
    """

    name: str
    views: dict[str, str]
    action: recipes.Recipe
    proprio: recipes.Recipe
    language: tuple[str, ...] = ("language_instruction",)
    depth: dict[str, str] = dataclasses.field(default_factory=dict)
    depth_metres: float = 0.001
    raw_action_dims: tuple[int, ...] = (6,)
    absolute_action_dims: tuple[int, ...] = (6,)
    proprio_padding: tuple[int, ...] = ()
    bgr: tuple[str, ...] = ()
    keep: recipes.Recipe | None = None
    keep_reason: str = ""
    drop_first: bool = False
    drop_last: bool = False
    swap: tuple[str, str] | None = None
    rate_hz: float = 0.0
    version: int = 1
    source: str = ""

    @property
    def main_view(self) -> str:
        """Image feature that stands for the main view: a robot with wrist cameras alone has its first one there."""
        return self.views.get("main") or next(iter(self.views.values()))


def annotated_depth(image: str) -> str:
    """Name of the depth of a camera in a converted copy: "observation/wrist_image" -> "observation/depth_wrist"."""
    folder, _, leaf = image.rpartition("/")
    return "/".join([folder, "_".join(["depth", *(part for part in leaf.split("_") if part and part != "image")])])


def depth_of(definition: Definition, dataset: spec.DatasetSpec, view: str = "") -> tuple[str, float]:
    """Depth feature of a view ("" = the main one) in this copy of the data set, and metres per unit of it.

    Depth that tools/convert_rlds.py added, which is in millimetres, goes before that of the original files. A copy may
    have neither: the name is then the one that a conversion would add.
    """
    view = view or ("main" if "main" in definition.views else next(iter(definition.views)))
    own, added = definition.depth.get(view), annotated_depth(definition.views[view])
    if own == added or (f"steps/{own}" in dataset.features and f"steps/{added}" not in dataset.features):
        return f"steps/{own}", definition.depth_metres
    return f"steps/{added}", 0.001


def swapped_channels(definition: Definition, dataset: spec.DatasetSpec) -> tuple[str, ...]:
    """Views whose channels must be exchanged after decoding this copy of the data set.

    rlds_dataset_mod, through which most copies went, repairs the order and resizes to 256x256 in one run, and keeps
    name and version. None of the originals has images of 256x256, so the declared size tells the two apart.
    """
    features = {view: f"steps/{definition.views[view]}" for view in definition.bgr}
    return tuple(
        view
        for view, name in features.items()
        if name in dataset.features and dataset.feature(name).shape[:2] != (256, 256)
    )
