"""Normalisation of actions and proprioception: pure functions on a small record that travels with checkpoints.

Kinds:
  bounds  q01..q99 to [-1, 1], clipped (open-pi-zero's default; robust against the outliers of relabelled actions)
  minmax  min..max to [-1, 1], clipped
  normal  (x - mean) / std
"""

import dataclasses
import json
import logging
from collections.abc import Sequence

import numpy as np

from qdepth_jax import errors

KINDS = ("bounds", "minmax", "normal")

# Smallest width that a dimension is divided by. Below it (a joint that never moves, q01 = q99) noise would be blown up
# to full scale; 1e-4 is far below any motion per step of the robots we read (about 1e-2).
FLOOR = 1e-4


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one vector over the training frames; tuples of D floats.

    Attributes:
      mean, std, low, high: over all frames; low and high are minimum and maximum.
      q01, q99: exact quantiles, linear between neighbours (numpy's default).
      count: number of frames.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    count: int

    @property
    def dims(self) -> int:
        return len(self.mean)


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """Statistics, kind, and the dimensions that stay as they are (the absolute gripper {0, 1})."""

    statistics: Statistics
    kind: str = "bounds"
    raw_dims: tuple[int, ...] = ()
    floor: float = FLOOR

    def __post_init__(self):
        if self.kind not in KINDS:
            raise errors.UserError(f"normalisation {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        bad = [dim for dim in self.raw_dims if not 0 <= dim < self.statistics.dims]
        if bad:
            raise errors.UserError(f"raw dimensions {bad} are outside of a vector of {self.statistics.dims}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Normaliser":
        """Inverse of `to_json`."""
        content = json.loads(text)
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in content["statistics"].items()}
        return cls(Statistics(**fields), content["kind"], tuple(content["raw_dims"]), content["floor"])


def compute(values: np.ndarray) -> Statistics:
    """Statistics of f32 [N, D], N >= 1; sums in float64."""
    if values.ndim != 2 or not len(values):
        raise ValueError(f"statistics need [N >= 1, D], got {values.shape}")
    wide = values.astype(np.float64)
    q01, q99 = np.quantile(wide, [0.01, 0.99], axis=0)
    rows = (wide.mean(0), wide.std(0), wide.min(0), wide.max(0), q01, q99)
    return Statistics(*(tuple(row.tolist()) for row in rows), count=len(values))


def normalise(values: np.ndarray, normaliser: Normaliser) -> np.ndarray:
    """[..., D] -> f32 [..., D]."""
    centre, half, clip = _affine(normaliser)
    x = (np.asarray(values, np.float64) - centre) / half
    if clip:
        x = np.clip(x, -1.0, 1.0)
    return _keep_raw(x, values, normaliser)


def unnormalise(values: np.ndarray, normaliser: Normaliser) -> np.ndarray:
    """Inverse of `normalise` inside the bounds; policies may leave [-1, 1], so the input is clipped there first."""
    centre, half, clip = _affine(normaliser)
    x = np.asarray(values, np.float64)
    if clip:
        x = np.clip(x, -1.0, 1.0)
    return _keep_raw(x * half + centre, values, normaliser)


def warn_constant(normaliser: Normaliser, what: str) -> tuple[int, ...]:
    """Logs the dimensions whose width lies below the floor (they come out near 0); returns them."""
    _, half, _ = _unfloored(normaliser)
    dims = tuple(d for d in np.flatnonzero(half < normaliser.floor).tolist() if d not in normaliser.raw_dims)
    if dims:
        logging.warning(
            "%s: dimensions %s are nearly constant (width %s): scaled by the floor %g instead",
            what,
            list(dims),
            [float(f"{half[d]:.2g}") for d in dims],
            normaliser.floor,
        )
    return dims


def check_dims(name: str, array_dims: int, expected: Sequence[int]) -> None:
    """All parts of a mix must agree on the width of a vector."""
    if any(dims != array_dims for dims in expected):
        raise errors.UserError(
            f"the data sets of the mix have {name} vectors of {[array_dims, *expected]} numbers; "
            "a batch needs one width: train on data sets that agree"
        )


def _unfloored(normaliser: Normaliser) -> tuple[np.ndarray, np.ndarray, bool]:
    statistics = normaliser.statistics
    if normaliser.kind == "normal":
        return np.array(statistics.mean), np.array(statistics.std), False
    low, high = (statistics.q01, statistics.q99) if normaliser.kind == "bounds" else (statistics.low, statistics.high)
    return (np.array(low) + np.array(high)) / 2, (np.array(high) - np.array(low)) / 2, True


def _affine(normaliser: Normaliser) -> tuple[np.ndarray, np.ndarray, bool]:
    centre, half, clip = _unfloored(normaliser)
    return centre, np.maximum(half, normaliser.floor), clip


def _keep_raw(x: np.ndarray, values: np.ndarray, normaliser: Normaliser) -> np.ndarray:
    for dim in normaliser.raw_dims:
        x[..., dim] = values[..., dim]
    return x.astype(np.float32)
