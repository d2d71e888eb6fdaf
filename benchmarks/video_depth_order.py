"""What the parent of benchmarks/video_depth.py tells a contestant, and the frames that all of them see."""

import dataclasses
import pathlib
import re

import numpy as np

CONTESTANTS = ("ours", "original")


@dataclasses.dataclass(frozen=True)
class Order:
    """One contestant's orders.

    Attributes:
      contestant: one of CONTESTANTS. encoder: vits, vitb or vitl.
      frames, height, width: of the window; height and width are multiples of 14.
      threads: cores. device: "cpu" | "gpu". dtype: "float32" | "bfloat16".
      checkout: of Video-Depth-Anything, "" = ours alone, with weights of our own.
      folder: weights.npz goes from the original to ours, NAME_depth.npy back to the parent.
      scan: ours only.
    """

    contestant: str
    encoder: str
    frames: int
    height: int
    width: int
    threads: int
    device: str
    dtype: str
    checkout: str
    folder: str
    scan: bool

    @property
    def weights(self) -> pathlib.Path:
        return pathlib.Path(self.folder) / "weights.npz"

    def depth_file(self, contestant: str) -> pathlib.Path:
        return pathlib.Path(self.folder) / f"{contestant}_depth.npy"


def parse_size(text: str) -> tuple[str, int, int, int]:
    """`vits:32x140x182` -> (encoder, frames, height, width)."""
    from qdepth_jax import errors

    found = re.fullmatch(r"(vit[sbl]):(\d+)x(\d+)x(\d+)", text)
    if not found:
        raise errors.UserError(f"--size={text}: write ENCODER:FRAMESxHEIGHTxWIDTH, for example vits:32x140x182")
    frames, height, width = (int(found.group(n)) for n in (2, 3, 4))
    if not 1 <= frames <= 32 or not height or height % 14 or not width or width % 14:
        raise errors.UserError(f"--size={text}: 1 to 32 frames, height and width multiples of 14")
    return found.group(1), frames, height, width


def make_frames(order: Order) -> np.ndarray:
    """Normalised frames f32 [1, T, H, W, 3]: waves of all lengths that move, about unit variance."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.linspace(0, 1, order.height), np.linspace(0, 1, order.width), indexing="ij")
    time = np.arange(order.frames, dtype=np.float32)[:, None, None, None] / 32
    out = np.zeros((order.frames, order.height, order.width, 3), np.float32)
    for _ in range(8):
        fy, fx, ft, phase = rng.uniform(-20, 20, 4)
        out += np.sin(fy * y[None, :, :, None] + fx * x[None, :, :, None] + ft * time + phase + np.arange(3)) / 2
    return out[None]
