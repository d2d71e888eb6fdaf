"""Depth maps of one camera of one split, by an estimator, into a sidecar: one episode is one unit of work."""

import collections
import concurrent.futures
from collections.abc import Iterator
from typing import Any

import numpy as np

from qdepth_jax import errors, progress
from qdepth_jax.data import definition as definition_lib
from qdepth_jax.data import depth_labels, episode_reader, index, sidecar

BEHIND = 2  # episodes that wait for the thread that writes


def annotate_split(
    opened: index.Index,
    definition: definition_lib.Definition,
    split: index.SplitIndex,
    view: str,
    root: str,
    estimator: depth_labels.Estimator,
    process: int = 0,
    processes: int = 1,
) -> dict:
    """Writes the episodes of this process's share that are not done yet; the last process publishes ROOT/SPLIT.

    Args:
      view: of the definition ("main", "wrist").

    Returns:
      The summary: "directory" (None while other processes have episodes left), "annotated_now", and once published the
      sum of every count of `depth_labels.COUNTS` over all episodes.

    Raises:
      UserError: what `sidecar.Writer` refuses; the data set lacks the camera, or the depth that is to be copied.
      ValueError: an image cannot be decoded.
    """
    reader = episode_reader.EpisodeReader(split)
    camera, depth = f"steps/{definition.views[view]}", definition_lib.depth_of(definition, split.dataset, view)
    shape = _depth_size(reader, split, *depth) if estimator.reads == "depth" else reader.image_size(camera)
    swapped = estimator.reads == "images" and view in definition_lib.swapped_channels(definition, split.dataset)
    details = {"depth_kind": estimator.kind, "licence": estimator.licence, **estimator.details}
    if estimator.notice:
        details["notice"] = estimator.notice
    if swapped:  # said where it is so alone: it decides values, and sidecars of older versions were made without it
        details["channels"] = "stored blue, green, red; estimated from red, green, blue"
    metadata = sidecar.Metadata(
        kind="depth",
        fingerprint=opened.fingerprint,
        split=split.name,
        camera=camera,
        identity=estimator.name,
        row_shape=shape,
        frames=split.frames,
        episodes=len(split.episodes),
        details=details,
    )
    writer = sidecar.Writer(root, metadata, len(depth_labels.COUNTS), process, processes)
    pending = writer.pending()
    label = f"{split.name} {view}" + (f", process {process} of {processes}" if processes > 1 else "")
    bar = progress.Progress(sum(reader.length(episode) for episode in pending), label, unit="frame")

    def store(episode: int, steps: np.ndarray, found: Any) -> int:
        raw, scale, offset, counts = _stored(estimator, reader.length(episode), shape, steps, found)
        start = int(split.episodes["start"][episode])
        writer.write(episode, start, raw, scale=scale, offset=offset, figures=counts)
        return len(raw)

    # A second thread quantises and writes while the first reads frames and keeps the devices busy.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        storing: collections.deque[concurrent.futures.Future[int]] = collections.deque()
        advance = bar.begin  # the first episode waits for compilation, which says nothing of the rest
        for row in _estimates(reader, estimator, camera, depth, pending, shape, swapped):
            storing.append(pool.submit(store, *row))
            while len(storing) > BEHIND or (storing and storing[0].done()):
                advance(storing.popleft().result())
                advance = bar.update
        while storing:
            advance(storing.popleft().result())
            advance = bar.update
    bar.close()
    reader.close()
    missing = writer.missing()
    directory = writer.finish()
    found = {
        "directory": directory,
        "unfinished_episodes": 0 if directory else missing,
        "episodes": len(split.episodes),
        "frames": split.frames,
        "quarantined_frames": len(split.quarantined),
        "annotated_now": len(pending),
    }
    return found | (totals(sidecar.open_sidecar(root, split.name)) if directory else {})


def totals(made: sidecar.Sidecar) -> dict[str, int]:
    """The sum of every count over all episodes; {} for sidecars without counts."""
    if made.figures is None:
        return {}
    return dict(zip(depth_labels.COUNTS, made.figures.sum(axis=0).astype(int).tolist(), strict=True))


def _depth_size(reader, split, feature: str, metres: float) -> tuple[int, int]:
    if feature not in split.dataset.features:
        raise errors.UserError(
            f"data set {split.dataset.name} carries no depth feature {feature!r}: use an estimator that reads images"
        )
    for episode in range(len(split.episodes)):
        if len(steps := reader.good_steps(episode)):
            return reader.depth(feature, metres, episode, steps[:1])[0].shape[1:]
    raise errors.UserError(f"{split.dataset.name} {split.name}: all frames are set aside: leave it out with --splits")


def _estimates(
    reader: episode_reader.EpisodeReader,
    estimator: depth_labels.Estimator,
    camera: str,
    depth: tuple[str, float],
    episodes: list[int],
    shape: tuple[int, int],
    swapped: bool,
) -> Iterator[tuple[int, np.ndarray, Any]]:
    """(episode, steps i64 [n] that were not set aside, what there is of them) of every episode, in order.

    What there is: estimates [n, H, W]; of carried depth (raw u16 [n, H, W], scale, offset); None without such steps.
    Episodes are read as the estimator asks for them, which may be several ahead.
    """
    good = {episode: reader.good_steps(episode) for episode in episodes}
    some = (episode for episode in episodes if len(good[episode]))
    estimates = estimator.estimate(reader.images(camera, episode, shape, good[episode], swapped) for episode in some)
    for episode in episodes:
        steps, found = good[episode], None
        if len(steps) and estimator.reads == "depth":
            found = reader.depth_of(*depth, None, episode, steps)
        elif len(steps):
            found = next(estimates)
            if found.shape != (len(steps), *shape):
                raise ValueError(f"{estimator.name}: maps {found.shape} of {len(steps)} frames of {shape}")
        yield episode, steps, found


def _stored(
    estimator: depth_labels.Estimator, frames: int, shape: tuple[int, int], steps: np.ndarray, found: Any
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """(raw u16 [T, H, W], scale, offset, counts): what a sidecar keeps of `_estimates`. Frames set aside are 0."""
    raw, scale, offset = np.zeros((frames, *shape), np.uint16), 1.0, 0.0
    values = np.zeros((0, *shape))
    if found is not None and estimator.reads == "depth":
        raw[steps], scale, offset = found
        values = np.where(raw[steps] > 0, raw[steps] * scale + offset, 0.0)
    elif found is not None:
        values = found
        raw[steps], scale, offset = depth_labels.to_uint16(values, estimator.kind)
    return raw, scale, offset, depth_labels.counts(estimator, frames, values, raw[steps])
