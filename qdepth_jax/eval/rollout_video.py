"""Videos of episodes: RGB | depth | gripper trace, one frame for each plan and one for the end.

Depth is what the policy believes where it has a depth expert whose tokens can be decoded, else the simulator's; the
panel says which, and the range of its grey values (near is bright).
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from qdepth_jax import errors

PANEL = 192  # smallest side of a panel, pixels: below it the text cannot be read
FARTHEST = 5.0  # times the nearest depth: what is farther is black


@dataclasses.dataclass(frozen=True)
class Frame:
    """picture: u8 [H, W, 3]. depth: f32 [R, R], None = not known here. commands, openings: of the gripper, one number
    for each step since the frame before."""

    picture: np.ndarray
    depth: np.ndarray | None
    commands: Sequence[float]
    openings: Sequence[float]


def check_install() -> None:
    """Raises UserError if videos cannot be written."""
    try:
        import imageio  # noqa: F401
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise errors.UserError(
            f"videos need {error.name!r}: pip install -e '.[sim]', or --videos=0 --failure_videos=0"
        ) from error


def write(path: pathlib.Path, frames: Sequence[Frame], depth_label: str, rate_hz: float) -> None:
    """An mp4; it appears when it is complete.

    Args:
      depth_label: what the depth is, with its unit: "predicted depth, m".
      rate_hz: frames per second.
    """
    # imageio-ffmpeg runs Python code (os.setpgrp, so that Ctrl-C does not reach ffmpeg) between fork and exec. Beside
    # threads such as JAX's that can hang (its issue 58), so JAX warns at every video. This switch of its own makes it
    # an ordinary start of a program, in which no fork hooks run; a video that Ctrl-C meets is not kept anyway.
    os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")
    import imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.mp4")
    with imageio.get_writer(partial, fps=rate_hz, macro_block_size=2, quality=8) as writer:
        for picture in draw(frames, depth_label):
            writer.append_data(picture)
    partial.replace(path)


def draw(frames: Sequence[Frame], depth_label: str) -> list[np.ndarray]:
    """u8 [S, 3 S, 3] for each frame."""
    side = max(PANEL, *(max(frame.picture.shape[:2]) for frame in frames))
    side += side % 2
    known = [frame.depth for frame in frames if frame.depth is not None]
    # One scale for the whole video: the range that nearly all values lie in.
    low, high = np.quantile(np.concatenate([x.ravel() for x in known]), (0.005, 0.995)) if known else (0.0, 1.0)
    inverse = "inverse" in depth_label
    if not inverse:
        high = min(high, FARTHEST * low)  # Meta-World's background lies 80 m behind a table at 1 m
    trace = _traces(frames, side)
    out = []
    for frame, gripper in zip(frames, trace):
        if frame.depth is None:
            depth = Image.new("RGB", (side, side), (40, 40, 40))
        else:
            x = np.clip((frame.depth - low) / max(high - low, 1e-9), 0, 1)
            grey = np.rint(255 * (x if inverse else 1 - x)).astype(np.uint8)
            depth = Image.fromarray(grey).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        _text(depth, f"{depth_label}: {low:.2f} to {high:.2f}" if known else f"{depth_label}: none")
        rgb = Image.fromarray(frame.picture).resize((side, side), Image.Resampling.BILINEAR)
        out.append(np.concatenate([np.asarray(rgb), np.asarray(depth), gripper], axis=1))
    return out


def _traces(frames: Sequence[Frame], side: int) -> list[np.ndarray]:
    """u8 [S, S, 3] for each frame: command (orange, up = close) and measured opening (blue) of the whole episode, what
    is past in full colour."""
    commands = [x for frame in frames for x in frame.commands]
    openings = [x for frame in frames for x in frame.openings]
    widest = max([*openings, 1e-6])
    top, height = 18, side - 24

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(2 + (side - 5) * i / max(len(commands) - 1, 1), top + height * (1 - v)) for i, v in enumerate(values)]

    lines = (
        ((255, 150, 40), points([(np.clip(x, -1, 1) + 1) / 2 for x in commands])),
        ((90, 160, 255), points([max(x, 0) / widest for x in openings])),
    )
    out, past = [], 0
    for frame in frames:
        past += len(frame.commands)
        panel = Image.new("RGB", (side, side))
        pen = ImageDraw.Draw(panel)
        for colour, line in lines:
            if len(line) > 1:
                pen.line(line, fill=tuple(c // 4 for c in colour))
            if past > 1:
                pen.line(line[:past], fill=colour, width=2)
        _text(panel, f"gripper: closing, opening  step {past}")
        out.append(np.asarray(panel))
    return out


def _text(panel: Image.Image, text: str) -> None:
    pen = ImageDraw.Draw(panel)
    pen.rectangle((0, 0, panel.width, 13), fill=(0, 0, 0))
    pen.text((3, 1), text, fill=(255, 255, 255))
