"""What the system says of a shard that cannot be opened or read, with the fix; it says nothing about the data in it."""

import contextlib
import errno
import resource
from collections.abc import Iterator

from qdepth_jax import errors

_AWAY = (
    "its disk or file server does not answer: the same command, given again, continues; where it comes back, look at "
    "the mount and the disk"
)
_FIXES = {
    errno.ENOENT: "the file is gone: copy it again, or index the data set again if it changed (tools/index_rlds.py)",
    errno.ENOTDIR: "the folder is gone: copy the data set again, or mount its disk",
    errno.EACCES: "this user may not read it: change its owner or its mode",
    errno.EPERM: "this user may not read it: change its owner or its mode",
    errno.ENFILE: "all processes of this machine together have too many files open: raise fs.file-max",
    errno.ESTALE: "the file was replaced or its file server started again: the same command, given again, opens it",
    errno.ENOMEM: "the machine is out of memory",
}


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Turns an OSError inside into `of(path, error)`."""
    try:
        yield
    except OSError as error:
        raise of(path, error) from error


def of(path: str, error: OSError) -> errors.UserError:
    """The message for a shard that the system does not open or read; TryAgain where a later start may read it."""
    number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno
    kind = errors.TryAgain if errors.is_transient(error) else errors.UserError
    fix = _too_many() if number == errno.EMFILE else _FIXES.get(number, _AWAY if kind is errors.TryAgain else "")
    return kind(f"{path} cannot be read ({error.strerror or error})" + (f"; {fix}" if fix else ""))


def _too_many() -> str:
    # Counting them would need a descriptor.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "" if hard == resource.RLIM_INFINITY else f", at most {hard},"
    return (
        f"this process has all {soft} files open that it may: raise the limit with `ulimit -n N`{most} and start again"
    )
