"""Reads a state dict out of a torch checkpoint (.pt, .pth, .bin), array by array. Needs torch, an extra.

A pickle is a program: only what torch's weights-only unpickler accepts is opened. The file is mapped, so a tensor is
read from the disk when it is asked for.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import storage
from qdepth_jax.weights import source


def open_source(path: str, item: str = "model") -> source.Source:
    """A local checkpoint.

    Args:
      path: of a file that torch.save wrote.
      item: where the state dict lies in a dict of several things (a trainer's checkpoint); a file that is a state dict
        itself is taken as it is.

    Raises:
      UserError: torch is not installed; the file is no torch checkpoint, not whole, or holds more than weights.
    """
    try:
        import torch
    except ImportError as error:
        raise errors.UserError(
            f"{path} is a torch checkpoint: install torch to read it (pip install -e '.[interop]')"
        ) from error
    import pickle

    path = storage.absolute(path)
    if storage.is_remote(path):
        raise errors.UserError(f"{path}: torch maps local files only; copy it to a disk first")
    if not os.path.isfile(path):
        raise errors.UserError(f"{path} is no file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise errors.UserError(
            f"{path} holds more than weights, and loading it would run code from it: refused. Save the state dict "
            "alone where you trust it (torch.save(model.state_dict(), ...))"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise errors.UserError(
            f"{path} is no whole torch checkpoint (zip format, torch >= 1.6): {str(error).splitlines()[0][:200]}"
        ) from error
    tensors = _state_dict(found, item, path)
    return TorchSource(path, tensors)


def _state_dict(found: Any, item: str, path: str) -> dict[str, Any]:
    import torch

    if isinstance(found, dict) and isinstance(found.get(item), dict):
        found = found[item]
    if not isinstance(found, dict) or not found:
        raise errors.UserError(f"{path} holds a {type(found).__name__}, and a state dict is needed")
    if odd := [str(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise errors.UserError(
            f"{path} is no state dict and has none under {item!r}: {len(odd)} entries are no tensors ({odd[:5]})"
        )
    return found


class TorchSource(source.Source):
    """Mapped tensors."""

    def __init__(self, path: str, tensors: dict[str, Any]):
        self._tensors = tensors
        self.specs = {key: source.Spec(tuple(t.shape), _dtype(t.dtype)) for key, t in tensors.items()}
        self.files = {os.path.basename(path): os.path.getsize(path)}

    def pieces(self, key: str, elements: int) -> Iterator[source.Block]:
        for block in source.blocks(self.specs[key], elements):
            yield tuple(s.start for s in block), _array(self._tensors[key][block])


def _dtype(dtype: Any) -> np.dtype:
    import torch

    if dtype == torch.bfloat16:
        return source.BFLOAT16
    # torch.float32 -> float32; types that NumPy lacks (quantised ones) are named in the message of the table.
    name = str(dtype).removeprefix("torch.")
    return np.dtype(name) if hasattr(np, name) else np.dtype(object)


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(source.BFLOAT16)
    return tensor.numpy()
