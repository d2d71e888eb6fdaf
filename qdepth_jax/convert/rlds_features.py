"""What a conversion changes in the features: sidecars that become features, image sizes; and who has an instruction.

Names: a sidecar of camera `image` becomes `steps/observation/depth` (or `depth_tokens`), one of `image_0` becomes
`depth_0`, one of `wrist_image` becomes `depth_wrist`: the names under which depth is looked for first (in millimetres,
`definition.depth_of`).
"""

import dataclasses
import json
import os
import re
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.convert import rlds_record, rlds_shard
from qdepth_jax.data import definitions, index, shard_scan, sidecar, spec, storage, write_rlds

_OBSERVATION = "steps/observation"
_METADATA = "episode_metadata"
_IMAGE_LIKE = 16  # a tensor whose first two dimensions are at least this large may be a picture


@dataclasses.dataclass(frozen=True)
class Changes:
    """The new features.json and what `convert_shard` does about it.

    Attributes:
      tree: content of features.json.
      additions: split -> sidecars.
      resize: or None.
      images: image features per step in the source.
      provenance: the additions in words, for metadata.json.
      not_resized: tensors that look like pictures, which `resize` leaves alone.
    """

    tree: dict[str, Any]
    additions: dict[str, tuple[rlds_shard.Addition, ...]]
    resize: rlds_record.Resize | None
    images: int
    provenance: list[dict[str, Any]]
    not_resized: tuple[str, ...]


def plan_changes(opened: index.Index, splits: tuple[str, ...], options) -> Changes:
    """Args: the index, the chosen splits, `rlds.Options`. Raises UserError for anything that does not fit."""
    dataset = opened.dataset
    tree = json.loads(storage.read(storage.join(dataset.directory, "features.json")))
    pictures = [feature for feature in dataset.features.values() if feature.kind == "image" and feature.per_step]
    resize, not_resized = None, ()
    if options.resize:
        resize = _resize(dataset, pictures, options)
        for feature in pictures:
            image = _node(tree, feature.name)["image"]
            channels = feature.shape[2] if len(feature.shape) == 3 else 3
            image["shape"] = {"dimensions": [str(n) for n in (*options.resize, channels)]}
        not_resized = tuple(
            feature.name
            for feature in dataset.features.values()
            if feature.kind == "tensor" and len(feature.shape) > 1 and min(feature.shape[:2]) >= _IMAGE_LIKE
        )
    additions: dict[str, list[rlds_shard.Addition]] = {name: [] for name in splits}
    provenance = []
    if options.token_encoding not in ("none", "bytes"):
        raise errors.UserError(f"--token_encoding={options.token_encoding}: use 'none' or 'bytes'")
    for kind, texts in (("depth", options.depth), ("depth_tokens", options.depth_tokens)):
        for text in texts:
            by_split = {name: _addition(opened, name, kind, text, options.token_encoding) for name in splits}
            for name, addition in by_split.items():
                additions[name].append(addition)
            provenance.append(_declare(dataset, tree, by_split, resize))
    return Changes(
        tree=tree,
        additions={name: tuple(items) for name, items in additions.items()},
        resize=resize,
        images=len(pictures),
        provenance=provenance,
        not_resized=not_resized,
    )


def language(opened: index.Index, given: tuple[str, ...]) -> tuple[str, ...]:
    """Full names of the instruction features: those given (below steps/ or complete), else the definition's."""
    dataset = opened.dataset
    # Not by kind: some data sets keep their instruction as a row of numbers, which the index reads as text.
    texts = sorted(feature.name for feature in dataset.features.values() if shard_scan.storage(feature) == "text")
    if not given:
        if dataset.name not in definitions.DEFINITIONS:
            raise errors.UserError(
                f"which text of {dataset.name!r} is the instruction is not known (it has no definition): name it with "
                f"--language; there is {', '.join(texts)}"
            )
        given = definitions.DEFINITIONS[dataset.name].language
        # A definition names variants that only some copies of the data set have.
        there = tuple(name for name in given if f"steps/{name}" in texts)
        given = there or given
    names = tuple(name if name in dataset.features else f"steps/{name}" for name in given)
    for name in names:
        if dataset.feature(name).name not in texts:
            raise errors.UserError(f"--language: {name!r} is no text; there is {', '.join(texts)}")
    return names


