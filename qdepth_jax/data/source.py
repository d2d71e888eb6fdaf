"""One data set, ready to be sampled: index, definition, standardised columns, normalisers, selected frames."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qdepth_jax import errors, files
from qdepth_jax.data import data_config, definitions, depth_images, index, normalise, sidecar, sidecar_sums, standardise

# Part of the name of a statistics file: files of another form are not found, and computed again.
STATISTICS_FORMAT = 2

_SLICE = re.compile(r"^([^\[\]]+?)(?:\[(\d*%?):(\d*%?)\])?$")


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set of a mix (F frames in its split).

    Attributes:
      index, split: the opened index and split.
      definition: table row with the feature names.
      frames: `Standardised`; `frames.valid` are the frames that are sampled.
      action, proprio: normalisers.
      weight: as configured.
      depth: annotated depth maps, or None = the data set's own images.
      depth_tokens: token sidecar or None.
      mapped: tables of the index that are open.
      identity: json-able; two sources with equal identity give equal samples for equal indices.
    """

    index: index.Index
    split: index.SplitIndex
    definition: definitions.Definition
    frames: standardise.Standardised
    action: normalise.Normaliser
    proprio: normalise.Normaliser
    weight: float
    depth: sidecar.Sidecar | None
    depth_tokens: sidecar.Sidecar | None
    identity: dict[str, Any]
    mapped: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def image_feature(self, view: str) -> str:
        """Feature of a camera view; a view that the data set lacks is an error."""
        if view not in self.definition.views:
            raise errors.UserError(
                f"data set {self.definition.name} has no view {view!r}; it has {', '.join(self.definition.views)}: "
                "change data.views"
            )
        return f"steps/{self.definition.views[view]}"

    def spans(self, feature: str) -> np.ndarray:
        """`split.spans`, mapped once: a batch must not open files of the index again."""
        if feature not in self.mapped:
            self.mapped[feature] = self.split.spans(feature)
        return self.mapped[feature]

    @functools.cached_property
    def paths(self) -> list[str]:
        """Path of every shard of the split."""
        return [self.split.shard_path(shard) for shard in range(len(self.index.dataset.splits[self.split.name].shards))]

    @functools.cached_property
    def good_frames(self) -> np.ndarray:
        """i64 [n] ascending: all frames of the split that are not quarantined."""
        return np.setdiff1d(np.arange(self.split.frames), self.split.quarantined, assume_unique=True)

    def depth_feature(self) -> str:
        """Feature of the data set's own depth images of the main view, "" if it has none."""
        name, _ = definitions.depth_of(self.definition, self.index.dataset)
        return name if name in self.index.dataset.features else ""

    def own_depth(self) -> tuple[depth_images.Decode, float]:
        """How the data set's own depth of the main view is decoded into u16, and metres per unit of it."""
        name, metres = definitions.depth_of(self.definition, self.index.dataset)
        return depth_images.decoder(self.index.dataset.feature(name), metres)

    @property
    def swapped_channels(self) -> tuple[str, ...]:
        """Views whose red and blue must be exchanged after decoding this copy of the data set."""
        return definitions.swapped_channels(self.definition, self.index.dataset)

    def instructions(self) -> list[tuple[np.ndarray, list[str]]]:
        """(ids i32 [F], distinct strings) of every instruction feature; one empty text for data without language."""
        names = present_instructions(self.index, self.definition)
        found = [self.split.texts(name) for name in names]
        return found or [(np.zeros(self.split.frames, np.int32), [""])]

    def end(self, frames: np.ndarray) -> np.ndarray:
        """One past the last observed frame of the episode of each frame, i64 [n] (`frames.end` counts actions)."""
        rows = self.split.episodes[self.frames.episode[frames]]
        return rows["start"] + rows["length"]


