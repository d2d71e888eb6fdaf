"""Writes small LIBERO-shaped RLDS data sets whose every value is known."""

import io
import pathlib

import numpy as np
import simplejpeg
from PIL import Image

from qdepth_jax.data import write_rlds

HEIGHT, WIDTH = 24, 32


def png(depth: np.ndarray) -> bytes:
    """u16 [H, W] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(depth).save(buffer, "png")
    return buffer.getvalue()


def make_libero(
    directory, lengths=(7, 3, 9, 5), *, name="libero_object", seed=0, depth=True, instructions=("pick up", "put down")
) -> str:
    """A LIBERO-shaped data set with two shards per split, every value derivable from `seed`; returns its folder.

    Frame t of episode e has depth e * 100 + t + 1 everywhere and state[0] = e + t / 100.
    """
    rng = np.random.default_rng(seed)
    folder = pathlib.Path(directory) / name / "1.0.0"
    folder.mkdir(parents=True)
    observation = {
        "image": write_rlds.Image((HEIGHT, WIDTH, 3)),
        "wrist_image": write_rlds.Image((HEIGHT, WIDTH, 3), "png"),
        "state": write_rlds.Tensor((8,)),
    }
    if depth:
        observation["depth"] = write_rlds.Image((HEIGHT, WIDTH, 1), "png", "uint16")
    features = {
        "steps": {
            "observation": observation,
            "action": write_rlds.Tensor((7,)),
            "is_last": write_rlds.Tensor((), "bool"),
            "language_instruction": write_rlds.Text(),
        },
        "episode_metadata": {"episode_id": write_rlds.Tensor((), "int64"), "success": write_rlds.Tensor((), "bool")},
    }

    def episode(number: int) -> bytes:
        count = lengths[number]
        frames = rng.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
        state = rng.normal(size=(count, 8)).astype(np.float32)
        state[:, 0] = number + np.arange(count, dtype=np.float32) / 100
        action = rng.normal(size=(count, 7)).astype(np.float32)
        action[:, 6] = rng.choice([-1, 1], count)
        steps = {
            "observation/image": [simplejpeg.encode_jpeg(np.ascontiguousarray(f), 90) for f in frames],
            "observation/wrist_image": [_rgb_png(f[::-1]) for f in frames],
            "observation/state": state,
            "action": action,
            "is_last": np.arange(count) == count - 1,
            "language_instruction": [instructions[number % len(instructions)]] * count,
        }
        if depth:
            maps = [np.full((HEIGHT, WIDTH), number * 100 + t + 1, np.uint16) for t in range(count)]
            steps["observation/depth"] = [png(m) for m in maps]
        return write_rlds.encode_episode(features, steps, {"episode_id": np.int64(number), "success": np.bool_(True)})

    half = len(lengths) // 2
    payloads = [episode(number) for number in range(len(lengths))]
    splits = [
        write_rlds.write_split(folder, name, "train", [payloads[:half], payloads[half:]]),
        write_rlds.write_split(folder, name, "val", [payloads[-1:]]),
    ]
    write_rlds.write_metadata(folder, name, "1.0.0", features, splits, "synthetic")
    return str(folder)


def _rgb_png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, "png")
    return buffer.getvalue()
