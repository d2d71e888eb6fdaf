"""Where a data set lies: local and network disks through the operating system, `gs://` through TensorStore.

Everything that reads shards or their metadata comes through here, so the rest of the package knows paths, never
clients. Reads of objects are asynchronous underneath: `start` sends the request and hands back how to wait for it.

Facts of TensorStore's gcs driver that shape this file (tensorstore 0.1.86): a listing of a bucket that is missing or
denied comes back empty, without an error, so a listing alone proves nothing; a read of a missing object is no error
either; sizes are not told, only generations; and a byte range that reaches past the end fails as a whole.
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from qdepth_jax import errors

# Sequential reads of objects: large enough that a request's latency does not show, small enough to hold two of them.
CHUNK_BYTES = 8 << 20
# Waits between tries double from the first to the last: about 45 s until a server that only fails is given up.
RETRIES, FIRST_WAIT, LONGEST_WAIT = 6, "1s", "16s"
# A request that is neither answered nor refused (a black hole in the network) ends here.
TIMEOUT_SECONDS = 180.0
# Requests in flight per process; TensorStore's own default of 32 leaves a fast network idle at 32 KB per image.
CONCURRENCY = 128

_GCS = "gs://"
_CREDENTIALS = (
    "give credentials that may read it (GOOGLE_APPLICATION_CREDENTIALS=key.json, or "
    "`gcloud auth application-default login`)"
)


class Stat(NamedTuple):
    """`size` in bytes, -1 where the store tells it only to those who read; `version` changes when content may have:
    modification time in ns on a disk, generation of an object."""

    size: int
    version: str


class Sequential(Protocol):
    """A file that is read from its start to its end. `size` is -1 where it is not known beforehand."""

    size: int

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""

    def close(self) -> None: ...


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> str:
    """The path in the one form used everywhere; a store that cannot be read is an error."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.abspath(os.path.expanduser(path))
    if not path.startswith(_GCS):
        raise errors.UserError(f"{path}: only local folders and gs:// can be read; mount or copy the data")
    path = path.rstrip("/")
    if not path.removeprefix(_GCS).partition("/")[0]:
        raise errors.UserError(f"{path!r} names no bucket: write gs://BUCKET/FOLDER")
    return path


def join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if is_remote(directory) else os.path.join(directory, name)


def stats(paths: Iterable[str]) -> list[Stat | None]:
    """What is known about each file without reading it; None where there is none. Objects are asked at once."""
    pending = [_start_stat(path) for path in paths]
    return [wait() for wait in pending]


def names(directory: str) -> list[str]:
    """Names of files and folders in a folder, sorted. A remote folder that is missing or may not be listed is empty."""
    if not is_remote(directory):
        return sorted(os.listdir(directory))
    import tensorstore as ts

    bucket, key = _split(directory)
    prefix = key + "/" if key else ""
    inside = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0") if prefix else ts.KvStore.KeyRange()
    keys = _wait(_store(bucket).list(inside, strip_prefix_length=len(prefix)), directory)
    return sorted({key.decode(errors="replace").partition("/")[0] for key in keys})


