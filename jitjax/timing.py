"""Where a run's time went, over all its starts: seconds by kind, and goodput. Imports no JAX."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FILE = "time.json"
# "step": what the loop spent on training steps; "lost": steps that were not saved before a crash and had to be made again.
KINDS = ("startup", "compile", "input_wait", "step", "save", "preview", "evaluation", "lost")
_PERSIST_SECONDS = 30.0


class TimeAccount:
    """Adds up what a run's seconds were spent on and keeps the sums in the workdir's `time.json`.

    Args:
      workdir: of the run.
      resumed_from: optimizer step of the checkpoint that this start continues, 0 without one.
      is_main: whether this process writes the file.
      clock: seconds.
    """

    def __init__(self, workdir: Path, *, resumed_from: int, is_main: bool = True, clock: Callable[[], float] = time.monotonic):
        self._file, self._is_main, self._clock = workdir / FILE, is_main, clock
        self.seconds, self.starts, self._unsaved, reached = self._read()
        if reached > resumed_from:
            # What was trained after the checkpoint must be made again.
            lost = min(self._unsaved, self.seconds["step"])
            self.seconds["step"] -= lost
            self.seconds["lost"] += lost
        self._unsaved = 0.0
        self.starts += 1
        self._step = resumed_from
        self._nested = 0.0
        self._persisted = clock()

    def add(self, kind: str, seconds: float) -> None:
        """`kind`: one of `KINDS`. Seconds of two kinds do not overlap."""
        self.seconds[kind] += seconds
        self._nested += seconds
        if kind == "step":
            self._unsaved += seconds

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Adds the time inside, less what was added inside under other kinds."""
        outer, self._nested = self._nested, 0.0
        begun = self._clock()
        try:
            yield
        finally:
            elapsed = self._clock() - begun
            inside, self._nested = self._nested, outer
            self.add(kind, max(0.0, elapsed - inside))
            self._nested = outer + elapsed

    def reached(self, step: int) -> None:
        """Optimizer step `step` is done. Writes the file now and then."""
        self._step = step
        if self._clock() - self._persisted >= _PERSIST_SECONDS:
            self.persist()

    def saved(self) -> None:
        """A checkpoint of the present step was saved: what was trained so far cannot be lost."""
        self._unsaved = 0.0
        self.persist()

    @property
    def goodput(self) -> float:
        """Share of all seconds, over all starts, that made steps which are still part of the run; 1.0 before any."""
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else 1.0

    def metrics(self) -> dict[str, float]:
        """`time/<kind>_seconds` over all starts, `time/starts`, `time/goodput`."""
        sums = {f"time/{kind}_seconds": seconds for kind, seconds in self.seconds.items()}
        return {**sums, "time/starts": float(self.starts), "time/goodput": self.goodput}

    def persist(self) -> None:
        """Write the file whole or not at all. A disk that refuses is left for the next save to report."""
        self._persisted = self._clock()
        if not self._is_main:
            return
        content = {"starts": self.starts, "step": self._step, "unsaved": self._unsaved, "seconds": self.seconds}
        with contextlib.suppress(OSError):
            temporary = self._file.with_suffix(".json.tmp")
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(temporary, self._file)

    def _read(self) -> tuple[dict[str, float], int, float, int]:
        empty = dict.fromkeys(KINDS, 0.0)
        try:
            known = json.loads(self._file.read_text())
            seconds = {kind: float(known["seconds"].get(kind, 0.0)) for kind in KINDS}
            return seconds, int(known["starts"]), float(known["unsaved"]), int(known["step"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or torn by a full disk: begin anew
            return empty, 0, 0.0, 0
