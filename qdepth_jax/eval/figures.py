"""Pictures of a report as embeddable PNG: learning curves, code usage, depth rows, action chunks."""

import base64
import io

import matplotlib

matplotlib.use("Agg")  # a report is a file, no window is opened

import matplotlib.pyplot as plt
import numpy as np

# Perceptually uniform: equal steps of depth look equal, and no bright band suggests an edge, as rainbow maps do.
DEPTH_COLOURS = "viridis"


def embed(figure: plt.Figure) -> str:
    """A figure as an <img> tag with inline data; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def curves(runs: dict[str, list[dict]], keys: list[str]) -> str:
    """One panel per metric, one line per run, validation dashed; losses and errors on a logarithmic scale.

    Args:
      runs: name -> rows of metrics.jsonl.
      keys: metrics; those that no run has are left out.
    """
    keys = [k for k in keys if any(k in row for rows in runs.values() for row in rows)]
    figure, axes = plt.subplots(1, len(keys), figsize=(4.2 * len(keys), 3.2), squeeze=False)
    for axis, key in zip(axes[0], keys):
        for i, (name, rows) in enumerate(runs.items()):
            for prefix, style in (("", "-"), ("val/", "--")):
                points = [(row["step"], row[prefix + key]) for row in rows if prefix + key in row]
                if points:
                    label = name + (" held out" if prefix else "")
                    axis.plot(*zip(*points), style, color=f"C{i}", label=label, linewidth=1)
        axis.set_title(key)
        axis.set_xlabel("step")
        if key.endswith(("loss", "rmse")):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return embed(figure)


def code_histogram(tokens: np.ndarray, codes: int) -> str:
    """How often each code is used, sorted, with uniform use as a line."""
    return code_shares(np.bincount(tokens.reshape(-1), minlength=codes) / tokens.size)


def code_shares(shares: np.ndarray) -> str:
    """The same from the share f64 [codes] of each code."""
    count, codes = np.sort(shares)[::-1], len(shares)
    figure, axis = plt.subplots(figsize=(6, 2.6))
    axis.bar(np.arange(codes), count, width=1.0)
    axis.axhline(1 / codes, color="black", linestyle=":", label="uniform use")
    axis.set_xlabel("code, most used first")
    axis.set_ylabel("share of tokens")
    axis.legend(fontsize=8)
    return embed(figure)


def depth_rows(images: np.ndarray, columns: dict[str, np.ndarray], near: float, far: float, unit: str) -> str:
    """One row per frame: the camera image, then depth maps in one colour scale.

    Args:
      images: u8 [N, H, W, 3].
      columns: title -> f32 [N, R, R] depth in `unit`, NaN = not measured (grey).
      near, far: ends of the colour scale.
    """
    n = len(images)
    figure, axes = plt.subplots(n, 1 + len(columns), figsize=(2.2 * (1 + len(columns)), 2.2 * n), squeeze=False)
    colours = matplotlib.colormaps[DEPTH_COLOURS].copy()
    colours.set_bad("0.6")
    drawn = None
    for row in range(n):
        axes[row][0].imshow(images[row])
        for axis, (title, maps) in zip(axes[row][1:], columns.items()):
            drawn = axis.imshow(np.ma.masked_invalid(maps[row]), cmap=colours, vmin=near, vmax=far)
            if row == 0:
                axis.set_title(title, fontsize=9)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0][0].set_title("camera", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes.ravel().tolist(), shrink=0.8, label=f"depth ({unit})")
    return embed(figure)


def action_chunks(true: np.ndarray, mask: np.ndarray, predictions: dict[str, np.ndarray], names: list[str]) -> str:
    """Chunks of a few frames: one row per frame, one panel per action dimension; truth black, masked steps left out.

    Args:
      true: f32 [N, Z, A] normalised; mask: bool [N, Z]; predictions: run -> f32 [N, Z, A]; names: of the A dimensions.
    """
    n, horizon, dims = true.shape
    figure, axes = plt.subplots(n, dims, figsize=(1.9 * dims, 1.6 * n), squeeze=False, sharex=True, sharey=True)
    steps = np.arange(horizon)
    for row in range(n):
        for dim in range(dims):
            axis = axes[row][dim]
            axis.plot(steps[mask[row]], true[row, mask[row], dim], "k-", linewidth=2, label="true")
            for i, (name, values) in enumerate(predictions.items()):
                axis.plot(steps, values[row, :, dim], color=f"C{i}", linewidth=1.2, label=name)
            axis.set_ylim(-1.25, 1.25)
            axis.tick_params(labelsize=6)
            if row == 0:
                axis.set_title(names[dim], fontsize=9)
    axes[0][0].legend(fontsize=6)
    return embed(figure)
