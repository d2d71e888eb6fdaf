"""Depth error measures as sums that add up over batches, and the floor a tokenizer must beat.

AbsRel = mean |d' - d| / d, RMSE = sqrt(mean (d' - d)^2), delta_1 = share with max(d'/d, d/d') < 1.25, over valid pixels
(the definitions of the AiT and big_vision evaluators). For relative depth AbsRel and delta_1 mean nothing where the
value nears 0, so pixels below RELATIVE_FLOOR are left out of those two and counted.
"""

import dataclasses

import numpy as np

RELATIVE_FLOOR = 0.05


@dataclasses.dataclass
class DepthSums:
    """Running sums over pixels; `add` batches, then `result`."""

    pixels: int = 0
    squared: float = 0.0
    ratio_pixels: int = 0
    relative: float = 0.0
    within: int = 0

    def add(self, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> None:
        """Add f32 [N, H, W] predictions and truths (same units) where `valid` bool [N, H, W]."""
        p, t = predicted[valid].astype(np.float64), true[valid].astype(np.float64)
        self.pixels += p.size
        self.squared += float(np.sum((p - t) ** 2))
        keep = t > RELATIVE_FLOOR
        p, t = np.maximum(p[keep], 1e-6), t[keep]
        self.ratio_pixels += t.size
        self.relative += float(np.sum(np.abs(p - t) / t))
        self.within += int(np.sum(np.maximum(p / t, t / p) < 1.25))

    def result(self) -> dict[str, float]:
        """{"rmse" in the units of the depth, "abs_rel", "delta_1", "pixels"}; NaN-free even when empty."""
        n, m = max(self.pixels, 1), max(self.ratio_pixels, 1)
        return {
            "rmse": (self.squared / n) ** 0.5,
            "abs_rel": self.relative / m,
            "delta_1": self.within / m,
            "pixels": self.pixels,
        }


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
    count = np.bincount(index.reshape(-1), minlength=num_codes).astype(np.float64)
    p = count[count > 0] / count.sum()
    return {
        "codes_used": int((count > 0).sum()),
        "codes": num_codes,
        "perplexity": float(np.exp(-(p * np.log(p)).sum())),
    }
