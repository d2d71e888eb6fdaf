"""Pictures of a data set: histograms, lengths, strips of frames, action curves, depth beside its reconstruction.

Small panels are SVG written here and pictures are plain PNG or JPEG: a page has hundreds, and matplotlib takes a second
for eight of them.
"""

import base64
import html
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import simplejpeg
from PIL import Image

from qdepth_jax.eval import figures

FIRST, SECOND, PALE, DARK = "#4878a8", "#c06a35", "#dddddd", "#555555"
# A panel in pixels: its size and the margins left of and above the box, right of and below it.
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 155, 104, 40, 17, 6, 15  # eight fit beside each other
INVALID = 0.6  # grey of pixels without depth

STYLE = """.panels{display:flex;flex-wrap:wrap}.panels svg{font:10px sans-serif;fill:#444}
.maps td,.maps th{border:0;padding:2px 6px;text-align:left;vertical-align:top;font-size:13px;font-weight:normal}
.maps img{width:180px;image-rendering:pixelated;display:block}
.bar{display:inline-block;width:180px;height:12px;vertical-align:middle;margin:0 .4em}"""


# ---- panels ----


def panels(items: list[str]) -> str:
    """Panels side by side, as many as the window holds."""
    return f"<div class='panels'>{''.join(items)}</div>"


def number(x: float, digits: int = 3) -> str:
    """Short, and without an exponent where whole digits do."""
    text = f"{x:.{digits}g}"
    return f"{x:.0f}" if "e+" in text and abs(x) < 1e6 else text


def panel(title: str, x: tuple[float, float], y: tuple[float, float], drawn: list[str], note: str = "") -> str:
    """An SVG with a box, its title, the ends of both axes as numbers and a note between those of x.

    Args:
      x, y: ends of the axes. drawn: SVG elements in pixels, see `place`.
      note: leaves room for short numbers alone.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    middle = (LEFT + right) / 2
    texts = [
        (middle, TOP - 6, "middle", title),
        (LEFT - 3, TOP + 8, "end", number(y[1])),
        (LEFT - 3, bottom, "end", number(y[0])),
        (LEFT, HEIGHT - 3, "start", number(x[0], 2 if note else 3)),
        (right, HEIGHT - 3, "end", number(x[1], 2 if note else 3)),
        (middle, HEIGHT - 3, "middle", note),
    ]
    words = "".join(
        f'<text x="{px:g}" y="{py:g}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for px, py, anchor, text in texts
        if text
    )
    box = f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" fill="none" stroke="#bbb"/>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}">{"".join(drawn)}{box}{words}</svg>'


def place(
    points_x: np.ndarray, points_y: np.ndarray, x: tuple[float, float], y: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Data coordinates to pixels of a panel."""
    across, up = WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - TOP
    px = LEFT + across * (np.asarray(points_x, float) - x[0]) / max(x[1] - x[0], 1e-12)
    py = TOP + up * (1 - (np.asarray(points_y, float) - y[0]) / max(y[1] - y[0], 1e-12))
    return px, py


def _path(px: np.ndarray, py: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py))


def histograms(rows: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], names: list[str], notes: list[str]) -> str:
    """One panel per dimension for each row; heights in percent of the frames.

    Args:
      rows: (label, low [D], high [D], counts [D, bins]), e.g. before and after normalisation.
      names, notes: of the D dimensions; the note stands below the panels of the last row.
    """
    out = []
    for r, (label, low, high, counts) in enumerate(rows):
        items = []
        for dim, name in enumerate(names):
            share = 100 * counts[dim] / max(int(counts[dim].sum()), 1)
            x, y = (float(low[dim]), float(high[dim])), (0.0, max(float(share.max()), 1e-9))
            edges = np.linspace(*x, len(share) + 1)
            px, py = place(np.repeat(edges, 2), np.concatenate([[0], np.repeat(share, 2), [0]]), x, y)
            bars = f'<polygon points="{_path(px, py)}" fill="{(FIRST, SECOND)[r % 2]}"/>'
            items.append(panel(name, x, y, [bars], notes[dim] if r == len(rows) - 1 else ""))
        out.append(f"<small>{html.escape(label)}, % of frames</small>{panels(items)}")
    return "".join(out)


