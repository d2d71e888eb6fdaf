"""What a person should look at before training on a data set, one sentence each."""

import collections
import hashlib

import numpy as np

from qdepth_jax import progress
from qdepth_jax.data import index, normalise, quarantine, shard_scan
from qdepth_jax.eval import data_facts

FAR_OUT = 10.0  # an outlier lies more than this many q01..q99 widths outside of them
HEADERS = 200  # images whose size is looked at


def find(subject: data_facts.Subject, horizon: int, images: data_facts.Images) -> list[str]:
    """Everything a person should look at before training on this split, one sentence each."""
    split = subject.split
    out = [subject.problem] if subject.problem else []
    out += list(subject.opened.warnings)
    lengths = split.episodes["length"]
    for what, these in (
        ("have one single frame", lengths == 1),
        (f"have fewer frames than the horizon of {horizon}", lengths < horizon),
    ):
        if these.any():
            out.append(f"{int(these.sum())} of {len(lengths)} episodes {what}: {_some(np.flatnonzero(these))}")
    out += _label_warnings(subject)
    out += _non_finite(subject)
    if subject.item is not None:
        for name, values, normaliser in data_facts.pairs(subject):
            out += _constant(name, normaliser) + _outliers(name, values, subject.item.frames.valid, split, normaliser)
    else:
        for feature in data_facts.columns(subject):
            values = split.column(feature.name)
            if (
                not feature.dtype.startswith("float")
                or len(feature.shape) != 1
                or values.shape[1] > data_facts.RAW_COLUMNS
            ):
                continue
            normaliser = normalise.Normaliser(data_facts.raw_statistics(values))
            out += _constant(feature.name, normaliser)
            out += _outliers(feature.name, values, np.arange(split.frames), split, normaliser)
    out += _quarantined(split)
    out += _duplicates(subject) + _sizes(subject, images)
    return out


def _quarantined(split: index.SplitIndex) -> list[str]:
    """Frames that are never sampled, by reason, and what was set aside without being an episode of the index."""
    out = []
    for reason, frames in split.quarantined_by_reason.items():
        out.append(f"{len(frames)} frames are quarantined and never sampled ({reason}): {_some(frames)}")
    unread = [row for row in split.quarantine if row.episode is None]
    if unread:
        counts = ", ".join(f"{number} x {reason}" for reason, number in quarantine.count(unread).items())
        places = _some((f"{row.shard} record {row.record}" for row in unread), 3)
        out.append(f"{len(unread)} records are quarantined and no episodes of the index ({counts}): {places}")
    return out


def _some(items, count: int = 8) -> str:
    items = list(items)
    return ", ".join(str(i) for i in items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def _label_warnings(subject: data_facts.Subject) -> list[str]:
    if not subject.languages:
        return ["no feature with an instruction was found"]
    _, labelled = data_facts.instructions(subject)
    if labelled.all():
        return []
    by_episode = np.maximum.reduceat(labelled, subject.split.episodes["start"])
    return [
        f"{1 - labelled.mean():.1%} of the frames have no instruction ({int((~labelled).sum())} of {len(labelled)}; "
        f"{int((~by_episode).sum())} of {len(by_episode)} episodes have none at all); training leaves them out unless "
        "data.skip_unlabelled=False"
    ]


def _non_finite(subject: data_facts.Subject) -> list[str]:
    out = []
    for feature in data_facts.columns(subject):
        if not feature.dtype.startswith("float"):
            continue
        bad, first = 0, -1
        for start, part in data_facts.chunks(subject.split.column(feature.name)):
            rows = np.flatnonzero(~np.isfinite(part).all(1))
            if len(rows) and first < 0:
                first = start + int(rows[0])
            bad += len(rows)
        if bad:
            out.append(f"{feature.name} is not finite in {bad} frames, first {subject.split.where(first)}")
    return out


def _constant(name: str, normaliser: normalise.Normaliser) -> list[str]:
    dims = data_facts.constant_dims(normaliser)
    if not dims:
        return []
    return [f"{name}: dimensions {dims} are (nearly) constant, q01 to q99 spans less than {2 * normaliser.floor:g}"]


def _outliers(
    name: str, values: np.ndarray, frames: np.ndarray, split: index.SplitIndex, normaliser: normalise.Normaliser
) -> list[str]:
    """Values f32 [F, D] at `frames` that lie far outside of q01..q99; the farthest one is named."""
    s, out = normaliser.statistics, []
    for dim in range(s.dims):
        low, high = s.q01[dim], s.q99[dim]
        if dim in normaliser.raw_dims or not high - low >= 2 * normaliser.floor:
            continue
        x = np.asarray(values[:, dim])[frames]
        beyond = np.maximum(low - x, x - high) / (high - low)
        bad = np.flatnonzero(beyond > FAR_OUT)
        if len(bad):
            worst = bad[np.argmax(beyond[bad])]
            out.append(
                f"{name} dimension {dim}: {len(bad)} of {len(x)} values farther than {FAR_OUT:g} times the q01..q99 "
                f"width outside of {low:.4g}..{high:.4g}, the farthest {x[worst]:.4g} at "
                f"{split.where(int(frames[worst]))}; frames {_some(frames[bad].tolist(), 5)}"
            )
    return out


def _duplicates(subject: data_facts.Subject) -> list[str]:
    """Groups of episodes with equal columns, texts and image sizes, byte for byte, in every step."""
    split, table = subject.split, subject.split.episodes
    features = [f for f in subject.opened.dataset.features.values() if f.per_step and shard_scan.storage(f)]
    spans = [split.spans(f.name)["size"] for f in features if shard_scan.storage(f) == "span"]
    # Only episodes of equal length and equal sums of image sizes can be equal: hashing is left to those.
    sums = [np.add.reduceat(sizes.astype(np.int64), table["start"]) for sizes in spans]
    keys = np.stack([table["length"].astype(np.int64), *sums], 1)
    _, group, count = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(count[group.reshape(-1)] > 1)
    arrays = [*spans, *(split.column(f.name) for f in features if shard_scan.storage(f) == "column")]
    arrays += [split.texts(f.name)[0] for f in features if shard_scan.storage(f) == "text"]
    found: dict[bytes, list[int]] = collections.defaultdict(list)
    for episode in progress.track(candidates.tolist(), len(candidates), "equal episodes", "episode"):
        start, digest = int(table["start"][episode]), hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(np.ascontiguousarray(array[start : start + int(table["length"][episode])]).tobytes())
        found[digest.digest()].append(episode)
    groups = [episodes for episodes in found.values() if len(episodes) > 1]
    if not groups:
        return []
    more = sum(len(g) - 1 for g in groups)
    return [f"{more} episodes repeat another one (equal columns, texts and image sizes): {_some(groups, 5)}"]


def _sizes(subject: data_facts.Subject, images: data_facts.Images) -> list[str]:
    """Image sizes of the first frame of up to HEADERS episodes, by view."""
    starts, out = subject.split.episodes["start"], []
    picks = np.unique(np.linspace(0, len(starts) - 1, min(HEADERS, len(starts))).astype(int))
    for view, feature in {**subject.views, **{f"depth {k}": v for k, v in subject.depth.items()}}.items():
        found = collections.Counter(images.size(feature, int(starts[e])) for e in picks)
        found.pop(None, None)
        if len(found) > 1:
            sizes = ", ".join(f"{h}x{w} ({n})" for (h, w), n in found.most_common())
            out.append(f"images of view {view} differ in size: {sizes}; set data.image_size to resize on the host")
    return out
