"""Where a run keeps its files: a local folder or a bucket URL, one kind of path for both; room on a local disk.

A URL never becomes a pathlib path: that would turn gs://bucket into the local folder gs:/bucket.
"""

import contextlib
import errno
import fcntl
import glob
import importlib.util
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from qdepth_jax import config as config_lib
from qdepth_jax import errors, files

ALLOWANCE = 4 * 2**20  # bytes per checkpoint beside its arrays: Orbax writes some dozen small files


# What etils.epath lists and moves objects with; arrays go through TensorStore's own clients. TensorFlow serves too.
CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}


def is_remote(workdir: str | epath.Path) -> bool:
    return "://" in str(workdir)


def folder(workdir: str) -> epath.Path:
    """The workdir as a path: absolute where it is local, as it stands where it is a URL.

    Raises:
      UserError: a URL without bucket, of an unknown kind, or of one for which a package is missing.
    """
    if is_remote(workdir):
        scheme, _, rest = str(workdir).partition("://")
        if scheme not in CLIENTS:
            raise errors.UserError(f"{workdir!r}: a workdir is a local folder or one of {', '.join(CLIENTS)}://")
        if not any(importlib.util.find_spec(name) for name in (CLIENTS[scheme], "tensorflow")):
            raise errors.UserError(f"{workdir!r} needs a client for {scheme}://: pip install {CLIENTS[scheme]}")
        if not rest.strip("/"):
            raise errors.UserError(f"{workdir!r} names no bucket: write {scheme}://BUCKET/FOLDER")
        return epath.Path(str(workdir).rstrip("/"))
    return epath.Path(os.path.abspath(os.path.expanduser(workdir)))


def write_whole(path: epath.Path, text: str) -> None:
    """The file appears whole or not at all, whatever kills the process (an object of a bucket does so by itself)."""
    if is_remote(path):
        path.write_text(text)
    else:
        files.write_whole(path, text)


@contextlib.contextmanager
def only_one(path: epath.Path, say: Callable[[str], None], flag: str = "--workdir") -> Iterator[None]:
    """Holds PATH/lock, so that a second start on a workdir is refused instead of damaging the first.

    `flag` is what the user calls the folder.

    The system releases it however the process ends. A bucket has no such thing: there the user has to see to it.

    Raises:
      UserError: another process holds it; which.
    """
    if is_remote(path):
        yield
        return
    try:
        file = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        if is_full_disk(error):
            raise
        raise errors.UserError(f"{flag}={path} cannot be written ({error}): choose another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise errors.UserError(
                f"{flag}={path} is in use by another start ({file.read().strip() or 'which has just begun'}): wait "
                f"for its end, stop it, or choose another {flag}"
            ) from None
        except OSError as error:  # some network disks have no locks
            say(f"{path}/lock cannot be locked ({error}): see to it that no second start uses this {flag}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # nobody holds it any more


@contextlib.contextmanager
def appears_whole(out: epath.Path, say: Callable[[str], None]) -> Iterator[epath.Path]:
    """A folder to write to, in its place when the block ends; nothing of it stays when the block fails.

    Only a killed process leaves its folder; it is named at the next start. A bucket has no rename: there the file that
    a reader goes by comes last.

    Raises:
      UserError: the place cannot be written, or somebody else wrote there meanwhile.
    """
    if is_remote(out):
        try:
            yield out
        except BaseException:
            if out.exists():
                out.rmtree()
            raise
        return
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        left = [str(path) for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp")]
        temporary.mkdir()
    except OSError as error:
        if is_full_disk(error):
            raise
        raise errors.UserError(f"--output={out} cannot be written ({error}): choose another folder") from error
    if left:
        say(
            f"left by processes that write {out} now or were killed at it; delete what nobody writes: {', '.join(left)}"
        )
    try:
        yield temporary
        try:
            temporary.rename(out)
        except OSError as error:
            if out.exists():
                raise errors.UserError(f"--output={out} appeared meanwhile: choose another folder") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def size_of(abstract: Any) -> int:
    """Bytes of one checkpoint of this state on disk, at most."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract)) + ALLOWANCE


def free_bytes(workdir: str) -> int | None:
    """Room on the disk of a local folder; None for a bucket, which has no such thing."""
    return None if is_remote(workdir) else shutil.disk_usage(workdir).free


def check_room(workdir: str, abstract: Any, train: config_lib.TrainConfig, existing: int = 0) -> None:
    """Refuse to start a run whose checkpoints cannot fit, `existing` of them being there already.

    Raises:
      UserError: less free space than what train.keep_* let stay until total_steps, and one being written.
    """
    room = free_bytes(workdir)
    if room is None:
        return
    kept = train.keep_checkpoints + train.keep_best
    kept += train.total_steps // train.keep_every if train.keep_every else 0
    kept = min(kept, -(-train.total_steps // train.checkpoint_every))
    need = max(1, kept + 1 - existing) * size_of(abstract)
    if need > room:
        raise errors.UserError(
            f"{workdir!r} has {room / 2**20:.0f} MiB free, but {kept} checkpoints and one being written need "
            f"{need / 2**20:.0f} MiB: free space, choose another --workdir or lower train.keep_checkpoints, "
            "train.keep_best, or raise train.keep_every"
        )


@contextlib.contextmanager
def full_disk(workdir: str, whole: str = "earlier checkpoints are complete") -> Iterator[None]:
    """A disk that fills is a message, not a page of tracebacks; `whole` says what is safe."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise errors.UserError(
                f"the disk of {workdir!r} is full; {whole}. Free space and give the same command again"
            ) from error
        raise


def is_full_disk(error: BaseException | None) -> bool:
    """True where the error or what caused it is a full disk, a quota or a limit on file sizes."""
    while error is not None:
        if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in ("No space left", "Disk quota exceeded", "File too large")):
            return True
        error = error.__cause__ or error.__context__
    return False
