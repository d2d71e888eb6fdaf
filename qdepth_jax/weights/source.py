"""What every reader of a weight file hands over: names, shapes and dtypes at once, numbers when they are asked for."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from qdepth_jax import errors

# Elements of one piece: 64 MiB in float32. Large enough that a request to a bucket or a device does not show, small
# against the memory of any host.
ELEMENTS = 16 * 2**20

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Block = tuple[tuple[int, ...], np.ndarray]  # start of every axis, array


@dataclasses.dataclass(frozen=True)
class Spec:
    """One array. chunk: the smallest block that the file lets read alone; () where any will do."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


class Source:
    """Base of the readers.

    Attributes:
      specs: key -> Spec.
      files: name -> bytes, for the record of where weights come from.
    """

    specs: dict[str, Spec]
    files: dict[str, int]

    def pieces(self, key: str, elements: int) -> Iterator[Block]:
        """The array in blocks of about `elements`, in C order, each read when it is asked for."""
        raise NotImplementedError

    def read(self, key: str) -> np.ndarray:
        """The whole array."""
        blocks = list(self.pieces(key, max(self.specs[key].size, 1)))
        if len(blocks) == 1:
            return blocks[0][1]
        out = np.empty(self.specs[key].shape, self.specs[key].dtype)
        for start, block in blocks:
            out[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
        return out

    def close(self) -> None:
        """Gives files back."""


class Arrays(Source):
    """Arrays in memory as a source."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.specs = {key: Spec(tuple(array.shape), np.dtype(array.dtype)) for key, array in arrays.items()}
        self.files = {}

    def pieces(self, key: str, elements: int) -> Iterator[Block]:
        array = np.asarray(self._arrays[key])
        for block in blocks(self.specs[key], elements):
            yield tuple(s.start for s in block), array[block]


def as_source(weights: Source | Mapping[str, np.ndarray]) -> Source:
    """Itself, or a dict of arrays as a source."""
    return weights if isinstance(weights, Source) else Arrays(weights)


def specs_of(weights: Source | Mapping[str, "Spec | np.ndarray"]) -> dict[str, Spec]:
    """Key -> Spec of a source, of its specs, or of a dict of arrays."""
    found = weights.specs if isinstance(weights, Source) else weights
    return {key: Spec(tuple(x.shape), np.dtype(x.dtype)) for key, x in found.items()}


def blocks(spec: Spec, elements: int) -> Iterator[tuple[slice, ...]]:
    """Blocks that cover an array, in C order, each of whole chunks and of at most `elements` unless a chunk has more.

    Last axes first grow to their whole length; without chunks every block is therefore one run of the file.
    """
    sizes = [min(c, n) for c, n in zip(spec.chunk or (1,) * len(spec.shape), spec.shape, strict=True)]
    if 0 in spec.shape:
        return
    for axis in reversed(range(len(sizes))):
        chunk, others = sizes[axis], math.prod(sizes[:axis] + sizes[axis + 1 :])
        sizes[axis] = min(spec.shape[axis], max(1, elements // (others * chunk)) * chunk)
        if sizes[axis] < spec.shape[axis]:
            break
    ranges = [range(0, n, size) for n, size in zip(spec.shape, sizes, strict=True)]
    for start in itertools.product(*ranges):
        yield tuple(slice(a, min(a + size, n)) for a, size, n in zip(start, sizes, spec.shape, strict=True))


def equal(weights: Source, first: str, second: str) -> bool:
    """Whether two keys hold the same numbers; reads both in pieces."""
    pairs = zip(weights.pieces(first, ELEMENTS), weights.pieces(second, ELEMENTS), strict=True)
    return all(np.array_equal(a, b) for (_, a), (_, b) in pairs)


def check_finite(block: np.ndarray, name: str) -> None:
    """Refuses weights that are no numbers: the model would be one of NaN from its first step.

    Raises:
      UserError: how many of a block are not finite.
    """
    if block.dtype == BFLOAT16:  # exponent of ones; NumPy's own test would convert every number
        bad = (block.view(np.uint16) & 0x7F80) == 0x7F80
    elif block.dtype.kind == "f":
        bad = ~np.isfinite(block)
    else:
        return
    if bad.any():
        raise errors.UserError(
            f"{name} holds {int(bad.sum())} numbers that are NaN or infinite (of {block.size} read last): the file is "
            "damaged, or of a run that diverged"
        )
