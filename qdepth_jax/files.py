"""A file that is written whole or not at all."""

import os
import pathlib
import uuid


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """The file has all of `content` or stays as it was, whatever kills the process; its folder must exist.

    Several processes may write one file: the last one's stays.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else the new name may be on the disk before the content is
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
