"""Per-frame arrays that belong to a data set but lie beside it: depth tokens and annotated depth maps.

    <root>/<split>/metadata.json   what it is: kind, fingerprint of the data, camera, identity of its maker
    <root>/<split>/values.npy      u16 [F, ...], memory-mapped, row = frame id of the split
    <root>/<split>/scale.npy       f32 [E, 2] per episode (scale, offset): value = raw * scale + offset

Keyed by the content fingerprint of the data set, so it survives a move and cannot be mixed up with other data. While it
is written the folder is called `<split>.partial` and keeps one byte per finished episode: a killed writer continues,
and a reader never sees half a sidecar.
"""

import dataclasses
import errno
import json
import os
import shutil
from typing import Any

import numpy as np

from qdepth_jax import errors
from qdepth_jax.data import storage

KINDS = ("depth", "depth_tokens")
# A token that stands for no depth: what is invalid must not be trained on, and a code would hide that.
INVALID_TOKEN = 65535


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a sidecar holds.

    Attributes:
      kind: "depth" (u16 maps, 0 = invalid) or "depth_tokens" (u16 code indices, INVALID_TOKEN = no valid depth).
      fingerprint, split: of the data set index.
      camera: image feature the values belong to ("steps/observation/image").
      identity: who made it: the tokenizer's identity, or the estimator's name and version.
      row_shape: shape of one frame: (P,) or (H, W).
      frames, episodes: of the split.
      details: json-able rest; tokens: grid, codes, invalid (INVALID_TOKEN);
        depth: {"depth_kind": "metric" | "relative"}.
    """

    kind: str
    fingerprint: str
    split: str
    camera: str
    identity: str
    row_shape: tuple[int, ...]
    frames: int
    episodes: int
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """An opened sidecar: `values` u16 [F, ...] memory-mapped; `scale`, `offset` f32 [E]."""

    metadata: Metadata
    directory: str
    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray


class Writer:
    """Creates or continues a sidecar; episodes may come in any order.

        writer = Writer(root, metadata)
        for episode in writer.pending():
            writer.write(episode, start, values)
        writer.finish()

    Raises:
      UserError: the folder holds a sidecar of something else, is not writable, or the disk is too small.
    """

    def __init__(self, root: str, metadata: Metadata):
        if metadata.kind not in KINDS:
            raise ValueError(f"sidecar kind {metadata.kind!r}: use one of {KINDS}")
        if storage.is_remote(root):
            raise errors.UserError(f"--output={root}: a sidecar is memory-mapped, so it needs a local folder")
        self._final = os.path.join(os.path.abspath(os.path.expanduser(root)), metadata.split)
        self._partial = self._final + ".partial"
        self._metadata = metadata
        if os.path.exists(self._final):
            found = open_sidecar(os.path.dirname(self._final), metadata.split).metadata
            _same(found, metadata, self._final)
            self._done = np.ones(metadata.episodes, np.uint8)
            self._finished = True
            return
        self._finished = False
        path = os.path.join(self._partial, "metadata.json")
        if os.path.exists(path):
            _same(_load_metadata(self._partial), metadata, self._partial)
            mode = "r+"
        else:
            mode = "w+"
            shutil.rmtree(self._partial, ignore_errors=True)
        try:
            os.makedirs(self._partial, exist_ok=True)
            shapes = {
                "values": ((metadata.frames, *metadata.row_shape), np.uint16),
                "scale": ((metadata.episodes, 2), np.float32),
                "done": ((metadata.episodes,), np.uint8),
            }
            arrays = {name: self._map(name, mode, *shape) for name, shape in shapes.items()}
            if mode == "w+":
                _write_json(path, dataclasses.asdict(metadata))
        except OSError as error:
            if mode == "w+":
                shutil.rmtree(self._partial, ignore_errors=True)
            raise _cannot_write(self._final, error) from error
        self._values, self._scale, self._done = arrays["values"], arrays["scale"], arrays["done"]

    def _map(self, name: str, mode: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        path = os.path.join(self._partial, name + ".npy")
        array = np.lib.format.open_memmap(path, mode=mode, dtype=dtype, shape=shape)
        if mode == "w+":
            # Claim the blocks now: a full disk is an error here, but a bus error when a mapped page is written later.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        return array

    def pending(self) -> list[int]:
        """Episodes that are not written yet, ascending."""
        return np.flatnonzero(self._done == 0).tolist()

    def write(self, episode: int, start: int, values: np.ndarray, *, scale: float = 1.0, offset: float = 0.0) -> None:
        """Stores all frames of one episode: u16 [T, ...] at frame ids start..start+T-1."""
        if values.dtype != np.uint16 or values.shape[1:] != self._metadata.row_shape:
            raise ValueError(
                f"sidecar rows are u16 {list(self._metadata.row_shape)}, got {values.dtype} {list(values.shape[1:])}"
            )
        if self._done[episode]:
            return
        self._values[start : start + len(values)] = values
        self._scale[episode] = (scale, offset)
        # Data before mark: a crash between the two repeats the episode, never trusts half of it.
        self._values.flush()
        self._scale.flush()
        self._done[episode] = 1
        self._done.flush()

    def finish(self) -> str:
        """Publishes the sidecar under its final name and returns that folder; all episodes must be written."""
        if not self._finished:
            left = self.pending()
            if left:
                raise ValueError(f"{self._partial}: {len(left)} episodes are not written, first {left[0]}")
            os.remove(os.path.join(self._partial, "done.npy"))
            os.rename(self._partial, self._final)
            self._finished = True
        return self._final


def open_sidecar(root: str, split: str) -> Sidecar:
    """Opens a finished sidecar.

    Raises:
      UserError: there is none (or only an unfinished one), or it is damaged.
    """
    directory = os.path.join(root, split)
    if not os.path.isdir(directory):
        half = " (an unfinished one is there: run the command again)" if os.path.isdir(directory + ".partial") else ""
        raise errors.UserError(
            f"no sidecar {directory}{half}: make it with tools/annotate_depth.py (depth maps) or "
            "tools/tokenize_depth.py (depth tokens)"
        )
    metadata = _load_metadata(directory)
    try:
        values = np.load(os.path.join(directory, "values.npy"), mmap_mode="r")
        scale = np.load(os.path.join(directory, "scale.npy"))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"sidecar {directory} is damaged ({error}): delete it and make it again") from error
    shape = (metadata.frames, *metadata.row_shape)
    if values.shape != shape or values.dtype != np.uint16 or scale.shape != (metadata.episodes, 2):
        raise errors.UserError(
            f"sidecar {directory} is damaged: values are {values.dtype} {values.shape}, uint16 {shape} expected; "
            "delete it and make it again"
        )
    return Sidecar(metadata, directory, values, scale[:, 0].copy(), scale[:, 1].copy())


def token_validity(valid: np.ndarray, grid: int) -> np.ndarray:
    """bool [N, grid * grid]: tokens of which at least half of the pixels have valid depth, row by row.

    Args:
      valid: bool [N, R, R] of the pixels; grid: tokens per side, a divisor of R.
    """
    count, size, _ = valid.shape
    cell = size // grid
    share = valid.reshape(count, grid, cell, grid, cell).mean(axis=(2, 4))
    return (share >= 0.5).reshape(count, grid * grid)


def token_pixels(valid: np.ndarray, size: int) -> np.ndarray:
    """The pixels bool [N, size, size] of tokens bool [N, P]: where a token holds, all of its pixels do."""
    grid = int(valid.shape[1] ** 0.5)
    return valid.reshape(len(valid), grid, grid).repeat(size // grid, axis=1).repeat(size // grid, axis=2)


def check(sidecar: Sidecar, *, kind: str, fingerprint: str, camera: str, identity: str = "") -> None:
    """Refuses a sidecar that belongs to other data, another camera or another maker (identity "" = any)."""
    wanted = {"kind": kind, "fingerprint": fingerprint, "camera": camera, "identity": identity}
    for name, value in wanted.items():
        found = getattr(sidecar.metadata, name)
        if value and found != value:
            raise errors.UserError(
                f"sidecar {sidecar.directory} has {name} {found!r}, but {value!r} is needed: make it again for this "
                f"{'tokenizer' if name == 'identity' else 'data set'}, into another folder"
            )


def _same(found: Metadata, wanted: Metadata, directory: str) -> None:
    for field in dataclasses.fields(Metadata):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if a != b:
            raise errors.UserError(
                f"{directory} holds a sidecar with {field.name} {a!r}, not {b!r}: choose another output folder or "
                "delete it"
            )


def _load_metadata(directory: str) -> Metadata:
    path = os.path.join(directory, "metadata.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return Metadata(**{**content, "row_shape": tuple(content["row_shape"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.UserError(f"{path} is damaged ({error!r}): delete {directory} and make it again") from error


def _write_json(path: str, content: Any) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".tmp", path)


def _cannot_write(directory: str, error: OSError) -> errors.UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space or choose another --output" if full else "choose another --output"
    return errors.UserError(f"cannot write the sidecar {directory}: {error.strerror}; {fix}")
