"""Byte ranges of one weight file, on a disk or in a bucket: nothing is mapped, only what is asked for is read."""

import io
import os

from etils import epath

from qdepth_jax import errors, workdirs
from qdepth_jax.data import storage


class File:
    """A file of known size; `read` gives exactly the bytes asked for or raises UserError."""

    def __init__(self, path: str):
        self.path = storage.absolute(path)
        self._handle = None
        if storage.is_remote(self.path):
            workdirs.folder(self.path)  # says which client is missing
            where = epath.Path(self.path)
            if not where.exists():
                raise errors.UserError(f"{self.path} does not exist: check the name, and who may read the bucket")
            self.size = where.stat().length
            return
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
            self.size = os.fstat(self._handle).st_size
            if os.path.isdir(self.path):
                raise errors.UserError(f"{self.path} is a folder, and a file is needed")
        except OSError as error:
            raise errors.UserError(f"{self.path} cannot be opened: {error.strerror}") from error

    def read(self, offset: int, size: int) -> bytearray | bytes:
        """`size` bytes at `offset`.

        Raises:
          UserError: the file ends before, or storage fails.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise errors.UserError(
                f"{self.path} ends at byte {self.size}, and bytes {offset} to {offset + size} are needed: it was "
                "truncated, copy or download it again"
            )
        out = bytearray(size)
        view = memoryview(out)
        if self._handle is None:
            steps = range(0, size, storage.CHUNK_BYTES)
            waits = [storage.start(self.path, offset + s, min(storage.CHUNK_BYTES, size - s)) for s in steps]
            for start, wait in zip(steps, waits, strict=True):
                data = wait()
                view[start : start + len(data)] = data
            return out
        done = 0
        while done < size:
            got = os.preadv(self._handle, [view[done:]], offset + done)
            if got == 0:
                raise errors.UserError(f"{self.path} became shorter while it was read")
            done += got
        return out

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Stream(io.RawIOBase):
    """A File for code that wants a seekable Python file."""

    def __init__(self, file: File):
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        data = self._file.read(self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data
