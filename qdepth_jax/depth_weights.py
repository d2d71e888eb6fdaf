"""Weights of Depth Anything V2 and Video-Depth-Anything for the depth estimators: files, sizes, licences.

Licences as the authors state them (README, "LICENSE", of DepthAnything/Depth-Anything-V2 and of
DepthAnything/Video-Depth-Anything): Small is Apache-2.0; Base, Large and Giant are CC-BY-NC-4.0. The metric
Video-Depth-Anything checkpoints are not named there, so theirs is unknown to us.
"""

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import storage
from qdepth_jax.models import depth_anything, dinov2, dpt
from qdepth_jax.weights import depth_anything as names
from qdepth_jax.weights import safetensors_files, source, table

# Of no published network: for tests, and to try a pipeline on a CPU.
TINY = "tiny"
_TINY = {
    "trunk": dinov2.Dinov2Config(width=64, depth=4, heads=4, trained_size=70, taps=(0, 1, 2, 3)),
    "head": dpt.DptConfig(features=32, out_channels=(32, 32, 64, 64)),
}
WIDTHS = {row["width"]: size for size, row in dinov2.SIZES.items()} | {_TINY["trunk"].width: TINY}
_NETWORK = {False: "Depth Anything V2", True: "Video-Depth-Anything"}
_CLS = {"pretrained.cls_token": False, "backbone.embeddings.cls_token": True}  # key -> Hugging Face's names


@dataclasses.dataclass(frozen=True)
class DepthWeights:
    """Parameters on the host and what is known of them.

    Attributes:
      identity: "sha256:..." of the file (of all weight files of a folder), or what random ones are made of.
      kind: "relative" or "metric".
      notice: to be said to the user, "" = nothing.
    """

    config: depth_anything.DepthAnythingConfig
    params: Any
    size: str
    identity: str
    licence: str
    kind: str
    notice: str


def load(weights: str, video: bool, kind: str = "") -> DepthWeights:
    """Weights of a network.

    Args:
      weights: .pth (torch needed), .safetensors with the authors' names, for images Hugging Face's safetensors or
        their folder too, or random:SIZE[:SEED].
      video: Video-Depth-Anything, else Depth Anything V2.
      kind: what the user says of the output; "" = as the name of the file says, else relative.

    Raises:
      UserError: no such file, another network's, no published size, arrays that are missing, too many or of another
        shape, or a metric checkpoint of Depth Anything V2 (another head: use transformers:FOLDER).
    """
    if weights.startswith("random:"):
        return _random(weights, video, kind)
    opened = _open(weights)
    try:
        return _load(opened, weights, video, kind)
    finally:
        opened.close()


def _load(opened: source.Source, weights: str, video: bool, kind: str) -> DepthWeights:
    found = [(key, hf) for key, hf in _CLS.items() if key in opened.specs]
    if len(found) != 1:
        raise errors.UserError(
            f"--weights={weights} holds no {_NETWORK[video]}: none of {', '.join(_CLS)} is in it, but "
            f"{', '.join(sorted(opened.specs)[:3])}, ..."
        )
    (cls, hugging_face), temporal = found[0], any(".motion_modules." in key for key in opened.specs)
    if temporal != video:
        other = "video_depth_anything" if temporal else "depth_anything_v2"
        raise errors.UserError(
            f"--weights={weights} is {'a video' if temporal else 'an image'} network (it has "
            f"{'' if temporal else 'no '}motion modules): use --estimator={other}, or the file of {_NETWORK[video]}"
        )
    width = opened.specs[cls].shape[-1]
    if width not in WIDTHS:
        sizes = ", ".join(f"{size} {width}" for width, size in WIDTHS.items())
        raise errors.UserError(f"--weights={weights}: a trunk of width {width} has no published size ({sizes})")
    size, rows = WIDTHS[width], names.HF_TABLE if hugging_face else names.TABLE
    config = sized(size, video)
    beside = _config_beside(weights) if hugging_face else {}
    if hugging_face:
        config = _as_transformers(config, beside)
    kind = _kind(weights, video, kind, beside)
    title = f"{_NETWORK[video]} {size} ({weights})"
    loaded = table.load(opened, rows, _shapes(config), title, clean=names.renamed)
    published = size != TINY and kind != "metric"
    return DepthWeights(
        config=config,
        params=loaded.params,
        size=size,
        identity=f"sha256:{sha256_of(weights)}",
        licence=_licence(size) if published else "unknown",
        kind=kind,
        notice="" if published else f"the licence of {weights} is not known",
    )


def sized(size: str, video: bool) -> depth_anything.DepthAnythingConfig:
    """The network of a published size, or TINY."""
    if video and size == "vitg":
        raise errors.UserError(
            "there is no giant Video-Depth-Anything (vitg is of Depth Anything V2 alone): use vits, vitb, vitl or tiny"
        )
    if size != TINY:
        return depth_anything.sized(size, video)
    frames = 32 if video else 0
    return depth_anything.DepthAnythingConfig(_TINY["trunk"], dataclasses.replace(_TINY["head"], frames=frames))


