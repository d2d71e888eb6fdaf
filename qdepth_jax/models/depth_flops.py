"""Floating point operations of a depth network's forward pass by formula: matrix products and convolutions.

2 for each multiply-add. Padded convolutions are counted without their products with padding, as XLA counts them.
Resizing, norms, activations and softmax are left out.
"""

import math

from qdepth_jax.models import depth_anything, dinov2, dpt


def total(config: depth_anything.DepthAnythingConfig, frames: int, height: int, width: int) -> float:
    """FLOPs of one window of `frames` frames of height x width pixels (multiples of the patch)."""
    return float(sum(parts(config, frames, height, width).values()))


def parts(config: depth_anything.DepthAnythingConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Part name -> FLOPs of one window."""
    grid = height // config.trunk.patch, width // config.trunk.patch
    out = {name: frames * value for name, value in _trunk(config.trunk, grid).items()}
    out |= {name: frames * value for name, value in _head(config.head, config.trunk, grid).items()}
    if config.head.frames:
        out["temporal modules"] = float(sum(_motion(c, n, frames) for c, n in _moving(config.head, grid)))
    return out


def _trunk(c: dinov2.Dinov2Config, grid: tuple[int, int]) -> dict[str, float]:
    d, patches = c.width, math.prod(grid)
    t = patches + 1
    # SwiGLU: two inner matrices of two thirds of the width, so as many products as the plain MLP but for rounding.
    hidden = 4 * d if c.mlp == "gelu" else (4 * d * 2 // 3 + 7) // 8 * 8
    mlp = (2 if c.mlp == "gelu" else 3) * d * hidden
    return {
        "trunk embedding": 2 * patches * c.patch**2 * 3 * d,
        "trunk projections": c.depth * 2 * t * (4 * d * d + mlp),
        "trunk attention": c.depth * 2 * 2 * t * t * d,
    }


def _head(c: dpt.DptConfig, trunk: dinov2.Dinov2Config, grid: tuple[int, int]) -> dict[str, float]:
    levels, e, channels = _levels(grid), c.features, c.out_channels
    patches = math.prod(grid)
    into = sum(2 * patches * trunk.width * n for n in channels)
    # Transposed convolutions with stride = kernel: one product for each pixel that comes out.
    into += sum(2 * math.prod(levels[i]) * channels[i] ** 2 for i in (0, 1))
    into += 2 * _taps(grid, stride=2) * channels[3] ** 2
    into += sum(2 * _taps(level) * n * e for level, n in zip(levels, channels))
    fusion = 0
    for i, level in enumerate(levels):
        units = 1 if i == 3 else 2
        fusion += units * 2 * 2 * _taps(level) * e * e
        fusion += 2 * math.prod(level) * e * e  # the layer after the units, before their result is enlarged
    fine, full = _doubled(levels[0]), (grid[0] * trunk.patch, grid[1] * trunk.patch)
    last = 2 * _taps(fine) * e * (e // 2) + 2 * _taps(full) * (e // 2) * 32 + 2 * math.prod(full) * 32
    return {"head levels": into, "head fusion": fusion, "head output": last}


def _levels(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(rows, columns) of the four feature maps, the finest first."""
    rows, columns = grid
    return [(4 * rows, 4 * columns), (2 * rows, 2 * columns), grid, ((rows + 1) // 2, (columns + 1) // 2)]


def _doubled(level: tuple[int, int]) -> tuple[int, int]:
    return 2 * level[0], 2 * level[1]


def _moving(c: dpt.DptConfig, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(channels, pixels) of the four temporal modules."""
    levels = [math.prod(level) for level in _levels(grid)]
    return [
        (c.out_channels[2], levels[2]),
        (c.out_channels[3], levels[3]),
        (c.features, levels[2]),
        (c.features, levels[1]),
    ]


def _motion(c: int, pixels: int, frames: int) -> float:
    """In, out, two attentions (four projections, products over T), GEGLU (8 C wide into 4 C)."""
    dense = 2 * c * c * (2 + 2 * 4 + 8 + 4)
    return pixels * frames * (dense + 2 * 2 * 2 * frames * c)


def _taps(size: tuple[int, int], stride: int = 1) -> int:
    """Pairs of (output, input) pixels of a 3x3 convolution with one row of padding."""
    return math.prod(sum(1 for o in range(0, n, stride) for k in (-1, 0, 1) if 0 <= o + k < n) for n in size)
