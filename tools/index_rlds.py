"""Builds or verifies the index of an RLDS data set, and the statistics of its training frames.

  python tools/index_rlds.py DATASET_DIR [--index_dir=DIR] [--workers=N] [--quarantine [--check_images]]
                             [--verify | --rebuild]

DATASET_DIR holds features.json and dataset_info.json (or is the parent of the one version that does), on a disk or
gs://. Every record's checksum is verified on a build; a build that was stopped continues. `--verify` reads the shards
again and compares. The first damaged record, record that does not fit features.json, episode without steps or action
that is not finite is an error; with `--quarantine` they are set aside, listed in quarantine.json of the index and never
sampled. An index that a training run built is completed: actions are checked in its columns, without reading shards.
No image is decoded, except by `--check_images`, which reads all shards. The last line of stdout is JSON.
"""

import json
import logging
import sys
import time

from absl import flags

_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes (local); default: DATASET_DIR/qdepth_index")
_WORKERS = flags.DEFINE_integer("workers", 0, "processes; 0 = one per core, one for small data", lower_bound=0)
_VERIFY = flags.DEFINE_bool("verify", False, "read all shards again and compare with the index")
_REBUILD = flags.DEFINE_bool("rebuild", False, "replace the index that is there")
_QUARANTINE = flags.DEFINE_bool("quarantine", False, "set damaged parts aside instead of stopping at the first")
_CHECK_IMAGES = flags.DEFINE_bool("check_images", False, "decode every image to find damaged ones (slow)")
_STRICT = flags.DEFINE_bool("strict", False, "anything odd (stale shard lengths, unlisted features) is an error")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if len(argv) != 2:
        raise errors.UserError(f"usage: index_rlds.py DATASET_DIR [--index_dir=DIR] (got {argv[1:]})")
    print(json.dumps(run(argv[1])))
    return 0


def run(directory: str) -> dict:
    """Builds, verifies or just opens; returns the summary."""
    from qdepth_jax import errors, progress
    from qdepth_jax.data import definitions, finite_check, index, quarantine, shard_scan, spec

    dataset = spec.read_spec(directory)
    definition = definitions.DEFINITIONS.get(dataset.name)
    checks = shard_scan.Checks(_QUARANTINE.value, _CHECK_IMAGES.value, _finite(dataset, definition))
    bar = progress.Progress(index.total_bytes(dataset), f"indexing {dataset.name}", unit="B")
    started = time.monotonic()
    work = {"bytes": 0}

    def on_shard(shard: str, size: int) -> None:
        work["bytes"] += size
        bar.update(size, shard)

    def build_anew() -> None:
        index.rebuild(dataset, _INDEX_DIR.value, on_shard, _WORKERS.value, checks)

    if _REBUILD.value:
        build_anew()
    opened = index.open_index(directory, _INDEX_DIR.value, on_shard=on_shard, workers=_WORKERS.value, checks=checks)
    action = "built" if work["bytes"] else "opened"
    if checks.images and not opened.checks.images:
        logging.info("the index that is there was built without --check_images: building it again")
        build_anew()
        opened, action = index.open_index(directory, _INDEX_DIR.value), "built"
    elif missing := [name for name in checks.finite if name not in opened.checks.finite]:
        # Built without this check, by a training run for instance: its columns hold what the shards do.
        finite_check.add(opened, missing, checks.tolerate)
        opened = index.open_index(directory, _INDEX_DIR.value)
        action = "checked" if action == "opened" else action
    if _VERIFY.value and action in ("opened", "checked"):
        index.verify(opened, on_shard, _WORKERS.value)
        action = "verified"
    bar.close()
    for warning in opened.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if _STRICT.value and opened.warnings:
        raise errors.UserError(f"{len(opened.warnings)} warnings and --strict: {'; '.join(opened.warnings)}")
    splits = {
        name: {
            "episodes": len(split.episodes),
            "frames": split.frames,
            "declared": sum(dataset.splits[name].declared),
            "quarantine": quarantine.count(split.quarantine),
            "quarantined_frames": len(split.quarantined),
        }
        for name, split in opened.splits.items()
    }
    return {
        "episodes": sum(split["episodes"] for split in splits.values()),
        "frames": sum(split["frames"] for split in splits.values()),
        "bytes": opened.shard_bytes,
        "fingerprint": opened.fingerprint,
        "quarantine": {
            "digest": opened.quarantine_digest,
            "rows": sum(len(s.quarantine) for s in opened.splits.values()),
        },
        "index": opened.directory,
        "action": action,
        "seconds": round(time.monotonic() - started, 3),
        "splits": splits,
        "left_out": opened.left_out,
        "warnings": list(opened.warnings),
        "statistics": _statistics(directory, opened, definition),
    }


def _finite(dataset, definition) -> tuple[str, ...]:
    """The float columns that the recipes of the data set read; without a definition, its actions and states."""
    import numpy as np

    from qdepth_jax.data import shard_scan, standardise

    columns = {
        name: feature
        for name, feature in dataset.features.items()
        if feature.per_step and shard_scan.storage(feature) == "column" and np.dtype(feature.dtype).kind == "f"
    }
    if definition is None:
        return tuple(sorted(name for name in columns if name.startswith(("steps/action", "steps/observation/"))))
    read = set()

    def values(name: str) -> np.ndarray:
        feature = dataset.feature(name)
        read.add(name)
        return np.zeros((1, *feature.shape), shard_scan.column_dtype(feature))

    # One episode of one frame, whose columns note that they were read.
    one = standardise.Columns(
        read=lambda name: values(f"steps/{name}"),
        lengths=np.ones(1, np.int64),
        text=lambda name: (np.zeros(1, np.int32), [""]),
        episode_read=values,
        episode_text=lambda name: (np.zeros(1, np.int32), [""]),
    )
    definition.action(one)
    definition.proprio(one)
    return tuple(sorted(read & set(columns)))


def _statistics(directory: str, opened, definition) -> dict | None:
    from qdepth_jax.data import data_config, source

    if definition is None:
        print(f"no definition for {opened.dataset.name!r}: no statistics (see definitions.py)", file=sys.stderr)
        return None
    split = "train" if "train" in opened.splits else next(iter(opened.splits))
    entry = data_config.DatasetConfig(path=directory)
    config = data_config.DataConfig(datasets=(entry,), split=split, horizon=1, index_dir=_INDEX_DIR.value)
    item = source.open_source(entry, config)
    return {
        "split": split,
        "frames": len(item.frames.valid),
        "left_out": dict(item.frames.dropped),
        "action": {"q01": item.action.statistics.q01, "q99": item.action.statistics.q99},
        "proprio": {"q01": item.proprio.statistics.q01, "q99": item.proprio.statistics.q99},
    }


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
