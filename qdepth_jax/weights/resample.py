"""Position embeddings of a vision tower for another picture size, as big_vision raises the resolution of a model."""

from collections.abc import Iterator

import numpy as np

from qdepth_jax import errors
from qdepth_jax.weights import big_vision_names, source

KEYS = ("img/pos_embedding", "embeddings.position_embedding.weight")


def positions(grid: np.ndarray, side: int) -> np.ndarray:
    """f32 [S, S, D] -> f32 [side, side, D]: linear in both directions, corner on corner.

    Source: big_vision models/vit.py, resample_posemb (scipy.ndimage.zoom of order 1). Nothing is anti-aliased.
    """
    weight = _weights(grid.shape[0], side)
    return np.einsum("ai,bj,ijd->abd", weight, weight, grid.astype(np.float64), optimize=True).astype(np.float32)


def _weights(old: int, new: int) -> np.ndarray:
    """f64 [new, old]: row i interpolates at i (old - 1) / (new - 1)."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    low = np.minimum(at.astype(int), max(old - 2, 0))
    out = np.zeros((new, old))
    out[np.arange(new), low] = 1 - (at - low)
    out[np.arange(new), np.minimum(low + 1, old - 1)] += at - low
    return out


class Resampled(source.Source):
    """A source whose vision tower has positions for `image_size`; everything else as it is.

    Raises:
      UserError: no position embedding, or no whole number of patches.
    """

    def __init__(self, weights: source.Source, image_size: int, patch: int):
        if image_size % patch or image_size < patch:
            near = max(1, round(image_size / patch)) * patch
            raise errors.UserError(f"image_size={image_size} is no multiple of the patch, {patch} pixels: use {near}")
        found = [key for key in weights.specs if key.removesuffix("/value").endswith(KEYS)]
        if len(found) != 1:
            raise errors.UserError(f"the weights have {len(found)} position embeddings, one is needed: {found}")
        self._weights, self._key, self._side = weights, found[0], image_size // patch
        old = weights.specs[self._key]
        shape = (*old.shape[:-2], self._side**2, old.shape[-1])
        self._old_side = big_vision_names.image_side(old.shape[-2])
        self.specs = weights.specs | {self._key: source.Spec(shape, np.dtype(np.float32))}
        self.files = weights.files

    def pieces(self, key: str, elements: int) -> Iterator[source.Block]:
        if key != self._key:
            yield from self._weights.pieces(key, elements)
            return
        old, shape = self._weights.read(key), self.specs[key].shape
        new = positions(old.reshape(self._old_side, self._old_side, -1), self._side).reshape(shape)
        yield (0,) * len(shape), new

    def close(self) -> None:
        self._weights.close()
