"""Where a run's time went, over all its starts: seconds by kind, and goodput. Imports no JAX."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jitjax import atomic

FILE = "time.json"
# "startup": from the first line of a start to the loop; "compile": until the first step is done; "step": the loop's own time,
# all that is of no other kind; "lost": steps that were not saved before a crash and had to be made again.
KINDS = ("startup", "compile", "input_wait", "step", "save", "preview", "evaluation", "lost")
LONG = ("save", "preview", "evaluation")  # kinds that `jitjax status` can name while they go on
_PERSIST_SECONDS = 30.0
_REMEMBERED = 64  # saves


class TimeAccount:
    """Adds up what a run's seconds were spent on and keeps the sums in the workdir's `time.json`.

    The clock always runs for one kind, first "startup": so no second is counted twice or not at all.

    Args:
      workdir: of the run.
      resumed_from: optimizer step of the checkpoint that this start continues, 0 without one.
      begun: when this start began, by `clock`; default now.
      is_main: whether this process writes the file.
      clock: seconds.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resumed_from: int,
        begun: float | None = None,
        is_main: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._file, self._is_main, self._clock = workdir / FILE, is_main, clock
        self.seconds, self.starts, self._saves, self._step = self._read()
        self._take_back(resumed_from)
        self.starts += 1
        self._persisted = clock()
        self._kind, self._since = "startup", self._persisted if begun is None else begun
        self._now = (self._kind, self._since)

    @property
    def now(self) -> tuple[str, float]:
        """What the time is spent on at present, and for how many seconds it has been. Any thread may ask."""
        kind, since = self._now
        return kind, self._clock() - since

    def _take_back(self, resumed_from: int) -> None:
        """What was trained after the checkpoint must be made again."""
        if self._step > resumed_from:
            # From the seconds noted at each save; between two of them in proportion to the steps.
            steps, seconds = zip((0, 0.0), *sorted(self._saves.items()), (self._step, self.seconds["step"]), strict=True)
            retained = float(np.interp(resumed_from, steps, seconds))
            self.seconds["lost"] += self.seconds["step"] - retained
            self.seconds["step"] = retained
        self._saves = {step: seconds for step, seconds in self._saves.items() if step <= resumed_from}
        self._step = resumed_from

    def switch(self, kind: str) -> None:
        """From now on the time is spent on `kind`, one of `KINDS`."""
        now = self._clock()
        self.seconds[self._kind] += now - self._since
        if kind != self._kind:
            self._now = (kind, now)
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """The time inside is spent on `kind`."""
        before = self._kind
        self.switch(kind)
        if kind in LONG:
            self.persist()
        try:
            yield
        finally:
            self.switch(before)
            if kind in LONG:
                self.persist()

    def reached(self, step: int) -> None:
        """Optimizer step `step` is done. Writes the file now and then."""
        self._step = step
        if self._clock() - self._persisted >= _PERSIST_SECONDS:
            self.persist()

    def saved(self, step: int) -> None:
        """The state after optimizer step `step`, the present one, is being saved."""
        self.switch(self._kind)
        self._step = step
        self._saves[step] = self.seconds["step"]
        self._saves = dict(sorted(self._saves.items())[-_REMEMBERED:])
        self.persist()

    @property
    def goodput(self) -> float:
        """Share of all seconds, over all starts, that made steps which are still part of the run; 1.0 before any."""
        self.switch(self._kind)
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else 1.0

    def metrics(self) -> dict[str, float]:
        """`time/<kind>_seconds` over all starts, `time/starts`, `time/goodput`."""
        goodput = self.goodput
        sums = {f"time/{kind}_seconds": seconds for kind, seconds in self.seconds.items()}
        return {**sums, "time/starts": float(self.starts), "time/goodput": goodput}

    def __str__(self) -> str:
        """E.g. "goodput (share of the time spent in training steps) 93.1% of 1:06:39 over 2 starts: step 1:02:03, ..."."""
        goodput = self.goodput
        spent = sorted(
            ((seconds, kind) for kind, seconds in self.seconds.items() if seconds >= 0.5 or kind == "step"), reverse=True
        )
        parts = ", ".join(f"{kind.replace('_', ' ')} {datetime.timedelta(seconds=round(seconds))}" for seconds, kind in spent)
        total = datetime.timedelta(seconds=round(sum(self.seconds.values())))
        starts = f"{self.starts} start{'s' if self.starts > 1 else ''}"
        return f"goodput (share of the time spent in training steps) {goodput:.1%} of {total} over {starts}: {parts}"

    def persist(self) -> None:
        """Write the file whole or not at all. A disk that refuses is left for the next save to report."""
        self.switch(self._kind)
        self._persisted = self._clock()
        if not self._is_main:
            return
        content = {
            "starts": self.starts,
            "step": self._step,
            "doing": self._kind,
            "seconds": self.seconds,
            "saves": self._saves,
        }
        with contextlib.suppress(OSError):
            atomic.write_text(self._file, json.dumps(content, indent=1) + "\n")

    def _read(self) -> tuple[dict[str, float], int, dict[int, float], int]:
        try:
            known = json.loads(self._file.read_text())
            seconds = {kind: float(known["seconds"].get(kind, 0.0)) for kind in KINDS}
            saves = {int(step): float(spent) for step, spent in known["saves"].items()}
            return seconds, int(known["starts"]), saves, int(known["step"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or torn by a full disk: begin anew
            return dict.fromkeys(KINDS, 0.0), 0, {}, 0
