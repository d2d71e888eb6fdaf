"""metrics.jsonl: one JSON object per logged step, append-only, continued exactly after a restart.

In a bucket metrics.1.jsonl, metrics.2.jsonl, ... follow it: objects cannot be appended to, and one that is written
whole every 30 s costs the square of its length.
"""

import json
import math
import time
from typing import Any

from etils import epath

from qdepth_jax import workdirs

UPLOAD_SECONDS = 30.0  # in a bucket the last part is written whole, this often
PART_BYTES = 1 << 20  # from this length on it stays as it is, and the next one begins


class MetricsFile:
    """Appends rows with increasing `step`; a restart drops rows after the checkpoint: they are computed again."""

    def __init__(self, path: epath.PathLike, resume_step: int):
        """Opens (or creates) the file and keeps the rows with step <= resume_step.

        The others (rows after it, a row cut off by a crash) move to metrics.dropped.jsonl; `dropped` counts them.
        """
        self.path = epath.Path(path)
        self._local = not workdirs.is_remote(path)
        before, kept, dropped = [part.read_bytes() for part in parts(self.path)], [], []
        for content in before:
            rows = []
            for line in content.decode(errors="replace").splitlines():
                try:
                    keep = json.loads(line)["step"] <= resume_step
                except (ValueError, KeyError, TypeError):
                    keep = False  # the row being written when the process died
                (rows if keep else dropped).append(line)
            kept.append("".join(row + "\n" for row in rows))
        if dropped:
            lost = self.path.parent / "metrics.dropped.jsonl"
            earlier = lost.read_text() if lost.exists() else ""
            workdirs.write_whole(lost, earlier + "".join(line + "\n" for line in dropped))
        self.dropped = len(dropped)
        # The last first: whatever kills the process, the parts that stay have no gap.
        while len(kept) > 1 and not kept[-1]:
            _part(self.path, len(kept) - 1).unlink()
            kept.pop()
        for number, text in enumerate(kept):
            if text.encode() != before[number]:
                workdirs.write_whole(_part(self.path, number), text)
        self._number, self._text = max(len(kept) - 1, 0), kept[-1] if kept else ""
        self._uploaded, self._file = 0.0, None
        if self._local:
            self._text, self._file = "", open(_part(self.path, self._number), "a")  # noqa: SIM115 (closed by `close`)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; on a local disk it is in the disk cache at once. NaN and infinity are written as null."""
        text = json.dumps({k: None if _is_bad(v) else v for k, v in row.items()}, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        if len(self._text) >= PART_BYTES or time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make every row readable to others; call it before a checkpoint, so that no row before it can be lost."""
        if self._file is None and (self._text or not self._number):
            _part(self.path, self._number).write_text(self._text)
            self._uploaded = time.monotonic()
            if len(self._text) >= PART_BYTES:
                self._number, self._text = self._number + 1, ""

    def close(self) -> None:
        """Close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl and the parts after it.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
    """
    texts = [part.read_text() for part in parts(path) or [epath.Path(path)]]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def parts(path: epath.PathLike) -> list[epath.Path]:
    """The files that hold the rows, in order: metrics.jsonl, and where it lay in a bucket metrics.1.jsonl, ..."""
    found: list[epath.Path] = []
    while (part := _part(epath.Path(path), len(found))).exists():
        found.append(part)
    return found


def _part(path: epath.Path, number: int) -> epath.Path:
    return path.parent / f"{path.stem}.{number}{path.suffix}" if number else path


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
