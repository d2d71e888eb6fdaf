"""Per-frame arrays that belong to a data set but lie beside it: depth tokens and annotated depth maps.

    <root>/<split>/metadata.json   what it is: kind, fingerprint of the data, camera, identity of its maker
    <root>/<split>/values.npy      u16 [F, ...], memory-mapped, row = frame id of the split
    <root>/<split>/scale.npy       f32 [E, 2] per episode (scale, offset): value = raw * scale + offset
    <root>/<split>/figures.npy     f64 [E, N] per episode, optional: counts and sums that its maker reports
    <root>/<split>/sums.npy        u32 [E] per episode: CRC-32 of its rows of the three above (see `sidecar_sums`)

Keyed by the content fingerprint of the data set, so it survives a move and cannot be mixed up with other data. While it
is written the folder is called `<split>.partial` and keeps, in `state/`, one byte per finished episode and a lock per
writing process: killed writers continue, and a reader never sees half a sidecar.
"""

import dataclasses
import errno
import json
import os
import shutil
import zlib
from typing import Any

import numpy as np

from qdepth_jax import errors, files
from qdepth_jax.data import sidecar_lock, storage

STATE, DONE = "state", "state/done"  # of an unfinished sidecar
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
      details: json-able rest; tokens: grid, codes, invalid (INVALID_TOKEN), depth (identity of what was tokenised),
        of a sidecar with its depth_digest (`sidecar_sums.digest`) too;
        depth: {"depth_kind": "metric" | "relative"}, licence, notice and settings of the estimator.
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
    """Opened: `values` u16 [F, ...] memory-mapped; `scale`, `offset` f32 [E]; `figures` f64 [E, N] or None.

    `sums` u32 [E] are None where an older version made it: damage inside of it cannot be seen.
    """

    metadata: Metadata
    directory: str
    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    figures: np.ndarray | None = None
    sums: np.ndarray | None = None


def episode_sum(values: np.ndarray, scale: float, offset: float, figures: np.ndarray | None) -> int:
    """CRC-32 of what is stored of one episode: values u16 [T, ...], (scale, offset) as f32, figures f64 [N]."""
    found = zlib.crc32(np.ascontiguousarray(values))
    found = zlib.crc32(np.array([scale, offset], np.float32), found)
    return found if figures is None else zlib.crc32(np.ascontiguousarray(figures, np.float64), found)