@functools.lru_cache
def _shapes(config: depth_anything.DepthAnythingConfig) -> Any:
    return jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]


def _licence(size: str) -> str:
    return "Apache-2.0" if size == "vits" else "CC-BY-NC-4.0 (no commercial use)"


def _open(weights: str) -> source.Source:
    path = storage.absolute(weights)
    if storage.is_remote(path):
        raise errors.UserError(f"--weights={weights}: every byte goes into the identity of the maps: copy it to a disk")
    if os.path.isdir(path) or (os.path.isfile(path) and path.endswith(".safetensors")):
        return safetensors_files.open_source(path)
    if not os.path.isfile(path):
        raise errors.UserError(f"--weights={weights} is no file: give a .pth or .safetensors, or random:SIZE[:SEED]")
    if path.endswith(".json"):
        raise errors.UserError(f"--weights={weights} is an index: name its folder")
    from qdepth_jax.weights import torch_pt

    return torch_pt.open_source(path)


def _kind(weights: str, video: bool, kind: str, beside: dict[str, Any]) -> str:
    """Kind of the output: names and shapes of a metric checkpoint are those of a relative one, its name is not."""
    named = "metric" in os.path.basename(os.path.normpath(weights)).lower()
    metric = named or beside.get("depth_estimation_type") == "metric"
    if metric and not video:
        raise errors.UserError(
            f"--weights={weights} is a metric checkpoint, whose head ends in another function: use "
            "--estimator=transformers:FOLDER with its Hugging Face files"
        )
    if metric and kind == "relative":
        raise errors.UserError(f"--weights={weights} names itself metric: leave out --depth_kind=relative")
    if kind == "metric" and not video:
        raise errors.UserError("--depth_kind=metric: depth_anything_v2 estimates relative depth")
    return "metric" if metric else kind or "relative"


def _config_beside(weights: str) -> dict[str, Any]:
    """config.json of transformers beside the weights; {} where there is none."""
    path = storage.absolute(weights)
    path = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise errors.UserError(f"{path} is damaged: {error}") from error


def _as_transformers(config: depth_anything.DepthAnythingConfig, beside: dict) -> depth_anything.DepthAnythingConfig:
    """The network as transformers runs it: no offset in the positions, and the layers that config.json taps.

    Depth Anything V1 has the names and shapes of V2 and taps the last four layers.
    """
    trunk = dataclasses.replace(config.trunk, offset=0.0)
    if taps := (beside.get("backbone_config") or {}).get("out_indices"):
        trunk = dataclasses.replace(trunk, taps=tuple(int(tap) - 1 for tap in taps))
    return dataclasses.replace(config, trunk=trunk)


def sha256_of(path: str) -> str:
    """Hex digest of a file's bytes; of a folder: of the names and digests of all of its files."""
    path = storage.absolute(path)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            file = os.path.join(folder, name)
            digest.update(f"{os.path.relpath(file, path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _random(weights: str, video: bool, kind: str) -> DepthWeights:
    _, size, seed = (*weights.split(":"), "0")[:3]
    if size not in WIDTHS.values() or not seed.isdecimal() or weights.count(":") > 2:
        raise errors.UserError(f"--weights={weights}: random:SIZE[:SEED] with SIZE one of {', '.join(WIDTHS.values())}")
    config = sized(size, video)
    params = random_params(config, int(seed))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(leaf.tobytes())
    return DepthWeights(
        config=config,
        params=params,
        size=size,
        identity=f"RANDOM weights, seed {seed}, sha256:{digest.hexdigest()}",
        licence="none needed (random weights)",
        kind=kind or "relative",
        notice=f"{weights}: RANDOM weights, these maps are NO depth; use them to test the pipeline only",
    )


def random_params(config: depth_anything.DepthAnythingConfig, seed: int) -> dict[str, Any]:
    """f32 parameters of the variance that keeps activations alive, from NumPy: the same on every machine.

    (The network's own initialisers compile for many seconds.) The last bias is 1: a fresh network is 0 nearly
    everywhere, which is a constant map.
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def leaf(path: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        *_, parent, name = ("", *(str(entry.key) for entry in path))
        shape, blocks = spec.shape, "blocks" in (str(entry.key) for entry in path)
        if name == "bias":
            return np.full(shape, 1.0 if parent == "output_3" else 0.0, np.float32)
        if name.startswith("scale"):
            return np.ones(shape, np.float32)
        inner = shape[1:] if blocks else shape
        fan = inner[1] if parent == "qkv" else int(np.prod(inner[:-1]))
        bound = np.float32((3 / fan) ** 0.5 if name == "kernel" else 0.02)
        return (2 * rng.random(shape, np.float32) - 1) * bound

    return jax.tree_util.tree_map_with_path(leaf, _shapes(config))