def read(path: str) -> bytes:
    """A whole small file.

    Raises:
      FileNotFoundError: there is none. UserError: the store refuses (TryAgain: it does not answer).
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    bucket, key = _split(path)
    return _value(_wait(_store(bucket).read(key), path), path).value


def start(path: str, offset: int, size: int) -> Callable[[], bytes]:
    """Requests `size` bytes at `offset` of an object; the result waits for them and returns them.

    Raises (from the result):
      ValueError: the object ends before. UserError: the store refuses (TryAgain: it does not answer).
    """
    if size == 0:
        return bytes
    bucket, key = _split(path)
    future = _store(bucket).read(key, byte_range=slice(offset, offset + size))

    def finish() -> bytes:
        try:
            return _value(_wait(future, path), path).value
        except _OutOfRangeError as error:
            raise ValueError(f"{path} ends before byte {offset + size}: it was truncated ({error})") from error

    return finish


def open_sequential(path: str) -> Sequential:
    """Opens a file for one pass; of an object, two chunks of CHUNK_BYTES are held or in flight at most."""
    return _RemoteFile(path) if is_remote(path) else _LocalFile(path)


class _LocalFile:
    def __init__(self, path: str):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        while len(data) < size:
            more = self._file.read(size - len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        self._file.close()


class _RemoteFile:
    size = -1

    def __init__(self, path: str):
        self._path = path
        self._bucket, self._key = _split(path)
        self._offset = 0  # of the chunk in flight
        self._generation: bytes | None = None
        self._buffer = bytearray()
        self._ended = False
        self._ahead = self._request(0)

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and not self._ended:
            self._buffer += self._next_chunk()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def close(self) -> None:
        self._ended = True
        self._buffer.clear()
        self._ahead.cancel()

    def _request(self, offset: int) -> Any:
        return _store(self._bucket).read(self._key, byte_range=slice(offset, offset + CHUNK_BYTES))

    def _next_chunk(self) -> bytes:
        try:
            found = _wait(self._ahead, self._path)
        except _OutOfRangeError:
            # The last chunk is a short one; nothing is left where the object ends at a border of chunks.
            self._ended = True
            try:
                rest = _store(self._bucket).read(self._key, byte_range=slice(self._offset, None))
                found = _wait(rest, self._path)
            except _OutOfRangeError:
                return b""
        generation = _value(found, self._path).stamp.generation
        if self._generation not in (None, generation):
            raise ValueError(f"{self._path} was replaced while it was read: start again")
        self._generation = generation
        self._offset += len(found.value)
        if not self._ended:
            self._ahead = self._request(self._offset)
        return found.value


def _start_stat(path: str) -> Callable[[], Stat | None]:
    if not is_remote(path):
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return lambda: None
        return lambda: Stat(found.st_size, str(found.st_mtime_ns))
    bucket, key = _split(path)
    # An empty range asks for the metadata alone.
    future = _store(bucket).read(key, byte_range=slice(0, 0))

    def finish() -> Stat | None:
        found = _wait(future, path)
        return None if found.state == "missing" else Stat(-1, found.stamp.generation.hex())

    return finish


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix(_GCS).partition("/")
    return bucket, key


@functools.cache
def _store(bucket: str) -> Any:
    import tensorstore as ts

    context = ts.Context(
        {
            "gcs_request_retries": {
                "max_retries": RETRIES,
                "initial_delay": FIRST_WAIT,
                "max_delay": LONGEST_WAIT,
            },
            "gcs_request_concurrency": {"limit": CONCURRENCY},
        }
    )
    try:
        return ts.KvStore.open({"driver": "gcs", "bucket": bucket}, context=context).result(timeout=TIMEOUT_SECONDS)
    except ValueError as error:
        raise errors.UserError(f"{_GCS}{bucket}: {error}") from error


class _OutOfRangeError(Exception):
    """A byte range that reaches past the end of an object."""


def _wait(future: Any, path: str) -> Any:
    """The result of a TensorStore future; what went wrong in our words."""
    try:
        return future.result(timeout=TIMEOUT_SECONDS)
    except TimeoutError as error:
        raise errors.TryAgain(
            f"{path}: no answer within {TIMEOUT_SECONDS:.0f} s; check the network (proxy, firewall)"
        ) from error
    except Exception as error:  # absl status codes arrive as several Python types; the code leads the message
        code = str(error).partition(":")[0]
        if code == "OUT_OF_RANGE":
            raise _OutOfRangeError(str(error)) from error
        # What is asked for is wrong; with every other code the store is away, or the way to it.
        wrong = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNIMPLEMENTED")
        fix = {
            "PERMISSION_DENIED": f"access is denied: {_CREDENTIALS}",
            "UNAUTHENTICATED": f"not signed in: {_CREDENTIALS}",
            "NOT_FOUND": "there is no such bucket or object: check the name",
        } | dict.fromkeys(wrong, "the store refuses the request: check the name")
        if code in fix:
            raise errors.UserError(f"{path} cannot be read, {fix[code]} ({error})") from error
        raise errors.TryAgain(
            f"{path} cannot be read, given up after {RETRIES} retries: check the network and the bucket, then start "
            f"again ({error})"
        ) from error


def _value(found: Any, path: str) -> Any:
    if found.state != "value":
        raise FileNotFoundError(f"{path}: there is no such object, or its bucket does not exist")
    return found
