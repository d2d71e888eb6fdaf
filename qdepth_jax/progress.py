"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")

PLAIN_SECONDS = 15.0  # between plain lines


class Progress:
    """Counts up to `total`; a tqdm bar on a terminal, otherwise a line at least every 15 s and one at the end.

    Not `shown` it only counts: of several hosts one speaks.
    """

    def __init__(self, total: int, label: str, initial: int = 0, unit: str = "it", shown: bool = True):
        self._tty, self._shown = sys.stderr.isatty() and shown, shown
        self._label, self._total, self._n, self._unit = label, total, initial, unit
        self._start, self._first, self._last = time.monotonic(), initial, 0.0
        self._bar = (
            tqdm.tqdm(total=total, initial=initial, desc=label, unit=unit, unit_scale=unit == "B")
            if self._tty
            else None
        )

    def update(self, n: int = 1, note: str = "") -> None:
        """Advance by n; `note` (for instance the loss) stands behind the bar."""
        self._n += n
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if not self._shown:
            return
        if now - self._last >= PLAIN_SECONDS or self._n >= self._total:
            self._last = now
            rate = (self._n - self._first) / max(now - self._start, 1e-9)
            left = (self._total - self._n) / rate if rate > 0 else float("inf")
            done = f"{self._n}/{self._total} {self._unit}, {rate:.2f}/s"
            if self._unit == "B":
                done = f"{self._n / 1e6:.1f}/{self._total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
            line = f"{self._label}: {done}, {left:.0f} s left {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def begin(self, n: int) -> None:
        """Advance by a first n whose time says nothing about the rest: programs were compiled in it."""
        if self._n + n >= self._total:
            return self.update(n)
        self._n += n
        self._first, self._start = self._n, time.monotonic()
        if self._bar is not None:
            self._bar.n = self._bar.initial = self._bar.last_print_n = self._n
            self._bar.start_t = self._bar.last_print_t = self._bar._time()
            self._bar.refresh()

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[T], total: int, label: str, unit: str = "it") -> Iterator[T]:
    """Iterate with progress."""
    progress = Progress(total, label, unit=unit)
    for item in items:
        yield item
        progress.update()
    progress.close()
