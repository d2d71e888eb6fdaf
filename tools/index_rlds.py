"""Builds or verifies the index of an RLDS data set, and the statistics of its training frames.

  python tools/index_rlds.py DATASET_DIR [--index_dir=DIR] [--verify | --rebuild]

DATASET_DIR holds features.json and dataset_info.json (or is the parent of the one version that does). Every record's
checksum is verified on a build; `--verify` reads the shards again and compares. No image is decoded. The last line of
stdout is JSON.
"""

import json
import sys
import time

from absl import app, flags

_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: DATASET_DIR/qdepth_index")
_VERIFY = flags.DEFINE_bool("verify", False, "read all shards again and compare with the index")
_REBUILD = flags.DEFINE_bool("rebuild", False, "replace the index that is there")
_STRICT = flags.DEFINE_bool("strict", False, "anything odd (stale shard lengths, unlisted features) is an error")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    try:
        if len(argv) != 2:
            raise errors.UserError(f"usage: index_rlds.py DATASET_DIR [--index_dir=DIR] (got {argv[1:]})")
        print(json.dumps(run(argv[1])))
    except (errors.UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(directory: str) -> dict:
    """Builds, verifies or just opens; returns the summary."""
    from qdepth_jax import errors, progress
    from qdepth_jax.data import data_config, definitions, index, source, spec

    dataset = spec.read_spec(directory)
    total = index.total_bytes(dataset)
    bar = progress.Progress(total, f"indexing {dataset.name}", unit="B")
    started = time.monotonic()
    work = {"bytes": 0}

    def on_shard(shard: str, size: int) -> None:
        work["bytes"] += size
        bar.update(size, shard)

    if _REBUILD.value:
        index.rebuild(dataset, _INDEX_DIR.value, on_shard)
    opened = index.open_index(directory, _INDEX_DIR.value, on_shard=on_shard)
    action = "built" if work["bytes"] else "opened"
    if _VERIFY.value and not work["bytes"]:
        found, _ = index.scan_identity(dataset, on_shard)
        if found != opened.fingerprint:
            raise errors.UserError(
                f"{opened.directory} has fingerprint {opened.fingerprint}, the data has {found}: the shards changed "
                "since they were indexed; restore them, or use --rebuild if the new data is what you want"
            )
        action = "verified"
    bar.close()
    for warning in opened.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if _STRICT.value and opened.warnings:
        raise errors.UserError(f"{len(opened.warnings)} warnings and --strict: {'; '.join(opened.warnings)}")
    splits = {
        name: {"episodes": len(split.episodes), "frames": split.frames, "declared": sum(dataset.splits[name].declared)}
        for name, split in opened.splits.items()
    }
    summary = {
        "episodes": sum(split["episodes"] for split in splits.values()),
        "frames": sum(split["frames"] for split in splits.values()),
        "bytes": opened.shard_bytes,
        "fingerprint": opened.fingerprint,
        "index": opened.directory,
        "action": action,
        "seconds": round(time.monotonic() - started, 3),
        "splits": splits,
        "left_out": opened.left_out,
        "warnings": list(opened.warnings),
        "statistics": None,
    }
    if dataset.name not in definitions.DEFINITIONS:
        print(f"no definition for {dataset.name!r}: no statistics (see definitions.py)", file=sys.stderr)
        return summary
    split = "train" if "train" in opened.splits else next(iter(opened.splits))
    entry = data_config.DatasetConfig(path=directory)
    config = data_config.DataConfig(datasets=(entry,), split=split, horizon=1, index_dir=_INDEX_DIR.value)
    item = source.open_source(entry, config)
    summary["statistics"] = {
        "split": split,
        "frames": len(item.frames.valid),
        "left_out": dict(item.frames.dropped),
        "action": {"q01": item.action.statistics.q01, "q99": item.action.statistics.q99},
        "proprio": {"q01": item.proprio.statistics.q01, "q99": item.proprio.statistics.q99},
    }
    return summary


if __name__ == "__main__":
    app.run(main)
