"""The page that shows a data set: what it holds, what training would see of it, and what looks odd."""

import dataclasses
import html
import os
from typing import Any

import numpy as np

from qdepth_jax import errors, files, progress
from qdepth_jax.data import normalise, shard_scan
from qdepth_jax.eval import data_facts, data_figures, data_warnings, inspect_depth, report

STRIP = 8  # frames of an episode shown
INSTRUCTIONS = 30
BLACK = 6.0  # mean grey value below which a frame counts as black

STYLE = """body{max-width:1260px}.plain tr:first-child{display:none}.plain td,.text td,.text th{text-align:left}
.warn{background:#fff3d6;border-left:4px solid #d99a00;padding:.2em 1em .2em 2em}
.fine{background:#e2f4e2;border-left:4px solid #4a9a4a;padding:.4em 1em}h3{margin-bottom:.2em}
.strip{margin:.15em 0}.strip span{display:inline-block;width:6em;color:#666;font-size:13px;vertical-align:top}
.strip img{max-width:calc(100% - 7em)}.scroll{overflow-x:auto}
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to show beside the data set itself.

    Attributes:
      episodes: how many are drawn, spread over the split.
      horizon: episodes shorter than this are named.
      depth: root of a depth-map sidecar; empty = the data set's own depth images.
      tokenizer: workdir of a trained depth tokenizer; empty = no reconstructions.
      depth_tokens: root of a token sidecar; empty = the one beside the tokenizer if there, else tokens made here.
    """

    episodes: int = 6
    horizon: int = 4
    depth: str = ""
    tokenizer: str = ""
    depth_tokens: str = ""


def write(subject: data_facts.Subject, output: str, options: Options) -> dict[str, Any]:
    """Writes OUTPUT/NAME-SPLIT.html.

    Returns:
      JSON-able: page, warnings, dataset, split, fingerprint, episodes, frames, bytes, sampled_frames, instructions,
      unlabelled_frames.

    Raises:
      UserError: a sidecar or tokenizer that does not fit, or a folder that cannot be written.
    """
    depth = inspect_depth.open_depth(
        subject, annotation=options.depth, tokenizer_dir=options.tokenizer, tokens=options.depth_tokens
    )
    images = data_facts.Images(subject.split)
    warnings = data_warnings.find(subject, options.horizon, images)
    texts, labelled = data_facts.instructions(subject)
    drawn = episodes(subject, images, options.episodes, warnings)
    sections = [("What it is", overview(subject)), ("Features", feature_table(subject)), *statistics(subject)]
    sections += [("Episode lengths", length_section(subject)), ("Instructions", text_section(subject, texts, labelled))]
    sections += [("Episodes", drawn)]
    if depth is not None:
        sections.append(("Depth", depth.section(images, options.episodes, warnings)))
    images.close()
    damaged = [f"cannot be decoded: {what}" for what in images.damaged]
    warnings += damaged[:10] + ([f"{len(damaged) - 10} more images cannot be decoded"] if len(damaged) > 10 else [])
    sections.insert(0, ("Warnings", warning_section(warnings)))
    name = f"{subject.opened.dataset.name} {subject.opened.dataset.version}, split {subject.split.name}"
    path = os.path.join(output, f"{subject.opened.dataset.name}-{subject.split.name}.html")
    _save(path, report.page(name, sections).replace("</style>", STYLE + data_figures.STYLE + "</style>", 1))
    return {
        "page": path,
        "warnings": warnings,
        "dataset": subject.opened.dataset.name,
        "split": subject.split.name,
        "fingerprint": subject.opened.fingerprint,
        "episodes": len(subject.split.episodes),
        "frames": subject.split.frames,
        "bytes": subject.opened.shard_bytes,
        "sampled_frames": len(subject.item.frames.valid) if subject.item is not None else None,
        "instructions": len(texts),
        "unlabelled_frames": int((~labelled).sum()) if subject.languages else None,
    }


def _save(path: str, content: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        files.write_whole(path, content)
    except OSError as error:
        raise errors.UserError(f"cannot write {path}: {error.strerror}; choose another --output") from error


# ---- tables ----


def warning_section(warnings: list[str]) -> str:
    if not warnings:
        return "<p class='fine'>Nothing odd was found.</p>"
    return "<ul class='warn'>" + "".join(f"<li>{html.escape(w)}</li>" for w in warnings) + "</ul>"


def overview(subject: data_facts.Subject) -> str:
    opened, split, item = subject.opened, subject.split, subject.item
    seconds = split.frames / subject.rate_hz if subject.rate_hz else 0
    rows = [
        ["name, version", f"{opened.dataset.name} {opened.dataset.version}"],
        ["folder", opened.dataset.directory],
        ["fingerprint", opened.fingerprint],
        ["all splits", ", ".join(f"{n}: {len(s.episodes)} episodes, {s.frames} frames"
                                 for n, s in opened.splits.items())],
        ["this split", f"{split.name}: {len(split.episodes)} episodes, {split.frames} frames"],
        ["size of all shards", f"{opened.shard_bytes / 1e6:,.1f} MB"],
        ["rate", f"{subject.rate_hz:g} Hz, {_duration(seconds)} in this split" if seconds else "not known"],
        ["definition", _definition(subject)],
        ["views", ", ".join(f"{view}: {feature}" for view, feature in subject.views.items()) or "none"],
        ["instruction", ", ".join(subject.languages) or "none"],
        ["depth images", ", ".join(f"{v}: {f}" for v, f in subject.depth.items()) or "none of its own"],
    ]  # fmt: skip
    used = (*subject.views.values(), *subject.depth.values())
    other = [f.name for f in opened.dataset.features.values() if f.kind == "image" and f.name not in used]
    if other:
        rows.append(["images not used", ", ".join(other)])
    if item is not None:
        left = "; ".join(f"{count} {reason}" for reason, count in item.frames.dropped.items()) or "none left out"
        rows.append(["frames that training samples", f"{len(item.frames.valid)} ({left})"])
    return f"<div class='plain'>{report.table(['', ''], rows)}</div>"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.1f} minutes"


