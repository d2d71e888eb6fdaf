"""Whether held-out episodes are held out: which of them are trained on, and whether each counts once."""

from collections.abc import Sequence

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import order as order_lib
from qdepth_jax.data import source


def check(training: Sequence[source.Source], held_out: Sequence[source.Source]) -> list[str]:
    """Held-out episodes that are trained on, data set by data set.

    Of one split (slices, held_out_every) the numbers of the episodes are compared, and one in common is refused. Of two
    splits the episodes: as many frames, as many bytes in the file, and the same actions and proprioception in every
    frame are the same episode. Such splits are as their publisher made them, in a sample even equal: it is said.

    Args:
      training, held_out: the same data sets in the same order.

    Returns:
      lines to say, one for each data set whose two splits share some episodes.

    Raises:
      UserError: how many, an example, and the fix.
    """
    lines = []
    for trained, aside in zip(training, held_out, strict=True):
        pairs = _shared(trained, aside)
        if pairs:
            here, there = pairs[0]
            name, what = trained.definition.name, f"{len(pairs)} of the {len(_used(aside))} held-out episodes"
            line = (
                f"{what} of {name} ({aside.identity['split']!r}) are trained on too ({trained.identity['split']!r}), "
                f"as episode {there} of {aside.split.name!r}, which is episode {here} of {trained.split.name!r}"
            )
            if trained.split.name == aside.split.name:
                raise errors.UserError(
                    f"{line}: validation would measure what was learned by heart. Set data.split and eval_split to "
                    "parts without common episodes, e.g. 'train[:95%]' and 'train[95%:]', or eval_split='' and "
                    "data.held_out_every=20"
                )
            lines.append(f"validation: {line}: what was learned by heart counts there")
    return lines


def repeats(names: Sequence[str], order: order_lib.Order, batches: int, batch_size: int) -> list[str]:
    """A line for each data set of which one validation reads more samples than it has held-out frames.

    Args:
      names: of the data sets; order: of the held-out frames; batches, batch_size: of one validation.
    """
    which, sample = order.samples(np.arange(batches * batch_size))
    again = np.flatnonzero(sample >= np.array(order.sizes)[which])
    if not len(again):
        return []
    fit = int(again[0]) // batch_size
    read = np.bincount(which, minlength=len(names))
    return [
        f"validation: train.eval_batches={batches} x train.batch_size={batch_size} reads {read[number]} samples of "
        f"{names[number]}, of which {order.sizes[number]} frames are held out: frames repeat within one validation; "
        f"train.eval_batches={max(1, fit)} reads {'as many as fit' if fit else 'one batch'}"
        for number in np.unique(which[again])
    ]


def _used(item: source.Source) -> np.ndarray:
    """i64 [n] ascending: episodes with frames that are sampled."""
    used = np.zeros(len(item.split.episodes), bool)
    used[item.frames.episode[item.frames.valid]] = True
    return np.flatnonzero(used)


def _shared(trained: source.Source, aside: source.Source) -> list[tuple[int, int]]:
    """(episode of the training split, the same episode of the held-out split)."""
    ours, theirs = _used(trained), _used(aside)
    if trained.split.name == aside.split.name:
        return [(int(e), int(e)) for e in np.intersect1d(ours, theirs)]
    sizes = trained.split.episodes[["length", "size"]][ours], aside.split.episodes[["length", "size"]][theirs]
    alike = np.isin(sizes[0], sizes[1])
    known = {_content(trained, e): e for e in ours[alike].tolist()}
    return [(known[key], e) for e in theirs.tolist() if (key := _content(aside, e)) in known]


def _content(item: source.Source, episode: int) -> tuple[int, int, int]:
    row = item.split.episodes[episode]
    frames = slice(int(row["start"]), int(row["start"] + row["length"]))
    digest = hash(item.frames.action[frames].tobytes() + item.frames.proprio[frames].tobytes())
    return int(row["length"]), int(row["size"]), digest
