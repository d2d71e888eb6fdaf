"""Where the time and memory of a run go: step times, waiting for data, checkpoint stalls, FLOP utilisation.

The host runs two steps ahead of the devices (train_loop.py), so in the steady state one turn of the loop takes as long
as one step: the watch times turns, less what validation and checkpoints took.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np


class Watch:
    """Times the turns of the loop between two metric rows.

    Args:
      batch_size: examples of a step, all hosts together.
      flops: model FLOPs of one example in one step; 0 = unknown.
      devices: of the mesh.
      peak: FLOP/s of one device at its best, None if unknown.
      ahead: steps that the host dispatches before it waits for the first: those turns take no time of their own.
      clock: seconds, only differences count.
    """

    def __init__(
        self,
        batch_size: int,
        flops: float,
        devices: int,
        peak: float | None,
        ahead: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._batch_size, self._flops, self._devices, self._peak, self._clock = batch_size, flops, devices, peak, clock
        self._ahead = ahead
        self._turns: list[float] = []
        self._data = self._stall = self._apart = 0.0
        self._mark = clock()

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around waiting for the next batch."""
        start = self._clock()
        yield
        self._data += self._clock() - start

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Around what a checkpoint keeps the loop from."""
        start = self._clock()
        yield
        spent = self._clock() - start
        self._stall += spent
        self._apart += spent

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around work that is no part of a step: validation, compilation, a profile being written."""
        start = self._clock()
        yield
        self._apart += self._clock() - start

    def turn(self) -> None:
        """A turn of the loop is over."""
        if self._ahead:  # what it took goes to the first turn that waits for a step
            self._ahead -= 1
            return
        now = self._clock()
        self._turns.append(now - self._mark - self._apart)
        self._mark, self._apart = now, 0.0

    def row(self) -> dict[str, float]:
        """What was measured since the last row; empty if no step was.

        Keys: steps_per_second, samples_per_second, step_seconds_{p50,p90,max}, data_wait_share (of the steps' time),
        checkpoint_stall_seconds (where there was a save), model_tflops_per_device (per second, by the model's formula,
        without recomputation) and mfu (its share of the device's peak), hbm_gib and hbm_peak_gib (the fullest device
        of this host, where the device tells). All of them are this host's; the log is host 0's.
        """
        if not self._turns:
            return {}
        turns, data, stall = np.asarray(self._turns), self._data, self._stall
        self._turns, self._data, self._stall = [], 0.0, 0.0
        seconds = max(float(turns.sum()), 1e-9)
        rate = len(turns) / seconds
        row = {
            "steps_per_second": rate,
            "samples_per_second": rate * self._batch_size,
            "step_seconds_p50": float(np.percentile(turns, 50)),
            "step_seconds_p90": float(np.percentile(turns, 90)),
            "step_seconds_max": float(turns.max()),
            "data_wait_share": data / seconds,
        }
        if stall:
            row["checkpoint_stall_seconds"] = stall
        if self._flops:
            per_device = rate * self._batch_size * self._flops / self._devices
            row["model_tflops_per_device"] = per_device / 1e12
            if self._peak:
                row["mfu"] = per_device / self._peak
        return row | memory()


# What of a metrics row is measured by a clock or a gauge: two equal runs differ in these alone.
MEASURED = (
    "steps_per_second",
    "samples_per_second",
    "step_seconds_p50",
    "step_seconds_p90",
    "step_seconds_max",
    "data_wait_share",
    "checkpoint_stall_seconds",
    "compile_seconds",
    "model_tflops_per_device",
    "mfu",
    "hbm_gib",
    "hbm_peak_gib",
)


def memory() -> dict[str, float]:
    """hbm_gib and hbm_peak_gib of this host's fullest device; empty where devices do not tell (CPU)."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        return {}
    in_use = max(found["bytes_in_use"] for found in stats)
    peak = max(found.get("peak_bytes_in_use", found["bytes_in_use"]) for found in stats)
    return {"hbm_gib": in_use / 2**30, "hbm_peak_gib": peak / 2**30}
