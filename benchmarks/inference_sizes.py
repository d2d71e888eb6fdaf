"""What every contestant of the inference race builds and is asked: the order to its process, and one observation.

Sizes are those of the train step race. NumPy alone: processes of other environments import this too.
"""

import dataclasses
from typing import Any

import numpy as np

from benchmarks import train_step_sizes

SIZES = train_step_sizes.SIZES
NOISE_SEED = 7
# Contestant -> (module, whose network). Contestants of one network get the same weights, observation and noise.
CONTESTANTS = {
    "ours": ("inference_ours", "open_pi_zero"),
    "int8": ("inference_ours", "open_pi_zero"),
    "eager": ("inference_torch", "open_pi_zero"),
    "compile": ("inference_torch", "open_pi_zero"),
    "ours_pi0": ("inference_ours", "pi0"),
    "openpi": ("inference_openpi", "pi0"),
}
# What a figure of a network is compared with, and who draws its weights.
REFERENCE = {"open_pi_zero": "ours", "pi0": "ours_pi0"}
ORIGINALS = ("eager", "compile", "openpi")


@dataclasses.dataclass(frozen=True)
class Order:
    """One contestant.

    Attributes:
      contestant: of CONTESTANTS. size: a name of SIZES.
      threads: cores the process may use (CPU).
      device: "cpu" | "gpu". dtype: of activations, "float32" | "bfloat16".
      folder: where weights and noise of its network are exchanged.
      checkout: of the original. write_weights: this contestant draws the weights, the others read them.
      scan, remat: of ours.
    """

    contestant: str
    size: str
    threads: int
    device: str
    dtype: str
    folder: str
    checkout: str = ""
    write_weights: bool = False
    scan: bool = False
    remat: str = "none"


def observation(size: train_step_sizes.Size) -> dict[str, np.ndarray]:
    """image u8 [1, S, S, 3], text i32 [1, L] padded with 0, proprio f32 [1, 1, Dp]."""
    batch = train_step_sizes.make_batch(size, 8)
    return {name: batch[name][:1] for name in ("image", "text", "proprio")}


def draw_noise(size: train_step_sizes.Size) -> np.ndarray:
    """f32 [1, Z, A]."""
    return np.random.default_rng(NOISE_SEED).normal(size=(1, size.horizon, size.action_dim)).astype(np.float32)


def facts(**values: Any) -> dict[str, Any]:
    """What a contestant says of itself before the race; every contestant has all of these."""
    names = ("parameters", "weight_bytes", "notes", "device_kind")
    return {name: values.pop(name) for name in names} | values
