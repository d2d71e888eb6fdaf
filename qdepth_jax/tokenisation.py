"""Depth tokens of one split into a sidecar, with the sums that their figures need: one episode is one unit of work."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from qdepth_jax import depth, device_groups, errors, progress
from qdepth_jax.data import definition as definition_lib
from qdepth_jax.data import episode_reader, index, sidecar, sidecar_sums
from qdepth_jax.eval import depth_metrics
from qdepth_jax.models import tokenizer

DEVICE_BATCH = 32  # frames that a device encodes together
SAMPLED = 8  # episodes whose depth is held against the tokenizer's range before anything is written


@dataclasses.dataclass(frozen=True)
class Source:
    """Depth maps of one camera of one split: of a depth sidecar, or where that is None of the data set itself."""

    opened: index.Index
    split: index.SplitIndex
    definition: definition_lib.Definition
    view: str
    annotated: sidecar.Sidecar | None

    @property
    def camera(self) -> str:
        return f"steps/{self.definition.views[self.view]}"

    @property
    def kind(self) -> str:
        return self.annotated.metadata.details["depth_kind"] if self.annotated else "metric"

    @property
    def identity(self) -> str:
        """Who made the depth."""
        return self.annotated.metadata.identity if self.annotated else "the data set's own"

    @property
    def labels(self) -> dict[str, str]:
        """What there is to say of the depth: identity, kind, licence, notice ("" = nothing), digest of its sidecar."""
        details = self.annotated.metadata.details if self.annotated else {"licence": "of the data set"}
        told = {name: details.get(name, "") for name in ("licence", "notice")}
        return {"identity": self.identity, "kind": self.kind, **told, "digest": self.digest}

    @functools.cached_property
    def digest(self) -> str:
        """Of the depth sidecar, all its settings and bytes; "" of the data set's own depth, which the index names."""
        return sidecar_sums.digest(self.annotated) if self.annotated else ""

    def read(
        self, reader: episode_reader.EpisodeReader, episode: int, steps: np.ndarray
    ) -> tuple[np.ndarray, float, float]:
        """raw u16 [n, H, W], scale, offset of the steps i64 [n] of an episode."""
        feature, metres = definition_lib.depth_of(self.definition, self.split.dataset, self.view)
        return reader.depth_of(feature, metres, self.annotated, episode, steps)

    def pictures(self, reader: episode_reader.EpisodeReader, episode: int, steps: np.ndarray) -> np.ndarray:
        """u8 [n, H, W, 3], red, green, blue, of the camera at the steps i64 [n] of an episode."""
        swapped = self.view in definition_lib.swapped_channels(self.definition, self.split.dataset)
        return reader.images(self.camera, episode, steps=steps, swapped=swapped)


def open_source(
    opened: index.Index, definition: definition_lib.Definition, split: index.SplitIndex, view: str, depth_root: str
) -> Source:
    """The depth of a split; depth_root "" = the data set's own.

    Raises:
      UserError: the sidecar is not there, or belongs to other data or another camera.
    """
    annotated = sidecar.open_sidecar(depth_root, split.name) if depth_root else None
    source = Source(opened, split, definition, view, annotated)
    if annotated:
        sidecar.check(annotated, kind="depth", fingerprint=opened.fingerprint, camera=source.camera)
        sidecar_sums.say_without(annotated)
    return source


def other_labels(source: Source, trained: list[dict[str, Any]]) -> str:
    """How this depth differs from what a tokenizer was trained on; "" where it does not, or nothing is known.

    Args:
      trained: identities of the training run's data sets (`data.source.Source.identity`), from its checkpoint.
    """
    known = [row for row in trained if "depth" in row]
    known = [row for row in known if row["name"] == source.definition.name] or known
    here = source.annotated.metadata.identity if source.annotated else ""
    if known and here not in [row["depth"] for row in known]:
        learnt = " and of ".join(sorted({row["depth"] or "the data set's own" for row in known}))
        return f"the tokenizer learnt depth of {learnt}, this is depth of {source.identity}"
    same = [row for row in known if row["split"].partition("[")[0] == source.split.name and "depth_digest" in row]
    same = [row for row in same if row["fingerprint"] == source.opened.fingerprint]
    if same and source.digest not in [row["depth_digest"] for row in same]:
        return (
            f"the tokenizer learnt from another sidecar of {source.identity} (digest {same[0]['depth_digest']}, here "
            f"{source.digest}): other settings, or other bytes"
        )
    return ""


