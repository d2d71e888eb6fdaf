"""Who may write an unfinished sidecar: one process at a time opens or publishes it, one writes each share.

Locks are those of the kernel (flock): they end with their process, however that ends. On a network file system they
hold between hosts where it carries locks (NFS version 4 does).
"""

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator

from qdepth_jax import errors

_NAME = re.compile(r"process-(\d+)-of-(\d+)\.lock")


@contextlib.contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Waits for a lock file and holds it; the file is gone afterwards."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is(path, file):
                break
            os.close(file)  # its last holder removed it while we waited: the lock is another file now
        except BaseException:
            os.close(file)
            raise
    try:
        yield
    finally:
        # Removed before it is released, so that nobody can hold a lock that others do not see.
        os.unlink(path)
        os.close(file)


def claim(folder: str, process: int, processes: int, what: str) -> int:
    """Holds the share `process` of `processes`; returns the open lock, which ends when it is closed.

    To be called inside `exclusive`.

    Args:
      folder: of the lock files. what: the thing that is written, for messages.

    Raises:
      UserError: a running process has this share, or runs with another number of processes.
    """
    for name in sorted(os.listdir(folder)):
        if not (found := _NAME.fullmatch(name)) or (int(found[1]), int(found[2])) == (process, processes):
            continue
        if int(found[2]) != processes:
            file = os.open(os.path.join(folder, name), os.O_RDWR)
            if not _try(file):
                holder = _holder(file)
                os.close(file)
                raise errors.UserError(
                    f"{what} is being written by process {int(found[1])} of {int(found[2])} ({holder}), and this is "
                    f"process {process} of {processes}: wait for it, stop it, or start all with one --num_processes"
                )
            os.unlink(os.path.join(folder, name))
            os.close(file)
    path = os.path.join(folder, f"process-{process:05d}-of-{processes:05d}.lock")
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    if not _try(file):
        holder = _holder(file)
        os.close(file)
        more = "" if processes == 1 else ": give each its own --process_id"
        raise errors.UserError(f"{what}: process {process} of {processes} is running already ({holder}){more}")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return file


def _try(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace") or "unknown"


def _is(path: str, file: int) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
