"""RLDS -> LeRobot v3: encoded images go into parquet as they are, numbers as stored, the instruction becomes the task.

No video is made: LeRobot's dtype "image" holds the JPEG and PNG bytes themselves, so nothing is encoded a second time
(and reading needs no seek in a video). Losses, all named in the result: features of no fixed shape per step, images
outside of the steps, further instruction features beyond the first that has text. Depth stays 16-bit PNG, marked as
lerobot 0.6 marks it ("is_depth_map", in "mm" where it is known to be millimetres); lerobot 0.4 reads values above 32767
as negative. Views that hold blue before red are refused: LeRobot has no place that says so.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.convert import lerobot_read, lerobot_write, rlds, rlds_claim, rlds_features, rlds_shard
from qdepth_jax.data import definitions, example, frame_reader, index, shard_scan, spec

FORMAT = 1
FILE_BYTES = 100 << 20  # LeRobot's own size of a data file
FILES_PER_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class ExportTask:
    """Consecutive episodes that become one data file; see `rlds_shard.ShardTask`.

    Attributes:
      sources: path of the shard of each row; rows: ROW [E].
      first_episode, first_frame: numbers in the new data set.
      features: LeRobot key -> feature of the source.
      language: instruction features, first with text wins; tasks: text -> task_index.
      episode_features: features outside of the steps.
    """

    output: str
    done: str
    digest: str
    sources: tuple[str, ...]
    rows: np.ndarray
    first_episode: int
    first_frame: int
    fps: float
    features: dict[str, spec.FeatureSpec]
    language: tuple[spec.FeatureSpec, ...]
    tasks: dict[str, int]
    episode_features: tuple[spec.FeatureSpec, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """An export, decided; `left_out`: RLDS feature -> why; `dropped`, `not_indexed`, `warnings`: as in `rlds.Plan`;
    `millimetres`: LeRobot keys of metric depth."""

    target: rlds_claim.Target
    tasks: tuple[ExportTask, ...]
    fps: float
    left_out: dict[str, str]
    dropped: dict[str, int]
    not_indexed: dict[str, int]
    warnings: tuple[str, ...]
    robot_type: str
    millimetres: tuple[str, ...]


def plan(
    directory: str,
    output: str,
    *,
    fps: float = 0.0,
    split: str = "train",
    language: tuple[str, ...] = (),
    leave_out: tuple[str, ...] = (),
    index_dir: str = "",
    file_bytes: int = FILE_BYTES,
) -> Plan:
    """Decides everything from the index; writes nothing.

    Args:
      directory, output: RLDS data set, new LeRobot folder.
      fps: control rate; 0 = that of the data set's definition. LeRobot times every frame as frame_index / fps.
      split: one split or range: LeRobot trains on all that is in a data set.
      language: instruction features; () = the definition's.
      leave_out: RLDS features, below steps/ or complete.

    Raises:
      UserError: no rate, unknown names, names that clash, output inside the input.
    """
    opened = index.open_index(directory, index_dir)
    index.say_warnings(opened)
    dataset = opened.dataset
    output = rlds_claim.place(dataset.directory, output)
    if not fps and dataset.name in definitions.DEFINITIONS:
        fps = definitions.DEFINITIONS[dataset.name].rate_hz
    if fps <= 0:
        raise errors.UserError(f"the control rate of {dataset.name!r} is not known: give --fps")
    language = rlds_features.language(opened, language)
    arrays = [
        feature for feature in language if dataset.feature(feature).kind == "text" and dataset.feature(feature).shape
    ]
    if arrays or not language:
        raise errors.UserError(
            f"LeRobot keeps one task per frame, but {arrays or 'no feature'} of {dataset.name!r} is the instruction: "
            "name a single text with --language"
        )
    kept, dropped = rlds.select(opened, rlds.Options(splits=(split,)))
    name, mask = next(iter(kept.items()))
    features, episode_features, left_out = _features(dataset, language, leave_out)
    table = opened.split(name)
    chosen = np.flatnonzero(mask)
    rows = np.zeros(len(chosen), rlds_shard.ROW)
    rows["episode"] = chosen
    for field in ("record", "offset", "size", "start", "length"):
        rows[field] = table.episodes[field][chosen]
    tasks = _task_texts(table, language, chosen)
    provenance = {
        "format": FORMAT,
        "source": rlds.source_identity(opened),
        "split": split,
        "episodes": rlds.episode_identity(kept),
        "fps": fps,
        "names": {key: {"name": f.name.removeprefix("steps/"), "shape": list(f.shape)} for key, f in features.items()},
        "episode_features": {
            f.name.partition("/")[2]: {"dtype": f.dtype, "shape": [None if n < 0 else n for n in f.shape]}
            for f in episode_features
        },
        "language": language[0].removeprefix("steps/"),
        "left_out": left_out,
        "file_bytes": file_bytes,
    }
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:32]
    parts = []
    for number, part in enumerate(_groups(rows["size"], file_bytes)):
        chunk, file = divmod(number, FILES_PER_CHUNK)
        path = os.path.join(output, lerobot_write.DATA_PATH.format(chunk_index=chunk, file_index=file))
        parts.append(
            ExportTask(
                output=path,
                done=os.path.join(output, rlds_claim.STATE, "done", f"{number:06d}.json"),
                digest=digest,
                sources=tuple(table.shard_path(shard) for shard in table.episodes["shard"][chosen[part]].tolist()),
                rows=rows[part],
                first_episode=part.start,
                first_frame=int(rows["length"][: part.start].sum()),
                fps=fps,
                features=features,
                language=tuple(dataset.feature(feature) for feature in language),
                tasks=tasks,
                episode_features=tuple(episode_features),
            )
        )
    files = tuple(part.output for part in parts)
    size = int(rows["size"].sum())
    target = rlds_claim.Target(
        output, provenance, digest, files, size, last="meta/info.json", notes="meta/qdepth_convert.json"
    )
    return Plan(
        target=target,
        tasks=tuple(parts),
        fps=fps,
        left_out=left_out,
        dropped=dropped[name],
        not_indexed=rlds.not_indexed(table),
        warnings=opened.warnings,
        robot_type=dataset.name,
        millimetres=_millimetres(dataset, features),
    )


def convert_file(task: ExportTask, on_bytes: Callable[[int], None] | None = None) -> dict:
    """Writes one data file unless it is there; returns its done file (episode rows and moments for the statistics)."""
    result = rlds_claim.make_file(task, lambda: _write_file(task, on_bytes))
    if result["kept"] and on_bytes:
        on_bytes(int(task.rows["size"].sum()))
    return result


def _write_file(task: ExportTask, on_bytes: Callable[[int], None] | None) -> dict:
    files, episodes, counts = frame_reader.ShardFiles(), [], {"frames": 0, "images": 0}
    moments: dict[str, lerobot_write.Moments] = {}
    try:
        with lerobot_write.DataFile(task.output, task.features) as writer:
            frame = task.first_frame
            for number, (row, source) in enumerate(zip(task.rows, task.sources)):
                try:
                    payload = rlds_shard.read_record(files, source, int(row["offset"]), int(row["size"]))
                    columns, texts, metadata = _episode(task, payload, int(row["length"]))
                    lerobot_write.add_moments(moments, task.features, columns)
                except errors.UserError:
                    raise
                except ValueError as error:
                    raise ValueError(f"{source}: record {row['record']} (episode {row['episode']}): {error}") from error
                length, episode = int(row["length"]), task.first_episode + number
                writer.write(columns, episode, frame, task.fps, [task.tasks[text] for text in texts])
                episodes.append({"length": length, "tasks": list(dict.fromkeys(texts)), "metadata": metadata})
                frame += length
                counts["frames"] += length
                counts["images"] += sum(length for feature in task.features.values() if feature.kind == "image")
                if on_bytes:
                    on_bytes(int(row["size"]))
    finally:
        files.close()
    return {
        "shard": os.path.basename(task.done).removesuffix(".json"),
        "episodes": episodes,
        "counts": counts,
        "moments": {key: value.as_json() for key, value in moments.items()},
    }


def finish(plan: Plan, results: list[dict]) -> dict[str, Any]:
    """Writes meta/, info.json last; returns the counts."""
    for task, result in zip(plan.tasks, results, strict=True):
        there = os.path.getsize(task.output) if os.path.exists(task.output) else None
        if (result["digest"], result["file_bytes"]) != (plan.target.digest, there):
            raise ValueError(f"{task.output} is not finished ({there} bytes on disk): run again")
    counts = {
        "episodes": sum(len(result["episodes"]) for result in results),
        "files": len(results),
        "frames": sum(result["counts"]["frames"] for result in results),
        "images_untouched": sum(result["counts"]["images"] for result in results),
        "file_bytes": sum(result["file_bytes"] for result in results),
        "tasks": len(plan.tasks[0].tasks),
        "dropped": plan.dropped,
        "not_indexed": plan.not_indexed,
        "source_warnings": list(plan.warnings),
    }
    try:
        lerobot_write.write_tasks(plan.target.folder, plan.tasks[0].tasks)
        lerobot_write.write_episodes(plan.target.folder, [result["episodes"] for result in results], FILES_PER_CHUNK)
        lerobot_write.write_statistics(plan.target.folder, [result["moments"] for result in results])
        rlds_claim.write_notes(plan.target, counts)
        features, robot = plan.tasks[0].features, plan.robot_type
        lerobot_write.write_info(
            plan.target.folder, features, plan.millimetres, plan.fps, robot, counts, FILES_PER_CHUNK
        )
    except OSError as error:
        raise rlds_claim.cannot_write(plan.target.folder, error) from error
    rlds_claim.close(plan.target)
    return counts


# ---- one episode ----


def _episode(task: ExportTask, payload: bytes, length: int) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """(LeRobot key -> array [T, ...], list of bytes or list of str; task text per step; episode metadata)."""
    scanned = example.scan(payload)

    def pieces(name: str) -> list[bytes]:
        return [payload[offset : offset + size] for offset, size in scanned[name].value.tolist()]

    columns = {}
    for key, feature in task.features.items():
        if feature.name not in scanned:
            raise ValueError(f"feature {feature.name!r} is missing")
        if feature.kind == "image":
            columns[key] = pieces(feature.name)
        elif feature.kind == "text":
            columns[key] = [piece.decode(errors="backslashreplace") for piece in pieces(feature.name)]
        elif feature.encoding in ("zlib", "bytes"):
            columns[key] = np.stack([shard_scan.decode_tensor(feature, piece) for piece in pieces(feature.name)])
        else:
            values = scanned[feature.name].value
            columns[key] = values.reshape(-1, *feature.shape).astype(shard_scan.column_dtype(feature))
        if len(columns[key]) != length:
            raise ValueError(f"feature {feature.name!r} has {len(columns[key])} rows, {length} steps")
    texts = [""] * length
    for feature in reversed(task.language):
        if feature.kind == "text":
            encoded = pieces(feature.name)
        else:
            numbers = scanned[feature.name].value.reshape(-1, *feature.shape)
            encoded = [shard_scan.code_units(feature, row) for row in numbers]
        found = [text.decode(errors="backslashreplace") for text in encoded]
        found = found * length if len(found) == 1 and not feature.per_step else found
        texts = [new if new.strip() else old for new, old in zip(found, texts, strict=True)]
    metadata = {}
    for feature in task.episode_features:
        name = feature.name.partition("/")[2]
        if scanned[feature.name].kind == "bytes":
            metadata[name] = pieces(feature.name)[0].decode(errors="backslashreplace")
        else:
            values = scanned[feature.name].value
            values = values.astype(shard_scan.column_dtype(feature)).tolist()
            metadata[name] = values if feature.shape else values[0]
    return columns, texts, metadata


# ---- parts of the plan ----


def _features(
    dataset: spec.DatasetSpec, language: tuple[str, ...], leave_out: tuple[str, ...]
) -> tuple[dict[str, spec.FeatureSpec], list[spec.FeatureSpec], dict[str, str]]:
    """(LeRobot key -> step feature, episode features, left out -> why)."""
    unwanted = {name if name in dataset.features else f"steps/{name}" for name in leave_out}
    unknown = sorted(name for name in unwanted if name not in dataset.features)
    if unknown:
        raise errors.UserError(f"--leave_out: no feature {unknown}; there is {', '.join(dataset.features)}")
    features, episode_features, left_out = {}, [], {}
    for feature in dataset.features.values():
        if feature.name in unwanted:
            left_out[feature.name] = "--leave_out"
        elif feature.name in language:
            if feature.name != language[0]:
                left_out[feature.name] = "a further instruction: the task of a step is the first that has text"
        elif not feature.per_step:
            plain = feature.kind == "text" or (feature.kind in ("tensor", "unsupported") and len(feature.shape) <= 1)
            if plain and feature.encoding in ("", "none") and feature.dtype not in ("", "bfloat16"):
                episode_features.append(feature)
            else:
                left_out[feature.name] = f"{feature.kind} {feature.dtype}{list(feature.shape)} outside of the steps"
        elif feature.kind == "unsupported":
            left_out[feature.name] = feature.reason
        else:
            key = lerobot_key(feature)
            if key in features:
                raise errors.UserError(
                    f"{feature.name!r} and {features[key].name!r} would both be {key!r}: --leave_out one"
                )
            features[key] = feature
    row = definitions.DEFINITIONS.get(dataset.name)
    swapped = [row.views[view] for view in definitions.swapped_channels(row, dataset)] if row else []
    if swapped := [name for name in swapped if f"steps/{name}" not in left_out]:
        raise errors.UserError(
            f"{', '.join(swapped)} of {dataset.name} hold blue before red, and LeRobot has no place that says so: "
            f"--leave_out={','.join(swapped)}, or export a copy whose channels were repaired (rlds_dataset_mod)"
        )
    return features, episode_features, left_out


def _millimetres(dataset: spec.DatasetSpec, features: dict[str, spec.FeatureSpec]) -> tuple[str, ...]:
    """Keys of 16-bit depth known to be in millimetres: by the definition, or since tools/convert_rlds.py added it."""
    row = definitions.DEFINITIONS.get(dataset.name)
    metres = dict(definitions.depth_of(row, dataset, view) for view in row.views) if row else {}

    def added(name: str) -> bool:
        leaf = name.rpartition("/")[2]
        return f"episode_metadata/{leaf}_kind" in dataset.features and not leaf.startswith("relative_")

    return tuple(key for key, f in features.items() if metres.get(f.name) == 0.001 or added(f.name))


def lerobot_key(feature: spec.FeatureSpec) -> str:
    """ "steps/observation/image" -> "observation.images.image"; other slashes become dots."""
    name = feature.name.removeprefix("steps/")
    if feature.kind == "image" and name.startswith("observation/"):
        return "observation.images." + name.removeprefix("observation/").replace("/", ".")
    key = name.replace("/", ".")
    return f"rlds.{key}" if key in (*lerobot_read.DEFAULT_FEATURES, "task") else key


def _task_texts(split: index.SplitIndex, language: tuple[str, ...], episodes: np.ndarray) -> dict[str, int]:
    """Text -> task_index, in the order in which the table of the split first names them."""
    frames = split.episodes[episodes]
    texts: dict[str, int] = {}
    for name in language:
        ids, strings = split.texts(name)
        per_step = split.dataset.feature(name).per_step
        spans = [ids[row["start"] : row["start"] + row["length"]] for row in frames] if per_step else [ids[episodes]]
        for number in dict.fromkeys(np.concatenate(spans).tolist()):
            texts.setdefault(strings[number], len(texts))
    if any(not text.strip() for text in texts):
        texts.setdefault("", len(texts))
    return texts


def _groups(sizes: np.ndarray, limit: int) -> list[slice]:
    """Consecutive episodes of at most `limit` bytes (a larger episode stands alone)."""
    groups, first, total = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        if number > first and total + size > limit:
            groups.append(slice(first, number))
            first, total = number, 0
        total += size
    return [*groups, slice(first, len(sizes))]
