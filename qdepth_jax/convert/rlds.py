"""Plans a converted data set: everything is decided here, and nothing is written yet (see `rlds_run`).

The index says which episodes lie where and which have an instruction, so everything is decided before anything is
written: which episodes are kept, how many shards there will be (TFDS puts their number into every file name; an input
shard of which nothing is kept gets no output shard), and about how many bytes it takes.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.convert import rlds_claim, rlds_features, rlds_shard
from qdepth_jax.data import index, quarantine, source, storage, write_rlds

FORMAT = 1
_SAMPLE_EPISODES = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make.

    Attributes:
      splits: "train", "train[:95%]", ...; () = all splits. Percentages count episodes, as in TFDS.
      episodes: numbers within the one chosen split, "0-9,12"; "" = all.
      keep_labelled: drop episodes without any instruction.
      language: instruction features; () = those of the data set's definition.
      depth, depth_tokens: sidecars, "ROOT" or "NAME=ROOT" (NAME: name of the feature below steps/observation).
      token_encoding: "none": int64 lists, what SkipDecoding loaders (octo, OpenVLA) expect; "bytes": two bytes per
        token, which can be read frame by frame.
      resize: (height, width) of all per-step images.
      jpeg_quality: of resized JPEG.
      version: of the output; "" = name of the output folder if that is a version, else the version of the input.
    """

    splits: tuple[str, ...] = ()
    episodes: str = ""
    keep_labelled: bool = False
    language: tuple[str, ...] = ()
    depth: tuple[str, ...] = ()
    depth_tokens: tuple[str, ...] = ()
    token_encoding: str = "none"
    resize: tuple[int, int] | None = None
    jpeg_quality: int = 95
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion, decided.

    Attributes:
      output: folder of the new data set version.
      digest: identity of (source content, options, sidecars).
      provenance: what metadata.json will say.
      features, info: new features.json; dataset_info.json without its splits.
      splits: names, in order.
      tasks: shards, in order of split and shard.
      dropped: split -> reason -> episodes; not_indexed: split -> reason -> records that the index could not read.
      warnings: what the index found odd.
      carried: other files of the source that go along (name -> path); left_out: those that do not.
      bytes_in: size of all kept records; bytes_out: estimate.
    """

    output: str
    digest: str
    provenance: dict[str, Any]
    features: dict[str, Any]
    info: dict[str, Any]
    splits: tuple[str, ...]
    tasks: tuple[rlds_shard.ShardTask, ...]
    dropped: dict[str, dict[str, int]]
    not_indexed: dict[str, dict[str, int]]
    warnings: tuple[str, ...]
    carried: dict[str, str]
    left_out: tuple[str, ...]
    bytes_in: int
    bytes_out: int

    @property
    def target(self) -> rlds_claim.Target:
        files = tuple(task.output for task in self.tasks)
        return rlds_claim.Target(self.output, self.provenance, self.digest, files, self.bytes_out)


def plan(directory: str, output: str, options: Options, index_dir: str = "") -> Plan:
    """Decides everything; converts a few episodes in memory to see that it works and how large the result will be.

    Raises:
      UserError: output inside the input, unknown split, a sidecar of other data, nothing left to convert, ...
      ValueError: a damaged record among those that were tried.
    """
    opened = index.open_index(directory, index_dir)
    index.say_warnings(opened)
    output = rlds_claim.place(opened.dataset.directory, output)
    kept, dropped = select(opened, options)
    changes = rlds_features.plan_changes(opened, tuple(kept), options)
    version = _version(output, options.version, opened.dataset.version)
    provenance = {
        "format": FORMAT,
        "source": source_identity(opened),
        "version": version,
        "episodes": episode_identity(kept),
        "resize": list(options.resize) if options.resize else None,
        "jpeg_quality": options.jpeg_quality if options.resize else None,
        "added": changes.provenance,
        "not_resized": list(changes.not_resized),
    }
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:32]
    tasks = _tasks(opened, output, digest, kept, changes)
    carried, left_out = _other_files(opened.dataset.directory)
    bytes_in = sum(int(task.rows["size"].sum()) for task in tasks)
    return Plan(
        output=output,
        digest=digest,
        provenance=provenance,
        features=changes.tree,
        info=_info(opened.dataset.directory, version, opened.dataset.version),
        splits=tuple(kept),
        tasks=tasks,
        dropped=dropped,
        not_indexed={name: not_indexed(opened.split(name)) for name in kept},
        warnings=opened.warnings,
        carried=carried,
        left_out=left_out,
        bytes_in=bytes_in,
        bytes_out=_estimate(tasks, bytes_in),
    )


def select(opened: index.Index, options: Options) -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
    """Split -> bool [E] of the episodes that are kept, and split -> reason -> number dropped for it.

    An episode of which frames were set aside goes as a whole: without them its time would have a gap that nobody sees.
    """
    kept, dropped = {}, {}
    for text in options.splits or tuple(opened.splits):
        try:
            name, part = source.parse_split(text, lambda name: len(opened.split(name).episodes))
        except errors.UserError as error:
            raise errors.UserError(str(error).replace("data.split=", "--split=")) from error
        if name in kept:
            raise errors.UserError(f"--split names {name!r} twice: give one range of each split")
        mask = np.zeros(len(opened.split(name).episodes), bool)
        mask[part] = True
        kept[name], dropped[name] = mask, {"outside of --split": int((~mask).sum())}
    if options.episodes:
        if len(kept) > 1:
            raise errors.UserError(f"--episodes counts within one split, but {', '.join(kept)} are chosen: use --split")
        name, mask = next(iter(kept.items()))
        chosen = parse_episodes(options.episodes, len(mask))
        dropped[name]["outside of --episodes"] = int((mask & ~chosen).sum())
        mask &= chosen
    for name, mask in kept.items():
        split = opened.split(name)
        for reason, frames in split.quarantined_by_reason.items():
            hit = np.zeros(len(mask), bool)
            hit[split.episode_of(frames)] = True
            if (mask & hit).any():
                dropped[name][f"quarantined: {reason}"] = int((mask & hit).sum())
            mask &= ~hit
    if options.keep_labelled:
        features = rlds_features.language(opened, options.language)
        for name, mask in kept.items():
            labelled = rlds_features.labelled(opened.split(name), features)
            dropped[name]["no instruction"] = int((mask & ~labelled).sum())
            mask &= labelled
    for name, mask in kept.items():
        if not mask.any():
            raise errors.UserError(f"no episode of split {name!r} is left ({dropped[name]}): leave it out with --split")
    return kept, dropped


def not_indexed(split: index.SplitIndex) -> dict[str, int]:
    """Reason -> entries of the quarantine that are no episodes of the index, so that nothing could keep them."""
    return quarantine.count(row for row in split.quarantine if row.episode is None)


def source_identity(opened: index.Index) -> dict[str, str]:
    """What a conversion was made from, for its provenance."""
    return {
        "name": opened.dataset.name,
        "version": opened.dataset.version,
        "fingerprint": opened.fingerprint,
        "quarantine": opened.quarantine_digest,
    }


def episode_identity(kept: dict[str, np.ndarray]) -> dict[str, dict[str, int | str]]:
    """Which episodes of each split were kept (`select`), for the provenance."""
    return {
        name: {
            "kept": int(mask.sum()),
            "of": len(mask),
            "digest": hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16],
        }
        for name, mask in kept.items()
    }


def parse_episodes(text: str, count: int) -> np.ndarray:
    """ "0-9,12" -> bool [count], both ends of a range included."""
    mask = np.zeros(count, bool)
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise errors.UserError(f'--episodes={text!r}: {part!r} is not understood, use "0-9,12"')
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low or high >= count:
            raise errors.UserError(f"--episodes={text!r}: {part.strip()!r} is not within the split's 0-{count - 1}")
        mask[low : high + 1] = True
    return mask


def _version(output: str, wanted: str, old: str) -> str:
    name = os.path.basename(output)
    version = wanted or (name if re.fullmatch(r"\d+\.\d+\.\d+", name) else old)
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise errors.UserError(f"version {version!r}: TFDS needs MAJOR.MINOR.PATCH, for instance --version=1.1.0")
    return version


def _tasks(opened, output: str, digest: str, kept: dict[str, np.ndarray], changes) -> tuple[rlds_shard.ShardTask, ...]:
    tasks = []
    for name, mask in kept.items():
        episodes = opened.split(name).episodes
        chosen = np.flatnonzero(mask)
        rows = np.zeros(len(chosen), rlds_shard.ROW)
        rows["episode"] = chosen
        for field in ("record", "offset", "size", "start", "length"):
            rows[field] = episodes[field][chosen]
        shards = np.unique(episodes["shard"][chosen])
        for number, shard in enumerate(shards.tolist()):
            file = write_rlds.shard_name(opened.dataset.name, name, number, len(shards))
            tasks.append(
                rlds_shard.ShardTask(
                    source=opened.split(name).shard_path(shard),
                    output=os.path.join(output, file),
                    done=rlds_claim.done_path(output, file),
                    digest=digest,
                    split=name,
                    rows=rows[episodes["shard"][chosen] == shard],
                    additions=changes.additions[name],
                    resize=changes.resize,
                    images=changes.images,
                )
            )
    return tuple(tasks)


def _info(directory: str, version: str, old: str) -> dict[str, Any]:
    """The source's dataset_info.json with the new version; what describes the old shards is left to `finish`."""
    info = json.loads(storage.read(storage.join(directory, "dataset_info.json")))
    notes = dict(info.get("releaseNotes", {}))
    notes[version] = f"Converted from version {old} (see metadata.json). {notes.get(version, '')}".rstrip()
    return {**info, "fileFormat": "tfrecord", "version": version, "releaseNotes": notes}


def _other_files(directory: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """(files that belong to the features, everything else beside shards and metadata)."""
    carried, left_out = {}, []
    for name in storage.names(directory):
        if name.endswith(".labels.txt"):  # the names of a ClassLabel; TFDS reads them beside features.json
            carried[name] = storage.join(directory, name)
        elif name not in ("features.json", "dataset_info.json", index.DEFAULT_FOLDER) and ".tfrecord-" not in name:
            left_out.append(name)
    return carried, tuple(left_out)


def _estimate(tasks: Sequence[rlds_shard.ShardTask], bytes_in: int) -> int:
    """Bytes of all output shards, extrapolated from a few episodes."""
    old = new = 0
    for at in np.linspace(0, len(tasks) - 1, _SAMPLE_EPISODES).astype(int):
        task = tasks[at]
        middle = len(task.rows) // 2
        for row, payload, _ in rlds_shard.records(task, task.rows[middle : middle + 1]):
            old, new = old + int(row["size"]), new + len(payload)
    return int(bytes_in * new / old)
