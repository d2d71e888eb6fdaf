"""One episode record of a data set into the record of a converted one: features added, images resized, the rest as is.

What is not changed is never decoded: its bytes are cut out of the old record and pasted into the new one. Colour is
resized with Lanczos (as the published pipelines do), depth takes the nearest pixel: an average over the edge of an
object is a distance at which nothing stands.
"""

import collections
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from qdepth_jax.data import example, frame_reader, quarantine


@dataclasses.dataclass(frozen=True)
class Resize:
    """New size of all per-step images.

    Attributes:
      size: (height, width).
      colour, nearest: names of the image features that are resized with Lanczos and by the nearest pixel.
      jpeg_quality: of re-encoded JPEG (4:4:4); PNG stays PNG.
    """

    size: tuple[int, int]
    colour: tuple[str, ...]
    nearest: tuple[str, ...]
    jpeg_quality: int = 95


def convert(payload: bytes, added: Mapping[str, Any], resize: Resize | None) -> tuple[bytes, collections.Counter]:
    """The new record of one episode.

    Args:
      payload: the old record, a serialised tf.train.Example.
      added: feature name -> value as `example.encode` takes it; must be new names.
      resize: what to do with images; None = nothing.

    Returns:
      the new record, and counts: images_resized, images_untouched (only of features that `resize` names).

    Raises:
      ValueError: not an Example, a feature that is there already or is missing, an image that cannot be decoded.
    """
    places = example.entries(payload)
    clash = sorted(set(added) & set(places))
    if clash:
        raise ValueError(f"the record holds {', '.join(clash)} already, although features.json does not list it")
    replaced, counts = {}, collections.Counter()
    if resize:
        scanned = example.scan(payload)
        for name in (*resize.colour, *resize.nearest):
            if name not in scanned or scanned[name].kind != "bytes":
                raise ValueError(f"feature {name!r} is missing or holds no images")
            old = [payload[offset : offset + size] for offset, size in scanned[name].value.tolist()]
            new = [_resized(data, name, step, resize) for step, data in enumerate(old)]
            changed = sum(a is not b for a, b in zip(old, new))
            counts.update(images_resized=changed, images_untouched=len(old) - changed)
            if changed:
                replaced[name] = example.encode_entry(name, new)
    kept = [replaced.get(name) or payload[start:end] for name, (start, end) in places.items()]
    return example.join(kept + [example.encode_entry(name, added[name]) for name in sorted(added)]), counts


def _resized(data: bytes, name: str, step: int, resize: Resize) -> bytes:
    try:
        if name in resize.colour:
            return resize_colour(data, resize.size, resize.jpeg_quality)
        return resize_nearest(data, resize.size)
    except ValueError as error:
        raise ValueError(f"feature {name!r}, step {step}: {error}; {quarantine.HOW}") from error


def resize_colour(data: bytes, size: tuple[int, int], jpeg_quality: int) -> bytes:
    """A JPEG or PNG of another size, same format; one that has the size already is handed back as it is."""
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    if frame_reader.image_size(data) == size:
        return data
    image = frame_reader.load_image(data)
    encoding = image.format
    # A palette has no in-between colours to average.
    image = image.convert("RGB") if image.mode == "P" else image
    image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if encoding == "JPEG":
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def resize_nearest(data: bytes, size: tuple[int, int]) -> bytes:
    """A PNG of another size, whole pixels taken over; one that has the size already is handed back as it is."""
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    if frame_reader.image_size(data) == size:
        return data
    return png(nearest(np.asarray(frame_reader.load_image(data))[None], size)[0])


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[T, H, W, ...] -> [T, *size, ...]: the pixel whose area holds the centre of the new one."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, values.shape[1:3]))
    return values[:, rows[:, None], columns]


def png(values: np.ndarray) -> bytes:
    """u16 [H, W] (or u8 [H, W, 3 or 4]) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(buffer, "PNG")
    return buffer.getvalue()
