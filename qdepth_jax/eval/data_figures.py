"""Pictures of a data set: histograms, lengths, strips of frames, action curves, depth beside its reconstruction."""

import base64

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import simplejpeg
from PIL import Image

from qdepth_jax.eval import figures

COLUMNS = 8  # panels side by side
FIRST, SECOND = "#4878a8", "#c06a35"


def histograms(rows: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], names: list[str], notes: list[str]) -> str:
    """One panel per dimension and row; wide vectors wrap.

    Args:
      rows: (y label, low [D], high [D], counts [D, bins]), e.g. before and after normalisation.
      names, notes: of the D dimensions; a note stands in the panel of the last row.
    """
    dims, out = len(names), []
    for first in range(0, dims, COLUMNS):
        part = range(first, min(first + COLUMNS, dims))
        size = (1.55 * COLUMNS, 1.45 * len(rows) + 0.3)
        figure, axes = plt.subplots(len(rows), COLUMNS, figsize=size, squeeze=False)
        for r, (label, low, high, counts) in enumerate(rows):
            for column, axis in enumerate(axes[r]):
                if column >= len(part):
                    axis.set_axis_off()
                    continue
                dim = part[column]
                edges = np.linspace(low[dim], high[dim], counts.shape[1] + 1)
                total = max(int(counts[dim].sum()), 1)
                axis.stairs(100 * counts[dim] / total, edges, fill=True, color=(FIRST, SECOND)[r % 2])
                axis.tick_params(labelsize=6)
                axis.locator_params(axis="both", nbins=3)
                axis.margins(x=0.02)
                if r == 0:
                    axis.set_title(names[dim], fontsize=8)
                if r == len(rows) - 1 and notes[dim]:
                    axis.set_xlabel(notes[dim], fontsize=7)
                if column == 0:
                    axis.set_ylabel(f"{label}\n% of frames", fontsize=7)
        figure.tight_layout(pad=0.4)
        out.append(figures.embed(figure))
    return "".join(out)


def lengths(values: np.ndarray, rate_hz: float) -> str:
    """Histogram of episode lengths i [E] in frames, with seconds above where the rate is known."""
    figure, axis = plt.subplots(figsize=(6, 2.4))
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // 50))
    axis.hist(values, bins=np.arange(low, high + width + 1, width) - 0.5, color=FIRST)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("frames in an episode")
    axis.set_ylabel("episodes")
    if rate_hz:
        above = axis.secondary_xaxis("top", functions=(lambda x: x / rate_hz, lambda x: x * rate_hz))
        above.set_xlabel(f"seconds at {rate_hz:g} Hz")
    return figures.embed(figure)


def strip(frames: list[np.ndarray | None], height: int = 112) -> str:
    """Frames u8 [H, W, 3] side by side as one inline JPEG; None is drawn as a grey field."""
    shapes = [f.shape for f in frames if f is not None] or [(height, height, 3)]
    widths = [max(1, round(height * (s[1] / s[0]))) for s in shapes]
    fields = []
    for frame in frames:
        if frame is None:
            fields.append(np.full((height, widths[0], 3), 128, np.uint8))
        else:
            size = (max(1, round(height * frame.shape[1] / frame.shape[0])), height)
            fields.append(np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BOX)))
        fields.append(np.full((height, 2, 3), 255, np.uint8))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(np.concatenate(fields[:-1], axis=1)), 88)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def action_curves(
    values: np.ndarray, names: list[str], low: np.ndarray, high: np.ndarray, marks: np.ndarray, defined: int
) -> str:
    """One small panel per dimension over the steps of an episode; q01 and q99 dashed, strip frames marked.

    Args:
      values: f32 [T, A]. low, high: [A], NaN = no line. marks: steps drawn in the strip.
      defined: steps that have an action; the rest is left out.
    """
    out = []
    for first in range(0, len(names), COLUMNS):
        part = range(first, min(first + COLUMNS, len(names)))
        figure, axes = plt.subplots(1, COLUMNS, figsize=(1.55 * COLUMNS, 1.35), squeeze=False, sharex=True)
        for column, axis in enumerate(axes[0]):
            if column >= len(part):
                axis.set_axis_off()
                continue
            dim = part[column]
            for mark in marks:
                axis.axvline(mark, color="0.88", linewidth=1, zorder=0)
            axis.plot(np.arange(defined), values[:defined, dim], color=FIRST, linewidth=1.1)
            for bound in (low[dim], high[dim]):
                if np.isfinite(bound):
                    axis.axhline(bound, color="0.4", linestyle="--", linewidth=0.7)
            axis.set_title(names[dim], fontsize=8, pad=3)
            axis.tick_params(labelsize=6)
            axis.locator_params(axis="both", nbins=3)
            axis.set_xlim(-0.5, len(values) - 0.5)
            if column == 0:
                axis.set_xlabel("step", fontsize=7)
        figure.tight_layout(pad=0.3)
        out.append(figures.embed(figure))
    return "".join(out)