def labelled(split: index.SplitIndex, features: tuple[str, ...]) -> np.ndarray:
    """bool [E]: any step of the episode has an instruction in any of `features` (blanks do not count)."""
    found = np.zeros(len(split.episodes), bool)
    for name in features:
        ids, strings = split.texts(name)
        has_text = np.array([bool(text.strip()) for text in strings], bool)[ids]
        has_text = has_text.reshape(len(has_text), -1).any(axis=1)  # an array of strings: any of them
        if split.dataset.feature(name).per_step:
            has_text = np.logical_or.reduceat(has_text, split.episodes["start"])
        found |= has_text
    return found


def _resize(dataset: spec.DatasetSpec, pictures: list[spec.FeatureSpec], options) -> rlds_record.Resize:
    if len(options.resize) != 2 or not all(1 <= size <= 4096 for size in options.resize):
        raise errors.UserError(f"--resize={options.resize}: give height,width between 1 and 4096")
    if not 1 <= options.jpeg_quality <= 100:
        raise errors.UserError(f"--jpeg_quality={options.jpeg_quality}: 1 to 100")
    if not pictures:
        raise errors.UserError(f"data set {dataset.name} has no images per step: leave out --resize")
    row = definitions.DEFINITIONS.get(dataset.name)
    swapped = definitions.swapped_channels(row, dataset) if row else ()
    if swapped and tuple(options.resize) == (256, 256):
        raise errors.UserError(
            f"views {swapped} of {dataset.name} hold blue before red, and a copy of 256x256 is taken for one whose "
            "channels were repaired: choose another --resize"
        )
    colour, nearest = [], []
    for feature in pictures:
        depth_like = feature.dtype != "uint8" or ("depth" in feature.name and feature.encoding == "png")
        if feature.dtype == "uint16" and feature.shape[2:] not in ((1,), ()):
            raise errors.UserError(
                f"feature {feature.name!r} is a 16-bit picture with {feature.shape[2]} channels, which cannot be "
                "resized here without loss: leave out --resize"
            )
        (nearest if depth_like else colour).append(feature.name)
    return rlds_record.Resize(tuple(options.resize), tuple(colour), tuple(nearest), options.jpeg_quality)


def _addition(opened: index.Index, split: str, kind: str, text: str, encoding: str) -> rlds_shard.Addition:
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.+)", text)
    root = match[2] if match else text
    try:
        found = sidecar.open_sidecar(root, split)
    except errors.UserError as error:
        raise errors.UserError(f"{error}; or convert other splits only (--split)") from error
    sidecar.check(found, kind=kind, fingerprint=opened.fingerprint, camera=found.metadata.camera)
    metadata = found.metadata
    if metadata.frames != opened.split(split).frames:
        raise errors.UserError(
            f"sidecar {found.directory} has {metadata.frames} frames, split {split} has {opened.split(split).frames}"
        )
    if kind == "depth" and metadata.details.get("depth_kind") not in ("metric", "relative"):
        raise errors.UserError(
            f"sidecar {found.directory} does not say whether it is metric or relative: make it again"
        )
    leaf = match[1] if match else feature_leaf(kind, metadata.camera)
    if kind == "depth" and metadata.details["depth_kind"] == "relative":
        # Readers take `depth` for millimetres; relative depth must not look like that.
        if match and not leaf.startswith("relative_"):
            raise errors.UserError(
                f"sidecar {found.directory} holds relative depth: a name that says so is needed, "
                f"--depth=relative_{leaf}={root}"
            )
        leaf = leaf if match else f"relative_{leaf}"
    root = os.path.abspath(os.path.expanduser(root))
    return rlds_shard.Addition(kind, f"{_OBSERVATION}/{leaf}", root, metadata, encoding)


