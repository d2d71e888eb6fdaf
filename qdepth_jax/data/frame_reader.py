"""Encoded images from disk into preallocated arrays: positioned reads and decoders that release the GIL."""

import functools
import io
import os
import resource
import threading
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from qdepth_jax.data import file_faults, storage

_JPEG = b"\xff\xd8"
UNLIMITED = 1 << 16  # shards that stay open where the process has no limit


class ShardFiles:
    """Positioned reads from many shards, local or `gs://`, safe for threads.

    Descriptors stay open up to a quarter of the process limit: training and validation have one such object each,
    sockets, checkpoints and libraries need the other half. Beyond that a read opens and closes its shard. Nothing is
    evicted, so no descriptor can be closed under another thread.
    """

    def __init__(self):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = UNLIMITED if soft == resource.RLIM_INFINITY else soft // 4
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`.

        Raises:
          ValueError: the file ends before. UserError: the file cannot be opened or read (file_faults.py), or a store
            refuses or does not answer.
        """
        with file_faults.named(path):
            return self._read(path, offset, size)

    def _read(self, path: str, offset: int, size: int) -> bytes:
        if storage.is_remote(path):
            return storage.start(path, offset, size)()
        descriptor = self._open.get(path)
        if descriptor is not None:
            return _pread(descriptor, path, offset, size)
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None and len(self._open) < self._limit:
                descriptor = self._open[path] = os.open(path, os.O_RDONLY)
        if descriptor is not None:
            return _pread(descriptor, path, offset, size)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _pread(descriptor, path, offset, size)
        finally:
            os.close(descriptor)

    def start(self, path: str, offset: int, size: int) -> Callable[[], bytes]:
        """`read` in two steps: calling the result waits for the bytes.

        The request to an object store is sent at once, so many can be in flight; a local file is read when the result
        is called, for a disk is made busy by threads.
        """
        if not storage.is_remote(path):
            return functools.partial(self.read, path, offset, size)
        wait = storage.start(path, offset, size)

        def finish() -> bytes:
            with file_faults.named(path):
                return wait()

        return finish

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


def _pread(descriptor: int, path: str, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise ValueError(f"{path} ends {size - len(data)} bytes short of byte {offset + size}: it was truncated")
        data += more
    return data


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, from its header alone."""
    if data[:2] == _JPEG:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return height, width
    with _open_image(data) as image:
        return image.height, image.width


def decode_rgb(data: bytes, out: np.ndarray) -> None:
    """JPEG or PNG into u8 [H, W, 3]; an image of another size is resized (Lanczos, antialiased).

    The exact integer DCT is used, as in Pillow, OpenCV and TensorFlow's INTEGER_ACCURATE.

    Raises:
      ValueError: the data is no image, or damaged.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    if data[:2] == _JPEG:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(data, buffer=out)
            return
        image = Image.fromarray(simplejpeg.decode_jpeg(data))
    else:
        image = load_image(data).convert("RGB")
    if image.size != (out.shape[1], out.shape[0]):
        image = image.resize((out.shape[1], out.shape[0]), Image.Resampling.LANCZOS)
    out[:] = np.asarray(image)


def decode_bgr(data: bytes, out: np.ndarray) -> None:
    """As `decode_rgb`, for files whose channels were stored in the order blue, green, red."""
    decode_rgb(data, out)
    out[:] = out[..., ::-1].copy()


def decode_depth(data: bytes, out: np.ndarray) -> None:
    """A 16-bit (or 8-bit) grey PNG into u16 [H, W]; the size must match, depth is never interpolated here.

    Raises:
      ValueError: no such image, damaged, of another size or with colour.
    """
    array = np.asarray(load_image(data))
    if array.shape != out.shape:
        raise ValueError(f"depth image of shape {list(array.shape)}, {list(out.shape)} expected")
    if array.dtype.kind not in "iu" or (array.dtype.itemsize > 2 and (array.min() < 0 or array.max() > 65535)):
        raise ValueError(f"depth image holds {array.dtype}, uint16 expected")
    out[:] = array


def check(data: bytes, dtype: str = "uint8") -> None:
    """Decodes an image for its errors alone; `dtype` "uint16" is depth.

    Raises:
      ValueError: the data is no image, or damaged.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    if dtype == "uint16":
        decode_depth(data, np.empty(image_size(data), np.uint16))
    elif data[:2] == _JPEG:
        simplejpeg.decode_jpeg(data)
    else:
        load_image(data)


def _open_image(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"not an image: {error}") from error


def load_image(data: bytes) -> Image.Image:
    image = _open_image(data)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"damaged image: {error}") from error
    return image
