"""One status line: redrawn in place on a terminal, a plain line per log interval elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

BAR = 20  # characters between the brackets
# What a narrow terminal gets: (characters of the bar, parts left out), the first that fits.
LAYOUTS = ((BAR, ()), (8, ()), (8, ("lr",)), (8, ("lr", "data wait")), (0, ("lr", "data wait")))


class Console:
    """Prints where a run stands.

    Args:
      total_steps: optimizer steps of the whole run.
      stream: where to print; default stdout as it is at each call.
      clock: seconds, for the time left.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.total_steps, self._stream, self._clock = total_steps, stream, clock
        self._drawn = ""  # the status line that stands on the terminal
        self._first: tuple[int, float] | None = None
        self._lock = threading.Lock()  # the W&B thread prints notes, too

    def status(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the state after `step`, from whichever of the known metrics are there."""
        seconds_left = self._seconds_left(step, metrics)
        with self._lock:
            if self._is_terminal():
                self._drawn = status_line(step, self.total_steps, metrics, seconds_left, _columns())
                self._redraw()
            else:
                self._print(status_line(step, self.total_steps, metrics, seconds_left) + "\n")

    def note(self, text: str) -> None:
        """Prints a line of its own above the status line."""
        with self._lock:
            if self._drawn:
                self._print("\r\x1b[2K")
            self._print(text + "\n")
            self._redraw()

    def close(self) -> None:
        """Leaves the last status line standing."""
        with self._lock:
            if self._drawn:
                self._print("\n")
            self._drawn = ""

    def _seconds_left(self, step: int, metrics: Mapping[str, Any]) -> float | None:
        """By the wall clock since the first status line, so that previews and checkpoints count and compilation does
        not; until there are two lines, by the measured time of a step."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, start = self._first
        per_step = (now - start) / (step - first_step) if step > first_step else metrics.get("time/step")
        return None if per_step is None else (self.total_steps - step) * per_step

    def _redraw(self) -> None:
        if self._drawn:
            # A line as wide as the terminal would wrap and could not be redrawn.
            self._print("\r\x1b[2K" + self._drawn[: _columns()])

    def _is_terminal(self) -> bool:
        try:
            return (self._stream or sys.stdout).isatty()
        except (ValueError, AttributeError):
            return False

    def _print(self, text: str) -> None:
        try:
            stream = self._stream or sys.stdout
            stream.write(text)
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # the terminal went away (a dropped connection); the run goes on


def _columns() -> int:
    return shutil.get_terminal_size().columns - 1  # some terminals wrap when the last column is filled


def status_line(
    step: int, total_steps: int, metrics: Mapping[str, Any], seconds_left: float | None, width: int | None = None
) -> str:
    """E.g. `[####....] 2000/10000 20%  loss 0.3125  lr 2.00e-04  626K tok/s  ETA 1h 12m  data wait 0.4%`.

    At most `width` characters: the bar shrinks, then learning rate and data wait go.
    """
    share = min(step / total_steps, 1.0) if total_steps else 1.0
    loss, rate = metrics.get("train/loss"), metrics.get("train/learning_rate")
    speed, wait = metrics.get("train/tokens_per_second"), metrics.get("perf/data_wait")
    parts = {
        "steps": f"{step}/{total_steps} {int(share * 100)}%",
        "loss": None if loss is None else f"loss {loss:.4f}",
        "lr": None if rate is None else f"lr {rate:.2e}",
        "speed": None if speed is None else f"{human_count(speed)} tok/s",
        "ETA": f"ETA {'?' if seconds_left is None else human_time(seconds_left)}",
        "data wait": None if wait is None else f"data wait {wait:.1%}",
    }
    for bar, left_out in LAYOUTS:
        text = "  ".join(part for label, part in parts.items() if part and label not in left_out)
        line = f"[{'#' * int(share * bar):.<{bar}}] {text}" if bar else text
        if width is None or len(line) <= width:
            break
    return line[:width]


def human_time(seconds: float) -> str:
    """Two units at most: 45s, 12m 05s, 1h 12m, 3d 4h."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(int(seconds + 0.5), 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m {seconds % 60:02d}s"
    return f"{seconds}s"


def human_count(number: float) -> str:
    """Three digits and a unit: 950, 12.3K, 626K, 1.25M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{unit}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
