"""From a data set's own columns to ours, for a whole split at once: actions, proprioception, frames to sample.

Everything is vectorised over the split; episode borders are explicit. Nothing is filtered at run time: the frames that
may be sampled, and the reasons why others may not, are computed once. What the columns of a data set mean stands in
recipes.py and definitions.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import index

# Rows that are looked at together where a whole column would need a temporary of its own size.
_ROWS = 1 << 20
ANOTHER_PART = "episode of another part of the split"


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a recipe may read (F frames, E episodes).

    Attributes:
      read: step feature (without the leading "steps/") -> array [F, ...].
      lengths: i64 [E]; frames of each episode.
      text: step feature -> (ids i32 [F], table of strings).
      episode_read: feature outside the steps, by its full name ("success") -> its value at every frame, [F, ...].
      episode_text: text feature outside the steps, by its full name -> (ids i32 [F], table of strings).
    """

    read: Callable[[str], np.ndarray]
    lengths: np.ndarray
    text: Callable[[str], tuple[np.ndarray, list[str]]] | None = None
    episode_read: Callable[[str], np.ndarray] | None = None
    episode_text: Callable[[str], tuple[np.ndarray, list[str]]] | None = None

    @functools.cached_property
    def start(self) -> np.ndarray:
        """i64 [F]; first frame of the episode of each frame."""
        return np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)

    @functools.cached_property
    def end(self) -> np.ndarray:
        """i64 [F]; one past the last frame of the episode of each frame."""
        return np.repeat(np.cumsum(self.lengths), self.lengths)


Recipe = Callable[[Columns], np.ndarray]


def split_columns(split: index.SplitIndex) -> Columns:
    """The columns of an opened split."""
    lengths = split.episodes["length"].astype(np.int64)

    def spread(name: str) -> tuple[np.ndarray, list[str]]:
        ids, strings = split.texts(name)
        return np.repeat(ids, lengths), strings

    return Columns(
        read=lambda name: split.column(f"steps/{name}"),
        lengths=lengths,
        text=lambda name: split.texts(f"steps/{name}"),
        episode_read=lambda name: np.repeat(split.column(name), lengths, axis=0),
        episode_text=spread,
    )


class PerEpisode:
    """One number per episode that is indexed by frame: with 27 M frames (DROID) an array by frame fills 216 MB."""

    def __init__(self, values: np.ndarray, episode: np.ndarray):
        self.values = values
        self._episode = episode

    def __getitem__(self, frames) -> np.ndarray:
        return self.values[self._episode[frames]]

    def __len__(self) -> int:
        return len(self._episode)


@dataclasses.dataclass(frozen=True)
class Standardised:
    """One split in our convention (F frames, all of them; `valid` says which may be sampled).

    Attributes:
      action: f32 [F, A].
      proprio: f32 [F, Dp].
      start: indexed by frame ids: first frame of the episode that may be seen, i64.
      end: indexed by frame ids: one past the last frame of the episode whose action is defined, i64.
      episode: i32 [F] episode number.
      valid: i64 [V] ids of the frames that may be sampled, ascending.
      weighed: V before `max_frames_per_episode`.
      dropped: reason -> number of frames that may not; a frame counts under the first reason that drops it.
    """

    action: np.ndarray
    proprio: np.ndarray
    start: PerEpisode
    end: PerEpisode
    episode: np.ndarray
    valid: np.ndarray
    weighed: int
    dropped: Mapping[str, int]