def open_source(
    entry: data_config.DatasetConfig,
    config: data_config.DataConfig,
    *,
    seed: int = 0,
    normalisers: Mapping[str, Mapping[str, normalise.Normaliser]] | None = None,
    on_shard: Callable[[str, int], None] | None = None,
) -> Source:
    """Opens (indexing first where needed) one data set.

    Args:
      entry, config: the data set and the rest of the data section.
      seed: for `max_frames_per_episode`.
      normalisers: data set name -> {"action", "proprio"}, of a checkpoint; absent = statistics of the data.
      on_shard: progress of an index build.

    Raises:
      UserError: anything missing or not fitting; ValueError: damaged shards.
    """
    opened = index.open_index(entry.path, config.index_dir, on_shard=on_shard)
    index.say_warnings(opened)
    definition = definitions.find(entry.name or opened.dataset.name)
    if definition.name != opened.dataset.name:
        logging.warning(
            "%s calls itself %r and is read by the definition of %r", opened.dataset.directory, opened.dataset.name,
            definition.name,
        )  # fmt: skip
    split, frames = _select(opened, definition, config, config.split, config.held_out, seed)
    given = (normalisers or {}).get(definition.name)
    if given is None:
        given = _normalisers(opened, definition, config, frames, seed)
    for name, values in (("action", frames.action), ("proprio", frames.proprio)):
        if given[name].statistics.dims != values.shape[1]:
            raise errors.UserError(
                f"{name} statistics have {given[name].statistics.dims} dimensions, data set {definition.name} "
                f"has {values.shape[1]}: they belong to another data set"
            )
    main = f"steps/{definition.main_view}"
    depth = _sidecar(entry.depth, "depth", opened, split, main)
    tokens = _sidecar(entry.depth_tokens, "depth_tokens", opened, split, main)
    identity = {
        "name": definition.name,
        "definition_version": definition.version,
        "fingerprint": opened.fingerprint,
        "quarantine": opened.quarantine_digest,
        "split": config.split,
        "held_out": [config.held_out_every, config.held_out],
        "frames": len(frames.valid),
        "frames_digest": _digest(frames.valid),
        "depth": depth.metadata.identity if depth else "",
        "depth_tokens": tokens.metadata.identity if tokens else "",
    }
    # The name of a maker does not tell two of its sidecars apart.
    identity |= {f"{k}_digest": sidecar_sums.digest(v) for k, v in (("depth", depth), ("depth_tokens", tokens)) if v}
    return Source(
        index=opened,
        split=split,
        definition=definition,
        frames=frames,
        action=given["action"],
        proprio=given["proprio"],
        weight=entry.weight,
        depth=depth,
        depth_tokens=tokens,
        identity=identity,
    )


def parse_split(text: str, count: Callable[[str], int]) -> tuple[str, slice]:
    """ "train[:95%]" -> ("train", episode slice); percentages are rounded to the nearest episode, as TFDS does."""
    match = _SLICE.match(text)
    if match is None:
        raise errors.UserError(f'data.split={text!r} is not understood: use "train", "train[:95%]" or "train[10:20]"')
    name, low, high = match.groups()
    total = count(name)

    def place(bound: str | None, default: int) -> int:
        if not bound:
            return default
        value = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
        if value > total:
            raise errors.UserError(f"data.split={text!r} reaches episode {value}, split {name!r} has {total}")
        return value

    return name, slice(place(low, 0), place(high, total))


def _select(
    opened: index.Index,
    definition: definitions.Definition,
    config: data_config.DataConfig,
    split_text: str,
    held_out: bool,
    seed: int,
) -> tuple[index.SplitIndex, standardise.Standardised]:
    name, part = parse_split(split_text, lambda name: len(opened.split(name).episodes))
    split = opened.split(name)
    episodes = np.zeros(len(split.episodes), bool)
    episodes[part] = True
    if config.held_out_every < 0 or config.held_out_every == 1 or (held_out and not config.held_out_every):
        raise errors.UserError(
            f"data.held_out_every={config.held_out_every} with held_out={held_out}: use n >= 2 to set every n-th "
            "episode aside, 0 for none"
        )
    if config.held_out_every:
        aside = np.arange(len(episodes)) % config.held_out_every == config.held_out_every - 1
        episodes &= aside if held_out else ~aside
    frames = standardise.standardise(
        split,
        definition.action,
        definition.proprio,
        drop_first=definition.drop_first,
        drop_last=definition.drop_last,
        keep=definition.keep,
        keep_reason=definition.keep_reason,
        # A label is the default instruction, or any where variants are drawn.
        language=present_instructions(opened, definition)[: None if config.instructions == "random" else 1],
        skip_unlabelled=config.skip_unlabelled,
        episodes=episodes,
        max_frames_per_episode=config.max_frames_per_episode,
        horizon=config.horizon,
        window=config.proprio_steps,
        pictures=config.image_steps,
        whole_chunks=config.chunk_end == "truncate",
        seed=seed,
    )
    longest = int((frames.end[frames.valid] - frames.start[frames.valid]).max())
    if longest < config.horizon:
        raise errors.UserError(
            f"data.horizon={config.horizon} is longer than every episode of {definition.name} {split_text} (longest: "
            f"{longest} actions): lower data.horizon"
        )
    return split, frames


