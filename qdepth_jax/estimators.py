"""Depth estimators by name: published networks with the weights of a file, or with random ones to try the plumbing.

video_depth_anything   Video-Depth-Anything, whole episodes in windows of 32 frames (video_depth.py)
depth_anything_v2      Depth Anything V2, frame by frame
transformers:MODEL     any depth model of Hugging Face transformers (estimator_transformers.py, extra `transformers`)
stand_in, dataset, simulator   without weights (data/depth_labels.py)
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from qdepth_jax import depth_weights, device_groups, errors, video_depth
from qdepth_jax.data import depth_labels
from qdepth_jax.models import depth_anything

NETWORKS = ("video_depth_anything", "depth_anything_v2")
# Raise it when the same network and weights would give other values. Version 2: pixels without a number no longer void
# the scale and shift of a window.
PROCEDURE = {"video_depth_anything": 2, "depth_anything_v2": 1}
DTYPES = ("float32", "bfloat16")
INPUT_SIZE = 518
# Windows (of 32 frames) or frames that one device computes together.
DEVICE_BATCH = {"video_depth_anything": 1, "depth_anything_v2": 8}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a network runs; all of it is stored with the maps, for it decides their last digits.

    Estimators refuse what they do not take.

    Attributes:
      kind: "relative", "metric" (the metric checkpoints of Video-Depth-Anything), or "" = as the weights say.
      dtype: of activations; "" = float32.
      input_size: pixels of the short side that the network sees, a multiple of 14; 0 = INPUT_SIZE. Models of
        transformers bring their own.
      device_batch: windows or frames that a device computes together; 0 = DEVICE_BATCH.
      devices: of this process; None = all.
    """

    kind: str = ""
    dtype: str = ""
    input_size: int = 0
    device_batch: int = 0
    devices: list[jax.Device] | None = None

    def __post_init__(self):
        if self.kind not in ("", *depth_labels.KINDS):
            raise errors.UserError(f"--depth_kind={self.kind}: use one of {', '.join(depth_labels.KINDS)}")
        if self.dtype not in ("", *DTYPES):
            raise errors.UserError(f"--dtype={self.dtype}: use one of {', '.join(DTYPES)}")
        if self.input_size < 0 or self.input_size % 14:
            raise errors.UserError(
                f"--input_size={self.input_size} must be a multiple of 14, the patch of the networks"
            )
        if self.device_batch < 0:
            raise errors.UserError(f"--device_batch={self.device_batch} must be positive (0 = the network's own)")

    def settings(self) -> dict[str, Any]:
        """By the names of their flags; "" and 0 where not given."""
        names = ("dtype", "input_size", "device_batch")
        return {"depth_kind": self.kind} | {name: getattr(self, name) for name in names}


def make(
    name: str, weights: str = "", options: Options = Options(), on_fill: Callable[[int], None] = lambda count: None
) -> depth_labels.Estimator:
    """The estimator of a name.

    Args:
      name: see above.
      weights: of a network: a .pth or .safetensors file, a folder with safetensors, or random:SIZE[:SEED].
      on_fill: see `device_groups.stream`.

    Raises:
      UserError: no such estimator, weights missing, not those of this network, or of no published size; an option
        that this estimator does not take.
    """
    if name in NETWORKS:
        return _network(name, weights, options, on_fill)
    if weights:
        raise errors.UserError(f"--estimator={name} takes no --weights={weights}: those with weights are {NETWORKS}")
    if name.startswith("transformers:"):
        from qdepth_jax import estimator_transformers

        return estimator_transformers.make(name.partition(":")[2], options)
    if name not in depth_labels.ESTIMATORS:
        known = ", ".join((*NETWORKS, "transformers:MODEL_OR_FOLDER", *depth_labels.ESTIMATORS))
        raise errors.UserError(f"no depth estimator {name!r}: there is {known}")
    return depth_labels.find(name, options.settings())


