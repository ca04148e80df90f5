"""The state of a run and how it is drawn on a terminal."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LOSS_MEMORY = 50  # optimizer steps over which the shown loss is smoothed
CURVE = 16  # points of the loss curve
BARS = "▁▂▃▄▅▆▇█"
SCORES = "eval/"  # metrics of this prefix are shown as scores
# What a run may be at, by the kinds of `jitjax.timing`.
ACTIVITIES = {
    "startup": "starting",
    "compile": "compiling, and reading the first batch",
    "input_wait": "waiting for input",
    "step": "training",
    "save": "saving",
    "preview": "drawing a preview",
    "evaluation": "evaluating",
}
BRIEF = 2.0  # seconds: a wait for input that is shorter is part of training
DETAILS = re.compile(r"_std$|/loss_t[\d.]+$")  # spreads, and the held-out loss at each time: not in the view


class View:
    """The state of a run, drawn at whatever width the terminal has.

    The console draws from a thread of its own, too: attributes are replaced, never changed in place.

    Args:
      total_steps, steps_per_epoch, title, step, activity: see `Console`.
      clock: seconds, for elapsed and remaining time.
      begun: when the run started, by that clock; None leaves the elapsed time out.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int | None,
        title: str,
        clock: Callable[[], float],
        begun: float | None,
        *,
        step: int = 0,
        activity: Callable[[], tuple[str, float]] | None = None,
    ):
        self.total_steps, self.steps_per_epoch, self.title, self._clock = total_steps, steps_per_epoch, title, clock
        self._begun, self._activity = begun, activity
        self._first: tuple[int, float] | None = None  # step and time of the first status
        self._loss, self._weight = 0.0, 0.0  # running mean of the loss and the weight that it has gathered
        self.step = step
        self._updated = step  # of the last status
        self.metrics: Mapping[str, Any] = {}
        self.curve: tuple[float, ...] = ()
        self.marks: Mapping[str, int] = {}
        self.scores: tuple[int, Mapping[str, float]] | None = None
        self._left: tuple[float, float, float] | None = None  # see `update`

    @property
    def elapsed(self) -> float | None:
        return None if self._begun is None else self._clock() - self._begun

    def end(self) -> None:
        self._activity = None

    def observe(self, step: int, loss: float | None) -> None:
        self.step = step
        if loss is None or not math.isfinite(loss):
            return
        decay = 1 - 1 / LOSS_MEMORY
        self._loss = decay * self._loss + (1 - decay) * loss
        self._weight = decay * self._weight + (1 - decay)

    def update(self, step: int, metrics: Mapping[str, Any], *, ago: float = 0.0) -> None:
        """Time left is by the wall clock since the first status, so that previews and checkpoints count and compilation
        does not; until there are two, by the measured time of a step.

        Args:
          ago: seconds since `step` was done.
        """
        now = self._clock() - ago
        steps, self._updated = step - self._updated, step
        self.step, self.metrics = step, dict(metrics)
        if self._first is None:
            self._first = (step, now)
        first_step, start = self._first
        per_step = (now - start) / (step - first_step) if step > first_step else metrics.get("time/step")
        # Seconds left, the time of that estimate, and seconds from then to the next status.
        self._left = None if per_step is None else ((self.total_steps - step) * per_step, now, ago + steps * per_step)
        if self._weight:
            self.curve = (*self.curve, self._loss / self._weight)[-CURVE:]

    def seconds_left(self) -> float | None:
        """Runs down until the next status is due and no further: what comes in between was not in the estimate."""
        if self._left is None:
            return None
        seconds, at, due = self._left
        return max(seconds - min(self._clock() - at, due), 0.0)

    def activity(self) -> str:
        """What the run is doing, and for how long it has been; "" where that is not known, or the run is over."""
        kind, seconds = self._activity() if self._activity else ("", 0.0)
        if kind in ("step", "input_wait") and seconds < BRIEF:
            return ACTIVITIES["step"]
        return f"{ACTIVITIES[kind]} ...  {duration(seconds)}" if kind in ACTIVITIES else ""

    def loss(self) -> float | None:
        """Smoothed; a loss that is not finite is shown as it is."""
        last = self.metrics.get("train/loss")
        if last is not None and not math.isfinite(last):
            return last
        return self.curve[-1] if self.curve else last

    def fields(self, ago: float = 0.0) -> dict[str, str]:
        """What is known, by its label, in the order of the plain line. ago: see `update`."""
        known = self.metrics
        step = self.step
        found: dict[str, str | None] = {
            "step": f"{step:,}/{self.total_steps:,} ({100 * step // self.total_steps if self.total_steps else 100}%)",
            "epoch": f"{step / self.steps_per_epoch:.2f}" if self.steps_per_epoch else None,
            "elapsed": None if self._begun is None else duration(self.elapsed - ago),
            # After the last step there may be a preview and a save to come.
            "left": duration(self.seconds_left()) if step < self.total_steps else None,
            "loss": _format(self.loss(), "{:.4f}"),
            "lr": _format(known.get("train/learning_rate"), "{:.2e}"),
            "grad norm": _format(known.get("train/grad_norm"), "{:.3g}"),
            "tokens/s": _format(known.get("train/tokens_per_second"), "{:,.0f}"),
            "images/s": _format(known.get("train/samples_per_second"), "{:,.1f}"),
            "MFU": _format(known.get("perf/mfu"), "{:.1%}"),
            "input wait": _format(known.get("perf/data_wait"), "{:.1%}"),
            "memory": _format(known.get("perf/peak_memory_gib"), "{:.1f} GiB"),
        }
        return {label: text for label, text in found.items() if text is not None}

    def line(self, ago: float = 0.0) -> str:
        """E.g. `step 2,000/10,000 (20%)  epoch 1.60  elapsed 0:12:05  left 0:48:20  loss 0.3125  lr 2.00e-04 ...`."""
        return "  ".join(f"{label} {text}" for label, text in self.fields(ago).items())

    def last(self) -> tuple[dict[str, str], dict[str, str]]:
        """The last checkpoint and preview, and the last scores, as far as there are any."""
        marks = {f"last {name}": f"step {step:,}" for name, step in self.marks.items()}
        if self.scores is None:
            return marks, {}
        step, values = self.scores
        main = {name.removeprefix(SCORES): value for name, value in values.items() if not DETAILS.search(name)}
        return marks, {"last score": ", ".join(f"{name} {value:.4g}" for name, value in main.items()) + f" (step {step:,})"}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fields = self.fields()
        if len(self.curve) > 1 and not options.ascii_only:
            fields["loss"] += f" {sparkline(self.curve)}"
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis")
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self.total_steps, 1), completed=self.step)
        head.add_row(Text(self.title or "step", style="bold"), bar, fields.pop("step"))
        activity = self.activity()
        now = [Text(activity, style="dim" if activity == ACTIVITIES["step"] else "yellow")] if activity else []
        if now and not self.metrics:  # nothing is known yet
            yield Group(head, *now)
            return
        last, score = self.last()
        progress = {label: fields.pop(label) for label in ("epoch", "elapsed", "left", "loss") if label in fields}
        groups = (_cells(group) for group in (progress, fields, last, score) if group)
        yield Group(head, *now, *groups)


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
