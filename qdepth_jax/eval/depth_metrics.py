"""Depth error measures as sums that add up over batches and episodes, and the floor a tokenizer must beat.

AbsRel = mean |d' - d| / d, RMSE = sqrt(mean (d' - d)^2), delta_n = share with max(d'/d, d/d') < 1.25^n, over valid
pixels (the definitions of the AiT and big_vision evaluators). For relative depth AbsRel and the deltas mean nothing
where the value nears 0, so pixels below RELATIVE_FLOOR are left out of those and counted.

Frames of an episode resemble one another, so an interval over frames would be far too narrow: `figures` takes the
episode as the unit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special

from qdepth_jax.data import sidecar

RELATIVE_FLOOR = 0.05
DELTAS = (1.25, 1.25**2, 1.25**3)
ERRORS = ("rmse", "abs_rel", "delta_1", "delta_2", "delta_3")
_COUNTS = ("frames", "pixels", "masked_pixels", "tokens", "invalid_tokens")
# Of a reconstruction: pixels, squared error, pixels above RELATIVE_FLOOR, sum of |d' - d| / d, the three deltas.
_MEASURED = 4 + len(DELTAS)


@dataclasses.dataclass
class DepthSums:
    """Running sums over pixels; `add` batches, then `result`."""

    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_MEASURED))

    def add(self, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> None:
        """Add f32 [N, H, W] predictions and truths (same units) where `valid` bool [N, H, W]."""
        self.sums = self.sums + _measured(predicted, true, valid)

    def result(self) -> dict[str, float]:
        """{"rmse" in the units of the depth, "abs_rel", "delta_1" to "delta_3", "pixels"}; NaN-free even when empty."""
        return {name: float(x) for name, x in _errors(self.sums).items()} | {"pixels": int(self.sums[0])}


def _measured(predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> np.ndarray:
    p, t = predicted[valid].astype(np.float64), true[valid].astype(np.float64)
    squared = np.sum((p - t) ** 2)
    keep = t > RELATIVE_FLOOR
    p, t, pixels = np.maximum(p[keep], 1e-6), t[keep], p.size
    ratio = np.maximum(p / t, t / p)
    within = [np.sum(ratio < limit) for limit in DELTAS]
    return np.asarray([pixels, squared, t.size, np.sum(np.abs(p - t) / t), *within], np.float64)


def _errors(sums: np.ndarray) -> dict[str, np.ndarray]:
    """ERRORS from sums f64 [..., _MEASURED]."""
    n, m = np.maximum(sums[..., 0], 1), np.maximum(sums[..., 2], 1)
    rest = (sums[..., 3 + i] / m for i in range(1 + len(DELTAS)))
    return dict(zip(ERRORS, (np.sqrt(sums[..., 1] / n), *rest)))


def constant_per_token(true: np.ndarray, valid: np.ndarray, grid: int) -> np.ndarray:
    """The best reconstruction with one number per token: the mean of each image's own valid pixels in each cell.

    It knows the image (not only the data set), so it is the strictest constant floor.

    Args:
      true: f32 [N, R, R]; valid: bool [N, R, R]; grid: tokens per side, a divisor of R.

    Returns:
      f32 [N, R, R].
    """
    n, r, _ = true.shape
    cell = r // grid
    split = (n, grid, cell, grid, cell)
    count = valid.reshape(split).sum(axis=(2, 4))
    total = np.where(valid, true, 0.0).reshape(split).sum(axis=(2, 4))
    mean = (total / np.maximum(count, 1)).astype(np.float32)
    return mean.repeat(cell, axis=1).repeat(cell, axis=2)


def code_usage(index: np.ndarray, num_codes: int) -> dict[str, float]:
    """{"codes_used", "codes", "perplexity"} of indices of any shape."""
    count = np.bincount(index.reshape(-1), minlength=num_codes)
    return {"codes_used": int((count > 0).sum()), "codes": num_codes, "perplexity": float(_perplexity(count))}


def _perplexity(count: np.ndarray) -> np.ndarray:
    """exp(entropy of use) of counts [..., K]; 0 where nothing was counted."""
    total = count.sum(axis=-1, keepdims=True)
    p = count / np.maximum(total, 1)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def episode_sums(
    value: np.ndarray,
    truth: np.ndarray,
    valid: np.ndarray,
    grid: int,
    index: np.ndarray,
    kept: np.ndarray,
    num_codes: int,
) -> dict[str, np.ndarray]:
    """What an episode, or a batch of its frames, adds to `figures`. All are float64: counts below 2^53 stay exact.

    Args:
      value, truth: f32 [N, R, R], depth from tokens and true depth in the same units.
      valid: bool [N, R, R], pixels with valid depth.
      grid: tokens per side.
      index: integers [N, P], codes; kept: bool [N, P], tokens that stand for depth (sidecar.token_validity). The errors
        are over the valid pixels of those tokens, since nobody uses the others.
      num_codes: K.

    Returns:
      {"counts" [5]: frames, pixels, pixels without depth, tokens, tokens that stand for no depth;
       "tokens" [7], "floor" [7]: sums of the reconstruction and of the best constant per token; "codes" [K]: uses}.
      Add them with `+`, key by key, or see `total`; `as_row` makes one row of them.
    """
    counted = valid & sidecar.token_pixels(kept, valid.shape[1])
    invalid = int((~kept).sum())
    return {
        "counts": np.asarray([len(valid), valid.size, (~valid).sum(), kept.size, invalid], np.float64),
        "tokens": _measured(value, truth, counted),
        "floor": _measured(constant_per_token(truth, counted, grid), truth, counted),
        "codes": np.bincount(index[kept].reshape(-1), minlength=num_codes).astype(np.float64),
    }


def no_sums(num_codes: int) -> dict[str, np.ndarray]:
    """The sums of nothing: of an episode that has no good frame, and where adding starts."""
    sizes = {"counts": len(_COUNTS), "tokens": _MEASURED, "floor": _MEASURED, "codes": num_codes}
    return {name: np.zeros(size) for name, size in sizes.items()}


def total(sums: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum of at least one `episode_sums`."""
    return {name: np.sum([s[name] for s in sums], axis=0) for name in sums[0]}