def present_instructions(opened: index.Index, definition: definitions.Definition) -> list[str]:
    """Instruction features of this copy of a data set: variants beside the first may be missing (early DROID)."""
    features = [f"steps/{name}" for name in definition.language]
    return [name for name in features if name == features[0] or name in opened.dataset.features]


def _normalisers(
    opened: index.Index,
    definition: definitions.Definition,
    config: data_config.DataConfig,
    frames: standardise.Standardised,
    seed: int,
) -> dict[str, normalise.Normaliser]:
    """Statistics of the training frames, kept beside the index (they need no image); of actions, of all targets."""
    split_text = config.statistics_split or config.split
    if split_text != config.split or config.held_out:
        _, frames = _select(opened, definition, config, split_text, False, seed)
    # Exactly these frames under exactly this recipe.
    key = [
        STATISTICS_FORMAT,
        opened.fingerprint,
        definition.name,
        definition.version,
        split_text,
        _digest(frames.valid),
    ]
    acting = frames.valid
    if config.chunk_end == "truncate":
        # No sample begins within the last steps of an episode, but their actions end the last whole chunks.
        reached = np.zeros(len(frames.episode), bool)
        for step in range(config.horizon):
            reached[frames.valid + step] = True
        acting = np.flatnonzero(reached)
        key.append(_digest(acting))
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = os.path.join(opened.directory, f"statistics-{definition.name}-{digest}.json")
    statistics = _load_statistics(path)
    if statistics is None:
        statistics = {
            "action": normalise.compute(frames.action, acting),
            "proprio": normalise.compute(frames.proprio, frames.valid),
        }
        _save_statistics(path, statistics, key)
    raw = () if config.normalise_gripper else definition.raw_action_dims
    out = {
        "action": normalise.Normaliser(statistics["action"], config.normalisation, raw),
        "proprio": normalise.Normaliser(statistics["proprio"], config.normalisation, definition.proprio_padding),
    }
    for name, normaliser in out.items():
        normalise.warn_constant(normaliser, f"{definition.name} {name}")
    return out


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()[:16]


def _load_statistics(path: str) -> dict[str, normalise.Statistics] | None:
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        statistics, digest = content["statistics"], content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.UserError(f"{path} is damaged ({error!r}): delete it, it is computed again") from error
    if _json_digest(statistics) != digest:
        raise errors.UserError(f"{path} was changed by hand or is damaged: delete it, it is computed again")
    return {
        name: normalise.Statistics(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        for name, fields in statistics.items()
    }


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _save_statistics(path: str, statistics: dict[str, normalise.Statistics], key: list[Any]) -> None:
    rows = json.loads(json.dumps({name: dataclasses.asdict(value) for name, value in statistics.items()}))
    content = {"key": key, "statistics": rows, "digest": _json_digest(rows)}
    try:
        files.write_whole(path, json.dumps(content, indent=1))
    except OSError as error:
        # They are recomputed in seconds: an index on a read-only disk stays usable.
        logging.warning("statistics are not kept in %s (%s); they are computed again next time", path, error.strerror)


def _sidecar(root: str, kind: str, opened: index.Index, split: index.SplitIndex, camera: str) -> sidecar.Sidecar | None:
    if not root:
        return None
    found = sidecar.open_sidecar(root, split.name)
    sidecar.check(found, kind=kind, fingerprint=opened.fingerprint, camera=camera)
    if found.metadata.frames != split.frames:
        raise errors.UserError(
            f"sidecar {found.directory} has {found.metadata.frames} frames, split {split.name} has {split.frames}"
        )
    sidecar_sums.check_at_start(found, split.episodes)
    return found
