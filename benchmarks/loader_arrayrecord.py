"""Contenders "arrayrecord" and "arrayrecord_episodes": TFDS on ArrayRecord files, read through grain.

TFDS can be read at random only from ArrayRecord (or Parquet) files, and rewrites a data set record by record: a record
is still a whole episode. "arrayrecord" draws frames from one global permutation, as ours does, and pays with parsing an
episode for every frame. "arrayrecord_episodes" draws whole episodes and shuffles their frames in a window of
`cell.buffer`: cheap, with the local shuffle of the octo family. Low-dimensional columns come from a table made by
`rewrite` (neither of them pays for it); images are decoded by TFDS itself (OpenCV where installed). No TensorFlow.
"""

import json
import os
import pathlib
from collections.abc import Iterator

import grain
import numpy as np
import tensorflow_datasets as tfds

from benchmarks.loader_cell import KEY_BASE, Cell

_TABLE = "frames.npz"


def rewrite(source: str, target: str) -> str:
    """Writes the data set as ArrayRecord (one episode per record and group, as TFDS does); returns the folder."""
    from array_record.python import array_record_module

    from qdepth_jax import progress
    from qdepth_jax.data import data_config, index, spec, tfrecord
    from qdepth_jax.data import source as sources

    out = pathlib.Path(target)
    if (out / _TABLE).exists():
        return str(out)
    out.mkdir(parents=True, exist_ok=True)
    dataset = spec.read_spec(source)
    bar = progress.Progress(index.total_bytes(dataset), f"writing {out}", unit="B")
    for split in dataset.splits.values():
        for shard in split.shards:
            path = out / shard.replace(".tfrecord-", ".array_record-")
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record in tfrecord.scan_records(dataset.shard_path(shard)):
                writer.write(record.payload)
            writer.close()
            bar.update(os.path.getsize(dataset.shard_path(shard)), shard)
    bar.close()
    for name in ("features.json", "dataset_info.json"):
        content = json.loads((pathlib.Path(dataset.directory) / name).read_text())
        if name == "dataset_info.json":
            content["fileFormat"] = "array_record"
        (out / name).write_text(json.dumps(content))
    # All frames, of the whole split: what a user of this design would keep beside the records.
    config = data_config.DataConfig((data_config.DatasetConfig(source),), views=("main", "wrist"), horizon=1)
    opened = sources.open_source(config.datasets[0], config)
    frames, start = np.arange(opened.split.frames), opened.split.episodes["start"]
    episode = opened.split.episode_of(frames)
    np.savez(
        out / _TABLE,
        episode=episode,
        step=frames - start[episode],
        length=opened.split.episodes["length"],
        action=opened.frames.action,
        proprio=opened.frames.proprio,
    )
    return str(out)


def open_batches(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    records = tfds.builder_from_directory(cell.array_record).as_data_source("train")
    table = dict(np.load(os.path.join(cell.array_record, _TABLE)))
    table["action"] = _normalise(table["action"], keep=(6,))
    table["proprio"] = _normalise(table["proprio"])
    episodes = round(0.95 * len(records)) if cell.split == "train[:95%]" else len(records)
    frames = int(table["length"][:episodes].sum())
    start = np.cumsum(table["length"]) - table["length"]

    def row(frame: int, step) -> dict[str, np.ndarray]:
        wanted = np.arange(frame, frame + cell.horizon)
        last = start[table["episode"][frame]] + table["length"][table["episode"][frame]] - 1
        return {
            "image_main": step["observation"]["image"],
            "image_wrist": step["observation"]["wrist_image"],
            "proprio": table["proprio"][frame],
            "action": table["action"][np.minimum(wanted, last)],
            "action_mask": wanted <= last,
            "key": KEY_BASE * table["episode"][frame] + table["step"][frame],
        }

    def one_frame(frame: int) -> dict[str, np.ndarray]:
        steps = records[int(table["episode"][frame])]["steps"]
        return row(frame, steps[int(table["step"][frame])])

    reading = grain.ReadOptions(num_threads=cell.threads or os.cpu_count(), prefetch_buffer_size=2 * cell.batch_size)
    if cell.contender == "arrayrecord":
        data = grain.MapDataset.range(frames).shuffle(seed=cell.seed).repeat().map(one_frame).to_iter_dataset(reading)
    else:
        data = grain.MapDataset.range(episodes).shuffle(seed=cell.seed).repeat()
        data = data.map(lambda number: (number, records[number]["steps"]))
        few = grain.ReadOptions(num_threads=cell.threads or os.cpu_count(), prefetch_buffer_size=4)
        data = grain.experimental.FlatMapIterDataset(data.to_iter_dataset(few), _Steps())
        data = grain.experimental.WindowShuffleIterDataset(data, window_size=cell.buffer, seed=cell.seed)
        data = data.map(lambda place: row(int(start[place[0]]) + place[2], place[1][place[2]]))
    return iter(data.batch(cell.batch_size, drop_remainder=True))


class _Steps(grain.experimental.FlatMapTransform):
    max_fan_out = KEY_BASE

    def flat_map(self, element):
        number, steps = element
        return [(number, steps, step) for step in range(len(steps))]


def _normalise(values: np.ndarray, keep: tuple[int, ...] = ()) -> np.ndarray:
    out = (values - values.mean(0)) / (values.std(0) + 1e-8)
    out[:, keep] = values[:, keep]
    return out.astype(np.float32)
