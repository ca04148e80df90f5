"""Notices a run that no longer makes steps: dumps the stacks of all threads and ends the process. Imports no JAX."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jitjax import signals

AGAIN = "stopped without saving, the same command continues from the last checkpoint"


class Watchdog:
    """Ends the process with code 3 when no step came for `factor` times the usual, and names what the run waited for.

    The clock runs between `step` calls, except within `untimed` (compiling, saving, previewing) and while the process itself
    was stopped. On a GPU the loop runs ahead of the device, but it waits for it at every log interval, so a device that hangs
    is noticed too. Who waits for input has that time; who does not has a tenth more, as with several processes all others wait
    for that one. A step that has failed on the device ends the process sooner, if the loop has not met the failure after
    `failed_seconds` itself: it may be waiting for another process, which waits for that step. A context manager.

    Args:
      factor: how many times the median of the last steps may pass.
      least_seconds: never sooner than this.
      describe: more about a wait for input, e.g. which worker and file; called in the watchdog's thread.
      failed: what is known of a step that has failed on the device, or ""; called in the watchdog's thread, and must not wait.
      failed_seconds: for how long that stands before the process ends.
      leave: called with exit code and line; the default ends the process.
      period: seconds between two looks.
    """

    def __init__(
        self,
        *,
        factor: float = 30.0,
        least_seconds: float = 300.0,
        describe: Callable[[], str] | None = None,
        failed: Callable[[], str] = str,
        failed_seconds: float = 10.0,
        leave: Callable[[int, str], None] = signals.leave,
        period: float = 1.0,
    ):
        self._factor, self._least, self._describe, self._leave, self._period = factor, least_seconds, describe, leave, period
        self._intervals: collections.deque[float] = collections.deque(maxlen=64)
        self._failed, self._failed_seconds = failed, failed_seconds
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._started = time.monotonic()  # of the wait for the next step
        self._step, self._phase, self._untimed = 0, "", 0

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def step(self, number: int) -> None:
        """Step `number` was made."""
        with self._lock:
            now = time.monotonic()
            if self._step:
                self._intervals.append(now - self._started)
            self._started, self._step = now, number

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the run waits for inside, e.g. "input": named if it takes too long."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def untimed(self, name: str) -> Iterator[None]:
        """Work that is not a step and may take any time: compiling, saving, previewing, evaluating."""
        with self._lock:
            self._untimed += 1
        begun = time.monotonic()
        try:
            with self.phase(name):
                yield
        finally:
            with self._lock:
                self._untimed -= 1
                self._started += time.monotonic() - begun  # nor is it part of the usual

    @property
    def limit(self) -> float:
        """Seconds that a step may take."""
        usual = statistics.median(self._intervals) if self._intervals else 0.0
        return max(self._least, self._factor * usual)

    def _watch(self) -> None:
        seen, failing = time.monotonic(), 0.0
        while not self._closed.wait(self._period):
            now = time.monotonic()
            with self._lock:
                if now - seen > 10 * self._period:  # the process was stopped (SIGSTOP, a suspended machine)
                    self._started += now - seen
                limit = self.limit * (1.0 if self._phase == "input" else 1.1)
                overdue = not self._untimed and now - self._started > limit
            reason = ""
            if not self._untimed:
                with contextlib.suppress(Exception):  # a hang must be noticed all the same
                    reason = self._failed()
            failing = failing + min(now - seen, self._period) if reason else 0.0
            seen = now
            if overdue:
                self._bark(now - self._started)
                return
            if reason and failing > self._failed_seconds:
                self._leave(signals.NOT_SAVED, f"{reason}; {AGAIN}")
                return

    def _bark(self, seconds: float) -> None:
        waited_for = f", waiting for {self._phase}" if self._phase else ""
        if self._phase == "input" and self._describe is not None:
            with contextlib.suppress(Exception):
                waited_for += f" ({self._describe()})"
        usual = f"usually {statistics.median(self._intervals):.2g} s" if self._intervals else "none was made before"
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        self._leave(
            signals.NOT_SAVED,
            f"no step for {seconds:.0f} s after step {self._step:,} ({usual}){waited_for}; stacks of all threads above; "
            f"{AGAIN}",
        )
