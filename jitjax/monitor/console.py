"""Where a run stands: a live view on a terminal, one plain line an interval elsewhere, and the same lines in `log.txt`."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from jitjax import tables
from jitjax.monitor.view import View


class Console:
    """Prints where a run stands.

    Args:
      total_steps: optimizer steps of the whole run.
      steps_per_epoch: optimizer steps of one epoch; None leaves the epoch out.
      title: name of the run, shown above the live view.
      log_path: file to which every printed line is appended, with the time of day; None: no file.
      stream: where to print; default stdout as it is at the start.
      step: the step that the run begins after.
      activity: what the run is doing, a key of `view.ACTIVITIES`, and for how many seconds it has been; asked by a thread of
        its own. None: not shown.
      clock: seconds, for elapsed and remaining time.
      begun: when the run started, by that clock; default now.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: int | None = None,
        title: str = "",
        log_path: str | os.PathLike | None = None,
        stream: TextIO | None = None,
        step: int = 0,
        activity: Callable[[], tuple[str, float]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        begun: float | None = None,
    ):
        begun = clock() if begun is None else begun
        self._view = View(total_steps, steps_per_epoch, title, clock, begun, step=step, activity=activity)
        self._stream = _Stream(stream or sys.stdout)
        self._log = None
        if log_path is not None:
            with contextlib.suppress(OSError):  # a full disk: metrics.jsonl warns about it
                self._log = open(log_path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._live: Live | None = None
        self._lock, self._closing = threading.RLock(), threading.Event()
        if self._stream.isatty():
            terminal = RichConsole(file=self._stream, force_terminal=True, force_jupyter=False, highlight=False)
            if not terminal.is_dumb_terminal:
                # Not Live's own thread: a note that it prints while that thread redraws a view whose height has just
                # changed lands in the view (seen with rich 15.0).
                self._live = Live(self._view, console=terminal, auto_refresh=False)
                self._live.start()
                self._redrawer = threading.Thread(target=self._redraw, name="console", daemon=True)
                self._redrawer.start()

    def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one optimizer step into the live view. Prints nothing."""
        self._view.observe(step, metrics.get("train/loss"))

    def status(self, step: int, metrics: Mapping[str, Any], *, ago: float = 0.0) -> None:
        """Shows the state after `step`, which was done `ago` seconds ago, from whichever of the known metrics are there."""
        with self._changing():
            self._view.update(step, metrics, ago=ago)
        line = self._view.line(ago)
        self._write_log(line)
        if self._live is None:
            self._print(line)

    def note(self, text: str, *, whole: bool = False) -> None:
        """Prints a line of its own, above the live view; broken between words where a terminal is narrower, unless `whole`, for
        commands to copy."""
        self._write_log(text)
        self._print(text, whole=whole)

    def mark(self, name: str, step: int) -> None:
        """Remembers the step of the last checkpoint or preview for the live view."""
        with self._changing():
            self._view.marks = {**self._view.marks, name: step}

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """Remembers the last scores for the live view."""
        with self._changing():
            self._view.scores = step, dict(values)

    @property
    def elapsed(self) -> float | None:
        """Seconds since the run started."""
        return self._view.elapsed

    def end(self) -> None:
        """The run is over, and does nothing any more."""
        with self._changing():
            self._view.end()

    def close(self, *lines: str, commands: Sequence[str] = ()) -> None:
        """Leaves the last view standing, with these lines and what to do next below it. A second call does nothing."""
        if self._live is not None:
            self._closing.set()
            self._redrawer.join()
            self._live.stop()
            self._live = None
        for line in lines:
            self.note(line)
        for command in commands:
            self.note(f"next: {command}", whole=True)
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Changes the view and draws it."""
        with self._lock:
            yield
            if self._live is not None:
                self._live.refresh()

    def _redraw(self) -> None:
        while not self._closing.wait(0.5):  # the clock goes on while the loop is busy
            with self._changing():
                pass

    def _print(self, text: str, *, whole: bool = False) -> None:
        text = text if whole else tables.wrap(text, self._stream)
        if self._live is not None:
            with self._lock:
                self._live.console.print(Text(text), soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            with contextlib.suppress(OSError, ValueError):
                self._log.write(f"{now}  {text}\n")


class _Stream:
    """A stream that loses what it cannot print: a terminal that goes away (a dropped connection) must not end the run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self.encoding
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"
