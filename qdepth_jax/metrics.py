"""metrics.jsonl: one JSON object per logged step, append-only, continued exactly after a restart."""

import json
import math
import time
from typing import Any

from etils import epath

from qdepth_jax import workdirs

UPLOAD_SECONDS = 30.0  # objects of a bucket cannot be appended to: there the file is written whole, this often


class MetricsFile:
    """Appends rows with increasing `step`; a restart drops rows after the checkpoint: they are computed again."""

    def __init__(self, path: epath.PathLike, resume_step: int):
        """Opens (or creates) the file and keeps the rows with step <= resume_step.

        The others (rows after it, a row cut off by a crash) move to metrics.dropped.jsonl; `dropped` counts them.
        """
        self.path = epath.Path(path)
        self._local = not workdirs.is_remote(path)
        rows, dropped = [], []
        if self.path.exists():
            for line in self.path.read_bytes().decode(errors="replace").splitlines():
                try:
                    keep = json.loads(line)["step"] <= resume_step
                except (ValueError, KeyError, TypeError):
                    keep = False  # the row being written when the process died
                (rows if keep else dropped).append(line)
            if dropped:
                lost = self.path.parent / "metrics.dropped.jsonl"
                before = lost.read_text() if lost.exists() else ""
                workdirs.write_whole(lost, before + "".join(line + "\n" for line in dropped))
        self.dropped = len(dropped)
        self._text = "".join(row + "\n" for row in rows)
        self._uploaded, self._file = 0.0, None
        if self._local:
            workdirs.write_whole(self.path, self._text)
            self._text, self._file = "", open(self.path, "a")  # noqa: SIM115 (closed by `close`)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; on a local disk it is in the disk cache at once. NaN and infinity are written as null."""
        text = json.dumps({k: None if _is_bad(v) else v for k, v in row.items()}, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make every row readable to others; call it before a checkpoint, so that no row before it can be lost."""
        if self._file is None:
            self.path.write_text(self._text)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """All rows of a metrics file."""
    return [json.loads(line) for line in epath.Path(path).read_text().splitlines()]


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
