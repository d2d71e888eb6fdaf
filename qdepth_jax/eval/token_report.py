"""Report of a tokenised data set: figures with intervals, reconstructions beside the truth, code usage, short videos.

Everything is read from finished sidecars: what is drawn is what a policy would learn from, decoded.
"""

import base64
import collections
import dataclasses
import html
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from qdepth_jax import depth, errors, progress, tokenisation
from qdepth_jax.data import episode_reader, sidecar
from qdepth_jax.eval import data_figures, depth_metrics, figures, report
from qdepth_jax.models import tokenizer

PANEL, LINE = 128, 12  # pixels: longer side of a panel of a video, height of a line of text above it
VIDEO_STEPS = 40  # of an episode, evenly spread: a GIF of 0.6 to 0.8 MB
FRAME_MS = 100
ENDS = (1, 99)  # percentiles of the drawn truth that end the colour scale


@dataclasses.dataclass(frozen=True)
class Part:
    """One split of a data set: where its depth comes from, and its finished token sidecar."""

    source: tokenisation.Source
    tokens: sidecar.Sidecar

    @property
    def title(self) -> str:
        return f"{self.source.split.dataset.name} {self.source.split.name}, camera {self.source.view}"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Frames of one episode: camera u8 [n, H, W, 3]; truth and decoded f32 [n, R, R], NaN = no depth; step numbers."""

    steps: np.ndarray
    camera: np.ndarray
    truth: np.ndarray
    decoded: np.ndarray


def write(
    output: str,
    config: tokenizer.TokenizerConfig,
    variables: dict[str, Any],
    parts: list[Part],
    episodes: int = 2,
    frames: int = 3,
) -> str:
    """Writes report.html, summary.json and videos/*.gif; the page holds its own copies of the videos.

    Args:
      output: folder, created.
      config, variables: the tokenizer that made the tokens.
      parts: at least one; their splits and cameras become sections. Of several data sets the figures over all of
        their episodes stand beside their own, by split and camera.
      episodes: drawn of each part, spread over it. frames: of each of those as still pictures; its video has more.

    Returns:
      Path of report.html.

    Raises:
      UserError: tokens of another tokenizer, or made without the sums that the figures need.
    """
    identity = tokenizer.identity(config, variables["params"], variables["state"])
    folder = pathlib.Path(output)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    sections, pools = [], collections.defaultdict(list)
    decode = jax.jit(lambda v, codes: tokenizer.decode(config, v["params"], v["state"], codes))
    for part in progress.track(parts, len(parts), "report", "split"):
        if part.tokens.metadata.identity != identity:
            raise errors.UserError(
                f"{part.tokens.directory} holds tokens of tokenizer {part.tokens.metadata.identity}, not of {identity}"
            )
        rows = _rows(part)
        pools[part.source.split.name, part.source.view].append(rows)
        found[part.title] = depth_metrics.figures(rows) | {"labels": part.source.labels}
        sections.append((part.title, _section(folder, config, variables, decode, part, rows, episodes, frames)))
    for (split, view), pool in pools.items():
        if len(pool) > 1:
            title = f"all {len(pool)} data sets, {split}, camera {view}"
            found[title] = depth_metrics.figures([row for rows in pool for row in rows])
    sections = [
        ("Figures", _figures_table(found) + _note(config)),
        *sections,
        ("Tokenizer", _tokenizer(config, identity)),
    ]
    (folder / "summary.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    path = folder / "report.html"
    page = report.page("Depth tokens", sections).replace("</style>", data_figures.STYLE + "</style>", 1)
    path.write_text(page)
    return str(path)


def _rows(part: Part) -> list[dict[str, np.ndarray]]:
    if part.tokens.figures is None:
        raise errors.UserError(f"{part.tokens.directory} was made by an older version, without figures: delete it")
    return depth_metrics.from_rows(part.tokens.figures)


# ---- figures ----


def _figures_table(found: dict[str, dict[str, Any]]) -> str:
    header = ["", "episodes", "frames", "codes used", "perplexity", "RMSE", "AbsRel", "delta 1", "delta 2", "delta 3"]
    header += ["floor RMSE", "floor AbsRel", "floor / RMSE", "floor / AbsRel", "masked pixels", "invalid tokens"]
    rows = []
    for title, f in found.items():
        interval, floor, over = f["interval_95"] or {}, f["constant_per_token"], f["floor_over_tokens"]

        def cell(name: str, value: float, digits: int = 4, interval=interval) -> str:
            if name not in interval:
                return f"{value:.{digits}f}"
            low, high = interval[name]
            return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

        rows.append([
            title, f["episodes"], f["frames"], f"{f['codes_used']} of {f['codes']}",
            cell("perplexity", f["perplexity"], 1), *(cell(name, f[name]) for name in depth_metrics.ERRORS),
            floor["rmse"], floor["abs_rel"],
            *(cell(f"floor_over_tokens_{name}", over[name], 2) for name in ("rmse", "abs_rel")),
            f"{f['masked_share']:.2%}", f"{f['invalid_token_share']:.2%}",
        ])  # fmt: skip
    # Upright: a dozen figures of a few splits read better as rows.
    turned = [[name, *values] for name, *values in zip(header[1:], *(row[1:] for row in rows))]
    return report.table(["", *(row[0] for row in rows)], turned)


def _note(config: tokenizer.TokenizerConfig) -> str:
    unit = "metres" if config.range.kind == "metric" else "relative inverse depth (1 = near, 0 = far)"
    return (
        f"<p><small>In {unit}, over valid pixels of valid tokens at {config.depth_size}x{config.depth_size} pixels. "
        "Brackets: 95 % interval over episodes (jackknife, Student's t); none with fewer than two episodes. Floor: the "
        "best reconstruction with one constant per token and frame. A training split says how well the data are "
        "stored, only a held-out one how well other episodes will be.</small></p>"
    )


def _tokenizer(config: tokenizer.TokenizerConfig, identity: str) -> str:
    settings = json.dumps(dataclasses.asdict(config), indent=1)
    return f"<p>Identity {html.escape(identity)}.</p><pre>{html.escape(settings)}</pre>"


# ---- pictures ----


def _section(folder, config, variables, decode, part: Part, rows, episodes: int, frames: int) -> str:
    usage = depth_metrics.total(rows)["codes"]
    out = [_labels(part.source.labels), "<h3>Code usage</h3>", _usage(usage)]
    drawn = {}
    reader = episode_reader.EpisodeReader(part.source.split)
    for episode in report.spread(len(part.source.split.episodes), episodes).tolist():
        steps = reader.good_steps(episode)
        if len(steps):
            steps = steps[report.spread(len(steps), VIDEO_STEPS)]
            drawn[episode] = _draw(config, variables, decode, part, reader, episode, steps)
    reader.close()
    values = np.concatenate([np.zeros(0), *(d.truth[np.isfinite(d.truth)] for d in drawn.values())])
    if not len(values):
        return "".join([*out, "<p>The episodes drawn have no valid depth.</p>"])
    ends = colour_ends(values)
    inverse = config.range.kind == "relative"
    label = "relative inverse depth (1 = near)" if inverse else "depth (m)"
    titles, stills = [], ([], [], [])
    for episode, d in drawn.items():
        for i in report.spread(len(d.steps), frames).tolist():
            titles.append(f"episode {episode} step {int(d.steps[i])}, RMSE of its episode {_rmse(rows[episode]):.3f}")
            for column, pictures in zip(stills, (d.camera, d.truth, d.decoded)):
                column.append(pictures[i])
    out += ["<h3>Reconstructions</h3>",
            data_figures.depth_table(titles, stills[0], stills[1], ends, label, stills[2], inverse)]  # fmt: skip
    out.append("<h3>Videos: camera, label, tokens decoded</h3>")
    for episode, d in drawn.items():
        name = f"{part.source.split.dataset.name}_{part.source.split.name}_{part.source.view}_{episode}.gif"
        data = video(d, ends, inverse)
        (folder / "videos" / name).write_bytes(data)
        source = base64.b64encode(data).decode()
        out.append(f'<p><img src="data:image/gif;base64,{source}"><br><small>{html.escape(name)}, {len(d.steps)} of '
                   f"{reader.length(episode)} steps</small></p>")  # fmt: skip
    return "".join(out)


def _labels(labels: dict[str, str]) -> str:
    """Who made the depth that the tokens stand for, and under which licence; what is no depth says so first."""
    notice = f"<p><b>{html.escape(labels['notice'])}</b></p>" if labels["notice"] else ""
    licence = f"; licence {html.escape(labels['licence'])}" if labels["licence"] else ""
    return f"{notice}<p>Depth: {html.escape(labels['identity'])} ({labels['kind']}){licence}.</p>"


def colour_ends(values: np.ndarray) -> tuple[float, float]:
    """The ENDS percentiles, rounded to about a hundredth of what lies between them."""
    low, high = np.percentile(values, ENDS)
    digits = round(2 - np.log10(max(high - low, 1e-6)))
    return round(float(low), digits) + 0.0, round(float(high), digits) + 0.0  # no -0


def _usage(usage: np.ndarray) -> str:
    total = usage.sum()
    if not total:
        return "<p>All tokens are invalid: they stand for no depth.</p>"
    most = f"the most frequent code makes {usage.max() / total:.1%} of {int(total)} valid tokens"
    return f"<p>{int((usage > 0).sum())} of {len(usage)} codes in use; {most}.</p>" + figures.code_shares(usage / total)


def _rmse(sums: dict[str, np.ndarray]) -> float:
    return depth_metrics.DepthSums(sums["tokens"]).result()["rmse"]


def _draw(config, variables, decode, part: Part, reader, episode: int, steps: np.ndarray) -> Drawn:
    raw, scale, offset = part.source.read(reader, episode, steps)
    one = np.ones(len(raw), np.float32)
    x, valid = tokenizer.preprocess(config, raw, one * np.float32(scale), one * np.float32(offset))
    start = int(part.source.split.episodes["start"][episode])
    codes = np.asarray(part.tokens.values[start + steps], np.int32)
    kept = codes != sidecar.INVALID_TOKEN
    # One shape for all episodes: one compilation.
    padded = np.zeros((VIDEO_STEPS, codes.shape[1]), np.int32)
    padded[: len(codes)] = np.where(kept, codes, 0)
    decoded = np.asarray(depth.denormalise(decode(variables, padded), config.range))[: len(codes)]
    truth = np.where(valid, np.asarray(depth.denormalise(x, config.range)), np.nan)
    decoded = np.where(sidecar.token_pixels(kept, config.depth_size), decoded, np.nan)
    return Drawn(steps, part.source.pictures(reader, episode, steps), truth, decoded)


def header(step: int, ends: tuple[float, float], inverse: bool) -> list[tuple[str, str]]:
    """The two lines above camera, label and decoded tokens; none is wider than a panel."""
    scale = f"{ends[0]:.2f}..{ends[1]:.2f}" + (", 1 = near" if inverse else " m")
    kind = "inverse depth" if inverse else "depth"
    return [("camera", f"step {step}"), (f"label, {kind}", scale), ("tokens decoded", scale)]


def video(drawn: Drawn, ends: tuple[float, float], inverse: bool) -> bytes:
    """A GIF of one episode: camera | label | tokens decoded, with the range of the colours in the lines above.

    All three have the camera's aspect; the tokenizer sees squares.
    """
    colours = figures.DEPTH_COLOURS + ("_r" if inverse else "")
    height, width = drawn.camera.shape[1:3]
    size = (max(1, round(PANEL * width / max(width, height))), max(1, round(PANEL * height / max(width, height))))
    pictures = []
    for step, camera, truth, decoded in zip(drawn.steps, drawn.camera, drawn.truth, drawn.decoded):
        maps = (data_figures.coloured(values, *ends, colours) for values in (truth, decoded))
        canvas = Image.new("RGB", (3 * PANEL + 8, size[1] + 2 * LINE + 2), "white")
        words = ImageDraw.Draw(canvas)
        for column, (picture, lines) in enumerate(zip((camera, *maps), header(int(step), ends, inverse))):
            at = column * (PANEL + 4)
            # Nearest for depth: no colour that no pixel has.
            how = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST
            canvas.paste(Image.fromarray(np.ascontiguousarray(picture)).resize(size, how), (at, 2 * LINE + 2))
            for row, text in enumerate(lines):
                words.text((at + 2, row * LINE), text, fill="black")
        pictures.append(canvas)
    buffer = io.BytesIO()
    pictures[0].save(buffer, "gif", save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0)
    return buffer.getvalue()
