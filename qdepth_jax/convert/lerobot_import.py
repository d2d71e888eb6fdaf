"""LeRobot v3 -> RLDS: features renamed, task texts per step, images as they are, video frames decoded.

Losses, all counted: video frames become JPEG (a second lossy step; `images="png"` keeps them as decoded) or PNG;
float64 becomes float32 in TFDS's float lists; timestamps that are frame_index / fps are left out.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import simplejpeg

from qdepth_jax import errors
from qdepth_jax.convert import lerobot_read, rlds_claim, rlds_record
from qdepth_jax.data import frame_reader, write_rlds

FORMAT = 1
NOTES = "meta/qdepth_convert.json"  # written by our export: the original names and shapes
_SCALARS = {"float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool"}
_EPISODE = "episode_metadata/"


@dataclasses.dataclass(frozen=True)
class Column:
    """One LeRobot feature and what becomes of it: `name` below steps/, `feature` in RLDS; `kind`: number, text, ..."""

    key: str
    name: str
    kind: str  # "number", "text", "image", "depth", "video"
    feature: write_rlds.Feature


@dataclasses.dataclass(frozen=True)
class ImportTask:
    """Consecutive episodes that become one shard; see `rlds_shard.ShardTask`."""

    root: str
    output: str
    done: str
    digest: str
    split: str
    episodes: tuple[int, ...]
    columns: tuple[Column, ...]
    extra: tuple[tuple[str, write_rlds.Feature], ...]
    tree: dict[str, Any]
    language: str
    images: str
    jpeg_quality: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """An import, decided; `left_out`: LeRobot feature -> why."""

    target: rlds_claim.Target
    name: str
    version: str
    tree: dict[str, Any]
    splits: tuple[str, ...]
    tasks: tuple[ImportTask, ...]
    left_out: dict[str, str]
    description: str


def plan(
    root: str,
    output: str,
    name: str,
    *,
    version: str = "1.0.0",
    language: str = "language_instruction",
    leave_out: tuple[str, ...] = (),
    images: str = "jpeg",
    jpeg_quality: int = 95,
    episodes_per_shard: int = 50,
) -> Plan:
    """Reads the metadata and decides names, shards and splits; writes nothing.

    Args:
      root, output: LeRobot folder, new RLDS version folder.
      name: of the RLDS data set (a definition of that name is what the loader looks for).
      language: where the task text goes, below steps/.
      leave_out: LeRobot features that are not imported.
      images: "jpeg" or "png": how decoded video frames are stored.

    Raises:
      UserError: not a v3 data set, names that clash, unknown features in `leave_out`.
    """
    dataset = lerobot_read.open_lerobot(root)
    output = rlds_claim.place(dataset.root, output)
    if images not in ("jpeg", "png") or episodes_per_shard < 1 or not name.isidentifier():
        raise errors.UserError(
            f"--images={images} (jpeg, png), --episodes_per_shard={episodes_per_shard}, --name={name!r}"
        )
    unknown = sorted(set(leave_out) - set(dataset.features))
    if unknown:
        raise errors.UserError(f"--leave_out: no feature {unknown}; there is {', '.join(dataset.features)}")
    before = rlds_claim.read_notes(dataset.root, NOTES) or {}
    columns, left_out = _columns(dataset, leave_out, before.get("names", {}), images)
    if not _regular(dataset):
        columns.append(Column("timestamp", "observation/timestamp", "number", write_rlds.Tensor()))
    language = before.get("language", language) if language == "language_instruction" else language
    extra = _episode_features(dataset, before.get("episode_features", {}), left_out)
    tree = _tree(columns, extra, language)
    splits = _splits(dataset)
    identity = [
        dataset.info,
        [list(map(str, row.values())) for row in dataset.episodes],
        dataset.tasks,
        _sizes(dataset),
    ]
    provenance = {
        "format": FORMAT,
        "source": {"kind": "LeRobot " + dataset.info["codebase_version"], "digest": _digest(identity)},
        "name": name,
        "version": version,
        "fps": dataset.info["fps"],
        "robot_type": dataset.info.get("robot_type"),
        "features": {column.key: f"steps/{column.name}" for column in columns},
        "left_out": left_out,
        "float64_stored_as_float32": [c.key for c in columns if getattr(c.feature, "dtype", "") == "float64"],
        "language": language,
        "images": images,
        "jpeg_quality": jpeg_quality,
        "episodes_per_shard": episodes_per_shard,
    }
    digest = _digest(provenance)
    tasks = []
    for split, episodes in splits.items():
        parts = [episodes[at : at + episodes_per_shard] for at in range(0, len(episodes), episodes_per_shard)]
        for number, part in enumerate(parts):
            file = os.path.join(output, write_rlds.shard_name(name, split, number, len(parts)))
            done = rlds_claim.done_path(output, file)
            more = (tuple(columns), tuple(extra.items()), tree, language, images, jpeg_quality)
            tasks.append(ImportTask(dataset.root, file, done, digest, split, tuple(part), *more))
    size = sum(size for _, size in _sizes(dataset))
    target = rlds_claim.Target(output, provenance, digest, tuple(task.output for task in tasks), size)
    description = f"Imported from a LeRobot {dataset.info['codebase_version']} data set, {dataset.info['fps']} Hz."
    return Plan(target, name, version, tree, tuple(splits), tuple(tasks), left_out, description)


def convert_shard(task: ImportTask, on_episode: Callable[[int], None] | None = None) -> dict:
    """Writes one shard unless it is there; `on_episode` is called with 1 per episode. Returns its done file."""
    counts = {"frames": 0, "images_untouched": 0, "depth_reencoded": 0, "null_texts": 0}
    counts["video_frames_as_" + task.images] = 0

    def payloads() -> Iterator[bytes]:
        for payload in _episodes(task, counts):
            yield payload
            if on_episode:
                on_episode(1)

    def write() -> dict:
        episodes, size = write_rlds.write_shard(task.output, payloads())
        return {"split": task.split, "episodes": episodes, "bytes_out": size, "counts": counts}

    result = rlds_claim.make_file(task, write)
    if result["kept"] and on_episode:
        on_episode(len(task.episodes))
    return result


def finish(plan: Plan, results: list[dict]) -> dict[str, Any]:
    """Writes the metadata; returns the counts."""
    ordered = rlds_claim.in_order(plan.target, results)
    splits = rlds_claim.splits(plan.splits, ordered)
    counts = {"episodes": sum(sum(split.shard_lengths) for split in splits), "shards": len(ordered)}
    for result in ordered:
        for key, value in result["counts"].items():
            counts[key] = counts.get(key, 0) + value
    try:
        rlds_claim.write_notes(plan.target, counts)
        write_rlds.write_metadata(plan.target.folder, plan.name, plan.version, plan.tree, splits, plan.description)
    except OSError as error:
        raise rlds_claim.cannot_write(plan.target.folder, error) from error
    rlds_claim.close(plan.target)
    return counts


# ---- one episode ----


def _episodes(task: ImportTask, counts: dict[str, int]) -> Iterator[bytes]:
    dataset = lerobot_read.open_lerobot(task.root)
    names = [column.key for column in task.columns if column.kind != "video"]
    names = list(dict.fromkeys([*names, "timestamp", "frame_index", "episode_index", "task_index"]))
    for episode, table in lerobot_read.episode_tables(dataset, task.episodes, names):
        length = table.num_rows
        steps: dict[str, Any] = {}
        for column in task.columns:
            try:
                steps[column.name] = _values(task, dataset, column, episode, table, counts)
            except ValueError as error:
                raise ValueError(f"{dataset.root}: episode {episode}, feature {column.key!r}: {error}") from error
        chosen = np.asarray(table.column("task_index")).tolist()
        if min(chosen) < 0 or max(chosen) >= len(dataset.tasks):
            raise ValueError(
                f"{dataset.root}: episode {episode} has task_index {max(chosen)}, {len(dataset.tasks)} tasks"
            )
        steps[task.language] = [dataset.tasks[number] for number in chosen]
        steps.setdefault("is_first", np.arange(length) == 0)
        steps.setdefault("is_last", np.arange(length) == length - 1)
        metadata = {"episode_index": np.int64(episode)}
        for name, feature in task.extra:
            value = dataset.episodes[episode][_EPISODE + name]
            metadata[name] = value if isinstance(feature, write_rlds.Text) else np.array(value, feature.dtype)
        counts["frames"] += length
        yield write_rlds.encode_episode(task.tree, steps, metadata)


def _values(task: ImportTask, dataset, column: Column, episode: int, table, counts: dict[str, int]) -> Any:
    if column.kind == "video":
        timestamps = np.asarray(table.column("timestamp"))
        frames = lerobot_read.video_frames(dataset, column.key, episode, timestamps)
        counts["video_frames_as_" + task.images] += len(timestamps)
        if task.images == "png":
            return [rlds_record.png(frame) for frame in frames]
        return [
            simplejpeg.encode_jpeg(np.ascontiguousarray(frame), task.jpeg_quality, "RGB", "444") for frame in frames
        ]
    cells = table.column(column.key)
    if column.kind == "number":
        return lerobot_read.numbers(cells, column.feature.dtype, column.feature.shape)
    if column.kind == "text":
        texts = cells.to_pylist()
        counts["null_texts"] += texts.count(None)
        return ["" if text is None else str(text) for text in texts]
    encoded = lerobot_read.images(dataset, cells)
    if column.kind == "depth":
        return [_depth_png(data, counts) for data in encoded]
    wrong = [data[:4] for data in encoded if _encoding(data) != column.feature.encoding]
    if wrong:
        raise ValueError(f"{len(wrong)} images are no {column.feature.encoding} (they begin with {wrong[0]!r})")
    counts["images_untouched"] += len(encoded)
    return encoded


def _depth_png(data: bytes, counts: dict[str, int]) -> bytes:
    if _encoding(data) == "png":
        counts["images_untouched"] += 1
        return data
    image = np.asarray(frame_reader.load_image(data))  # a TIFF, as lerobot records depth
    if image.dtype != np.uint16:
        raise ValueError(f"a depth image of {image.dtype}; only uint16 can be kept without loss: use --leave_out")
    counts["depth_reencoded"] += 1
    return rlds_record.png(image)


def _encoding(data: bytes) -> str:
    return "jpeg" if data[:2] == b"\xff\xd8" else "png" if data[:4] == b"\x89PNG" else "other"


# ---- names, shapes, splits ----


def _columns(
    dataset: lerobot_read.LeRobot, leave_out: tuple[str, ...], original: dict[str, Any], images: str
) -> tuple[list[Column], dict[str, str]]:
    columns, left_out = [], {}
    for key, feature in dataset.features.items():
        if key in lerobot_read.DEFAULT_FEATURES:
            continue
        dtype, shape = feature["dtype"], tuple(feature["shape"])
        name = original[key]["name"] if key in original else rlds_name(key, dtype)
        info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
        depth = bool(info.get("is_depth_map") or info.get("video.is_depth_map"))
        if key in leave_out:
            left_out[key] = "--leave_out"
        elif dtype == "video" and depth:
            left_out[key] = "a depth video is quantised to the range of its encoder: it is no depth image"
        elif dtype in ("image", "video"):
            height, width, channels = _image_shape(feature)
            if depth:
                columns.append(Column(key, name, "depth", write_rlds.Image((height, width, 1), "png", "uint16")))
                continue
            encoding = images if dtype == "video" else _first_encoding(dataset, key)
            columns.append(Column(key, name, dtype, write_rlds.Image((height, width, channels), encoding)))
        elif dtype == "string":
            columns.append(Column(key, name, "text", write_rlds.Text()))
        elif dtype in _SCALARS:
            shape = tuple(original[key]["shape"]) if key in original else shape
            columns.append(Column(key, name, "number", write_rlds.Tensor(shape, dtype)))
        else:
            left_out[key] = f"dtype {dtype}"
    return columns, left_out


def rlds_name(key: str, dtype: str) -> str:
    """ "observation.images.top" -> "observation/top"; other dots become slashes."""
    if dtype in ("image", "video") and key.startswith("observation.images."):
        return "observation/" + key.removeprefix("observation.images.").replace(".", "_")
    return key.replace(".", "/")


def _image_shape(feature: dict[str, Any]) -> tuple[int, int, int]:
    shape, names = list(feature["shape"]), feature.get("names")
    first = str(names[0]).startswith("channel") if names else len(shape) == 3 and shape[0] in (1, 3, 4)
    return (shape[1], shape[2], shape[0]) if first else (shape[0], shape[1], shape[2] if len(shape) > 2 else 1)


def _first_encoding(dataset: lerobot_read.LeRobot, key: str) -> str:
    _, table = next(lerobot_read.episode_tables(dataset, [0], [key, "episode_index", "frame_index"]))
    encoding = _encoding(lerobot_read.images(dataset, table.column(key).slice(0, 1))[0])
    if encoding == "other":
        raise errors.UserError(f"feature {key!r}: its images are neither JPEG nor PNG: use --leave_out={key}")
    return encoding


def _regular(dataset: lerobot_read.LeRobot) -> bool:
    """Timestamps are frame_index / fps in every row."""
    import pyarrow.parquet as pq

    for path in {dataset.data_file(episode) for episode in range(len(dataset.episodes))}:
        table = pq.read_table(path, columns=["timestamp", "frame_index"])
        expected = np.asarray(table.column("frame_index")) / float(dataset.info["fps"])
        if np.abs(np.asarray(table.column("timestamp")) - expected).max(initial=0) > 1e-4:
            return False
    return True


def _episode_features(dataset, original: dict[str, Any], left_out: dict[str, str]) -> dict[str, write_rlds.Feature]:
    """Features of whole episodes, which our own export keeps in meta/episodes."""
    features = {}
    for key in dataset.episodes[0]:
        name = key.removeprefix(_EPISODE)
        if not key.startswith(_EPISODE) or name == "episode_index":
            continue
        if name not in original:
            left_out[key] = "an episode column of unknown type"
        elif original[name]["dtype"] == "string":
            features[name] = write_rlds.Text()
        else:
            shape = tuple(None if size is None else size for size in original[name]["shape"])
            features[name] = write_rlds.Tensor(shape, original[name]["dtype"])
    return features


def _tree(columns: list[Column], extra: dict[str, write_rlds.Feature], language: str) -> dict[str, Any]:
    flat = {column.name: column.feature for column in columns}
    if len(flat) != len(columns) or language in flat:
        raise errors.UserError(
            f"two features would be steps/{language}, or share another name: use --language or --leave_out"
        )
    flat[language] = write_rlds.Text()
    for name in ("is_first", "is_last"):
        flat.setdefault(name, write_rlds.Tensor((), "bool"))
    tree: dict[str, Any] = {}
    for name, feature in flat.items():
        *branches, leaf = name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise errors.UserError(f"steps/{name} lies below a feature of its own: use --leave_out for one of them")
        if isinstance(node.get(leaf), dict):
            raise errors.UserError(f"steps/{name} is a feature and a folder: use --leave_out for one of them")
        node[leaf] = feature
    return {"steps": tree, "episode_metadata": {"episode_index": write_rlds.Tensor((), "int64"), **extra}}


def _splits(dataset: lerobot_read.LeRobot) -> dict[str, list[int]]:
    total = len(dataset.episodes)
    declared = dataset.info.get("splits") or {"train": f"0:{total}"}
    out = {}
    for name, text in declared.items():
        low, _, high = str(text).partition(":")
        if not (low.isdigit() and high.isdigit() and int(low) < int(high) <= total):
            raise errors.UserError(
                f"{dataset.root}/meta/info.json: split {name!r} is {text!r}, not a range of 0:{total}"
            )
        out[name] = list(range(int(low), int(high)))
    if sorted(episode for part in out.values() for episode in part) != list(range(total)):
        raise errors.UserError(
            f"{dataset.root}/meta/info.json: splits {declared} do not cover the {total} episodes once"
        )
    return out


def _sizes(dataset: lerobot_read.LeRobot) -> list[tuple[str, int]]:
    videos = [key for key, feature in dataset.features.items() if feature["dtype"] == "video"]
    files = {dataset.data_file(episode) for episode in range(len(dataset.episodes))}
    files |= {dataset.video_file(episode, key) for episode in range(len(dataset.episodes)) for key in videos}
    return [(os.path.relpath(path, dataset.root), os.path.getsize(path)) for path in sorted(files)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
