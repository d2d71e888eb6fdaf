"""SIGTERM and Ctrl-C end a run at a step boundary, the same on all hosts."""

import os
import signal
import types

from qdepth_jax import distributed


class StopSignal:
    """SIGTERM, or Ctrl-C once, ends the run at a step boundary that is the same on all hosts.

        with StopSignal() as stop:
            if stop.asked_before(start): return
            for step in range(start + 1, ...):
                ...
                if stop.reached(step): save and break

    In a run of several processes JAX's preemption service carries the notice of one host to all of them and picks a
    step that none has passed; it takes SIGTERM itself, from `start` on. Ctrl-C a second time is a KeyboardInterrupt.
    """

    def __init__(self):
        self._several, self._asked, self._before = distributed.is_started(), False, {}

    def __enter__(self) -> "StopSignal":
        # SIGTERM belongs to the preemption service in a run of several processes: it would not see one we took.
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked_before(self, start: int) -> bool:
        """True if the run was asked to end before its first step, `start` + 1. Every host calls it once, before that.

        The service takes the largest step told so far, plus one, and asks for equality. What came before any host had
        told a step therefore ends the run after step 1, which a resumed run never reaches: so that is asked here.
        """
        if not self._several:
            return self._asked
        self.reached(start)
        distributed.barrier("the first step")  # from here on the largest is `start` or more, whatever host 0 tells
        asked = distributed.is_main() and self.reached(1)
        self.reached(start)
        return distributed.from_main(asked, "asked to stop")

    def reached(self, step: int) -> bool:
        """True if the run ends after this step. Every host calls it after every step, with the same number."""
        if not self._several:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        # os.write, because print is not safe in a handler that may have interrupted another print.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping after this step; Ctrl-C stops at once\n".encode())
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