class Writer:
    """Creates or continues a sidecar; episodes may come in any order, and from several processes at once.

        writer = Writer(root, metadata, process=1, processes=4)
        for episode in writer.pending():
            writer.write(episode, start, values)
        writer.finish()

    Process p of n writes the episodes e with e % n = p. Nobody waits for anybody: whoever finds all episodes done
    publishes. The finished bytes are the same for any number of processes and any interruptions.

    Args:
      figures: numbers per episode that `write` takes beside the values; kept in figures.npy, f64 [E, figures].

    Raises:
      UserError: the folder holds a sidecar of something else, is not writable, or the disk is too small; a running
        process writes this share already, or others run with another number of processes.
    """

    _files: dict[str, tuple[int, int]] | None = None  # name -> (file descriptor, where its data begins)
    _lock: int | None = None
    _published = False

    def __init__(self, root: str, metadata: Metadata, figures: int = 0, process: int = 0, processes: int = 1):
        if metadata.kind not in KINDS:
            raise ValueError(f"sidecar kind {metadata.kind!r}: use one of {KINDS}")
        if not 0 <= process < processes:
            raise errors.UserError(
                f"--process_id={process} --num_processes={processes}: processes are numbered from 0 to N - 1"
            )
        if storage.is_remote(root):
            raise errors.UserError(f"--output={root}: sidecars are read through mapped memory: name a local folder")
        # As it will be read back: JSON knows no tuples.
        metadata = dataclasses.replace(metadata, details=json.loads(json.dumps(metadata.details)))
        self._root = os.path.abspath(os.path.expanduser(root))
        self._final = os.path.join(self._root, metadata.split)
        self._partial = self._final + ".partial"
        self._metadata, self._figures = metadata, figures
        self._share = np.arange(process, metadata.episodes, processes)
        try:
            os.makedirs(self._root, exist_ok=True)
            with sidecar_lock.exclusive(self._lock_path):
                self._open(process, processes)
        except OSError as error:
            self.close()
            raise _cannot_write(self._final, error) from error
        except BaseException:
            self.close()
            raise

    @property
    def _lock_path(self) -> str:
        return os.path.join(self._root, f".{self._metadata.split}.lock")

    def _arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """File -> shape and type of its array."""
        frames, episodes = self._metadata.frames, self._metadata.episodes
        arrays = {"values": ((frames, *self._metadata.row_shape), np.uint16), "scale": ((episodes, 2), np.float32)}
        if self._figures:
            arrays["figures"] = ((episodes, self._figures), np.float64)
        arrays["sums"] = ((episodes,), np.uint32)
        return arrays | {DONE: ((episodes,), np.uint8)}

    def _open(self, process: int, processes: int) -> None:
        if os.path.exists(self._final):
            _same(open_sidecar(self._root, self._metadata.split).metadata, self._metadata, self._final)
            shutil.rmtree(os.path.join(self._final, STATE), ignore_errors=True)
            self._published = True
            return
        path = os.path.join(self._partial, "metadata.json")
        if os.path.exists(path):
            _same(_load_metadata(self._partial), self._metadata, self._partial)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
            try:
                os.makedirs(os.path.join(self._partial, STATE))
                for name, (shape, dtype) in self._arrays().items():
                    _create(os.path.join(self._partial, name + ".npy"), shape, dtype)
                _write_json(path, dataclasses.asdict(self._metadata))  # last: with it the folder counts as begun
            except OSError:
                shutil.rmtree(self._partial, ignore_errors=True)
                raise
        state = os.path.join(self._partial, STATE)
        if not os.path.isdir(state) or not os.path.exists(os.path.join(self._partial, "sums.npy")):
            raise errors.UserError(f"{self._partial} was begun by an older version: delete it and start again")
        self._lock = sidecar_lock.claim(state, process, processes, self._partial)
        self._files = {}
        for name, (shape, dtype) in self._arrays().items():
            file = os.path.join(self._partial, name + ".npy")
            found = _load(file, self._partial)
            if found.shape != shape or found.dtype != dtype:
                raise errors.UserError(
                    f"{file} is {found.dtype} {found.shape}, {np.dtype(dtype)} {shape} expected: delete "
                    f"{self._partial} and start again"
                )
            self._files[name] = os.open(file, os.O_RDWR), os.path.getsize(file) - found.nbytes

    def _done(self) -> np.ndarray:
        """bool [E]: what all processes have finished by now."""
        if self._published:
            return np.ones(self._metadata.episodes, bool)
        if self._files is None:
            raise ValueError(f"{self._partial}: the writer is closed")
        file, begin = self._files[DONE]
        return np.frombuffer(os.pread(file, self._metadata.episodes, begin), np.uint8) == 1

    def pending(self) -> list[int]:
        """Episodes of this process that are not written yet, ascending."""
        return self._share[~self._done()[self._share]].tolist()

    def missing(self) -> int:
        """Episodes that no process has written yet."""
        return int((~self._done()).sum())

    def write(
        self,
        episode: int,
        start: int,
        values: np.ndarray,
        *,
        scale: float = 1.0,
        offset: float = 0.0,
        figures: np.ndarray | None = None,
    ) -> None:
        """Stores all frames of one episode: u16 [T, ...] at frame ids start..start+T-1, and its figures f64 [figures].

        Not through mapped memory: pages of neighbouring episodes are shared, and two hosts that write one page of a
        network file system would each put back the other's old bytes.
        """
        if values.dtype != np.uint16 or values.shape[1:] != self._metadata.row_shape:
            raise ValueError(
                f"sidecar rows are u16 {list(self._metadata.row_shape)}, got {values.dtype} {list(values.shape[1:])}"
            )
        if not 0 <= start <= start + len(values) <= self._metadata.frames:
            raise ValueError(f"frames {start} to {start + len(values)} of {self._metadata.frames}")
        if (self._figures or None) != (None if figures is None else len(figures)):
            raise ValueError(f"{self._figures} figures an episode, got {figures}")
        if not np.isfinite([scale, offset]).all():
            raise ValueError(f"episode {episode}: scale {scale} and offset {offset} must be finite")
        if self._done()[episode]:
            return
        try:
            self._put("values", start, values)
            self._put("scale", episode, np.array([[scale, offset]], np.float32))
            if figures is not None:
                self._put("figures", episode, np.asarray(figures, np.float64)[None])
            self._put("sums", episode, np.array([episode_sum(values, scale, offset, figures)], np.uint32))
            # Data before mark: a crash between the two repeats the episode, never trusts half of it.
            self._put(DONE, episode, np.ones(1, np.uint8))
        except OSError as error:
            raise _cannot_write(self._final, error) from error

    def _put(self, name: str, row: int, rows: np.ndarray) -> None:
        """Writes rows [n, ...] of an array from number `row` on; they are on the disk when this returns."""
        file, begin = self._files[name]
        data = memoryview(np.ascontiguousarray(rows)).cast("B")
        at = begin + row * (rows.nbytes // max(len(rows), 1))
        while len(data):
            count = os.pwrite(file, data, at)
            data, at = data[count:], at + count
        os.fdatasync(file)

    def finish(self) -> str | None:
        """Ends this process's share. Publishes the sidecar if no episode is missing and returns its folder.

        Returns:
          None while other processes have episodes left: the last of them, or any later start, publishes.
        """
        if self._published:
            return self._final
        if left := self.pending():
            raise ValueError(f"{self._partial}: {len(left)} episodes are not written, first {left[0]}")
        with sidecar_lock.exclusive(self._lock_path):
            if not os.path.exists(self._final):
                if self.missing():
                    self.close()
                    return None
                # A kill right after the rename leaves the state in the finished folder, where it harms nobody.
                os.rename(self._partial, self._final)
            shutil.rmtree(os.path.join(self._final, STATE), ignore_errors=True)
        self._published = True
        self.close()
        return self._final

    def close(self) -> None:
        """Gives the share back; done without it when the process ends."""
        for file, _ in (self._files or {}).values():
            os.close(file)
        if self._lock is not None:
            os.close(self._lock)
        self._files, self._lock = None, None

    def __del__(self):
        self.close()


def _create(path: str, shape: tuple[int, ...], dtype: type) -> None:
    """An array of zeros whose blocks are claimed: a full disk is an error now, not in the middle of the work."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def _load(path: str, directory: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} is damaged ({error}): delete {directory} and start again") from error


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
        path = os.path.join(directory, "figures.npy")
        figures = np.load(path) if os.path.exists(path) else None
        path = os.path.join(directory, "sums.npy")
        sums = np.load(path) if os.path.exists(path) else None
    except (OSError, ValueError) as error:
        raise errors.UserError(f"sidecar {directory} is damaged ({error}): delete it and make it again") from error
    shape = (metadata.frames, *metadata.row_shape)
    if values.shape != shape or values.dtype != np.uint16 or scale.shape != (metadata.episodes, 2):
        raise errors.UserError(
            f"sidecar {directory} is damaged: values are {values.dtype} {values.shape}, uint16 {shape} expected; "
            "delete it and make it again"
        )
    if sums is not None and (sums.shape != (metadata.episodes,) or sums.dtype != np.uint32):
        raise errors.UserError(
            f"sidecar {directory} is damaged: sums.npy is {sums.dtype} {sums.shape}, uint32 ({metadata.episodes},) "
            "expected; delete it and make it again"
        )
    if odd := np.flatnonzero(~np.isfinite(scale).all(axis=1)).tolist():
        raise errors.UserError(
            f"sidecar {directory} is damaged: scale and offset of episode {odd[0]} are {scale[odd[0]].tolist()} "
            f"({len(odd)} of {metadata.episodes} episodes are not finite); delete it and make it again"
        )
    return Sidecar(metadata, directory, values, scale[:, 0].copy(), scale[:, 1].copy(), figures, sums)


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
    here, there = dataclasses.asdict(wanted), dataclasses.asdict(found)
    here, there = (row | {f"details.{k}": v for k, v in row.pop("details").items()} for row in (here, there))
    if odd := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        if "identity" in odd:  # another maker has other settings too: one difference says it
            odd = [name for name in odd if not name.startswith("details.")]
        listed = "; ".join(f"{name} {there.get(name)!r}, not {here.get(name)!r}" for name in odd)
        raise errors.UserError(
            f"{directory} holds a sidecar with {listed}: give every process the same flags, weights and data, choose "
            "another output folder, or delete it"
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
    files.write_whole(path, json.dumps(content, indent=1))


def _cannot_write(directory: str, error: OSError) -> errors.UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space or choose another --output" if full else "choose another --output"
    return errors.UserError(f"cannot write the sidecar {directory}: {error.strerror}; {fix}")