def _definition(subject: data_facts.Subject) -> str:
    if not subject.defined:
        return "none: views, instruction and depth are guessed from types and names"
    if subject.item is None:
        return "there is one, but it does not fit this copy (see the warnings)"
    definition = subject.item.definition
    return f"{definition.name}, version {definition.version}"


def feature_table(subject: data_facts.Subject) -> str:
    kept = {"span": "places in the shards", "column": "column", "text": "text table"}
    rows = []
    for f in subject.opened.dataset.features.values():
        stored = kept.get(shard_scan.storage(f), "")
        why = "its size is not fixed" if -1 in f.shape else subject.opened.left_out.get(f.name, f.reason)
        stored = stored or f"not read: {why}"
        shape = "x".join("?" if n < 0 else str(n) for n in f.shape) or "scalar"
        encoding = f.encoding if f.encoding not in ("", "none") else ""
        rows.append([f.name, f.kind, f.dtype, shape, encoding, "step" if f.per_step else "episode", stored])
    header = ["feature", "kind", "dtype", "shape", "encoding", "per", "in the index"]
    return f"<div class='scroll text'>{report.table(header, rows)}</div>"


def dimension_names(name: str, dims: int) -> list[str]:
    if name == "action" and dims == len(report.ACTION_NAMES):
        return report.ACTION_NAMES
    return [f"{name} {i}" for i in range(dims)]


def statistics_table(names: list[str], s: normalise.Statistics, notes: list[str]) -> str:
    header = ["dimension", "mean", "std", "min", "q01", "q99", "max", "note"]
    rows = [
        [names[d], *(f"{column[d]:.4g}" for column in (s.mean, s.std, s.low, s.q01, s.q99, s.high)), notes[d]]
        for d in range(s.dims)
    ]
    if not any(notes):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return report.table(header, rows)


def statistics(subject: data_facts.Subject) -> list[tuple[str, str]]:
    """Sections with tables and histograms: standardised where a definition fits, else the raw columns."""
    if subject.item is None:
        return [("Raw columns", _raw_columns(subject))]
    out = []
    for name, values, normaliser in data_facts.pairs(subject):
        s, frames = normaliser.statistics, subject.item.frames.valid
        names = dimension_names(name, s.dims)
        clipped = data_facts.clipped_share(values, frames, normaliser)
        constant = data_facts.constant_dims(normaliser)
        notes = [
            "not normalised" if d in normaliser.raw_dims else "(nearly) constant" if d in constant else ""
            for d in range(s.dims)
        ]
        before, after = _before_and_after(values, frames, normaliser)
        marks = [note or f"{share:.1%} clipped" for note, share in zip(notes, clipped)]
        count = f"<p>Over the {s.count} frames that training samples, in the unit of the data set. "
        outside = before[1]
        if outside.max() > 0:
            count += f"The upper row leaves out up to {outside.max():.2%} of the values, far from the rest. "
        count += f"Lower row: after normalisation ({normaliser.kind}), what a policy sees.</p>"
        picture = data_figures.histograms([("stored", *before[2:], before[0]), ("normalised", *after[2:], after[0])],
                                          names, marks)  # fmt: skip
        title = {"action": "Actions", "proprio": "Proprioception"}[name] + ", standardised"
        out.append((title, count + statistics_table(names, s, notes) + picture))
    return out


def _before_and_after(values: np.ndarray, frames: np.ndarray, normaliser: normalise.Normaliser):
    """Two rows (counts, share outside, low, high): around q01..q99 before, the whole range after normalisation."""
    s = normaliser.statistics
    low, high = np.array(s.q01), np.array(s.q99)
    width = np.maximum(high - low, normaliser.floor)
    low, high = np.maximum(low - width / 2, s.low), np.minimum(high + width / 2, s.high)
    high = np.where(high > low, high, low + width)

    def parts(change):
        for start in range(0, len(frames), data_facts.CHUNK):
            yield change(values[frames[start : start + data_facts.CHUNK]])

    before = data_facts.histogram(parts(lambda x: x), low, high)
    end = 4.0 if normaliser.kind == "normal" else 1.02
    ends = np.full(s.dims, end)
    after = data_facts.histogram(parts(lambda x: normalise.normalise(x, normaliser)), -ends, ends)
    return (*before, low, high), (*after, -ends, ends)


