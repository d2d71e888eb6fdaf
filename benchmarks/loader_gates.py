"""What a loader promises besides speed, tried on each contender and reported as found.

Frames are named by (episode, step), so coverage and mixing are counted, not estimated.
"""

import dataclasses
import hashlib
import itertools
from typing import Any

import numpy as np

from benchmarks import loader_cell

_SAME = 8  # batches compared for equality
_MIXING = 50  # batches in which distinct episodes are counted


def check(cell: loader_cell.Cell) -> dict[str, Any]:
    """Gate name -> True, False, a figure, or None where the contender has no such thing."""
    module = loader_cell.module_of(cell.contender)

    def digests() -> list[str]:
        return [digest(batch) for batch in itertools.islice(module.open_batches(cell), _SAME)]

    frames = frames_of(cell)
    batches = frames // cell.batch_size
    keys = np.stack([batch["key"] for batch in itertools.islice(module.open_batches(cell), batches)])
    out = {
        "cell": dataclasses.asdict(cell),
        "frames": frames,
        "same_seed_equal": digests() == digests(),
        # One epoch's worth of samples: 1.0 = every frame at most once.
        "epoch_distinct": round(len(np.unique(keys)) / keys.size, 4),
        "epoch_is_permutation": len(np.unique(keys)) == keys.size,
        "episodes_per_batch": round(float(np.mean([episodes(row) for row in keys[:_MIXING]])), 2),
        "resume_exact": None,
        "state_bytes": None,
        "hosts_equal": None,
    }
    if cell.contender == "ours":
        out |= _ours(cell, module)
    elif cell.contender.startswith("arrayrecord"):
        out["resume_exact"], out["state_bytes"] = _grain_resume(cell, module)
    return out


def digest(batch: dict[str, np.ndarray]) -> str:
    """Hash of all arrays of a batch."""
    total = hashlib.sha256()
    for name in sorted(batch):
        values = np.asarray(batch[name])
        total.update(name.encode() + repr(values.tolist() if values.dtype == object else values.tobytes()).encode())
    return total.hexdigest()


def episodes(keys: np.ndarray) -> int:
    """Distinct episodes among frame keys."""
    return len(np.unique(keys // loader_cell.KEY_BASE))


def frames_of(cell: loader_cell.Cell) -> int:
    """Frames of the part of the data set that is read, from the index."""
    from qdepth_jax.data import index, source

    opened = index.open_index(cell.data)
    name, part = source.parse_split(cell.split, lambda name: len(opened.split(name).episodes))
    return int(opened.split(name).episodes["length"][part].sum())


def _ours(cell: loader_cell.Cell, module) -> dict[str, Any]:
    """Resume at random positions; the global batch from 1, 2 and 4 hosts."""
    opened = module.open_loader(cell)
    places = np.random.default_rng(cell.seed).integers(0, 3 * opened.steps_per_epoch, 10).tolist()
    resumed = all(digest(next(opened.iterate(step))) == digest(opened.batch(step)) for step in places)
    # A run through, against starts in the middle of it.
    through = [digest(batch) for batch in itertools.islice(opened.iterate(), 2 * _SAME)]
    resumed &= through[_SAME:] == [digest(batch) for batch in itertools.islice(opened.iterate(_SAME), _SAME)]
    equal = True
    for hosts in (2, 4):
        parts = [module.open_loader(cell, process_index=host, process_count=hosts) for host in range(hosts)]
        for step in places[:3]:
            rows = [part.batch(step) for part in parts]
            equal &= digest({k: np.concatenate([row[k] for row in rows]) for k in rows[0]}) == digest(
                opened.batch(step)
            )
    return {"resume_exact": bool(resumed), "state_bytes": 8, "hosts_equal": bool(equal)}


def _grain_resume(cell: loader_cell.Cell, module) -> tuple[bool, int]:
    batches = module.open_batches(cell)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    after = [digest(next(batches)) for _ in range(2)]
    again = module.open_batches(cell)
    again.set_state(state)
    return after == [digest(next(again)) for _ in range(2)], len(str(state))
