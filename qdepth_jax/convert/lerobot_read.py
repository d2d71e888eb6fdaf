"""LeRobot data sets v3 as they lie on disk, read with pyarrow (and av for videos), without the lerobot package.

    meta/info.json                            fps, features, totals
    meta/tasks.parquet                        task text -> task_index (the text is the pandas index)
    meta/episodes/chunk-*/file-*.parquet      one row per episode: length, tasks, which files hold it
    data/chunk-*/file-*.parquet               one row per frame, many episodes per file
    videos/KEY/chunk-*/file-*.mp4             many episodes per file, from_timestamp to to_timestamp

Facts from lerobot 0.4.4 to 0.6.1 (src/lerobot/datasets/utils.py, dataset_metadata.py, video_utils.py), CODEBASE_VERSION
"v3.0".
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdepth_jax import errors

DEFAULT_FEATURES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_CONVERTER = "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30"  # of lerobot 0.4; lerobot.scripts.* since 0.5
_TOLERANCE_S = 1e-3  # pts of a 30 Hz mp4 are multiples of 1/15360 s or finer


@dataclasses.dataclass(frozen=True)
class LeRobot:
    """An opened data set.

    Attributes:
      root: its folder.
      info: meta/info.json.
      episodes: one dict per episode, by episode_index, without statistics.
      tasks: texts by task_index.
    """

    root: str
    info: dict[str, Any]
    episodes: tuple[dict[str, Any], ...]
    tasks: tuple[str, ...]

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    def data_file(self, episode: int) -> str:
        row = self.episodes[episode]
        path = self.info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        return os.path.join(self.root, path)

    def video_file(self, episode: int, key: str) -> str:
        row = self.episodes[episode]
        chunk, file = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
        path = self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
        return os.path.join(self.root, path)


def check_installed() -> None:
    """Raises UserError where the packages of the extra are missing."""
    try:
        import av  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise errors.UserError(f"LeRobot data needs pyarrow and av ({error}): pip install -e '.[lerobot]'") from error


def open_lerobot(root: str | os.PathLike) -> LeRobot:
    """Reads the metadata; every declared file must exist.

    Raises:
      UserError: no such data set, another format version, damaged or incomplete metadata, missing files.
    """
    import pyarrow.parquet as pq

    root = os.path.abspath(os.path.expanduser(os.fspath(root)))
    path = Path(root, "meta", "info.json")
    if not path.is_file():
        raise errors.UserError(f"{root} is no LeRobot data set: {path} is missing")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version, features, total = info["codebase_version"], info["features"], info["total_episodes"]
        fps = float(info["fps"])
    except (ValueError, KeyError, TypeError) as error:
        raise errors.UserError(f"{path} is damaged ({error!r}): copy it again") from error
    if not str(version).startswith("v3."):
        raise errors.UserError(
            f"{root} has format {version}, only v3 is read: convert it with lerobot first ({_CONVERTER} --repo-id=...)"
        )
    if fps <= 0 or not features:
        raise errors.UserError(f"{path}: fps {fps} and {len(features)} features make no data set")
    rows = []
    for file in sorted(Path(root, "meta", "episodes").glob("*/*.parquet")):
        names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
        rows += pq.read_table(file, columns=names).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(total)) or total == 0:
        raise errors.UserError(
            f"{root}: info.json declares {total} episodes, meta/episodes holds {len(rows)}: copy it again"
        )
    tasks = pq.read_table(Path(root, "meta", "tasks.parquet")).to_pylist()
    texts = {row["task_index"]: next(str(v) for k, v in row.items() if k != "task_index") for row in tasks}
    if sorted(texts) != list(range(len(texts))):
        raise errors.UserError(f"{root}/meta/tasks.parquet: task_index is not 0..{len(texts) - 1}")
    dataset = LeRobot(root, info, tuple(rows), tuple(texts[number] for number in range(len(texts))))
    videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
    needed = {dataset.data_file(episode) for episode in range(total)}
    needed |= {dataset.video_file(episode, key) for episode in range(total) for key in videos}
    gone = sorted(file for file in needed if not os.path.isfile(file))
    if gone:
        raise errors.UserError(f"{root}: {len(gone)} files missing, first {gone[0]}: copy them again")
    return dataset


def episode_tables(dataset: LeRobot, episodes: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(episode, its rows as a pyarrow table) of consecutive episodes; memory is one episode and a batch of rows.

    Raises:
      ValueError: an episode whose rows are missing or out of order (names file and episode).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[Any] = []
    wanted = iter(episodes)
    current = next(wanted)
    for path in dict.fromkeys(dataset.data_file(episode) for episode in episodes):
        file = pq.ParquetFile(path)
        groups = _row_groups(file, episodes[0], episodes[-1])
        for batch in file.iter_batches(batch_size=32, row_groups=groups, columns=list(columns)):
            numbers = np.asarray(batch.column("episode_index"))
            for number in dict.fromkeys(numbers.tolist()):
                if not episodes[0] <= number <= episodes[-1]:
                    continue
                if number != current:
                    yield _whole(dataset, path, current, pa.Table.from_batches(waiting) if waiting else None)
                    waiting, current = [], next(wanted, None)
                    if number != current:
                        raise ValueError(f"{path}: episode {number} stands where {current} is expected")
                waiting.append(batch.filter(pa.array(numbers == number)))
    yield _whole(dataset, dataset.data_file(current), current, pa.Table.from_batches(waiting) if waiting else None)
    left = next(wanted, None)
    if left is not None:
        raise ValueError(f"{dataset.data_file(left)}: episode {left} has no rows")


def _whole(dataset: LeRobot, path: str, episode: int, table) -> tuple[int, Any]:
    length = dataset.episodes[episode]["length"]
    found = np.asarray(table.column("frame_index")).tolist() if table is not None else []
    if found != list(range(length)):
        raise ValueError(f"{path}: episode {episode} has rows {found[:3]}... ({len(found)}), 0..{length - 1} expected")
    return episode, table


def _row_groups(file, first: int, last: int) -> list[int]:
    """Row groups that may hold episodes first..last, by their statistics."""
    leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    at = leaves.index("episode_index")
    groups = []
    for group in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(group).column(at).statistics
        if statistics is None or not statistics.has_min_max or (statistics.max >= first and statistics.min <= last):
            groups.append(group)
    return groups


def numbers(column, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """A numeric column of a table as an array [T, *shape] (lists of any depth, fixed or not)."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    rows = len(array)
    while not (pa.types.is_primitive(array.type) or pa.types.is_boolean(array.type)):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.flatten()
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing (null)")
    values = array.to_numpy(zero_copy_only=False).astype(dtype)
    if values.size != rows * int(np.prod(shape)):
        raise ValueError(f"{values.size} values in {rows} rows, shape {list(shape)} expected")
    return values.reshape(rows, *shape)