def feature_leaf(kind: str, camera: str) -> str:
    """("depth", "steps/observation/wrist_image") -> "depth_wrist"."""
    rest = [part for part in camera.rpartition("/")[2].split("_") if part and part != "image"]
    return "_".join([kind, *rest])


def _declare(
    dataset: spec.DatasetSpec,
    tree: dict[str, Any],
    by_split: dict[str, rlds_shard.Addition],
    resize: rlds_record.Resize | None,
) -> dict[str, Any]:
    """Enters one sidecar in features.json; returns its provenance."""
    first = next(iter(by_split.values()))
    shared = {name: dict(addition.metadata.details) for name, addition in by_split.items()}
    # Tokens name the very depth sidecar of their split by it, so it differs as the identity may.
    made_from = {name: details.pop("depth_digest", "") for name, details in shared.items()}
    details = next(iter(shared.values()))
    for name, addition in by_split.items():
        a, b = first.metadata, addition.metadata
        if (a.row_shape, a.camera, details) != (b.row_shape, b.camera, shared[name]):
            raise errors.UserError(f"the sidecars in {first.root} differ between splits ({name}): {a}, {b}")
    camera = first.metadata.camera
    if first.kind == "depth":
        size = resize.size if resize else first.metadata.row_shape
        features = {
            first.feature: (write_rlds.Image((*size, 1), "png", "uint16"), f"Depth of {camera}, 0 = invalid."),
            f"{_METADATA}/{first.leaf}_scale": (write_rlds.Tensor(), f"{first.leaf} = raw * scale + offset."),
            f"{_METADATA}/{first.leaf}_offset": (write_rlds.Tensor(), f"{first.leaf} = raw * scale + offset."),
            f"{_METADATA}/{first.leaf}_kind": (write_rlds.Text(), "metric (metres) or relative (inverse depth)."),
        }
    else:
        tensor = write_rlds.Tensor(first.metadata.row_shape, "uint16", first.encoding)
        invalid = first.metadata.details.get("invalid")
        said = f"; {invalid} = too little valid depth, no code" if invalid is not None else ""
        features = {first.feature: (tensor, f"Depth codes of {camera}, row by row{said}.")}
    for name, (feature, description) in features.items():
        if name in dataset.features or _node(tree, name, missing_ok=True) is not None:
            raise errors.UserError(
                f"the data set has {name!r} already: give the new feature another name, "
                f"--{first.kind}=NAME={first.root}, or leave it out"
            )
        _enter(tree, name, {**feature.spec(), "description": description})
    return {
        "feature": first.feature,
        "kind": first.kind,
        "camera": camera,
        "details": details,
        "encoding": first.encoding if first.kind == "depth_tokens" else "png",
        "identity": {name: addition.metadata.identity for name, addition in by_split.items()},
        **({"depth_digest": made_from} if any(made_from.values()) else {}),
    }


# ---- features.json as a tree ----


def _children(node: dict[str, Any]) -> dict[str, Any]:
    node = node["sequence"]["feature"] if "sequence" in node else node
    return node.get("featuresDict", {}).get("features", {})


def _node(tree: dict[str, Any], name: str, missing_ok: bool = False) -> dict[str, Any] | None:
    node = tree
    for part in name.split("/"):
        if missing_ok and part not in _children(node):
            return None
        node = _children(node)[part]
    return node


def _enter(tree: dict[str, Any], name: str, node: dict[str, Any]) -> None:
    *branches, leaf = name.split("/")
    children = _children(tree)
    for branch in branches:
        children = _children(children.setdefault(branch, write_rlds.dict_spec({})))
    children[leaf] = node
