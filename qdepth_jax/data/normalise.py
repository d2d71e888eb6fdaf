"""Normalisation of actions and proprioception: pure functions on a small record that travels with checkpoints.

Kinds:
  bounds  q01..q99 to [-1, 1], clipped (open-pi-zero's default; robust against the outliers of relabelled actions)
  minmax  min..max to [-1, 1], clipped
  normal  (x - mean) / std
"""

import dataclasses
import json
import logging

import numpy as np

from qdepth_jax import errors

KINDS = ("bounds", "minmax", "normal")

# Smallest width that a dimension is divided by. Below it (a joint that never moves, q01 = q99) noise would be blown up
# to full scale; 1e-4 is far below any motion per step of the robots we read (about 1e-2).
FLOOR = 1e-4
# Rows that are summed together in float64.
_BLOCK = 1 << 18


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


def compute(values: np.ndarray, rows: np.ndarray | None = None) -> Statistics:
    """Statistics of f32 [F, D] over all frames, or over the frame ids in `rows` (i64 [N]); N >= 1.

    Exact and one dimension at a time: besides its input it needs one float32 column (108 MB at 27 M frames). Sums are
    in float64 over blocks; quantiles are numpy's default, linear between neighbours.

    Raises:
      UserError: a value that is not finite (names frame and dimension).
    """
    count = len(values) if rows is None else len(rows)
    if values.ndim != 2 or not count:
        raise ValueError(f"statistics need [N >= 1, D], got {values.shape} and {count} rows")
    found = []
    for dim in range(values.shape[1]):
        column = np.array(values[:, dim] if rows is None else values[rows, dim], np.float32)
        found.append(_column_statistics(column, dim, rows))
    return Statistics(*(tuple(row) for row in zip(*found)), count=count)


def _column_statistics(column: np.ndarray, dim: int, rows: np.ndarray | None) -> tuple[float, ...]:
    """(mean, std, low, high, q01, q99) of f32 [N], which is reordered."""
    blocks = [column[i : i + _BLOCK] for i in range(0, len(column), _BLOCK)]
    for number, block in enumerate(blocks):
        if not np.isfinite(block).all():
            at = number * _BLOCK + int(np.flatnonzero(~np.isfinite(block))[0])
            frame = at if rows is None else int(rows[at])
            raise errors.UserError(
                f"no statistics: frame {frame} has {column[at]} in dimension {dim}; leave it out with "
                "`python tools/index_rlds.py DATASET_DIR --quarantine`"
            )
    mean = sum(block.sum(dtype=np.float64) for block in blocks) / len(column)
    variance = sum(np.square(block.astype(np.float64) - mean).sum() for block in blocks) / len(column)
    places = [_place(len(column), q) for q in (0.01, 0.99)]
    column.partition(sorted({0, len(column) - 1, *(at for place in places for at in place[:2])}))
    quantiles = [_between(float(column[low]), float(column[high]), part) for low, high, part in places]
    return (float(mean), float(np.sqrt(variance)), float(column[0]), float(column[-1]), *quantiles)


def _place(count: int, q: float) -> tuple[int, int, float]:
    """Ranks of the two neighbours of a quantile, and how far it lies between them."""
    at = q * (count - 1)
    low = int(at)
    return low, min(low + 1, count - 1), at - low


def _between(low: float, high: float, part: float) -> float:
    # numpy interpolates from the nearer neighbour; the same here, so that both agree to the last bit.
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)


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


def policies(normaliser: Normaliser) -> tuple[str, ...]:
    """What happens to each dimension: "scaled", "floored" (nearly constant, divided by the floor), or "raw"."""
    _, half, _ = _unfloored(normaliser)
    names = np.where(half < normaliser.floor, "floored", "scaled")
    names[list(normaliser.raw_dims)] = "raw"
    return tuple(names.tolist())


def warn_constant(normaliser: Normaliser, what: str) -> tuple[int, ...]:
    """Logs the dimensions whose width lies below the floor (they come out near 0); returns them."""
    _, half, _ = _unfloored(normaliser)
    dims = tuple(dim for dim, policy in enumerate(policies(normaliser)) if policy == "floored")
    if dims:
        logging.warning(
            "%s: dimensions %s are nearly constant (width %s): scaled by the floor %g instead",
            what,
            list(dims),
            [float(f"{half[d]:.2g}") for d in dims],
            normaliser.floor,
        )
    return dims


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