def row_size(num_codes: int) -> int:
    """Numbers in a row of `as_row`."""
    return len(_COUNTS) + 2 * _MEASURED + num_codes


def as_row(sums: dict[str, np.ndarray]) -> np.ndarray:
    """`episode_sums` as f64 [row_size], for files."""
    return np.concatenate([sums["counts"], sums["tokens"], sums["floor"], sums["codes"]])


def from_rows(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """f64 [E, row_size] back to `episode_sums` of E episodes."""
    cuts = np.cumsum([len(_COUNTS), _MEASURED, _MEASURED])
    return [dict(zip(("counts", "tokens", "floor", "codes"), np.split(row, cuts))) for row in np.asarray(rows)]


def figures(sums: Sequence[dict[str, np.ndarray]]) -> dict:
    """All figures over the pixels of all episodes, with 95 % intervals over episodes.

    The interval is the delete-one jackknife with Student's t [Efron & Tibshirani 1993, ch. 11]: unlike a percentile
    bootstrap it is not too narrow for the handful of episodes of a small held-out split. It holds for other episodes of
    the same data and this tokenizer; other training seeds are another matter.

    Args:
      sums: `episode_sums` of each episode; episodes without a valid pixel only add to the counts.

    Returns:
      {"episodes", "frames", "masked_share", "invalid_tokens", "invalid_token_share", "codes_used", "codes",
      "perplexity", "rmse", "abs_rel", "delta_1", "delta_2", "delta_3", "pixels",
      "constant_per_token": the floor's rmse to pixels, "floor_over_tokens": {"rmse", "abs_rel"}: how many times lower
      than the floor (0 where there is no error to divide by),
      "interval_95": name -> [low, high] or None with fewer than two episodes that have depth; the names are those of
      the figures, floor_over_tokens_rmse and floor_over_tokens_abs_rel}. NaN-free even when empty.
    """
    stacked = {name: np.stack([s[name] for s in sums]) for name in sums[0]} if sums else _nothing()
    whole = {name: x.sum(axis=0) for name, x in stacked.items()}
    there = stacked["tokens"][:, 0] > 0
    without = {name: whole[name] - x[there] for name, x in stacked.items()}
    point, left_out = _statistics(whole), _statistics(without)
    counts = dict(zip(_COUNTS, whole["counts"]))
    return {
        "episodes": len(stacked["counts"]),
        "frames": int(counts["frames"]),
        "masked_share": float(counts["masked_pixels"] / max(counts["pixels"], 1)),
        "invalid_tokens": int(counts["invalid_tokens"]),
        "invalid_token_share": float(counts["invalid_tokens"] / max(counts["tokens"], 1)),
        "codes_used": int((whole["codes"] > 0).sum()),
        "codes": len(whole["codes"]),
        "perplexity": float(point["perplexity"]),
        **DepthSums(whole["tokens"]).result(),
        "constant_per_token": DepthSums(whole["floor"]).result(),
        "floor_over_tokens": {name: float(point[f"floor_over_tokens_{name}"]) for name in ("rmse", "abs_rel")},
        "interval_95": {
            name: _interval(name, float(x), left_out[name]) for name, x in point.items() if there.sum() > 1
        } or None,
    }  # fmt: skip


def _nothing() -> dict[str, np.ndarray]:
    return {name: x[None][:0] for name, x in no_sums(0).items()}


def _statistics(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every figure that has an interval, from sums with any leading axes."""
    tokens, floor = _errors(sums["tokens"]), _errors(sums["floor"])
    ratio = {
        f"floor_over_tokens_{name}": np.where(
            tokens[name] > 0, floor[name] / np.where(tokens[name] > 0, tokens[name], 1), 0
        )
        for name in ("rmse", "abs_rel")
    }
    return {"perplexity": _perplexity(sums["codes"]), **tokens, **ratio}


def _interval(name: str, point: float, left_out: np.ndarray) -> list[float]:
    n = len(left_out)
    error = np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    half = float(special.stdtrit(n - 1, 0.975) * error)
    return [max(point - half, 0.0), min(point + half, 1.0) if name.startswith("delta") else point + half]
