"""Whole episodes in order: what annotation, tokenisation and inspection read (training reads batches).

An episode may hold frames that were set aside (see `quarantine`): they may not decode, so those who go through all of a
data set read `good_steps` and say what stands at the others.
"""

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import depth_images, frame_reader, index, quarantine, sidecar, sidecar_sums


class EpisodeReader:
    """Reads all frames of one episode of a split; memory is one episode."""

    def __init__(self, split: index.SplitIndex):
        self._split = split
        self._files = frame_reader.ShardFiles()

    def length(self, episode: int) -> int:
        return int(self._split.episodes["length"][episode])

    def good_steps(self, episode: int) -> np.ndarray:
        """i64 [n]: ascending steps of an episode that were not set aside; all of them but in damaged data."""
        row = self._split.episodes[episode]
        bad = self._split.quarantined
        low, high = np.searchsorted(bad, [row["start"], row["start"] + row["length"]])
        return np.setdiff1d(np.arange(row["length"]), bad[low:high] - row["start"])

    def image_size(self, feature: str) -> tuple[int, int]:
        """(height, width) of the first image of a split that was not set aside."""
        for episode in range(len(self._split.episodes)):
            steps = self.good_steps(episode)
            if len(steps):
                return frame_reader.image_size(self._encoded(feature, episode, steps[:1])[0])
        raise errors.UserError(
            f"{self._split.dataset.name} {self._split.name}: all {self._split.frames} frames are set aside "
            "(quarantine.json of the index): leave this split out with --splits"
        )

    def images(
        self,
        feature: str,
        episode: int,
        size: tuple[int, int] | None = None,
        steps: np.ndarray | None = None,
        swapped: bool = False,
    ) -> np.ndarray:
        """u8 [T, H, W, 3] of an image feature; native size, or resized to `size` (height, width).

        With `steps`, i64 [n], only those are read: u8 [n, H, W, 3]. `swapped`: the file holds blue, green, red, as
        `definitions.swapped_channels` says of a view; what is returned is red, green, blue in either case.
        """
        decode = frame_reader.decode_bgr if swapped else frame_reader.decode_rgb
        data, steps = self._encoded(feature, episode, steps), self._steps(episode, steps)
        height, width = size or frame_reader.image_size(data[0])
        out = np.empty((len(data), height, width, 3), np.uint8)
        for row, (step, encoded) in enumerate(zip(steps, data, strict=True)):
            self._decode(decode, encoded, out[row], episode, step)
        return out

    def depth(
        self, feature: str, metres: float, episode: int, steps: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """u16 [T, H, W] of a depth feature (0 = invalid), and metres per unit of it; `metres` per stored unit.

        With `steps`, i64 [n], only those are read: u16 [n, H, W].
        """
        declared = self._split.dataset.feature(feature)
        decode, scale = depth_images.decoder(declared, metres)
        data, shape = self._encoded(feature, episode, steps), declared.shape[:2]
        if min(shape) < 1:
            shape = frame_reader.image_size(data[0])
        out = np.empty((len(data), *shape), np.uint16)
        for row, (step, encoded) in enumerate(zip(self._steps(episode, steps), data, strict=True)):
            self._decode(decode, encoded, out[row], episode, step)
        return out, scale

    def depth_of(
        self,
        feature: str,
        metres: float,
        annotated: sidecar.Sidecar | None,
        episode: int,
        steps: np.ndarray | None = None,
    ) -> tuple[np.ndarray, float, float]:
        """Depth of an episode from an annotation sidecar, or from the data set's own images where that is None.

        Returns:
          raw u16 [T, H, W] (of `steps`: [n, H, W]), scale, offset; value = raw * scale + offset (see
          `qdepth_jax.depth`).

        Raises:
          UserError: no such depth, or the bytes of the sidecar are not those that were written.
        """
        if annotated is not None:
            row = self._split.episodes[episode]
            raw = np.array(annotated.values[row["start"] : row["start"] + row["length"]])
            sidecar_sums.check_episode(annotated, episode, int(row["start"]), raw)
            return raw[self._steps(episode, steps)], float(annotated.scale[episode]), float(annotated.offset[episode])
        if feature not in self._split.dataset.features:
            raise errors.UserError(
                f"data set {self._split.dataset.name} in {self._split.dataset.directory} has no depth feature "
                f"{feature!r}: annotate it with tools/annotate_depth.py"
            )
        return *self.depth(feature, metres, episode, steps), 0.0

    def close(self) -> None:
        self._files.close()

    def _steps(self, episode: int, steps: np.ndarray | None) -> np.ndarray:
        return np.arange(self.length(episode)) if steps is None else steps

    def _encoded(self, feature: str, episode: int, steps: np.ndarray | None) -> list[bytes]:
        row = self._split.episodes[episode]
        path = self._split.shard_path(int(row["shard"]))
        spans = self._split.spans(feature)[row["start"] + self._steps(episode, steps)]
        pending = [self._files.start(path, offset, size) for offset, size in spans.tolist()]
        return [wait() for wait in pending]

    def _decode(self, decode, encoded: bytes, out: np.ndarray, episode: int, step: int) -> None:
        try:
            decode(encoded, out)
        except ValueError as error:
            frame = int(self._split.episodes["start"][episode]) + int(step)
            raise ValueError(f"{self._split.where(frame)}: {error}; {quarantine.HOW}") from error
