"""One input shard into one output shard: the unit of work of a conversion, in a local process or on a Beam worker.

The output depends on the input shard, the sidecars and the recipe alone, so shards can be converted anywhere in any
order. A shard gets its name when it is complete and on the disk; after that its done file tells a restart what it
holds. Memory is one episode.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qdepth_jax import errors
from qdepth_jax.convert import rlds_claim, rlds_record
from qdepth_jax.data import depth_labels, frame_reader, sidecar, sidecar_sums, tfrecord, write_rlds

# `episode` and `start` (first frame id) are of the input split: rows of a sidecar.
ROW = np.dtype(
    [("episode", "<i4"), ("record", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("start", "<i8"), ("length", "<i4")]
)


@dataclasses.dataclass(frozen=True)
class Addition:
    """A sidecar that becomes a feature.

    Attributes:
      kind: "depth" or "depth_tokens".
      feature: its name ("steps/observation/depth").
      root: of the sidecar.
      metadata: what the sidecar said when the conversion was planned.
      encoding: of tokens: "none" (int64 list) or "bytes" (two bytes per token, little-endian).
    """

    kind: str
    feature: str
    root: str
    metadata: sidecar.Metadata
    encoding: str = "none"

    @property
    def leaf(self) -> str:
        return self.feature.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """What `convert_shard` needs to know; small and picklable.

    Attributes:
      source, output: paths of the two shards.
      done: path of the done file.
      digest: identity of the conversion: a done file of another one is refused.
      split: name of the split.
      rows: ROW [E], the episodes that are kept, in record order.
      additions: sidecars of this split.
      resize: or None.
      images: number of image features per step.
    """

    source: str
    output: str
    done: str
    digest: str
    split: str
    rows: np.ndarray
    additions: tuple[Addition, ...]
    resize: rlds_record.Resize | None
    images: int


def convert_shard(task: ShardTask, on_bytes: Callable[[int], None] | None = None) -> dict:
    """Writes the output shard unless it is there already; returns what it holds (the content of its done file).

    Args:
      task: the shard.
      on_bytes: called with the size of each input record when it is finished.

    Returns:
      {"shard", "split", "digest", "episodes", "frames", "bytes_in", "bytes_out" (payloads), "file_bytes",
      "images_resized", "images_untouched", "depth_maps", "token_rows", "kept": the shard was there already}.

    Raises:
      ValueError: a damaged record or image (names shard, record and episode).
      UserError: the disk is full, a sidecar is gone, a done file of another conversion.
    """
    counts = collections.Counter(images_resized=0, images_untouched=0, depth_maps=0, token_rows=0)

    def payloads() -> Iterator[bytes]:
        for row, payload, more in records(task, task.rows):
            counts.update(more)
            yield payload
            if on_bytes:
                on_bytes(int(row["size"]))

    def write() -> dict:
        episodes, size = write_rlds.write_shard(task.output, payloads())
        frames, bytes_in = int(task.rows["length"].sum()), int(task.rows["size"].sum())
        sizes = {"episodes": episodes, "frames": frames, "bytes_in": bytes_in, "bytes_out": size}
        return {"split": task.split, **sizes, **counts}

    result = rlds_claim.make_file(task, write)
    if result["kept"] and on_bytes:
        on_bytes(int(task.rows["size"].sum()))
    return result


def records(task: ShardTask, rows: np.ndarray) -> Iterator[tuple[np.void, bytes, collections.Counter]]:
    """(row, new record, counts) of each of `rows`, one episode in memory at a time."""
    files = frame_reader.ShardFiles()
    opened = [(addition, sidecar.open_sidecar(addition.root, task.split)) for addition in task.additions]
    for addition, found in opened:
        if found.metadata != addition.metadata:
            raise errors.UserError(f"sidecar {found.directory} was changed during the conversion: start it again")
    try:
        for row in rows:
            where = f"{task.source}: record {row['record']} (payload at byte {row['offset']}, episode {row['episode']})"
            try:
                payload = read_record(files, task.source, int(row["offset"]), int(row["size"]))
                added = {}
                for addition, found in opened:
                    added |= _values(addition, found, row, task.resize)
                new, counts = rlds_record.convert(payload, added, task.resize)
            except errors.UserError:
                raise
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            length = int(row["length"])
            if task.resize is None:
                counts["images_untouched"] = length * task.images
            for addition in task.additions:
                counts["depth_maps" if addition.kind == "depth" else "token_rows"] += length
            yield row, new, counts
    finally:
        files.close()


def read_record(files: frame_reader.ShardFiles, path: str, offset: int, size: int) -> bytes:
    """The payload of one record, its checksum verified."""
    data = files.read(path, offset, size + tfrecord.FOOTER_BYTES)
    payload = data[:size]
    if tfrecord.masked_crc(payload) != int.from_bytes(data[size:], "little"):
        raise ValueError("the checksum does not match: the shard was damaged or changed since it was indexed")
    return payload


def _values(
    addition: Addition, found: sidecar.Sidecar, row: np.void, resize: rlds_record.Resize | None
) -> dict[str, object]:
    """Feature name -> value of one sidecar for one episode."""
    values = found.values[row["start"] : row["start"] + row["length"]]
    sidecar_sums.check_episode(found, int(row["episode"]), int(row["start"]), values)
    if addition.kind == "depth_tokens":
        if addition.encoding == "bytes":
            return {addition.feature: [np.asarray(tokens, "<u2").tobytes() for tokens in values]}
        return {addition.feature: np.asarray(values)}
    episode, kind = int(row["episode"]), found.metadata.details["depth_kind"]
    scale, offset = np.float32(found.scale[episode]), np.float32(found.offset[episode])
    if kind == "metric":
        values, scale, offset = _millimetres(values, scale, offset, f"{found.directory}, episode {episode}")
    maps = rlds_record.nearest(values, resize.size) if resize else values
    return {
        addition.feature: [rlds_record.png(np.asarray(depth)) for depth in maps],
        f"episode_metadata/{addition.leaf}_scale": np.float32([scale]),
        f"episode_metadata/{addition.leaf}_offset": np.float32([offset]),
        f"episode_metadata/{addition.leaf}_kind": [found.metadata.details["depth_kind"].encode()],
    }


def _millimetres(
    raw: np.ndarray, scale: np.float32, offset: np.float32, where: str
) -> tuple[np.ndarray, np.float32, np.float32]:
    """Metric depth in the unit that every reader of depth images expects; raw 0 stays invalid."""
    unit, none = np.float32(0.001), np.float32(0)
    if (scale, offset) == (unit, none):
        return raw, unit, none
    metres = np.where(raw > 0, raw * np.float64(scale) + np.float64(offset), np.nan)
    if (furthest := np.nanmax(metres, initial=0)) > 65.535:
        raise errors.UserError(f"{where}: depth of {furthest:.1f} m does not fit 16 bits of millimetres (65.535 m)")
    return depth_labels.to_uint16(metres, "metric")[0], unit, none