def images(dataset: LeRobot, column) -> list[bytes]:
    """Encoded bytes of an image column; those that are stored as a path only are read from their file."""
    out = []
    for cell in column.to_pylist():
        data = cell.get("bytes") if cell else None
        if data is None:
            name = (cell or {}).get("path")
            if not name or not os.path.isfile(os.path.join(dataset.root, name)):
                raise ValueError(f"an image is missing (path {name!r})")
            data = Path(dataset.root, name).read_bytes()
        out.append(data)
    return out


def video_frames(dataset: LeRobot, key: str, episode: int, timestamps: np.ndarray) -> Iterator[np.ndarray]:
    """The frame u8 [H, W, 3] of each of an episode's timestamps (seconds, ascending), decoded in one pass.

    Raises:
      ValueError: no frame within a millisecond of a timestamp (names file, episode, time).
    """
    import av

    path = dataset.video_file(episode, key)
    wanted = (float(dataset.episodes[episode][f"videos/{key}/from_timestamp"]) + timestamps.astype(np.float64)).tolist()
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(max(0, int((wanted[0] - _TOLERANCE_S) / stream.time_base)), stream=stream, backward=True)
        at, nearest = 0, None
        for frame in container.decode(stream):
            nearest = frame.time
            if nearest < wanted[at] - _TOLERANCE_S:
                continue
            if nearest > wanted[at] + _TOLERANCE_S:
                break
            yield frame.to_ndarray(format="rgb24")
            at += 1
            if at == len(wanted):
                return
    raise ValueError(
        f"{path}: no frame at {wanted[at]:.4f} s (episode {episode}, step {at}); the nearest is at {nearest}"
    )
