"""What of a data set must never be sampled: records, episodes and frames that were set aside, each with its reason.

The list is part of an index (`quarantine.json`). It is written only on request (`tools/index_rlds.py --quarantine`);
without it the first problem is an error. Nothing is dropped silently: every row is kept, counted and said.
"""

import collections
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Records: not in the episode table at all.
DAMAGED = "damaged record"
LOST = "unreadable rest of a shard"  # one row, however many records it held
MISFIT = "record that does not fit features.json"
EMPTY = "episode without steps"
# Episodes and frames: in the table, so that frame ids stay what they are, but not to be sampled.
NON_FINITE = "episode with a non-finite value"
IMAGE = "damaged image"

HOW = "`python tools/index_rlds.py DATASET_DIR --quarantine --check_images` sets damaged images aside"


class Row(NamedTuple):
    """One thing that was set aside.

    Attributes:
      split, shard: where; `shard` is the file name.
      record: number in the shard.
      episode: number in the split; None where the record is no episode of the index.
      step: in the episode; None = all of it.
      reason: one of the constants above.
      detail: what exactly, for people.
    """

    split: str
    shard: str
    record: int
    episode: int | None
    step: int | None
    reason: str
    detail: str


def count(rows: Iterable[Row]) -> dict[str, int]:
    """Reason -> number of rows."""
    return dict(sorted(collections.Counter(row.reason for row in rows).items()))


def digest(rows: Sequence[Row]) -> str:
    """Identity of what is set aside; "" for nothing. Equal lists in any order, from any folder, have one digest."""
    if not rows:
        return ""
    identity = sorted(json.dumps(row[:-1]) for row in rows)
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]


def frames(rows: Iterable[Row], start: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
    """Frame ids of one split that must not be sampled, by reason: ascending i64, each id once per reason.

    Args:
      rows: of that split.
      start, length: i64 [E] of its episodes.
    """
    found: dict[str, list[np.ndarray]] = {}
    for row in rows:
        if row.episode is None:
            continue
        first = int(start[row.episode])
        ids = np.arange(first, first + int(length[row.episode])) if row.step is None else np.array([first + row.step])
        found.setdefault(row.reason, []).append(ids.astype(np.int64))
    return {reason: np.unique(np.concatenate(parts)) for reason, parts in sorted(found.items())}


def to_json(rows: Sequence[Row]) -> dict:
    return {"counts": count(rows), "digest": digest(rows), "rows": [row._asdict() for row in rows]}


def from_json(content: dict) -> tuple[Row, ...]:
    return tuple(Row(**row) for row in content["rows"])
