"""Neighbouring steps of one episode as rows of a batch: observed steps before a frame, actions from it on.

Axis letters: n rows, W observed steps, Z horizon, A action numbers. Frame ids count over a whole split.
"""

from collections.abc import Sequence

import numpy as np

from qdepth_jax import errors

# What stands behind the last action of an episode:
#   repeat    the last action again (octo);
#   neutral   no motion: zero in relative dimensions, the last value in absolute ones such as the gripper (OpenVLA);
#   truncate  nothing: frames whose chunk would reach past the end are not sampled (OpenVLA-OFT).
CHUNK_ENDS = ("repeat", "neutral", "truncate")


def observed(frames: np.ndarray, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The `steps` observations up to each frame; before the episode's start its first one stands in, masked.

    frames, start i64 [n] (frame ids, first frame of their episode) -> ids i64 [n, W], oldest first, and bool [n, W],
    False where the first observation was repeated.
    """
    wanted = frames[:, None] + np.arange(1 - steps, 1)[None, :]
    return np.maximum(wanted, start[:, None]), wanted >= start[:, None]


def chunk(
    action: np.ndarray,
    frames: np.ndarray,
    end: np.ndarray,
    horizon: int,
    ending: str = "repeat",
    absolute_dims: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Action chunks.

    Args:
      action: f32 [F, A] in physical units (not normalised: "no motion" is a physical zero).
      frames: i64 [n] first frame of each chunk.
      end: i64 [n] one past the last frame of the episode that has an action.
      horizon: Z.
      ending: of CHUNK_ENDS.
      absolute_dims: dimensions that hold a place, not a motion; for `neutral`.

    Returns:
      f32 [n, Z, A] and bool [n, Z], True where the action is the episode's own.
    """
    check_ending(ending)
    wanted = frames[:, None] + np.arange(horizon)[None, :]
    inside = wanted < end[:, None]
    out = action[np.minimum(wanted, end[:, None] - 1)]
    if ending == "neutral":
        relative = np.setdiff1d(np.arange(action.shape[1]), np.asarray(absolute_dims, np.int64))
        out[..., relative] = np.where(inside[..., None], out[..., relative], 0)
    return out, inside


def check_ending(ending: str) -> None:
    if ending not in CHUNK_ENDS:
        raise errors.UserError(f"data.chunk_end={ending!r} is unknown: use one of {', '.join(CHUNK_ENDS)}")
