"""The depth part of a data set's page: maps, their range, and what is left of them after tokenisation."""

import dataclasses
import html
import os
from typing import Any

import jax
import numpy as np

from qdepth_jax import depth as depth_lib
from qdepth_jax import earlier_stages, errors, progress
from qdepth_jax.data import sidecar
from qdepth_jax.eval import data_facts, data_figures, depth_metrics, figures, report
from qdepth_jax.models import tokenizer

SAMPLE = 64  # frames whose depth gives its statistics


@dataclasses.dataclass(frozen=True)
class Depth:
    """Depth of one view and, where given, its tokens and tokenizer.

    Attributes:
      subject: the data set. view, camera: name and image feature. feature: own depth images, "" if annotated.
      annotated, tokens: sidecars or None.
      model: (TokenizerConfig, {"params", "state"}) or None.
    """

    subject: data_facts.Subject
    view: str
    camera: str
    feature: str
    annotated: sidecar.Sidecar | None
    tokens: sidecar.Sidecar | None
    model: tuple[tokenizer.TokenizerConfig, dict[str, Any]] | None

    @property
    def kind(self) -> str:
        return self.annotated.metadata.details["depth_kind"] if self.annotated is not None else "metric"

    @property
    def label(self) -> str:
        return "depth (m)" if self.kind == "metric" else "relative inverse depth (1 = near)"

    def read(self, images: data_facts.Images, frame: int) -> tuple[np.ndarray, float, float] | None:
        """(raw u16 [H, W], scale, offset) of a frame; None if it cannot be decoded."""
        if self.annotated is None:
            found = images.depth(self.feature, self.subject.metres[self.feature], frame)
            return None if found is None else (*found, 0.0)
        episode = int(self.subject.split.episode_of(np.int64(frame)))
        return np.array(self.annotated.values[frame]), float(self.annotated.scale[episode]), float(
            self.annotated.offset[episode]
        )  # fmt: skip

    def section(self, images: data_facts.Images, count: int, warnings: list[str]) -> str:
        """Statistics over a sample, pictures of the episodes drawn, reconstructions and code usage."""
        out = [f"<p>View {html.escape(self.view)}, {self._origin()}.</p>"]
        if self.annotated is not None or self.feature:
            out += self._maps(images, count, warnings)
        if self.tokens is not None:
            out.append(self._usage())
        return "".join(out)

    def _origin(self) -> str:
        if self.annotated is not None:
            return html.escape(f"annotated by {self.annotated.metadata.identity}")
        return html.escape(f"the data set's own images {self.feature}") if self.feature else "no depth maps"

    def _maps(self, images: data_facts.Images, count: int, warnings: list[str]) -> list[str]:
        split = self.subject.split
        sample, invalid, pixels = [], 0, 0
        picks = report.spread(split.frames, SAMPLE)
        for frame in progress.track(picks.tolist(), len(picks), "depth maps read", "frame"):
            found = self.read(images, frame)
            if found is None:
                continue
            raw, scale, offset = found
            invalid, pixels = invalid + int((raw == 0).sum()), pixels + raw.size
            valid = raw[raw > 0]
            sample.append(valid[:: max(1, len(valid) // 4096)].astype(np.float32) * scale + offset)
        values = np.concatenate([np.zeros(0, np.float32), *sample])
        share = invalid / max(pixels, 1)
        if not len(values):
            warnings.append(f"depth of {self.view}: no valid pixel in {len(picks)} sampled frames")
            return ["<p>No valid depth in the sample.</p>"]
        if share > 0.5:
            warnings.append(f"depth of {self.view}: {share:.0%} of the pixels in {len(picks)} frames are invalid")
        cuts = np.quantile(values, [0, 0.01, 0.5, 0.99, 1])
        rows = [[f"{len(picks)} frames spread over the split", f"{share:.2%}", *(f"{v:.4g}" for v in cuts)]]
        header = [self.label, "invalid pixels", "min", "q01", "median", "q99", "max"]
        out = [report.table(header, rows), data_figures.depth_histogram(values, self.label)]
        return [*out, self._pictures(images, count, (float(cuts[1]), float(cuts[3])))]

    def _pictures(self, images: data_facts.Images, count: int, ends: tuple[float, float]) -> str:
        table = self.subject.split.episodes
        titles, cameras, maps, frames = [], [], [], []
        for number in report.spread(len(table), count).tolist():
            step = int(table["length"][number]) // 2
            found = self.read(images, int(table["start"][number]) + step)
            if found is None:
                continue
            frames.append(int(table["start"][number]) + step)
            maps.append(found)
            titles.append(f"episode {number} step {step}")
            cameras.append(images.rgb(self.camera, frames[-1], self.view in self.subject.bgr))
        if not maps:
            return "<p>None of the depth maps to draw can be decoded.</p>"
        inverse = self.kind == "relative"
        if self.model is None:
            values = [np.where(raw > 0, raw * np.float32(s) + np.float32(o), np.nan) for raw, s, o in maps]
            return data_figures.depth_table(titles, cameras, values, ends, self.label, inverse=inverse)
        values, decoded, said = self._reconstruct(maps, frames)
        low, high = sorted((self.model[0].range.near, self.model[0].range.far))
        ends = max(ends[0], low), min(ends[1], high)
        return said + data_figures.depth_table(titles, cameras, values, ends, self.label, decoded, inverse)

    def _reconstruct(self, maps, frames) -> tuple[list[np.ndarray], list[np.ndarray], str]:
        """Truth (NaN = masked) and reconstruction at the tokenizer's size, and the figures as a table."""
        config, variables = self.model
        values, decoded, sums, floor = [], [], depth_metrics.DepthSums(), depth_metrics.DepthSums()
        run = tokenizer.compiled_roundtrip(config)
        decode = jax.jit(lambda v, codes: tokenizer.decode(config, v["params"], v["state"], codes))
        for (raw, scale, offset), frame in zip(maps, frames):
            _, x_hat, x, valid = run(variables, raw[None], np.float32([scale]), np.float32([offset]))
            valid = np.asarray(valid)
            kept = sidecar.token_validity(valid, config.grid)
            if self.tokens is not None:
                codes = np.asarray(self.tokens.values[frame : frame + 1], np.int32)
                kept = codes != sidecar.INVALID_TOKEN
                x_hat = decode(variables, np.where(kept, codes, 0))
            guess, truth = (np.asarray(depth_lib.denormalise(a, config.range)) for a in (x_hat, x))
            kept = sidecar.token_pixels(kept, valid.shape[1])
            valid = valid & kept
            sums.add(guess, truth, valid)
            floor.add(depth_metrics.constant_per_token(truth, valid, config.grid), truth, valid)
            values.append(np.where(valid, truth, np.nan)[0])
            decoded.append(np.where(kept, guess, np.nan)[0])
        rows = [
            [name, r["rmse"], r["abs_rel"], r["delta_1"]]
            for name, r in (("from tokens", sums.result()), ("best constant per token", floor.result()))
        ]
        made = "of the token sidecar" if self.tokens is not None else "made here"
        said = (
            f"<p>Depth outside of {config.range.near:g}..{config.range.far:g} is masked (grey), and so are tokens "
            f"mostly without valid depth. Tokens {made}; figures over the {len(frames)} maps below.</p>"
        )
        return values, decoded, said + report.table(["", "RMSE", "AbsRel", "delta 1"], rows)

    def _usage(self) -> str:
        meta = self.tokens.metadata
        counts = data_facts.code_counts(self.tokens, int(meta.details["codes"]))
        total = int(counts.sum())
        invalid = 1 - total / (meta.frames * meta.row_shape[0])
        if not total:
            return "<h3>Code usage</h3><p>All tokens are invalid: they stand for no depth.</p>"
        used, p = int((counts > 0).sum()), counts[counts > 0] / total
        perplexity = float(np.exp(-(p * np.log(p)).sum()))
        return (
            f"<h3>Code usage</h3><p>{used} of {len(counts)} codes in {meta.frames} frames of {meta.row_shape[0]} "
            f"tokens, perplexity {perplexity:.1f}, most frequent code {counts.max() / total:.1%}; {invalid:.1%} "
            f"of the tokens are invalid. Tokenizer {html.escape(meta.identity)}.</p>"
            + figures.code_shares(counts / total)
        )


def open_depth(
    subject: data_facts.Subject, *, annotation: str = "", tokenizer_dir: str = "", tokens: str = ""
) -> Depth | None:
    """The depth of the main view; None if there is none at all.

    Args:
      subject: the data set.
      annotation: root of a depth-map sidecar; empty = the data set's own depth images.
      tokenizer_dir: workdir of a trained depth tokenizer; empty = no reconstructions.
      tokens: root of a token sidecar; empty = the one beside the tokenizer if there, else tokens are made here.

    Raises:
      UserError: sidecars or a tokenizer that belong to something else.
    """
    view = subject.main
    camera = subject.views.get(view, "")
    fingerprint = subject.opened.fingerprint
    annotated = coded = model = None
    if annotation:
        annotated = sidecar.open_sidecar(annotation, subject.split.name)
        sidecar.check(annotated, kind="depth", fingerprint=fingerprint, camera=camera)
    own = "" if annotated is not None else subject.depth.get(view, next(iter(subject.depth.values()), ""))
    root, identity = tokens, ""
    if tokenizer_dir:
        config, variables, _ = earlier_stages.load_tokenizer(tokenizer_dir)
        identity = tokenizer.identity(config, variables["params"], variables["state"])
        model = config, variables
        beside = earlier_stages.token_dir(tokenizer_dir, subject.opened.dataset.name)
        root = root or (beside if os.path.isdir(os.path.join(beside, subject.split.name)) else "")
    if root:
        coded = sidecar.open_sidecar(root, subject.split.name)
        sidecar.check(coded, kind="depth_tokens", fingerprint=fingerprint, camera=camera, identity=identity)
    found = Depth(subject, view, camera, own, annotated, coded, model)
    if model is not None:
        if annotated is None and not own:
            raise errors.UserError(
                f"--tokenizer needs depth maps, but {subject.opened.dataset.name} has none of its own: give --depth"
            )
        if model[0].range.kind != found.kind:
            raise errors.UserError(
                f"the tokenizer in {tokenizer_dir!r} was trained on {model[0].range.kind} depth, this is "
                f"{found.kind}: give another --depth or --tokenizer"
            )
    return found if annotated is not None or own or coded is not None else None