def standardise(
    split: index.SplitIndex,
    action: Recipe,
    proprio: Recipe,
    *,
    drop_first: bool = False,
    drop_last: bool = False,
    keep: Recipe | None = None,
    keep_reason: str = "left out by the data set's rule",
    language: str | Sequence[str] = (),
    skip_unlabelled: bool = False,
    episodes: np.ndarray | None = None,
    max_frames_per_episode: int = 0,
    horizon: int = 1,
    window: int = 1,
    pictures: int = 1,
    whole_chunks: bool = False,
    seed: int = 0,
) -> Standardised:
    """Applies recipes to every frame of a split and decides which frames may be sampled.

    Args:
      split: the opened split. Frames in `split.quarantined` (i64 ids) are never sampled.
      action, proprio: recipes of the data set's definition.
      drop_first, drop_last: the first, the last step of an episode has no action (relabelled actions).
      keep, keep_reason: bool [F]; False = never sampled, counted under this reason.
      language: instruction features with "steps/"; needed for `skip_unlabelled`.
      skip_unlabelled: leave out frames whose instructions are all empty.
      episodes: bool [E]; episodes to use (None = all).
      max_frames_per_episode: of longer episodes, keep this many frames, drawn once from `seed` (0 = all).
      horizon, window, pictures: actions from a frame on, observed steps and observed images up to it, that a sample
        reads.
      whole_chunks: leave out frames whose chunk passes the end of the episode ("truncate").

    Raises:
      UserError: a value that is not finite (names the frame and the fix), or no frame left.
    """
    columns = split_columns(split)
    stop = np.cumsum(columns.lengths)
    start = stop - columns.lengths + int(drop_first)
    end = stop - int(drop_last)
    episode = np.repeat(np.arange(len(stop), dtype=np.int32), columns.lengths)
    frames = len(episode)
    values = {"action": action(columns), "proprio": proprio(columns)}
    chosen = np.ones(frames, bool)
    dropped: dict[str, int] = {}

    def drop(reason: str, these: np.ndarray) -> None:
        before = int(chosen.sum())
        np.logical_and(chosen, ~these, out=chosen)
        dropped[reason] = dropped.get(reason, 0) + before - int(chosen.sum())

    quarantined = np.zeros(frames, bool)
    quarantined[split.quarantined] = True
    if episodes is not None:
        drop(ANOTHER_PART, ~episodes[episode])
    drop("quarantined", quarantined)
    if pictures > 1:
        after = np.zeros(frames, bool)
        for frame in split.quarantined.tolist():
            after[frame : min(frame + pictures, stop[episode[frame]])] = True
        drop("an observed image is quarantined", after)
    if drop_first:
        drop("first step, action undefined", _marked(frames, start - 1))
    if drop_last:
        drop("last step, action undefined", _marked(frames, end))
    if keep is not None:
        drop(keep_reason, ~keep(columns))
    if skip_unlabelled:
        drop("no instruction", ~_labelled(split, language, frames))
    if whole_chunks:
        last = np.maximum(end - horizon + 1, start)
        drop(f"fewer than {horizon} actions to the end of the episode", np.arange(frames) >= last[episode])
    for name, array in values.items():
        # A sample reads the actions after its frame and the observations before it.
        before, after = (horizon - 1, 0) if name == "action" else (0, window - 1)
        near = _refuse_odd_values(split, name, array, (start, end), episode, chosen, quarantined, before, after)
        drop("next to a quarantined frame whose values are not finite", near)
    weighed = int(chosen.sum())
    if max_frames_per_episode:
        drop(
            f"more than {max_frames_per_episode} frames in the episode",
            ~_subsample(episode, chosen, max_frames_per_episode, seed),
        )
    dropped = {reason: count for reason, count in dropped.items() if count}
    if not chosen.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the split is empty"
        if dropped.get("no instruction"):
            reasons += "; data.skip_unlabelled=False keeps frames without an instruction"
        if dropped.get(ANOTHER_PART):
            reasons += "; a smaller data.held_out_every sets more episodes aside, data.held_out_every=0 none"
        raise errors.UserError(f"{split.dataset.name} {split.name}: no frame left to sample ({reasons})")
    return Standardised(
        action=np.ascontiguousarray(values["action"], np.float32),
        proprio=np.ascontiguousarray(values["proprio"], np.float32),
        start=PerEpisode(start, episode),
        end=PerEpisode(end, episode),
        episode=episode,
        valid=np.flatnonzero(chosen),
        weighed=weighed,
        dropped=dropped,
    )


# ---- parts of `standardise` ----


def _marked(frames: int, ids: np.ndarray) -> np.ndarray:
    out = np.zeros(frames, bool)
    out[ids] = True
    return out


def _labelled(split: index.SplitIndex, features: str | Sequence[str], frames: int) -> np.ndarray:
    """bool [F]: one of the instruction features has text."""
    out = np.zeros(frames, bool)
    for feature in [features] if isinstance(features, str) else features:
        ids, strings = split.texts(feature)
        out |= np.array([bool(text.strip()) for text in strings], bool)[ids]
    return out


def _refuse_odd_values(
    split: index.SplitIndex,
    name: str,
    array: np.ndarray,
    borders: tuple[np.ndarray, np.ndarray],
    episode: np.ndarray,
    chosen: np.ndarray,
    quarantined: np.ndarray,
    before: int,
    after: int,
) -> np.ndarray:
    """bool [F]: frames whose sample would read a quarantined value that is not finite. Any other such is an error.

    Values count that a sample can read: those between the borders of an episode with a chosen frame.
    """
    start, end = borders
    bad = np.concatenate([~np.isfinite(array[i : i + _ROWS]).all(1) for i in range(0, len(array), _ROWS)] or [chosen])
    near = np.zeros(len(array), bool)
    if not bad.any():
        return near
    used = np.zeros(len(start), bool)
    used[episode[chosen]] = True
    ids = np.flatnonzero(bad)
    number = episode[ids]
    ids = ids[used[number] & (ids >= start[number]) & (ids < end[number])]
    loose = ids[~quarantined[ids]]
    if len(loose):
        raise errors.UserError(
            f"{name} is not finite in {len(loose)} frames, first {split.where(int(loose[0]))}: {array[loose[0]]}; "
            f"leave such frames out: `python tools/index_rlds.py {split.dataset.directory} --quarantine`"
        )
    for frame in ids.tolist():
        here = episode[frame]
        near[max(start[here], frame - before) : min(end[here], frame + after + 1)] = True
    return near


def _subsample(episode: np.ndarray, keep: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """bool [F]: at most `limit` kept frames of every episode, drawn without replacement."""
    draw = np.random.Generator(np.random.PCG64(seed)).random(len(episode))
    order = np.lexsort((draw, ~keep, episode))
    first = np.searchsorted(episode, episode[order], side="left")
    chosen = np.zeros(len(episode), bool)
    chosen[order] = np.arange(len(episode)) - first < limit
    return chosen
