"""Depth maps for data without depth: the interface of an estimator, and the storage of its estimates.

Two kinds of depth: "metric" is metres; "relative" is relative inverse depth (elsewhere called relative_inverse: larger
is nearer, up to an unknown scale and shift), stored scaled per episode by its robust range. Estimators that are
networks are made by `qdepth_jax.estimators`; here are those that need none.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qdepth_jax import errors

KINDS = ("metric", "relative")
# An episode whose robust range is narrower than this share of its values has no relative depth.
CONSTANT = 1e-6
# What is counted of every episode (`counts`), beside its maps in the sidecar.
COUNTS = (
    "frames",
    "annotated_frames",
    "pixels",
    "invalid_pixels",
    "not_finite_pixels",
    "not_positive_pixels",
    "too_far_pixels",
    "constant_episodes",
    "short_episodes",
    "computed_frames",
)


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One way to depth.

    Attributes:
      name: identity stored with the maps: what decides their values.
      kind: "metric" or "relative".
      estimate: episodes u8 [T, H, W, 3], taken as they are needed -> their maps float [T, H, W], in order.
      reads: "images", or "depth": the data set's own depth is copied and `estimate` is not called.
      licence: of the weights (of the data set, where its depth is copied).
      details: json-able settings, stored and compared at a restart.
      notice: said at the start, "" = nothing.
      window: frames that it sees together; a shorter episode is filled by repeating its last frame.
      computed: T -> frames that it computes for an episode of T: windows overlap, and the last ones are filled.
    """

    name: str
    kind: str
    estimate: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]
    reads: str = "images"
    licence: str = "none needed"
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    notice: str = ""
    window: int = 1
    computed: Callable[[int], int] = lambda frames: frames


def stand_in(frames: np.ndarray) -> np.ndarray:
    """NOT a depth estimate: a smooth map of image row and brightness, u8 [T, H, W, 3] -> f32 [T, H, W].

    It has the form of a relative estimate (lower rows are nearer, brighter is nearer), so that a pipeline can be run
    end to end without any depth network. Nothing learned from it means anything.
    """
    luminance = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    rows = np.linspace(0, 1, frames.shape[1], dtype=np.float32)
    return 0.8 * rows[None, :, None] + 0.2 * luminance


def _carried(name: str) -> Estimator:
    return Estimator(
        f"{name} (depth that the data set carries)-v1", "metric", lambda episodes: iter(()), "depth", "of the data set"
    )


ESTIMATORS = {
    "stand_in": Estimator(
        "stand_in-v1 (image row and brightness, no depth)",
        "relative",
        lambda episodes: (stand_in(frames) for frames in episodes),
        notice="stand_in: these maps are NO depth; use them to test the pipeline only",
    ),
    # Two names for one thing: what a depth camera or a renderer wrote into the data set.
    "dataset": _carried("dataset"),
    "simulator": _carried("simulator"),
}


def find(name: str, settings: Mapping[str, Any] | None = None) -> Estimator:
    """An estimator without weights.

    Args:
      settings: flag -> value ("" or 0 = not given) of what the user asked for; these estimators have none to set.

    Raises:
      UserError: no such estimator, or a setting that it does not take.
    """
    if name not in ESTIMATORS:
        raise errors.UserError(f"no depth estimator {name!r} without weights: there is {', '.join(ESTIMATORS)}")
    found, given = ESTIMATORS[name], dict(settings or {})
    if given.get("depth_kind") == found.kind:
        del given["depth_kind"]  # it is what it gives anyway
    for flag, value in given.items():
        refuse_setting(name, flag, value, f"it gives {found.kind} depth and has nothing to set")
    return found


def refuse_setting(name: str, flag: str, value: Any, why: str) -> None:
    """Refuses a setting that an estimator would ignore; value "" or 0 = not given."""
    if value:
        raise errors.UserError(f"--estimator={name} takes no --{flag}={value}: {why}; leave the flag out")


def to_uint16(values: np.ndarray, kind: str) -> tuple[np.ndarray, float, float]:
    """Float maps of one episode as raw u16 with scale and offset; raw 0 = invalid (not finite, or not positive metres).

    metric: millimetres; beyond 65.535 m is invalid. relative: the 2nd..98th percentile of the episode becomes 0..1,
    values outside are clipped to it; where these two are equal (CONSTANT) everything is invalid.

    Args:
      values: [T, H, W].
      kind: "metric" or "relative".

    Returns:
      raw u16 [T, H, W], scale, offset; value = raw * scale + offset.
    """
    finite = np.isfinite(values)
    if kind == "metric":
        values = np.asarray(values, np.float64)
        millimetres = np.where(finite, np.round(np.where(finite, values, 0) * 1000), 0)
        return np.where((millimetres >= 1) & (millimetres <= 65535), millimetres, 0).astype(np.uint16), 0.001, 0.0
    if kind != "relative":
        raise ValueError(f"depth kind {kind!r}: use 'metric' or 'relative'")
    values = np.asarray(values, np.float32)
    low, high = np.quantile(values[finite], [0.02, 0.98]).tolist() if finite.any() else (0.0, 0.0)
    if high - low <= CONSTANT * max(abs(low), abs(high)):
        return np.zeros(values.shape, np.uint16), 1.0, 0.0
    # In place: this is what the host does for every pixel while devices work.
    x = np.where(finite, values, np.float32(low))
    x -= np.float32(low)
    x *= np.float32(65534 / (high - low))
    np.rint(np.clip(x, 0, 65534, out=x), out=x)
    x += 1
    x *= finite
    # A hair inside of [0, 1], so that float32 arithmetic cannot carry an end point out of the valid range.
    margin = 1e-6
    scale = (1 - 2 * margin) / 65534
    return x.astype(np.uint16), scale, margin - scale


def counts(estimator: Estimator, frames: int, values: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """COUNTS of one episode, f64.

    Args:
      frames: of the episode, those that were set aside too.
      values: [n, H, W] as estimated, or as the data set carries them; n <= frames.
      raw: u16 [n, H, W] that is stored of them.
    """
    finite = np.isfinite(values)
    found = dict.fromkeys(COUNTS, 0)
    found |= {"frames": frames, "annotated_frames": len(values), "pixels": values.size}
    found |= {"invalid_pixels": int((raw == 0).sum()), "not_finite_pixels": int((~finite).sum())}
    if estimator.kind == "metric":
        found["not_positive_pixels"] = int((finite & (values <= 0.0005)).sum())
        found["too_far_pixels"] = int((raw == 0).sum()) - found["not_positive_pixels"] - found["not_finite_pixels"]
    else:
        found["constant_episodes"] = int(finite.any() and not raw.any())
    if len(values):
        found["short_episodes"] = int(len(values) < estimator.window)
        found["computed_frames"] = estimator.computed(len(values))
    return np.array([found[name] for name in COUNTS], np.float64)
