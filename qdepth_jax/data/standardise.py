"""From a data set's own columns to ours: action with an absolute gripper (1 open, 0 closed), proprioception.

Everything is vectorised over the whole split; episode borders are explicit arrays. Nothing is filtered at run time:
the frames that may be sampled, and the reasons why others may not, are computed once.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import index


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a recipe may read.

    Attributes:
      read: feature name (without the leading "steps/") -> array [F, ...].
      start, end: i64 [F]; first frame of the episode of each frame, and one past its last.
    """

    read: Callable[[str], np.ndarray]
    start: np.ndarray
    end: np.ndarray


Recipe = Callable[[Columns], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Standardised:
    """One split in our convention (F frames, all of them; `valid` says which may be sampled).

    Attributes:
      action: f32 [F, A].
      proprio: f32 [F, Dp].
      start: i64 [F] first frame of the episode.
      end: i64 [F] one past the last frame of the episode whose action is defined.
      episode: i32 [F] episode number.
      valid: i64 [V] ids of the frames that may be sampled, ascending.
      dropped: reason -> number of frames that may not.
    """

    action: np.ndarray
    proprio: np.ndarray
    start: np.ndarray
    end: np.ndarray
    episode: np.ndarray
    valid: np.ndarray
    dropped: Mapping[str, int]


# ---- gripper primitives: source convention -> absolute, 1 open, 0 closed ----


def binarise(gripper: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Continuous opening -> {0, 1}: above 0.95 open, below 0.05 closed, between takes the state reached next.

    Values between at the end of an episode, with no state reached after them, take the episode's last raw value (octo's
    rule). gripper f32 [F], end i64 [F] (one past the episode's last frame) -> f32 [F].
    """
    frames = len(gripper)
    decided = (gripper > 0.95) | (gripper < 0.05)
    # Position of the next decided frame at or after each frame, over the whole split; beyond the episode = none.
    at = np.where(decided, np.arange(frames), frames)
    following = np.minimum.accumulate(at[::-1])[::-1]
    reached = following < end
    opened = (gripper > 0.95).astype(np.float32)
    return np.where(reached, opened[np.where(reached, following, 0)], gripper[end - 1]).astype(np.float32)


def relative_to_absolute(gripper: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Commands (+1 close, -1 open, about 0 keep; threshold 0.1) -> held state, 1 open, 0 closed.

    Before its first command an episode is in the opposite state; without any command it is open. f32 [F] -> f32 [F].
    """
    frames = len(gripper)
    command = np.where(gripper < -0.1, 1, np.where(gripper > 0.1, -1, 0))
    given = command != 0
    last = np.maximum.accumulate(np.where(given, np.arange(frames), -1))
    following = np.minimum.accumulate(np.where(given, np.arange(frames), frames)[::-1])[::-1]
    held = last >= start
    coming = following < end
    before = np.where(coming, -command[np.where(coming, following, 0)], 1)
    state = np.where(held, command[np.where(held, last, 0)], before)
    return (state.astype(np.float32) + 1) / 2


def invert(gripper: np.ndarray) -> np.ndarray:
    """1 - g."""
    return (1 - gripper).astype(np.float32)


def successive_difference(state: np.ndarray, end: np.ndarray) -> np.ndarray:
    """state[t+1] - state[t] inside an episode, 0 on its last frame (which such recipes drop). [F, n] -> f32 [F, n].

    Angles are not wrapped: that is the published recipe, outliers of up to 2 pi included.
    """
    frames = len(state)
    following = np.minimum(np.arange(1, frames + 1), end - 1)
    return (state[following] - state).astype(np.float32)


# ---- a whole split ----


def standardise(
    split: index.SplitIndex,
    action: Recipe,
    proprio: Recipe,
    *,
    drop_last: bool = False,
    language: str = "",
    skip_unlabelled: bool = False,
    episodes: np.ndarray | None = None,
    max_frames_per_episode: int = 0,
    seed: int = 0,
) -> Standardised:
    """Applies recipes to every frame of a split and decides which frames may be sampled.

    Args:
      split: the opened split.
      action, proprio: recipes of the data set's definition.
      drop_last: the last step of an episode has no action (relabelled actions).
      language: feature of the instruction, needed for `skip_unlabelled`.
      skip_unlabelled: leave out episodes without any instruction.
      episodes: bool [E]; episodes to use (None = all).
      max_frames_per_episode: of longer episodes, keep this many frames, drawn once from `seed` (0 = all).

    Raises:
      UserError: a value that is not finite (names the frame), or no frame left.
    """
    table = split.episodes
    lengths = table["length"].astype(np.int64)
    start, end = np.repeat(table["start"], lengths), np.repeat(table["start"] + lengths, lengths)
    episode = np.repeat(np.arange(len(table), dtype=np.int32), lengths)
    columns = Columns(lambda name: split.column(f"steps/{name}"), start, end)
    values = {"action": action(columns), "proprio": proprio(columns)}
    frame_end = end - 1 if drop_last else end
    frames = np.arange(len(episode))
    keep = np.ones(len(episode), bool)
    dropped: dict[str, int] = {}

    def drop(reason: str, these: np.ndarray) -> None:
        nonlocal keep
        dropped[reason] = int((keep & these).sum())
        keep = keep & ~these

    if episodes is not None:
        drop("episode of another part of the split", ~episodes[episode])
    if drop_last:
        drop("last step, action undefined", frames >= frame_end)
    if skip_unlabelled:
        ids, strings = split.texts(language)
        labelled = np.array([bool(text.strip()) for text in strings])[ids]
        any_label = np.zeros(len(table), bool)
        np.logical_or.at(any_label, episode, labelled)
        drop("no instruction", ~(any_label[episode] & labelled))
    if max_frames_per_episode:
        drop(
            f"more than {max_frames_per_episode} frames in the episode",
            ~_subsample(episode, keep, max_frames_per_episode, seed),
        )
    for name, array in values.items():
        bad = keep & ~np.isfinite(array).all(1)
        if bad.any():
            frame = int(np.flatnonzero(bad)[0])
            raise errors.UserError(
                f"{name} is not finite in {int(bad.sum())} frames, first {split.where(frame)}: {array[frame]}; "
                "drop these episodes from the data set"
            )
    if not keep.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the split is empty"
        raise errors.UserError(f"{split.dataset.name} {split.name}: no frame left to sample ({reasons})")
    return Standardised(
        action=np.ascontiguousarray(values["action"], np.float32),
        proprio=np.ascontiguousarray(values["proprio"], np.float32),
        start=start,
        end=frame_end,
        episode=episode,
        valid=np.flatnonzero(keep),
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def _subsample(episode: np.ndarray, keep: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """bool [F]: at most `limit` kept frames of every episode, drawn without replacement."""
    draw = np.random.Generator(np.random.PCG64(seed)).random(len(episode))
    order = np.lexsort((draw, ~keep, episode))
    first = np.searchsorted(episode, episode[order], side="left")
    chosen = np.zeros(len(episode), bool)
    chosen[order] = np.arange(len(episode)) - first < limit
    return chosen
