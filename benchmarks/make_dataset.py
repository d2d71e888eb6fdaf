"""Writes a synthetic RLDS data set for benchmarks: realistic sizes, fixed seed, no TensorFlow.

  python benchmarks/make_dataset.py DIR [--episodes=300] [--shards=8] [--seed=0]

Episodes of 25 to 50 steps, two cameras of 256x256 JPEG (about 32 KB each), state and action of 7 to 8 floats, one
instruction each, in the layout of the LIBERO sets, so that every loader which reads those reads this. The result is
DIR/libero_90/1.0.0; a data set that is there already, written by the same arguments, is left as it is. The last line of
stdout is JSON.
"""

import json
import pathlib
import sys

from absl import flags

_EPISODES = flags.DEFINE_integer("episodes", 300, "number of episodes", lower_bound=1)
_SHARDS = flags.DEFINE_integer("shards", 8, "number of shards", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of every value; equal seeds give equal bytes")

NAME = "libero_90"
SIZE = 256
STEPS = (25, 50)
# With this much noise on a smooth scene, quality 90 and 4:2:0 (TensorFlow's default) give about 32 KB, as real 256x256
# camera frames take.
NOISE, QUALITY = 16.5, 90


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(f"usage: make_dataset.py DIR [--episodes=300] (got {argv[1:]})", file=sys.stderr)
        return 2
    print(json.dumps(make(argv[1], _EPISODES.value, _SHARDS.value, _SEED.value)))
    return 0


def make(directory: str, episodes: int, shards: int, seed: int = 0) -> dict:
    """Writes the data set below `directory`; returns its folder, episodes, frames and bytes."""
    import numpy as np

    from qdepth_jax import errors, progress
    from qdepth_jax.data import write_rlds

    shards = min(shards, episodes)
    folder = pathlib.Path(directory).absolute() / NAME / "1.0.0"
    lengths = np.random.default_rng([seed, 0]).integers(STEPS[0], STEPS[1] + 1, episodes)
    summary = {"directory": str(folder), "episodes": episodes, "frames": int(lengths.sum()), "shards": shards}
    arguments = {"episodes": episodes, "shards": shards, "seed": seed}
    if (folder / "dataset_info.json").exists():
        there = json.loads((folder / "metadata.json").read_text())
        if there != arguments:
            raise errors.UserError(f"{folder} was written with {there}, not {arguments}: remove it or choose another")
        return summary | {"bytes": _size(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    features = _features(write_rlds)
    bar = progress.Progress(episodes, f"writing {folder}", unit="episode")

    def read(number: int) -> bytes:
        bar.update()
        return _episode(features, number, int(lengths[number]), seed)

    parts = [list(map(int, part)) for part in np.array_split(np.arange(episodes), shards)]
    split = write_rlds.write_split(folder, NAME, "train", parts, read)
    bar.close()
    write_rlds.write_metadata(folder, NAME, "1.0.0", features, [split], "synthetic benchmark data", arguments)
    return summary | {"bytes": _size(folder)}


def _features(write_rlds):
    image = write_rlds.Image((SIZE, SIZE, 3))
    return {
        "steps": {
            "observation": {
                "image": image,
                "wrist_image": image,
                "state": write_rlds.Tensor((8,)),
                "joint_state": write_rlds.Tensor((7,)),
            },
            "action": write_rlds.Tensor((7,)),
            "reward": write_rlds.Tensor(),
            "discount": write_rlds.Tensor(),
            "is_first": write_rlds.Tensor((), "bool"),
            "is_last": write_rlds.Tensor((), "bool"),
            "is_terminal": write_rlds.Tensor((), "bool"),
            "language_instruction": write_rlds.Text(),
        },
        "episode_metadata": {"file_path": write_rlds.Text()},
    }


def _episode(features, number: int, steps: int, seed: int) -> bytes:
    import numpy as np

    from qdepth_jax.data import write_rlds

    rng = np.random.default_rng([seed, 1, number])
    walk = np.cumsum(rng.normal(scale=0.02, size=(steps, 8)), 0).astype(np.float32)
    action = np.clip(rng.normal(scale=0.3, size=(steps, 7)), -1, 1).astype(np.float32)
    action[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
    place = np.arange(steps)
    rows = {
        "observation/image": _camera(rng, steps),
        "observation/wrist_image": _camera(rng, steps),
        "observation/state": walk,
        "observation/joint_state": np.cumsum(walk[:, :7], 0),
        "action": action,
        "reward": (place == steps - 1).astype(np.float32),
        "discount": np.ones(steps, np.float32),
        "is_first": place == 0,
        "is_last": place == steps - 1,
        "is_terminal": place == steps - 1,
        "language_instruction": [f"put object {number % 90} into the basket"] * steps,
    }
    return write_rlds.encode_episode(features, rows, {"file_path": f"episode_{number:06d}.hdf5"})


def _camera(rng, steps: int) -> list[bytes]:
    """A smooth random scene under fixed-pattern noise that moves a little from step to step."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    coarse = Image.fromarray(rng.integers(30, 226, (6, 6, 3), np.uint8))
    scene = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
    scene = np.clip(scene + rng.normal(scale=NOISE, size=scene.shape), 0, 255).astype(np.uint8)
    shifts = np.cumsum(rng.integers(-3, 4, (steps, 2)), 0)
    frames = (np.ascontiguousarray(np.roll(scene, tuple(shift), (0, 1))) for shift in shifts)
    return [simplejpeg.encode_jpeg(frame, QUALITY, colorsubsampling="420") for frame in frames]


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tfrecord-*"))


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)