def tokenise_split(
    config: tokenizer.TokenizerConfig,
    variables: Any,
    source: Source,
    root: str,
    devices: list[jax.Device],
    process: int = 0,
    processes: int = 1,
) -> dict:
    """Writes the tokens of this process's share that are not done yet; the last process publishes ROOT/SPLIT.

    Returns:
      {"directory" (None while other processes have episodes left), "identity", "encoded_now", ...}, and once published
      `depth_metrics.figures` over all episodes.

    Raises:
      UserError: what `sidecar.Writer` refuses; too many codes for 16 bits; depth of another kind than the tokenizer's,
        or all of it out of its range.
    """
    if config.num_codes > sidecar.INVALID_TOKEN:
        raise errors.UserError(
            f"the tokenizer has {config.num_codes} codes; tokens are stored in 16 bits, which leaves room for "
            f"{sidecar.INVALID_TOKEN}: train one with fewer"
        )
    split, name = source.split, f"{source.split.dataset.name} {source.split.name}"
    identity = tokenizer.identity(config, variables["params"], variables["state"])
    reader = episode_reader.EpisodeReader(split)
    _check_range(config.range, source, reader, name)
    metadata = sidecar.Metadata(
        kind="depth_tokens",
        fingerprint=source.opened.fingerprint,
        split=split.name,
        camera=source.camera,
        identity=identity,
        row_shape=(config.grid * config.grid,),
        frames=split.frames,
        episodes=len(split.episodes),
        details={
            "grid": config.grid,
            "codes": config.num_codes,
            "invalid": sidecar.INVALID_TOKEN,
            "depth": source.identity,
            **({"depth_digest": source.digest} if source.digest else {}),
            "backend": devices[0].platform,
        },
    )
    writer = sidecar.Writer(root, metadata, depth_metrics.row_size(config.num_codes), process, processes)
    pending = writer.pending()
    label = name + (f", process {process} of {processes}" if processes > 1 else "")
    bar = progress.Progress(sum(reader.length(episode) for episode in pending), label, unit="frame")
    good = {episode: reader.good_steps(episode) for episode in pending}
    some = (source.read(reader, episode, good[episode]) for episode in pending if len(good[episode]))
    encoded = encode(config, variables, some, devices)
    advance = bar.begin  # the first episode waits for compilation
    for episode in pending:
        steps, sums = good[episode], depth_metrics.no_sums(config.num_codes)
        tokens = np.full((reader.length(episode), *metadata.row_shape), sidecar.INVALID_TOKEN, np.uint16)
        if len(steps):
            tokens[steps], sums = next(encoded)
        start = int(split.episodes["start"][episode])
        writer.write(episode, start, tokens, figures=depth_metrics.as_row(sums))
        advance(len(tokens))
        advance = bar.update
    bar.close()
    reader.close()
    missing, directory = writer.missing(), writer.finish()
    found = {
        "directory": directory,
        "unfinished_episodes": 0 if directory else missing,
        "identity": identity,
        "depth": source.identity,
        "depth_digest": source.digest,
        "quarantined_frames": len(split.quarantined),
        "encoded_now": len(pending),
    }
    return found | (figures(sidecar.open_sidecar(root, split.name)) if directory else {})


def figures(made: sidecar.Sidecar) -> dict:
    """Figures over all episodes of a finished token sidecar."""
    if made.figures is None:
        raise errors.UserError(f"{made.directory} was made by an older version, without figures: delete it")
    return depth_metrics.figures(depth_metrics.from_rows(made.figures))


def encode(
    config: tokenizer.TokenizerConfig,
    variables: Any,
    episodes: Iterable[tuple[np.ndarray, float, float]],
    devices: list[jax.Device],
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Tokens and sums of episodes, in order, one compilation for all of them.

    Args:
      episodes: raw depth u16 [T, H, W] with scale and offset, taken as they are needed.
      devices: each encodes frames of one episode at a time.

    Yields:
      u16 [T, P], INVALID_TOKEN where most of a token's pixels are invalid; `depth_metrics.episode_sums` of the frames.
    """
    waiting: collections.deque[tuple[int, int]] = collections.deque()  # frames, groups of an episode

    def groups() -> Iterator[tuple[np.ndarray, ...]]:
        for raw, scale, offset in episodes:
            chunked, _ = device_groups.chunks(raw, DEVICE_BATCH)
            waiting.append((len(raw), len(chunked)))
            one = np.ones(DEVICE_BATCH, np.float32)
            yield from ((chunk, one * np.float32(scale), one * np.float32(offset)) for chunk in chunked)

    parts: list[tuple[np.ndarray, ...]] = []
    for part in device_groups.stream(_roundtrip(config), variables, groups(), devices):
        frames, count = waiting[0]
        rows = frames - DEVICE_BATCH * (count - 1) if len(parts) == count - 1 else DEVICE_BATCH
        parts.append(_measured(config, *(array[:rows] for array in part)))
        if len(parts) == count:
            waiting.popleft()
            yield np.concatenate([tokens for tokens, _ in parts]), depth_metrics.total([sums for _, sums in parts])
            parts = []


_roundtrip = functools.lru_cache(maxsize=2)(tokenizer.compiled_roundtrip)  # one program for all splits


def _measured(config, codes, x_hat, x, valid) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    value, truth = (np.asarray(depth.denormalise(a, config.range)) for a in (x_hat, x))
    kept = sidecar.token_validity(valid, config.grid)
    sums = depth_metrics.episode_sums(value, truth, valid, config.grid, codes, kept, config.num_codes)
    return np.where(kept, codes, sidecar.INVALID_TOKEN).astype(np.uint16), sums


def _check_range(wanted: depth.DepthRange, source: Source, reader: episode_reader.EpisodeReader, name: str) -> None:
    """A tokenizer of another kind of depth, or of another range, would make tokens of nothing."""
    if source.kind != wanted.kind:
        raise errors.UserError(
            f"the tokenizer's depth range is {wanted.kind!r}, but {name} has {source.kind!r} depth: train one on it"
        )
    episodes = len(source.split.episodes)
    low, high = np.inf, -np.inf
    for episode in np.unique(np.linspace(0, episodes - 1, min(SAMPLED, episodes)).astype(int)):
        steps = reader.good_steps(int(episode))[:1]
        if len(steps):
            raw, scale, offset = source.read(reader, int(episode), steps)
            values = raw[raw > 0] * scale + offset
            low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
    first, last = sorted((wanted.near, wanted.far))
    if low <= high and (high < first or low > last):
        raise errors.UserError(
            f"the tokenizer's range is {wanted.near:g} to {wanted.far:g}, but the depth of {name} runs from {low:.3g} "
            f"to {high:.3g} (a sample): it is a tokenizer of other data; train one on this"
        )
