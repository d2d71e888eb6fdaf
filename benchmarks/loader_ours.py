"""Contender "ours": qdepth_jax.data.loader, unchanged.

Mode "resize" does the resize on the host (Pillow, Lanczos), so that the row is equal work. In training the loader sends
stored sizes ("sent raw": the cell of mode "decode") and the device resizes. Mode "augment" is equal work too: the
package's device augmentation, compiled for and running on the CPU.
"""

import os
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.loader_cell import KEY_BASE, Cell
from qdepth_jax.data import data_config, loader

FEATURES = ("image_main", "image_wrist", "proprio", "action", "action_mask", "text", "frame", "position")
_TOKENIZER = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data/text_tokenizer/libero.model"
)


def config(cell: Cell, **changes) -> data_config.DataConfig:
    """The data section: octo's normalisation, two views, everything else as in training."""
    given = {
        "datasets": (data_config.DatasetConfig(path=cell.data),),
        "split": cell.split,
        "views": ("main", "wrist"),
        "horizon": cell.horizon,
        "normalisation": "normal",
        "image_size": (cell.size, cell.size) if cell.mode == "resize" else (),
        "text_tokenizer": _TOKENIZER,
        "threads": cell.threads,
    }
    return data_config.DataConfig(**(given | changes))


def open_loader(cell: Cell, features=FEATURES, **host) -> loader.Loader:
    return loader.Loader(config(cell), features, cell.batch_size, seed=cell.seed, **host)


def open_batches(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    opened = open_loader(cell)
    batches = opened.iterate()
    if cell.mode == "augment":
        return _augmented(batches, cell)
    if cell.mode == "gates":
        return _keyed(batches, opened)
    return batches


def _keyed(batches, opened: loader.Loader) -> Iterator[dict[str, np.ndarray]]:
    split = opened.sources[0].split
    start = split.episodes["start"]
    for batch in batches:
        episode = split.episode_of(batch["frame"])
        yield batch | {"key": KEY_BASE * episode + (batch["frame"] - start[episode])}


def _augmented(batches, cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    """octo's ranges (those of open-pi-zero), in one compiled program of both views."""
    import jax

    from qdepth_jax.models import augment, augment_config

    recipe = augment_config.PUBLISHED["open_pi_zero"]
    key = jax.random.key(cell.seed)
    program = jax.jit(lambda seen: augment.augment_views(seen, ("main", "wrist"), cell.size, recipe, key))
    for batch in batches:
        seen = {name: batch[name] for name in ("image_main", "image_wrist", "position")}
        yield batch | jax.block_until_ready(program(seen))


def prepare(cell: Cell) -> dict[str, float]:
    """The one-time work: index (every record's checksum) and statistics, into an empty folder."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(cell.data)) as scratch:
        began = time.perf_counter()
        opened = loader.Loader(config(cell, index_dir=scratch), FEATURES, cell.batch_size)
        opened.close()
        size = sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(scratch) for name in names)
        return {"index_s": time.perf_counter() - began, "written_mb": size / 2**20}
