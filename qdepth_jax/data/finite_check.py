"""Looks for values that are not finite in an index that is there: its columns hold them all, no shard is read.

A training run builds an index without this check (`shard_scan.NO_CHECKS`). What is found becomes the rows that a scan
with the check would have written, so both ways end with the same files.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np

from qdepth_jax import errors, files
from qdepth_jax.data import index, index_build, quarantine

# Rows looked at together: a mask of a whole column of DROID would be as large as the column.
_ROWS = 1 << 20


def find(opened: index.Index, features: Sequence[str]) -> list[quarantine.Row]:
    """One row for every episode and feature (float, per step) with NaN or infinity, in the order of the episodes."""
    return [row for split in opened.splits.values() for row in _find(split, features)]


def add(opened: index.Index, features: Sequence[str], tolerate: bool) -> None:
    """Checks `features` and notes that in the index, with what must be set aside.

    Safe to repeat after a kill: the rows are written before the note that they are complete.

    Args:
      opened: the index; open it again afterwards.
      features: per-step float columns.
      tolerate: write quarantine rows; otherwise the first value that is not finite is an error.

    Raises:
      UserError: such a value, with its place and the fix; or an index that cannot be written.
    """
    rows = find(opened, features)
    if rows and not tolerate:
        first = rows[0]
        raise errors.UserError(
            f"data set {opened.dataset.name}, split {first.split}, {opened.dataset.shard_path(first.shard)}: record "
            f"{first.record} {first.detail} ({len(rows)} such episodes and features). Repair the data, or set these "
            f"episodes aside with `python tools/index_rlds.py {opened.dataset.directory} --quarantine`"
        )
    content = _read(opened.directory, "index.json")
    known = quarantine.from_json(_read(opened.directory, "quarantine.json"))
    aside = sorted(dict.fromkeys([*known, *rows]), key=lambda row: _order(opened, row))
    content["files"]["quarantine.json"] = _replace(opened.directory, "quarantine.json", quarantine.to_json(aside))
    for name in opened.splits:
        content["warnings"] = _warnings(content["warnings"], name, [row for row in aside if row.split == name])
    finite = tuple(sorted({*opened.checks.finite, *features}))
    checks = dataclasses.replace(opened.checks, tolerate=opened.checks.tolerate or tolerate, finite=finite)
    content["checks"] = dataclasses.asdict(checks)
    _replace(opened.directory, "index.json", content)


def _find(split: index.SplitIndex, features: Sequence[str]) -> list[quarantine.Row]:
    table, first = split.episodes, {}
    for name in features:
        column = split.column(name)
        for low in range(0, len(column), _ROWS):
            part = np.asarray(column[low : low + _ROWS])
            bad = low + np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(1))
            episodes, at = np.unique(split.episode_of(bad), return_index=True)
            for episode, frame in zip(episodes.tolist(), bad[at].tolist()):
                first.setdefault((episode, name), frame)
    rows = []
    for (episode, name), frame in sorted(first.items(), key=lambda item: (item[0][0], features.index(item[0][1]))):
        record, step = table[episode], frame - int(table["start"][episode])
        shard = split.dataset.splits[split.name].shards[record["shard"]]
        values = split.column(name)[frame].tolist()
        detail = f"(payload at byte {record['offset']}): {name!r} holds {values} at step {step}"
        rows.append(
            quarantine.Row(split.name, shard, int(record["record"]), episode, None, quarantine.NON_FINITE, detail)
        )
    return rows


def _order(opened: index.Index, row: quarantine.Row) -> tuple:
    """The order in which a scan writes its rows: within a record, numbers before images."""
    split = list(opened.dataset.splits).index(row.split)
    shard = opened.dataset.splits[row.split].shards.index(row.shard)
    return split, shard, row.record, row.reason == quarantine.IMAGE


def _warnings(warnings: list[str], split: str, rows: Sequence[quarantine.Row]) -> list[str]:
    """The warnings with the counts of what is set aside now, where a build puts them: last of the split's."""
    mine = [text for text in warnings if text.startswith(f"split {split}: ")]
    kept = [text for text in warnings if not text.startswith(f"split {split}: set aside ")]
    if not rows:
        return kept
    place = max((kept.index(text) + 1 for text in mine if text in kept), default=len(kept))
    return [*kept[:place], index_build.aside_warning(split, rows), *kept[place:]]


def _read(directory: str, name: str) -> dict[str, Any]:
    with open(os.path.join(directory, name), encoding="utf-8") as file:
        return json.load(file)


def _replace(directory: str, name: str, content: Any) -> list[int]:
    """Writes a file of the index anew by one rename; returns [size, crc]."""
    data = json.dumps(content, ensure_ascii=False, indent=1).encode()
    try:
        files.write_whole(os.path.join(directory, name), data)
    except OSError as error:
        raise index_build.cannot_write(directory, error) from error
    return [len(data), google_crc32c.value(data)]