def _network(name: str, weights: str, options: Options, on_fill: Callable[[int], None]) -> depth_labels.Estimator:
    if not weights:
        raise errors.UserError(
            f"--estimator={name} needs --weights=FILE (the authors' .pth"
            + (", or Hugging Face safetensors" if name == "depth_anything_v2" else "")
            + "), or --weights=random:vits to try the plumbing"
        )
    video = name == "video_depth_anything"
    found = depth_weights.load(weights, video, options.kind)
    dtype, input_size = options.dtype or DTYPES[0], options.input_size or INPUT_SIZE
    config = dataclasses.replace(found.config, dtype=dtype)
    batch = options.device_batch or DEVICE_BATCH[name]
    devices = options.devices or jax.local_devices()
    details = {
        "network": name,
        "size": found.size,
        "weights": found.identity,
        "dtype": dtype,
        "input_size": input_size,
        "device_batch": batch,
        "backend": devices[0].platform,
        "matmul_precision": str(jax.config.jax_default_matmul_precision or "default"),
        "procedure": PROCEDURE[name],
    }
    estimate = estimate_videos if video else estimate_frames
    plan = video_depth.plan_windows if video else lambda frames: np.arange(frames)[:, None]
    return depth_labels.Estimator(
        name=f"{name} {found.size} {found.identity} input {input_size} {dtype} procedure {PROCEDURE[name]}",
        kind=found.kind,
        estimate=functools.partial(
            estimate, config, found.params, input_size, batch, devices, on_fill, metric=found.kind == "metric"
        ),
        licence=found.licence,
        details=details,
        notice=found.notice,
        window=video_depth.LENGTH if video else 1,
        computed=lambda frames: _computed(plan(frames), batch),
    )


def _computed(rows: np.ndarray, batch: int) -> int:
    """Frames of windows [W, L] in whole groups of `batch` windows."""
    return -(-len(rows) // batch) * batch * rows.shape[1]


def estimate_videos(
    config: depth_anything.DepthAnythingConfig,
    params: Any,
    input_size: int,
    batch: int,
    devices: list[jax.Device],
    on_fill: Callable[[int], None],
    episodes: Iterable[np.ndarray],
    metric: bool = False,
) -> Iterator[np.ndarray]:
    """Depth of episodes u8 [T, H, W, 3], all of one size, by Video-Depth-Anything's windows. Yields f32 [T, H, W].

    The windows of several episodes keep all devices busy; each device takes `batch` windows of one episode.
    """
    waiting: collections.deque[tuple[int, int, int]] = collections.deque()  # frames, windows, groups of an episode

    def groups() -> Iterator[tuple[np.ndarray]]:
        for frames in episodes:
            rows = video_depth.plan_windows(len(frames))
            chunked, _ = device_groups.chunks(rows, batch)
            waiting.append((len(frames), len(rows), len(chunked)))
            yield from ((frames[chunk],) for chunk in chunked)

    done: list[np.ndarray] = []
    window = _window(config, input_size)
    for depth in device_groups.stream(window, params, groups(), devices, on_fill):
        done.append(depth)
        if len(done) == waiting[0][2]:
            frames, windows, _ = waiting.popleft()
            yield video_depth.join_windows(iter(np.concatenate(done)[:windows]), frames, metric)
            done = []


def estimate_frames(
    config: depth_anything.DepthAnythingConfig,
    params: Any,
    input_size: int,
    batch: int,
    devices: list[jax.Device],
    on_fill: Callable[[int], None],
    episodes: Iterable[np.ndarray],
    metric: bool = False,
) -> Iterator[np.ndarray]:
    """Depth of every frame by itself, of episodes u8 [T, H, W, 3] of one size. Yields f32 [T, H, W]."""
    waiting: collections.deque[tuple[int, int]] = collections.deque()

    def groups() -> Iterator[tuple[np.ndarray]]:
        for frames in episodes:
            chunked, _ = device_groups.chunks(np.arange(len(frames)), batch)
            waiting.append((len(frames), len(chunked)))
            yield from ((frames[chunk][:, None],) for chunk in chunked)

    done: list[np.ndarray] = []
    for depth in device_groups.stream(_window(config, input_size), params, groups(), devices, on_fill):
        done.append(depth[:, 0])
        if len(done) == waiting[0][1]:
            yield np.concatenate(done)[: waiting.popleft()[0]]
            done = []


@functools.lru_cache(maxsize=8)
def _window(config: depth_anything.DepthAnythingConfig, input_size: int) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, frames u8 [B, T, H, W, 3]) -> depth f32 [B, T, H, W] for any H and W."""

    def window(params: Any, frames: jax.Array) -> jax.Array:
        return video_depth.make_window_fn(config, *frames.shape[2:4], input_size)(params, frames)

    return window
