"""The files of a LeRobot v3 data set, written with pyarrow (see `lerobot_read` for the layout)."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdepth_jax.data import frame_reader, quarantine, shard_scan, spec, write_rlds

VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
_IMAGES_PER_EPISODE = 4  # for the statistics, which lerobot too takes from a sample
_NUMBERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}


class DataFile:
    """A data file under a partial name until it is complete; one row group per episode."""

    def __init__(self, path: str, features: Mapping[str, spec.FeatureSpec]):
        import pyarrow.parquet as pq

        self._path, self._features = path, features
        self._partial = f"{path}.partial.{os.getpid()}"
        self._schema = _schema(features)
        self._file = open(self._partial, "wb")  # noqa: SIM115
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="snappy")

    def __enter__(self) -> "DataFile":
        return self

    def write(
        self, columns: Mapping[str, Any], episode: int, first_frame: int, fps: float, tasks: Sequence[int]
    ) -> None:
        """Appends an episode; `columns` as arrays [T, ...], lists of image bytes, or lists of str."""
        import pyarrow as pa

        count = len(tasks)
        steps = np.arange(count)
        fixed = {
            "timestamp": (steps / fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(count, episode),
            "index": first_frame + steps,
            "task_index": np.asarray(tasks, np.int64),
        }
        arrays = []
        for field in self._schema:
            if field.name in fixed:
                arrays.append(pa.array(fixed[field.name], field.type))
                continue
            values = columns[field.name]
            if self._features[field.name].kind == "image":
                values = [{"bytes": data, "path": None} for data in values]
            elif isinstance(values, np.ndarray):
                # LeRobot knows no scalars: shape [1] in info.json, a plain number in the file.
                one = _lerobot_shape(self._features[field.name]) == (1,)
                values = (values.reshape(count) if one else values).tolist()
            arrays.append(pa.array(values, field.type))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._writer.close()
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                write_rlds.publish(self._partial, self._path)
        finally:
            self._file.close()
            if os.path.exists(self._partial):
                os.remove(self._partial)


def _schema(features: Mapping[str, spec.FeatureSpec]):
    import pyarrow as pa

    fields = []
    for key, feature in features.items():
        if feature.kind == "image":
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        elif feature.kind == "text":
            kind = pa.string()
        else:
            kind = pa.from_numpy_dtype(shard_scan.column_dtype(feature))
            for size in reversed(_lerobot_shape(feature)) if _lerobot_shape(feature) != (1,) else ():
                kind = pa.list_(kind, size) if len(feature.shape) == 1 else pa.list_(kind)
        fields.append(pa.field(key, kind))
    fields += [pa.field(name, getattr(pa, dtype)()) for name, dtype in _NUMBERS.items()]
    return pa.schema([*fields, pa.field("task_index", pa.int64())])


def _lerobot_shape(feature: spec.FeatureSpec) -> tuple[int, ...]:
    return feature.shape or (1,)


# ---- meta ----


def write_tasks(folder: str, tasks: Mapping[str, int]) -> None:
    """meta/tasks.parquet: what pandas would write for an index "task" and a column "task_index"."""
    import pyarrow as pa

    texts = sorted(tasks, key=tasks.__getitem__)
    column = {"field_name": "", "pandas_type": "", "numpy_type": "", "metadata": None}
    index = {**column, "name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"}
    number = {**column, "name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {**column, "name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
        ],
        "columns": [number, index],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array([tasks[text] for text in texts], pa.int64()), "task": texts})
    _write_table(
        os.path.join(folder, "meta/tasks.parquet"), table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    )


def write_episodes(folder: str, files: Sequence[Sequence[Mapping[str, Any]]], files_per_chunk: int) -> None:
    """meta/episodes: `files` lists the episodes of each data file: length, tasks, metadata."""
    import pyarrow as pa

    rows, frame = [], 0
    for number, episodes in enumerate(files):
        chunk, file = divmod(number, files_per_chunk)
        for episode in episodes:
            rows.append(
                {
                    "episode_index": len(rows),
                    "tasks": episode["tasks"],
                    "length": episode["length"],
                    "data/chunk_index": chunk,
                    "data/file_index": file,
                    "dataset_from_index": frame,
                    "dataset_to_index": frame + episode["length"],
                    **{f"episode_metadata/{name}": value for name, value in episode["metadata"].items()},
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": 0,
                }
            )
            frame += episode["length"]
    _write_table(os.path.join(folder, _EPISODES), pa.Table.from_pylist(rows))


def write_info(
    folder: str,
    features: Mapping[str, spec.FeatureSpec],
    millimetres: Sequence[str],
    fps: float,
    robot_type: str,
    counts: Mapping[str, int],
    files_per_chunk: int,
) -> None:
    """meta/info.json: the last file; `millimetres`: keys of depth in that unit."""
    described = {key: _describe(feature, key in millimetres) for key, feature in features.items()}
    fixed = {**_NUMBERS, "task_index": "int64"}
    described |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in fixed.items()}
    info = {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": counts["episodes"],
        "total_frames": counts["frames"],
        "total_tasks": counts["tasks"],
        "chunks_size": files_per_chunk,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps) if float(fps).is_integer() else fps,
        "splits": {"train": f"0:{counts['episodes']}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": described,
    }
    write_json(os.path.join(folder, "meta/info.json"), info)


def _describe(feature: spec.FeatureSpec, millimetres: bool) -> dict[str, Any]:
    if feature.kind == "image":
        described = {"dtype": "image", "shape": list(feature.shape), "names": ["height", "width", "channels"]}
        if feature.dtype == "uint16":
            described["info"] = {"is_depth_map": True, **({"depth_unit": "mm"} if millimetres else {})}
        return described
    dtype = "string" if feature.kind == "text" else str(shard_scan.column_dtype(feature))
    return {"dtype": dtype, "shape": list(_lerobot_shape(feature)), "names": None}


# ---- statistics ----


@dataclasses.dataclass
class Moments:
    """Count, mean, sum of squared deviations, min and max, each [D] in float64; merged without cancellation."""

    count: int
    mean: np.ndarray
    deviations: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(values: np.ndarray) -> "Moments":
        """values [N, D]."""
        values = values.astype(np.float64)
        mean = values.mean(0)
        return Moments(len(values), mean, ((values - mean) ** 2).sum(0), values.min(0), values.max(0))

    def merge(self, other: "Moments") -> "Moments":
        count, delta = self.count + other.count, other.mean - self.mean
        deviations = self.deviations + other.deviations + delta**2 * (self.count * other.count / count)
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, deviations, np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name).tolist() for name in ("mean", "deviations", "low", "high")}
        return {"count": self.count, **fields}


def add_moments(
    moments: dict[str, Moments], features: Mapping[str, spec.FeatureSpec], columns: Mapping[str, Any]
) -> None:
    """Adds one episode: numbers completely, images by a few frames (colour in 0..1 per channel, depth as stored)."""
    for key, feature in features.items():
        if feature.kind == "text":
            continue
        if feature.kind == "image":
            chosen = sorted({int(at) for at in np.linspace(0, len(columns[key]) - 1, _IMAGES_PER_EPISODE)})
            pictures = [_picture(feature.name, at, columns[key][at]) for at in chosen]
            channels = 1 if pictures[0].ndim == 2 else pictures[0].shape[2]
            scale = 255 if pictures[0].dtype == np.uint8 else 1
            new = Moments.of(np.concatenate([picture.reshape(-1, channels) for picture in pictures]) / scale)
        else:
            new = Moments.of(np.asarray(columns[key]).reshape(len(columns[key]), -1))
        moments[key] = moments[key].merge(new) if key in moments else new


def _picture(name: str, step: int, data: bytes) -> np.ndarray:
    try:
        return np.asarray(frame_reader.load_image(data))
    except ValueError as error:
        raise ValueError(f"feature {name!r}, step {step}: {error}; {quarantine.HOW}") from error


def write_statistics(folder: str, files: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """meta/stats.json: min, max, mean, std, count of every feature; images as [C, 1, 1]."""
    merged: dict[str, Moments] = {}
    for moments in files:
        for key, fields in moments.items():
            arrays = {name: np.array(fields[name]) for name in ("mean", "deviations", "low", "high")}
            new = Moments(fields["count"], **arrays)
            merged[key] = merged[key].merge(new) if key in merged else new
    statistics = {}
    for key, m in merged.items():
        shape = (-1, 1, 1) if ".images." in key else (-1,)
        values = {"min": m.low, "max": m.high, "mean": m.mean, "std": np.sqrt(m.deviations / m.count)}
        statistics[key] = {name: value.reshape(shape).tolist() for name, value in values.items()} | {"count": [m.count]}
    write_json(os.path.join(folder, "meta/stats.json"), statistics)


def write_json(path: str, content: Any) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_rlds.write_json(path, content)


def _write_table(path: str, table) -> None:
    import pyarrow.parquet as pq

    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial.{os.getpid()}"
    pq.write_table(table, partial)
    write_rlds.publish(partial, path)
