"""Counters, gauges and histograms in Prometheus' text format, without its client library.

All of them stand in one table. Everything is written and read in the server's event loop, so nothing needs a lock.
"""

import bisect
import os
from typing import NamedTuple

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Row(NamedTuple):
    """kind: counter, gauge or histogram. label: name of its one label, "" = none. buckets: upper bounds."""

    kind: str
    help: str
    label: str = ""
    buckets: tuple[float, ...] = ()


TABLE = {
    "requests_total": Row("counter", "requests by outcome: ok, bad_request, error, stopping, gone", "outcome"),
    "connections_total": Row("counter", "handshakes by outcome: open, unauthorised, full", "outcome"),
    "connections": Row("gauge", "open connections"),
    "batches_total": Row("counter", "programs run, by rows of the program", "size"),
    "rows_total": Row("counter", "rows of these programs: planned for a robot, or fill", "kind"),
    "retried_batches_total": Row("counter", "batches that failed and were run again row by row"),
    "prepare_seconds": Row("histogram", "from a frame to a row for the network", "", SECONDS),
    "queue_seconds": Row("histogram", "a row waits for its batch", "", SECONDS),
    "infer_seconds": Row("histogram", "a batch, until the device is done", "", SECONDS),
    "request_seconds": Row("histogram", "from a frame to its answer", "", SECONDS),
}


class Metrics:
    """Values of the table's rows. prefix: of all names."""

    def __init__(self, prefix: str = "qdepth_"):
        self._prefix = prefix
        self._values: dict[str, dict[str, float]] = {name: {} for name in TABLE}
        self._histograms = {name: [0] * (len(row.buckets) + 1) for name, row in TABLE.items() if row.buckets}
        for name, row in TABLE.items():
            if not row.label and not row.buckets:
                self._values[name][""] = 0.0

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Adds to a counter or a gauge."""
        values = self._values[name]
        values[label] = values.get(label, 0.0) + value

    def put(self, name: str, value: float) -> None:
        """Sets a gauge."""
        self._values[name][""] = value

    def observe(self, name: str, value: float) -> None:
        """One value of a histogram."""
        self._histograms[name][bisect.bisect_left(TABLE[name].buckets, value)] += 1
        self.add(name, value)

    def value(self, name: str, label: str = "") -> float:
        """A counter or gauge; the sum of a histogram."""
        return self._values[name].get(label, 0.0)

    def text(self) -> str:
        """Everything, as Prometheus reads it."""
        lines = []
        for name, row in TABLE.items():
            full = self._prefix + name
            lines += [f"# HELP {full} {row.help}", f"# TYPE {full} {row.kind}"]
            if row.buckets:
                lines += self._histogram_lines(full, name, row)
                continue
            for label, value in sorted(self._values[name].items()):
                # Fifteen digits: a counter that is rounded stands still, then jumps.
                lines.append(f'{full}{{{row.label}="{label}"}} {value:.15g}' if row.label else f"{full} {value:.15g}")
        if memory := resident_bytes():
            lines += ["# TYPE process_resident_memory_bytes gauge", f"process_resident_memory_bytes {memory}"]
        return "\n".join(lines) + "\n"

    def _histogram_lines(self, full: str, name: str, row: Row) -> list[str]:
        counts, total, lines = self._histograms[name], 0, []
        for bound, count in zip((*row.buckets, "+Inf"), counts):
            total += count
            lines.append(f'{full}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{full}_sum {self.value(name):.15g}", f"{full}_count {total}"]


def resident_bytes() -> int:
    """Memory of this process, 0 where the system does not say (only Linux does, here)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
