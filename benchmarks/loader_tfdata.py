"""Contender "tfdata": the tf.data pipeline of the octo family from its stages, in one small file, so that the benchmark
runs without a checkout of octo.

Same stages in the same order (episodes interleaved over files, standardise, normalise, repeat, chunk, at most 100
frames of an episode, flatten, one shuffle buffer of encoded frames, decode, resize, augment, sequential batch, ram
budget), less bookkeeping: no padding masks, no window axis, no dropout. So it is a lower bound of what that design
costs. Its images are TensorFlow's, with the fast DCT that `tf.io.decode_image` uses by default.
"""

import json
import os
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from benchmarks.loader_cell import KEY_BASE, Cell

_FRAMES_PER_EPISODE = 100


def open_batches(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    tf.random.set_seed(cell.seed)
    builder = tfds.builder_from_directory(cell.data)
    statistics = _statistics(builder, cell)
    options = tf.data.Options()
    options.deterministic = False
    options.autotune.enabled = True
    options.autotune.ram_budget = 1 << 30
    data = _episodes(builder, cell, shuffle=True).with_options(options)
    data = data.map(lambda episode: _normalise(episode, statistics), tf.data.AUTOTUNE).repeat()
    data = data.map(lambda episode: _frames(episode, cell.horizon), tf.data.AUTOTUNE)
    data = data.interleave(tf.data.Dataset.from_tensor_slices, tf.data.AUTOTUNE, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.shuffle(cell.buffer).map(lambda frame: _images(frame, cell), tf.data.AUTOTUNE)
    return data.batch(cell.batch_size).as_numpy_iterator()


def prepare(cell: Cell) -> dict[str, float]:
    """The one-time work: statistics."""
    _statistics(tfds.builder_from_directory(cell.data), cell, force=True)
    return {}


def _episodes(builder, cell: Cell, shuffle: bool) -> tf.data.Dataset:
    reading = tfds.ReadConfig(
        skip_prefetch=True,
        interleave_cycle_length=tf.data.AUTOTUNE,
        num_parallel_calls_for_interleave_files=tf.data.AUTOTUNE,
    )
    data = builder.as_dataset(
        split=cell.split,
        shuffle_files=shuffle,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=reading,
    )
    return data.map(_standardise, tf.data.AUTOTUNE)


def _standardise(episode):
    steps = episode["steps"]
    action, count = steps["action"], tf.shape(steps["action"])[0]
    number = tf.strings.regex_replace(episode["episode_metadata"]["file_path"], r"\D", "")
    number = tf.strings.to_number(tf.strings.substr(number, 0, 6), tf.int64)  # "episode_000012.hdf5": digits and the 5
    return {
        "image_main": steps["observation"]["image"],
        "image_wrist": steps["observation"]["wrist_image"],
        "proprio": steps["observation"]["state"],
        "action": tf.concat([action[:, :6], 1 - tf.clip_by_value(action[:, 6:], 0, 1)], 1),
        "language": steps["language_instruction"],
        "key": KEY_BASE * number + tf.range(count, dtype=tf.int64),
    }


def _statistics(builder, cell: Cell, force: bool = False) -> dict[str, dict[str, list[float]]]:
    """Mean and deviation, kept beside the data as octo keeps its own."""
    path = os.path.join(cell.data, "tfdata_statistics.json")
    if os.path.exists(path) and not force:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    rows: dict[str, list[np.ndarray]] = {"action": [], "proprio": []}
    for episode in _episodes(builder, cell, shuffle=False).as_numpy_iterator():
        for name, values in rows.items():
            values.append(episode[name])
    joined = {name: np.concatenate(values) for name, values in rows.items()}
    out = {name: {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()} for name, values in joined.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(out, file)
    return out


def _normalise(episode, statistics):
    for name, value in statistics.items():
        scaled = (episode[name] - value["mean"]) / (tf.constant(value["std"]) + 1e-8)
        if name == "action":
            scaled = tf.concat([scaled[:, :6], episode[name][:, 6:]], 1)
        episode[name] = scaled
    return episode


def _frames(episode, horizon: int):
    count = tf.shape(episode["action"])[0]
    wanted = tf.range(count)[:, None] + tf.range(horizon)
    episode["action_mask"] = wanted < count
    episode["action"] = tf.gather(episode["action"], tf.minimum(wanted, count - 1))
    if count > _FRAMES_PER_EPISODE:
        chosen = tf.random.shuffle(tf.range(count))[:_FRAMES_PER_EPISODE]
        episode = {name: tf.gather(value, chosen) for name, value in episode.items()}
    return episode


def _images(frame, cell: Cell):
    seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    for turn, name in enumerate(("image_main", "image_wrist")):
        image = tf.io.decode_image(frame[name], expand_animations=False)
        if cell.mode in ("resize", "augment"):
            image.set_shape([None, None, 3])
            image = tf.image.resize(image, (cell.size, cell.size), method="lanczos3", antialias=True)
            image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        if cell.mode == "augment":
            image = _augment(image, seed + turn, crop=name == "image_main")
        frame[name] = image
    return frame


def _augment(image, seed, crop: bool):
    image = tf.image.convert_image_dtype(image, tf.float32)
    if crop:
        area = tf.random.stateless_uniform([], seed, 0.8, 1.0)
        ratio = tf.exp(tf.random.stateless_uniform([], seed + 10, tf.math.log(0.9), tf.math.log(1.1)))
        high, wide = tf.minimum(tf.sqrt(area / ratio), 1), tf.minimum(tf.sqrt(area * ratio), 1)
        place = tf.random.stateless_uniform([2], seed + 20) * tf.stack([1 - high, 1 - wide])
        box = tf.stack([place[0], place[1], place[0] + high, place[1] + wide])[None]
        image = tf.image.crop_and_resize(image[None], box, [0], image.shape[:2])[0]
    for turn, (change, values) in enumerate(
        (
            (tf.image.stateless_random_brightness, [0.1]),
            (tf.image.stateless_random_contrast, [0.9, 1.1]),
            (tf.image.stateless_random_saturation, [0.9, 1.1]),
            (tf.image.stateless_random_hue, [0.05]),
        )
    ):
        image = tf.clip_by_value(change(image, *values, seed=seed + 30 + turn), 0, 1)
    return tf.image.convert_image_dtype(image, tf.uint8, saturate=True)