def action_curves(
    values: np.ndarray, names: list[str], low: np.ndarray, high: np.ndarray, marks: np.ndarray, defined: int
) -> str:
    """One small panel per dimension over the steps of an episode; q01 and q99 dashed, strip frames marked.

    Args:
      values: f32 [T, A]. low, high: [A], NaN = no line. marks: steps drawn in the strip.
      defined: steps that have an action; the rest is left out.
    """
    items, x = [], (0.0, float(max(len(values) - 1, 1)))
    for dim, name in enumerate(names):
        curve, bounds = values[:defined, dim], [b for b in (low[dim], high[dim]) if np.isfinite(b)]
        shown = np.concatenate([curve, bounds]) if bounds else np.append(curve, [0.0, 1.0])  # a gripper: 0..1
        y = (float(shown.min()), float(shown.max()))
        margin = 0.05 * (y[1] - y[0]) or 0.05
        y = (y[0] - margin, y[1] + margin)
        drawn = [_line((mark, mark), y, x, y, PALE) for mark in marks]
        drawn += [_line(x, (b, b), x, y, DARK, ' stroke-dasharray="4 3" stroke-width="0.8"') for b in bounds]
        drawn.append(_line(np.arange(defined), curve, x, y, FIRST, ' stroke-width="1.4"'))
        items.append(panel(name, x, y, drawn, "step"))
    return panels(items)


def _line(points_x, points_y, x: tuple[float, float], y: tuple[float, float], colour: str, more: str = "") -> str:
    px, py = place(points_x, points_y, x, y)
    return f'<polyline points="{_path(px, py)}" fill="none" stroke="{colour}"{more}/>'


def lengths(values: np.ndarray, rate_hz: float) -> str:
    """Histogram of episode lengths i [E] in frames, with seconds above where the rate is known."""
    figure, axis = plt.subplots(figsize=(6, 2.4))
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // 50))
    axis.hist(values, bins=np.arange(low, high + width + 1, width) - 0.5, color=FIRST)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.get_major_locator().set_params(integer=True)
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


def png(picture: np.ndarray) -> str:
    """u8 [H, W, 3] as an inline image."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "png")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def coloured(values: np.ndarray, low: float, high: float, colours: str) -> np.ndarray:
    """f32 [H, W] in a colour map between low and high, NaN grey: u8 [H, W, 3]."""
    x = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    rgb = matplotlib.colormaps[colours](np.nan_to_num(x))[..., :3]
    return np.round(255 * np.where(np.isfinite(values)[..., None], rgb, INVALID)).astype(np.uint8)


def colour_bar(label: str, low: float, high: float, colours: str) -> str:
    """Label, low end, the colours, high end."""
    ramp = png(coloured(np.linspace(0, 1, 128)[None], 0, 1, colours)).replace("<img", "<img class='bar'")
    return f"<p><small>{html.escape(label)}: {low:.3g}{ramp}{high:.3g}</small></p>"


def depth_table(
    titles: list[str],
    pictures: list[np.ndarray | None],
    depth: list[np.ndarray],
    ends: tuple[float, float],
    label: str,
    reconstruction: list[np.ndarray] | None = None,
    inverse: bool = False,
) -> str:
    """One row per frame: camera, depth, and where given reconstruction and absolute error, with colour bars.

    Args:
      titles: of the N rows. pictures: u8 [H, W, 3] or None.
      depth: f32 [R, R] with NaN = invalid (grey). reconstruction: the same, without NaN.
      ends: (low, high) of the colour scale. label: of its bar.
      inverse: large values are near; near has the same colour in both cases.
    """
    colours = figures.DEPTH_COLOURS + ("_r" if inverse else "")
    cells, bars = [], colour_bar(label + ", grey is invalid", *ends, colours)
    gaps, worst = [], 1.0
    if reconstruction:
        gaps = [np.abs(r - d) for r, d in zip(reconstruction, depth)]
        finite = np.concatenate([g[np.isfinite(g)] for g in gaps])
        worst = float(np.quantile(finite, 0.99)) if len(finite) else 1.0
        bars += colour_bar("absolute error, same unit", 0.0, worst, "magma")
    for row, title in enumerate(titles):
        invalid = 1 - np.isfinite(depth[row]).mean()
        line = [
            (title, png(pictures[row]) if pictures[row] is not None else ""),
            (f"depth, {invalid:.1%} invalid", png(coloured(depth[row], *ends, colours))),
        ]
        if reconstruction:
            error = gaps[row][np.isfinite(gaps[row])]
            rmse = f"RMSE {np.sqrt(np.mean(error**2)):.3g}" if len(error) else "nothing valid"
            line.append(("from tokens", png(coloured(reconstruction[row], *ends, colours))))
            line.append((f"error, {rmse}", png(coloured(gaps[row], 0.0, worst, "magma"))))
        cells.append("<tr>" + "".join(f"<td>{html.escape(text)}{image}</td>" for text, image in line) + "</tr>")
    return f"{bars}<table class='maps'>{''.join(cells)}</table>"


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
