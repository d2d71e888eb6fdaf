"""What every contestant of the train step race builds and is fed: sizes, batch, and the order to its process.

The model is the open-pi-zero baseline, without depth expert. NumPy alone: the torch process imports this too.
"""

import dataclasses
from typing import Any

import numpy as np

LEARNING_RATE = 5e-5  # open-pi-zero's, and so are b1 0.9, b2 0.999, eps 1e-8, no weight decay, clip at norm 1
CLIP_NORM = 1.0
NOISE_SEED = 7


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the network, by default the published; rope theta and time period are those of its train configs."""

    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_layers: int = 27
    vision_heads: int = 16
    vlm_width: int = 2048
    vlm_mlp: int = 16384
    action_width: int = 1024
    action_mlp: int = 4096
    layers: int = 18
    heads: int = 8
    head_dim: int = 256
    vocabulary: int = 257_216
    image_size: int = 224
    patch: int = 14
    text_length: int = 20
    proprio_dim: int = 7
    action_dim: int = 7
    horizon: int = 4
    rope_theta: float = 10_000.0
    action_rope_theta: float = 100.0
    time_period: float = 100.0

    @property
    def image_tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch) ** 2


SIZES = {
    "full": Size(),
    # The published shape (18 layers, mlp 8 times the width, 281 tokens, attention as wide as the vlm), an eighth as
    # wide: a step of seconds on two cores.
    "mid": Size(
        vision_width=192,
        vision_mlp=768,
        vision_layers=12,
        vision_heads=4,
        vlm_width=256,
        vlm_mlp=2048,
        action_width=128,
        action_mlp=512,
        head_dim=32,
        vocabulary=2048,
    ),
    # The published widths with as many layers as two cores carry, 3 of 27 and 2 of 18.
    "wide": Size(vision_layers=3, layers=2, vocabulary=2048),
    # For the test of the benchmark.
    "tiny": Size(
        vision_width=24,
        vision_mlp=32,
        vision_layers=2,
        vision_heads=2,
        vlm_width=32,
        vlm_mlp=48,
        action_width=16,
        action_mlp=24,
        layers=3,
        heads=4,
        head_dim=8,
        vocabulary=64,
        image_size=28,
        text_length=5,
    ),
}


@dataclasses.dataclass(frozen=True)
class Order:
    """One contestant.

    Attributes:
      contestant: "ours" | "eager" | "compile".
      size: a name of SIZES. batch: examples per step.
      threads: cores the process may use (CPU).
      device: "cpu" | "gpu". dtype: of activations, "float32" | "bfloat16".
      folder: where weights and noise are exchanged.
      open_pi_zero: a checkout. write_weights: this contestant draws the weights, the others read them.
      scan, remat: of ours. fused: torch's fused AdamW instead of its default loop.
    """

    contestant: str
    size: str
    batch: int
    threads: int
    device: str
    dtype: str
    folder: str
    open_pi_zero: str = ""
    write_weights: bool = False
    scan: bool = False
    remat: str = "none"
    fused: bool = False


def make_batch(size: Size, batch: int) -> dict[str, np.ndarray]:
    """image u8 [B, S, S, 3], text i32 [B, L] padded with 0, proprio f32 [B, 1, Dp], action f32 [B, Z, A], t f32 [B].

    Text lengths differ between examples.
    """
    rng = np.random.default_rng(0)
    text = rng.integers(1, size.vocabulary - 1, (batch, size.text_length)).astype(np.int32)
    real = 1 + rng.permutation(batch) % size.text_length
    text = np.where(np.arange(size.text_length)[None] < real[:, None], text, 0).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (batch, size.image_size, size.image_size, 3), dtype=np.uint8),
        "text": text,
        "proprio": rng.uniform(-1, 1, (batch, 1, size.proprio_dim)).astype(np.float32),
        "action": rng.uniform(-1, 1, (batch, size.horizon, size.action_dim)).astype(np.float32),
        "t": rng.uniform(0, 0.999, batch).astype(np.float32),
    }


def facts(**values: Any) -> dict[str, Any]:
    """What a contestant says of itself before the race; every contestant has all of these."""
    names = ("parameters", "trained", "notes", "flops_per_sample", "device_kind")
    return {name: values.pop(name) for name in names} | values
