"""Whether the bytes of a finished sidecar are those that were written, and a name for its content.

Every episode carries the CRC-32 of what is stored of it. Who reads whole episodes checks each of them on the way;
training checks whole sidecars at its start up to START_BYTES (tokens of millions of frames are below, their depth maps
are not: tools/check_sidecar.py reads those).
"""

import dataclasses
import functools
import hashlib
import json
import logging

import numpy as np

from qdepth_jax import errors, progress
from qdepth_jax.data import sidecar

START_BYTES = 4 << 30  # read at the start of a training run; a CRC-32 takes about a second for one to three GB


def check_episode(opened: sidecar.Sidecar, episode: int, start: int, values: np.ndarray) -> None:
    """Refuses an episode whose stored bytes changed since it was written; without sums it checks nothing.

    Args:
      start: frame id of its first frame.
      values: u16 [T, ...] all of its rows.

    Raises:
      UserError: they differ from the sum that was kept when it was written.
    """
    if opened.sums is None:
        return
    figures = None if opened.figures is None else opened.figures[episode]
    found = sidecar.episode_sum(values, opened.scale[episode], opened.offset[episode], figures)
    if found != opened.sums[episode]:
        raise errors.UserError(
            f"sidecar {opened.directory} is damaged: the bytes of episode {episode} (frames {start} to "
            f"{start + len(values) - 1}) have the sum {found:08x}, {int(opened.sums[episode]):08x} was written; "
            "restore it, or delete it and make it again"
        )


def check(opened: sidecar.Sidecar, episodes: np.ndarray, shown: bool = False) -> None:
    """`check_episode` of every episode, with `episodes` of the index ("start", "length"); `shown`: a progress bar."""
    if opened.sums is None:
        say_without(opened)
        return
    label = f"sums of {opened.directory}"
    bar = progress.Progress(opened.metadata.frames, label, unit="frame") if shown else None
    for episode, (start, length) in enumerate(
        zip(episodes["start"].tolist(), episodes["length"].tolist(), strict=True)
    ):
        check_episode(opened, episode, start, opened.values[start : start + length])
        if bar:
            bar.update(length)
    if bar:
        bar.close()


def check_at_start(opened: sidecar.Sidecar, episodes: np.ndarray, limit: int = START_BYTES) -> None:
    """`check` where the values have no more than `limit` bytes; says that a larger one is not read."""
    if opened.sums is not None and opened.values.nbytes > limit:
        _say(
            f"sidecar {opened.directory} ({opened.values.nbytes / 1e9:.0f} GB) is not checked for damage at the start: "
            "tools/check_sidecar.py does it"
        )
        return
    check(opened, episodes)


def say_without(opened: sidecar.Sidecar) -> None:
    """Says once that a sidecar of an older version carries no sums."""
    if opened.sums is None:
        _say(
            f"sidecar {opened.directory} was made by an older version, without sums: damage inside of it is not "
            "noticed; make it again to have it checked"
        )


@functools.lru_cache(maxsize=1024)  # once in a process: several loaders open one sidecar
def _say(text: str) -> None:
    logging.warning("%s", text)


def digest(opened: sidecar.Sidecar) -> str:
    """16 hex digits of all that a sidecar is: its metadata with all details, and the sums of its content.

    Sidecars of an older version have no sums: there scale, offset and figures stand for the content.
    """
    found = hashlib.sha256(json.dumps(dataclasses.asdict(opened.metadata), sort_keys=True).encode())
    arrays = (opened.scale, opened.offset, opened.figures) if opened.sums is None else (opened.sums,)
    for array in arrays:
        if array is not None:
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
