"""Whole episodes in order: what annotation, tokenisation and inspection read (training reads batches)."""

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import depth_images, frame_reader, index, sidecar


class EpisodeReader:
    """Reads all frames of one episode of a split; memory is one episode."""

    def __init__(self, split: index.SplitIndex):
        self._split = split
        self._files = frame_reader.ShardFiles()

    def images(self, feature: str, episode: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """u8 [T, H, W, 3] of an image feature; native size, or resized to `size` (height, width)."""
        data = self._encoded(feature, episode)
        height, width = size or frame_reader.image_size(data[0])
        out = np.empty((len(data), height, width, 3), np.uint8)
        for step, encoded in enumerate(data):
            self._decode(frame_reader.decode_rgb, encoded, out[step], episode, step)
        return out

    def depth(self, feature: str, metres: float, episode: int) -> tuple[np.ndarray, float]:
        """u16 [T, H, W] of a depth feature (0 = invalid), and metres per unit of it; `metres` per stored unit."""
        declared = self._split.dataset.feature(feature)
        decode, scale = depth_images.decoder(declared, metres)
        data, shape = self._encoded(feature, episode), declared.shape[:2]
        if min(shape) < 1:
            shape = frame_reader.image_size(data[0])
        out = np.empty((len(data), *shape), np.uint16)
        for step, encoded in enumerate(data):
            self._decode(decode, encoded, out[step], episode, step)
        return out, scale

    def depth_of(
        self, feature: str, metres: float, annotated: sidecar.Sidecar | None, episode: int
    ) -> tuple[np.ndarray, float, float]:
        """Depth of an episode from an annotation sidecar, or from the data set's own images where that is None.

        Returns:
          raw u16 [T, H, W], scale, offset; value = raw * scale + offset (see `qdepth_jax.depth`).
        """
        if annotated is not None:
            row = self._split.episodes[episode]
            raw = annotated.values[row["start"] : row["start"] + row["length"]]
            return np.array(raw), float(annotated.scale[episode]), float(annotated.offset[episode])
        if feature not in self._split.dataset.features:
            raise errors.UserError(
                f"data set {self._split.dataset.name} in {self._split.dataset.directory} has no depth feature "
                f"{feature!r}: annotate it with tools/annotate_depth.py"
            )
        return *self.depth(feature, metres, episode), 0.0

    def close(self) -> None:
        self._files.close()

    def _encoded(self, feature: str, episode: int) -> list[bytes]:
        row = self._split.episodes[episode]
        path = self._split.shard_path(int(row["shard"]))
        spans = self._split.spans(feature)[row["start"] : row["start"] + row["length"]]
        pending = [self._files.start(path, offset, size) for offset, size in spans.tolist()]
        return [wait() for wait in pending]

    def _decode(self, decode, encoded: bytes, out: np.ndarray, episode: int, step: int) -> None:
        try:
            decode(encoded, out)
        except ValueError as error:
            frame = int(self._split.episodes["start"][episode]) + step
            raise ValueError(f"{self._split.where(frame)}: {error}") from error