def _raw_columns(subject: data_facts.Subject) -> str:
    out = ["<p>As stored, over all frames of the split; nothing is standardised.</p>"]
    for feature in data_facts.columns(subject):
        dims = int(np.prod(feature.shape, dtype=np.int64))
        if dims > data_facts.RAW_COLUMNS:
            out.append(f"<h3>{html.escape(feature.name)}</h3><p>{dims} numbers per step: not shown.</p>")
            continue
        array = subject.split.column(feature.name)
        s = data_facts.raw_statistics(array)
        short = feature.name.removeprefix("steps/").removeprefix("observation/")
        names = [short] if not feature.shape else [f"{short} {i}" for i in range(dims)]
        out.append(f"<h3>{html.escape(feature.name)}</h3>" + statistics_table(names, s, [""] * dims))
        low, high = np.nan_to_num(np.array(s.low)), np.nan_to_num(np.array(s.high))
        if feature.dtype.startswith("float") and (high > low).any():
            high = np.where(high > low, high, low + 1e-6)
            counts, _ = data_facts.histogram((part for _, part in data_facts.chunks(array)), low, high)
            titles = names if len(short) < 16 else [str(i) for i in range(dims)]
            out.append(data_figures.histograms([("stored", low, high, counts)], titles, [""] * dims))
    return "".join(out)


def length_section(subject: data_facts.Subject) -> str:
    lengths = np.asarray(subject.split.episodes["length"])
    rows = [["frames", int(lengths.min()), f"{np.median(lengths):g}", f"{lengths.mean():.1f}", int(lengths.max())]]
    if subject.rate_hz:
        rows.append(["seconds", *(f"{float(v) / subject.rate_hz:.1f}" for v in rows[0][1:])])
    return report.table(["", "shortest", "median", "mean", "longest"], rows) + data_figures.lengths(
        lengths, subject.rate_hz
    )


def text_section(subject: data_facts.Subject, texts: list[tuple[str, int, int]], labelled: np.ndarray) -> str:
    if not subject.languages:
        return "<p>No text feature was found.</p>"
    said = (
        f"<p>Different instructions: {len(texts)}. {1 - labelled.mean():.1%} of the frames have none "
        f"({int((~labelled).sum())} of {len(labelled)}).</p>"
    )
    rows = [[text, frames, episodes, f"{frames / len(labelled):.1%}"] for text, frames, episodes in texts]
    more = f"<p>and {len(rows) - INSTRUCTIONS} more</p>" if len(rows) > INSTRUCTIONS else ""
    return said + report.table(["instruction", "frames", "episodes", "share of frames"], rows[:INSTRUCTIONS]) + more


# ---- episodes ----


def episodes(subject: data_facts.Subject, images: data_facts.Images, count: int, warnings: list[str]) -> str:
    """Strips and action curves of `count` episodes spread over the split; black frames are added to `warnings`."""
    split, item, out, black = subject.split, subject.item, [], []
    texts = data_facts.texts(subject)
    picks = report.spread(len(split.episodes), count)
    for number in progress.track(picks.tolist(), len(picks), "episodes drawn", "episode"):
        start, length = int(split.episodes["start"][number]), int(split.episodes["length"][number])
        steps = report.spread(length, STRIP)
        said = dict.fromkeys(strings[ids[start]] for ids, strings in texts)
        title = " / ".join(f"“{text}”" for text in said if text) or "no instruction"
        seconds = f", {length / subject.rate_hz:.1f} s" if subject.rate_hz else ""
        out.append(
            f"<h3>{html.escape(title)}</h3><small>episode {number}, {length} frames{seconds}; frames at steps "
            f"{', '.join(map(str, steps))}</small>"
        )
        for view, feature in subject.views.items():
            frames = [images.rgb(feature, start + int(step), view in subject.bgr) for step in steps]
            black += [
                f"{view} of episode {number} step {step}"
                for step, frame in zip(steps, frames)
                if frame is not None and frame.mean() < BLACK
            ]
            out.append(f"<div class='strip'><span>{html.escape(view)}</span>{data_figures.strip(frames)}</div>")
        if item is not None:
            s, raw = item.action.statistics, item.action.raw_dims
            keep = np.array([d not in raw for d in range(s.dims)])
            out.append(
                data_figures.action_curves(
                    item.frames.action[start : start + length],
                    dimension_names("action", s.dims),
                    np.where(keep, s.q01, np.nan),
                    np.where(keep, s.q99, np.nan),
                    steps,
                    int(item.frames.end[start]) - start,
                )
            )
    if black:
        shown = ", ".join(black[:6]) + (f" and {len(black) - 6} more" if len(black) > 6 else "")
        warnings.append(f"{len(black)} of the frames drawn are (nearly) black: {shown}")
    note = "<p><small>Action curves: standardised, dashed q01 and q99, grey lines at the frames shown.</small></p>"
    return (note if item is not None else "") + "".join(out)
