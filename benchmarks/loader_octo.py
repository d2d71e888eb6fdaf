"""Contender "octo": the real octo data pipeline on the real dlimp, from checkouts (--octo, --dlimp); nothing is copied.

Written against octo 241fb35 (github.com/octo-models/octo) and dlimp ad72ce3 (github.com/kvablack/dlimp). Left out, for
every contender alike: goal images (they would double the images of a frame), paraphrased instructions, history. Kept as
published: interleaved reading, 100 frames of an episode per pass, one shuffle buffer of encoded frames,
sequential batch, ram budget of 1 GiB, no prefetch behind the batch. Thread numbers are left to tf.data: the published
ones (48, 48, 200) are for large hosts.
"""

import logging
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.loader_cell import KEY_BASE, Cell

# Base configuration of open-pi-zero and octo's fine-tuning; the wrist view gets the colours alone.
_COLOUR = {
    "random_brightness": [0.1],
    "random_contrast": [0.9, 1.1],
    "random_saturation": [0.9, 1.1],
    "random_hue": [0.05],
}
AUGMENT = {
    "primary": {
        "random_resized_crop": {"scale": [0.8, 1.0], "ratio": [0.9, 1.1]},
        **_COLOUR,
        "augment_order": ["random_resized_crop", *_COLOUR],
    },
    "wrist": {**_COLOUR, "augment_order": [*_COLOUR]},
}


def standardise(traj: dict[str, Any]) -> dict[str, Any]:
    """LIBERO as OpenVLA standardises it: gripper clipped and inverted, state without its seventh number's padding."""
    action = traj["action"]
    gripper = 1 - tf.clip_by_value(action[:, 6:], 0, 1)
    traj["action"] = tf.concat([action[:, :6], gripper], axis=1)
    traj["observation"]["proprio"] = traj["observation"]["state"]
    return traj


def standardise_with_key(traj: dict[str, Any]) -> dict[str, Any]:
    """And the file name behind the instruction: the one string that octo hands through, so that frames have names."""
    path = traj["traj_metadata"]["episode_metadata"]["file_path"]
    traj["language_instruction"] = tf.strings.join([traj["language_instruction"], path], "|")
    return standardise(traj)


def open_batches(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    dataset = _import(cell)
    tf.random.set_seed(cell.seed)
    frame: dict[str, Any] = {"resize_size": {}, "image_augment_kwargs": {}}
    if cell.mode in ("resize", "augment"):
        frame["resize_size"] = {view: (cell.size, cell.size) for view in AUGMENT}
    if cell.mode == "augment":
        frame["image_augment_kwargs"] = AUGMENT
    built = dataset.make_interleaved_dataset(
        [_kwargs(cell)],
        [1.0],
        train=True,
        shuffle_buffer_size=cell.buffer,
        batch_size=cell.batch_size,
        balance_weights=True,
        traj_transform_kwargs={
            "window_size": 1,
            "action_horizon": cell.horizon,
            "subsample_length": 100,
            "max_action_dim": 7,
        },
        frame_transform_kwargs=frame,
    )
    return map(_rename, built.iterator(prefetch=0))


def prepare(cell: Cell) -> dict[str, float]:
    """The one-time work: statistics, by a pass over all episodes (images are read, not decoded)."""
    _import(cell).make_dataset_from_rlds(**_kwargs(cell), train=True, force_recompute_dataset_statistics=True)
    return {}


def _kwargs(cell: Cell) -> dict[str, Any]:
    name, _version = cell.data.rstrip("/").split("/")[-2:]
    recipe = standardise_with_key if cell.mode == "gates" else standardise
    return {
        "name": name,
        "data_dir": os.path.dirname(os.path.dirname(cell.data.rstrip("/"))),
        "image_obs_keys": {"primary": "image", "wrist": "wrist_image"},
        "proprio_obs_key": "proprio",
        "language_key": "language_instruction",
        "action_normalization_mask": [True] * 6 + [False],
        "standardize_fn": {"module": recipe.__module__, "name": recipe.__name__, "args": (), "kwargs": {}},
    }


def _import(cell: Cell):
    """octo.data.dataset of the checkout. Its package asks for things that reading data does not need: stubs."""
    for folder, inside in ((cell.octo, "octo/data/dataset.py"), (cell.dlimp, "dlimp/dataset.py")):
        if not os.path.exists(os.path.join(folder, inside)):
            raise FileNotFoundError(f"{folder or '(not given)'} is no checkout: there is no {inside} in it")
        sys.path.insert(0, folder)
    if "huggingface_hub" not in sys.modules:
        stub = types.ModuleType("huggingface_hub")
        stub.hf_hub_download = _refuse  # the paraphrase table, which is switched off
        sys.modules["huggingface_hub"] = stub
    import octo.data.dataset as dataset

    logging.getLogger("absl").setLevel(logging.ERROR)
    return dataset


def _refuse(*_args, **_kwargs):
    raise RuntimeError("the benchmark uses no paraphrases: nothing should be downloaded")


def _rename(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Views of octo's arrays under the names of the benchmark; the history axis of 1 goes."""
    seen = batch["observation"]
    out = {
        "image_main": seen["image_primary"][:, 0],
        "image_wrist": seen["image_wrist"][:, 0],
        "proprio": seen["proprio"][:, 0],
        "action": batch["action"][:, 0],
        "timestep": seen["timestep"][:, 0],
        "language": batch["task"]["language_instruction"],
    }
    if b"|" in out["language"][0]:
        episode = np.array([int(text.rpartition(b"_")[2].partition(b".")[0]) for text in out["language"]])
        out["key"] = KEY_BASE * episode + out["timestep"]
    return out
