"""Where a run stands: a live view on a terminal, one plain line an interval elsewhere, and the same lines in `log.txt`."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LOSS_MEMORY = 50  # optimizer steps over which the shown loss is smoothed
CURVE = 16  # points of the loss curve
BARS = "▁▂▃▄▅▆▇█"
SCORES = "eval/"  # metrics of this prefix are shown as scores


class Console:
    """Prints where a run stands.

    Args:
      total_steps: optimizer steps of the whole run.
      steps_per_epoch: optimizer steps of one epoch; None leaves the epoch out.
      title: name of the run, shown above the live view.
      memory: bytes of device memory in use at the peak, or None; asked once an interval.
      log_path: file to which every printed line is appended, with the time of day; None: no file.
      stream: where to print; default stdout as it is at the start.
      clock: seconds, for elapsed and remaining time.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: int | None = None,
        title: str = "",
        memory: Callable[[], int | None] | None = None,
        log_path: str | os.PathLike | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._view = _View(total_steps, steps_per_epoch, title, clock)
        self._memory = memory
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
        if self._view.stage:
            with self._changing():
                self._view.stage = ""
        self._view.observe(step, metrics.get("train/loss"))

    def status(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the state after `step`, from whichever of the known metrics are there."""
        memory = self._memory() if self._memory is not None else None
        with self._changing():
            self._view.update(step, metrics, memory)
        line = self._view.line()
        self._write_log(line)
        if self._live is None:
            self._print(line)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live view."""
        self._write_log(text)
        self._print(text)

    def stage(self, text: str) -> None:
        """Prints a line before something that takes a while and shows it in the live view until the next status."""
        with self._changing():
            self._view.stage = text
        self.note(text + " ...")

    def mark(self, name: str, step: int) -> None:
        """Remembers the step of the last checkpoint or preview for the live view."""
        with self._changing():
            self._view.marks = {**self._view.marks, name: step}

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """Remembers the last scores for the live view."""
        with self._changing():
            self._view.scores = (step, dict(values))

    @property
    def elapsed(self) -> float:
        """Seconds since the console was opened."""
        return self._view.elapsed

    def close(self, *lines: str) -> None:
        """Leaves the last view standing, with these lines below it. A second call does nothing."""
        if self._live is not None:
            self._closing.set()
            self._redrawer.join()
            self._live.stop()
            self._live = None
        for line in lines:
            self.note(line)
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

    def _print(self, text: str) -> None:
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


class _View:
    """The state of a run, drawn at whatever width the terminal has.

    Rich draws from a thread of its own: attributes are replaced, never changed in place.
    """

    def __init__(self, total_steps: int, steps_per_epoch: int | None, title: str, clock: Callable[[], float]):
        self.total_steps, self.steps_per_epoch, self.title, self._clock = total_steps, steps_per_epoch, title, clock
        self._begun = clock()
        self._first: tuple[int, float] | None = None  # step and time of the first status
        self._loss, self._weight = 0.0, 0.0  # running mean of the loss and the weight that it has gathered
        self.step: int | None = None
        self.metrics: Mapping[str, Any] = {}
        self.memory: int | None = None
        self.curve: tuple[float, ...] = ()
        self.marks: Mapping[str, int] = {}
        self.scores: tuple[int, Mapping[str, float]] | None = None
        self.stage = ""
        self._left: tuple[float, float] | None = None  # seconds to go, and when that was computed

    @property
    def elapsed(self) -> float:
        return self._clock() - self._begun

    def observe(self, step: int, loss: float | None) -> None:
        self.step = step
        if loss is None or not math.isfinite(loss):
            return
        decay = 1 - 1 / LOSS_MEMORY
        self._loss = decay * self._loss + (1 - decay) * loss
        self._weight = decay * self._weight + (1 - decay)

    def update(self, step: int, metrics: Mapping[str, Any], memory: int | None) -> None:
        """Time left is by the wall clock since the first status, so that previews and checkpoints count and compilation
        does not; until there are two, by the measured time of a step."""
        now = self._clock()
        self.step, self.metrics, self.memory, self.stage = step, dict(metrics), memory, ""
        if self._first is None:
            self._first = (step, now)
        first_step, start = self._first
        per_step = (now - start) / (step - first_step) if step > first_step else metrics.get("time/step")
        self._left = None if per_step is None else ((self.total_steps - step) * per_step, now)
        if self._weight:
            self.curve = (*self.curve, self._loss / self._weight)[-CURVE:]

    def seconds_left(self) -> float | None:
        if self._left is None:
            return None
        seconds, at = self._left
        return max(seconds - (self._clock() - at), 0.0)

    def loss(self) -> float | None:
        """Smoothed; a loss that is not finite is shown as it is."""
        last = self.metrics.get("train/loss")
        if last is not None and not math.isfinite(last):
            return last
        return self.curve[-1] if self.curve else last

    def fields(self) -> dict[str, str]:
        """What is known, by its label, in the order of the plain line."""
        known = self.metrics
        step = self.step or 0
        found: dict[str, str | None] = {
            "step": f"{step:,}/{self.total_steps:,} ({100 * step // self.total_steps if self.total_steps else 100}%)",
            "epoch": f"{step / self.steps_per_epoch:.2f}" if self.steps_per_epoch else None,
            "elapsed": duration(self.elapsed),
            "left": duration(self.seconds_left()),
            "loss": _format(self.loss(), "{:.4f}"),
            "lr": _format(known.get("train/learning_rate"), "{:.2e}"),
            "grad norm": _format(known.get("train/grad_norm"), "{:.3g}"),
            "tokens/s": _format(known.get("train/tokens_per_second"), "{:,.0f}"),
            "images/s": _format(known.get("train/samples_per_second"), "{:,.1f}"),
            "MFU": _format(known.get("perf/mfu"), "{:.1%}"),
            "input wait": _format(known.get("perf/data_wait"), "{:.1%}"),
            "memory": None if self.memory is None else f"{self.memory / 2**30:.1f} GiB",
        }
        return {label: text for label, text in found.items() if text is not None}

    def line(self) -> str:
        """E.g. `step 2,000/10,000 (20%)  epoch 1.60  elapsed 0:12:05  left 0:48:20  loss 0.3125  lr 2.00e-04 ...`."""
        return "  ".join(f"{label} {text}" for label, text in self.fields().items())

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        fields = self.fields()
        if len(self.curve) > 1 and not options.ascii_only:
            fields["loss"] += f" {sparkline(self.curve)}"
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis")
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self.total_steps, 1), completed=self.step or 0)
        head.add_row(Text(self.title or "step", style="bold"), bar, fields.pop("step"))
        if self.stage:
            yield Group(head, Text(f"{self.stage} ...  {duration(self.elapsed)}", style="yellow"))
            return
        last = {f"last {name}": f"step {step:,}" for name, step in self.marks.items()}
        if self.scores is not None:
            step, values = self.scores
            text = ", ".join(f"{name.removeprefix(SCORES)} {value:.4g}" for name, value in values.items())
            last["last score"] = f"{text} (step {step:,})"
        progress = {label: fields.pop(label) for label in ("epoch", "elapsed", "left", "loss") if label in fields}
        groups = (_cells(group) for group in (progress, fields, last) if group)
        yield Group(head, *groups)


def _cells(fields: Mapping[str, str]) -> Columns:
    """Labels and values in as many columns as the terminal has room for."""
    return Columns([Text.assemble((label, "dim"), " ", text) for label, text in fields.items()], padding=(0, 3))


def duration(seconds: float | None) -> str:
    """0:12:05, or 3 days, 4:00:00; a question mark for None and what is not finite."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    return str(datetime.timedelta(seconds=round(seconds)))


def sparkline(values: tuple[float, ...]) -> str:
    """One bar a value, the least one lowest and the greatest highest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _format(value: float | None, template: str) -> str | None:
    return None if value is None else template.format(value)


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
