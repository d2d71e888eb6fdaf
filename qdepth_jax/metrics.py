"""metrics.jsonl: one JSON object per logged step, append-only, continued exactly after a restart."""

import json
import math
import os
import pathlib
from typing import Any

from qdepth_jax import errors


class MetricsFile:
    """Appends rows with increasing `step`; a restart drops rows after the checkpoint: they are computed again."""

    def __init__(self, path: str | pathlib.Path, resume_step: int):
        """Opens (or creates) the file and keeps the rows with step <= resume_step.

        The others (rows after it, a row cut off by a crash) move to metrics.dropped.jsonl; `dropped` counts them.
        """
        self.path = pathlib.Path(path)
        rows, dropped = [], []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    keep = json.loads(line)["step"] <= resume_step
                except (ValueError, KeyError, TypeError):
                    keep = False  # the row being written when the process died
                (rows if keep else dropped).append(line)
            if dropped:
                with self.path.with_name("metrics.dropped.jsonl").open("a") as file:
                    file.writelines(line + "\n" for line in dropped)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            os.replace(temporary, self.path)
        self.dropped = len(dropped)
        self._file = self.path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush it to the disk cache.

        Raises:
          UserError: a loss is not finite: training is stopped before a checkpoint of it is written.
        """
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        bad = {k: v for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        if bad:
            raise errors.UserError(
                f"step {row['step']}: {bad} is not finite; the last checkpoint is untouched. Lower "
                "optim.learning_rate, or look at the data with tools/index_rlds.py"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """All rows of a metrics file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
