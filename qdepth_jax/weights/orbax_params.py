"""Reads a tree of arrays that Orbax saved (openpi's `params`), array by array, whole chunks of the store at a time.

Orbax restores trees; here single arrays are read through TensorStore, with or without OCDBT, zarr or zarr3, on disks
and in buckets. A chunk that is not there is an error: TensorStore alone would give zeros for it.
"""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from qdepth_jax import errors, workdirs
from qdepth_jax.weights import source

METADATA = "_METADATA"


def open_source(path: str) -> source.Source:
    """The folder of an Orbax tree, or a folder whose item `params` it is; keys are paths, "params/img/head/kernel".

    Raises:
      UserError: no Orbax checkpoint there, or one whose metadata cannot be read.
    """
    folder = workdirs.folder(path)
    if not (folder / METADATA).exists() and (folder / "params" / METADATA).exists():
        folder = folder / "params"
    if not (folder / METADATA).exists():
        inside = sorted(p.name for p in folder.iterdir())[:6] if folder.is_dir() else "no folder"
        raise errors.UserError(
            f"{path} is no Orbax checkpoint: neither it nor {path}/params holds {METADATA}; it holds {inside}"
        )
    return OrbaxSource(folder)


class OrbaxSource(source.Source):
    """An open checkpoint."""

    def __init__(self, folder: epath.Path):
        import orbax.checkpoint as ocp

        self._folder, self._opened = folder, {}
        try:
            about = json.loads((folder / METADATA).read_text())
            tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
            self._driver = "zarr3" if about.get("use_zarr3") else "zarr"
            self._ocdbt = about["use_ocdbt"] if "use_ocdbt" in about else (folder / "manifest.ocdbt").exists()
            # Checkpoints of old Orbax versions leave out chunks of zeros.
            self._whole = bool(about.get("store_array_data_equal_to_fill_value"))
            leaves = {
                "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            self._names = {key: leaf.name for key, leaf in leaves.items()}
            self.specs = {
                key: source.Spec(
                    tuple(leaf.shape),
                    np.dtype(leaf.dtype),
                    tuple(leaf.storage.chunk_shape) if leaf.storage is not None else (),
                )
                for key, leaf in leaves.items()
            }
        except Exception as error:  # whatever a damaged file makes Orbax and TensorStore raise
            raise errors.UserError(f"{folder} is no whole Orbax checkpoint: {_short(error)}") from error
        self.files = {folder.name: sum(spec.nbytes for spec in self.specs.values())}

    def pieces(self, key: str, elements: int) -> Iterator[source.Block]:
        try:
            array = self._array(key)
            for block in source.blocks(self.specs[key], elements):
                yield tuple(s.start for s in block), np.asarray(array[block].read().result())
        except (ValueError, OSError) as error:  # TensorStore's status codes come as these
            raise errors.UserError(f"{self._folder}: {key} cannot be read: {_short(error)}") from error

    def _array(self, key: str) -> Any:
        import tensorstore as ts

        if key not in self._opened:
            base = str(self._folder)
            base = base if workdirs.is_remote(base) else f"file://{base}"
            name = self._names[key]
            store = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"} if self._ocdbt else f"{base}/{name}/"
            spec = {"driver": self._driver, "kvstore": store}
            if self._whole:
                spec["fill_missing_data_reads"] = False
            self._opened[key] = ts.open(spec, read=True).result()
        return self._opened[key]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
