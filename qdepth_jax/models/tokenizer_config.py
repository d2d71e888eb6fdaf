"""Sizes and conventions of a depth tokenizer (models/tokenizer.py)."""

import dataclasses
import math

from qdepth_jax import depth as depth_lib
from qdepth_jax import errors
from qdepth_jax.models import codebook

STEM = 4  # side of the space-to-depth patch: full-resolution convolutions cost most and help least on depth


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes and conventions of a depth tokenizer; stored with every checkpoint.

    Attributes:
      depth_size: R, side of the square depth input in pixels; the raw map is resampled (nearest) to it.
      grid: g, tokens per side; P = g * g. R / g must be 4 times a power of two.
      num_codes, code_dim: K and D of the codebook (`fsq` derives D from K).
      widths: channels per resolution, from R/4 down to g: log2(R / 4 / g) + 1 entries.
      blocks: residual blocks per resolution.
      quantiser: "ema" | "l2" | "plain" | "fsq", see models/codebook.py.
      beta: weight of the commitment term.
      decay: EMA decay of codes.
      dead_share: (`ema`, `l2`) a code used less than this share of uniform use is revived. A larger share evens out
        the use of codes, for a little more error.
      l2_weight: of the squared error beside the absolute one. Absolute error keeps edges sharp, squared error is what
        RMSE measures: errors at edges are few and large.
      start_step: (`ema`, `l2`) before this step the decoder sees unquantised features; then the codebook starts from
        data. Quantising an untrained encoder from step 0 can lock all features onto one code.
      crop_scale: share of the map's area that a crop of a training map keeps, drawn uniformly between the two; it is
        resampled (nearest) to the whole size. (1, 1) = none.
      flip: probability that a training map is mirrored left-right. Depth values never change.
      range: which depth the ends of [-1, 1] mean.
      dtype: activation dtype of the convolutions; features, codes and losses are float32.
    """

    depth_size: int = 256
    grid: int = 16
    num_codes: int = 256
    code_dim: int = 160
    widths: tuple[int, ...] = (64, 128, 256)
    blocks: int = 2
    quantiser: str = "ema"
    beta: float = 0.25
    decay: float = 0.99
    dead_share: float = 0.05
    l2_weight: float = 10.0
    start_step: int = 200
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    range: depth_lib.DepthRange = depth_lib.DepthRange()
    dtype: str = "float32"

    def __post_init__(self):
        ratio = self.depth_size / self.grid / STEM
        if ratio < 1 or not math.log2(ratio).is_integer():
            raise errors.UserError(
                f"depth_size={self.depth_size} and grid={self.grid} do not fit: depth_size / grid must be {STEM} times "
                f"a power of two; with this grid use depth_size={STEM * self.grid} or {2 * STEM * self.grid}"
            )
        if len(self.widths) != int(math.log2(ratio)) + 1:
            raise errors.UserError(
                f"widths={self.widths} has {len(self.widths)} entries, but depth_size={self.depth_size} and "
                f"grid={self.grid} need {int(math.log2(ratio)) + 1}, one per resolution"
            )
        if self.quantiser not in codebook.KINDS:
            raise errors.UserError(f"quantiser {self.quantiser!r} is unknown: use one of {codebook.KINDS}")
        if not 0.001 <= self.dead_share <= 0.25:
            raise errors.UserError(
                f"dead_share={self.dead_share} must lie in 0.001..0.25: a revived code starts at 4 times as much"
            )
        low, high = self.crop_scale
        if not 0.01 <= low <= high <= 1.0:
            raise errors.UserError(f"crop_scale={self.crop_scale} must be (low, high) with 0.01 <= low <= high <= 1")
        if not 0.0 <= self.flip <= 1.0:
            raise errors.UserError(f"flip={self.flip} is a probability: it must lie in 0..1")

    @property
    def augments(self) -> bool:
        """Whether training maps are cropped or mirrored."""
        return self.crop_scale != (1.0, 1.0) or self.flip > 0

    @property
    def running(self) -> bool:
        """Whether the codebook is a running mean, which holds nothing before `start_step`."""
        return self.quantiser in codebook.RUNNING

    @property
    def feature_dim(self) -> int:
        """Dimension of the features that are quantised (and of a code)."""
        return len(codebook.fsq_levels(self.num_codes)) if self.quantiser == "fsq" else self.code_dim