def depth_table(
    titles: list[str],
    pictures: list[np.ndarray | None],
    depth: list[np.ndarray],
    ends: tuple[float, float],
    label: str,
    reconstruction: list[np.ndarray] | None = None,
) -> str:
    """One row per frame: camera, depth, and where given reconstruction and absolute error, with colour bars.

    Args:
      titles: of the N rows. pictures: u8 [H, W, 3] or None.
      depth: f32 [R, R] with NaN = invalid (grey). reconstruction: the same, without NaN.
      ends: (low, high) of the colour scale. label: of its bar.
    """
    n, columns = len(titles), 4 if reconstruction else 2
    colours, warm = matplotlib.colormaps[figures.DEPTH_COLOURS].copy(), matplotlib.colormaps["magma"].copy()
    colours.set_bad("0.6")
    warm.set_bad("0.6")
    figure, axes = plt.subplots(
        n, columns, figsize=(2.3 * columns + 1.2, 2.25 * n), squeeze=False, layout="constrained"
    )
    drawn, wrong = None, None
    if reconstruction:
        gaps = [np.abs(r - d) for r, d in zip(reconstruction, depth)]
        finite = np.concatenate([g[np.isfinite(g)] for g in gaps])
        worst = float(np.quantile(finite, 0.99)) if len(finite) else 1.0
    for row in range(n):
        if pictures[row] is not None:
            axes[row][0].imshow(pictures[row])
        axes[row][0].set_title(titles[row], fontsize=8, loc="left")
        drawn = axes[row][1].imshow(np.ma.masked_invalid(depth[row]), cmap=colours, vmin=ends[0], vmax=ends[1])
        invalid = 1 - np.isfinite(depth[row]).mean()
        axes[row][1].set_title(f"depth, {invalid:.1%} invalid", fontsize=8, loc="left")
        if reconstruction:
            axes[row][2].imshow(reconstruction[row], cmap=colours, vmin=ends[0], vmax=ends[1])
            axes[row][2].set_title("from tokens", fontsize=8, loc="left")
            wrong = axes[row][3].imshow(np.ma.masked_invalid(gaps[row]), cmap=warm, vmin=0, vmax=worst)
            rmse = float(np.sqrt(np.nanmean(gaps[row] ** 2))) if np.isfinite(gaps[row]).any() else float("nan")
            axes[row][3].set_title(f"|error|, RMSE {rmse:.3g}", fontsize=8, loc="left")
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(drawn, ax=axes[:, 1 : 3 if reconstruction else 2], shrink=0.8, aspect=30, label=label)
    if wrong is not None:
        figure.colorbar(wrong, ax=axes[:, 3], shrink=0.8, aspect=30, label="absolute error")
    return figures.embed(figure)


def depth_histogram(values: np.ndarray, label: str) -> str:
    """Histogram of sampled depth values f32 [N] between their 0.1st and 99.9th percentile."""
    low, high = np.quantile(values, [0.001, 0.999])
    figure, axis = plt.subplots(figsize=(6, 2.2))
    high = high if high > low else low + 1e-6
    counts, edges = np.histogram(values, 80, (low, high))
    axis.stairs(100 * counts / len(values), edges, fill=True, color=FIRST)
    axis.set_xlabel(label)
    axis.set_ylabel("% of pixels")
    return figures.embed(figure)
