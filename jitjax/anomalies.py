"""Steps whose numbers are not finite, and losses out of line. Imports no JAX.

The training step leaves weights, EMAs and optimizer untouched where loss or gradient is not finite; with accumulation it
leaves out a micro-batch whose gradient is not. What is decided here, from the metrics of the interval before, is whether the
run may go on: such steps are counted in the workdir, across starts, so that a scheduler that starts a failing run again and
again meets the same stop.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jitjax import atomic
from jitjax.errors import UserError

FILE = "skipped_steps.json"
POLICIES = ("skip", "stop")
_LOSS_SCALE_PATIENCE = 24  # halvings in a row: from the largest loss scale, 2^24, down to 1
_LEFT_OUT = "train/skipped_micro_batches"
_USUAL = 200  # losses that say what is usual
_SPIKE = 10.0  # times the usual deviation from the median
_SPIKE_LEAST = 0.25  # and by this fraction of the median


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Optimizer steps that were skipped, wholly or in part, over the workdir's whole life."""

    in_a_row: int = 0
    total: int = 0
    first: int = 0  # step at which the current row began
    last: int = 0  # the latest such step

    def after(self, step: int, finite: bool) -> Skipped:
        """The count after optimizer step `step`. A step that was counted before and is repeated after a restart counts
        again: it failed again."""
        if finite:
            return dataclasses.replace(self, in_a_row=0)
        first = self.first if self.in_a_row else step
        return Skipped(self.in_a_row + 1, self.total + 1, first, step)


def what_is_not_finite(metrics: Mapping[str, float]) -> str:
    """ "loss" or "gradient": the step changed nothing; "gradient of N micro-batches": it did without them; "": nothing."""
    for name, what in (("train/loss", "loss"), ("train/grad_norm", "gradient")):
        if not math.isfinite(metrics.get(name, 0.0)):
            return what
    left_out = int(metrics.get(_LEFT_OUT, 0))
    return f"gradient of {left_out} micro-batch{'es' if left_out > 1 else ''}" if left_out else ""


def is_spike(loss: float, before: Iterable[float]) -> bool:
    """Whether `loss` lies far above the losses `before`: 10 median absolute deviations, and a quarter of the median."""
    before = list(before)
    if len(before) < _USUAL // 2:
        return False
    median = statistics.median(before)
    deviation = statistics.median(abs(value - median) for value in before)
    return loss - median > max(_SPIKE * deviation, _SPIKE_LEAST * abs(median))


class Anomalies:
    """Fed the metrics of every step, an interval late.

    Args:
      workdir: holds `skipped_steps.json`, written by process 0 when something is skipped.
      policy: "skip": go on; "stop": the first such step ends the run.
      limit: steps in a row that end the run.
      dynamic_loss_scale: float16, whose overflows halve the loss scale and are no fault unless they do not end.
      last_good: describes the newest checkpoint, for the line that ends the run.
      batch: the images of a step, as {"index", "file", ...} each, written to `bad_batch_<step>.json` when the run ends.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        policy: str = "skip",
        limit: int = 20,
        dynamic_loss_scale: bool = False,
        is_main: bool = True,
        last_good: Callable[[], str] = lambda: "",
        batch: Callable[[int], list[dict[str, Any]]] | None = None,
    ):
        if policy not in POLICIES:
            raise UserError(f"--config.nan_policy={policy} is unknown: skip or stop")
        self._workdir, self._policy, self._limit, self._is_main = workdir, policy, limit, is_main
        self._tolerated = _LOSS_SCALE_PATIENCE if dynamic_loss_scale else 0
        self._last_good, self._batch = last_good, batch
        self._overflows = 0  # in a row, with a dynamic loss scale
        self._losses: collections.deque[float] = collections.deque(maxlen=_USUAL)
        self._quiet_until = 0
        self.skipped = self._read()

    def add(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Lines for the user about optimizer step `step`.

        Raises:
          UserError: the run must not go on. Weights and checkpoints are as they were before the skipped steps.
        """
        what = what_is_not_finite(metrics)
        if what and self._overflows < self._tolerated:
            self._overflows += 1
            return []
        self._overflows = self._overflows if what else 0
        before, self.skipped = self.skipped, self.skipped.after(step, finite=not what)
        lines = []
        if not what:
            if before.in_a_row:
                self._write()
                lines.append(f"step {step:,} is finite again after {before.in_a_row:,} skipped")
            loss = metrics["train/loss"]
            if step >= self._quiet_until and is_spike(loss, self._losses):
                self._quiet_until = step + _USUAL // 2
                lines.append(f"loss spike at step {step:,}: {loss:.4g}, usual {statistics.median(self._losses):.4g}")
            self._losses.append(loss)
            return lines
        self._write()
        if self._policy == "stop" or self.skipped.in_a_row >= self._limit:
            raise self._end(what)
        if _power_of_two(self.skipped.in_a_row):
            done = f"skipped: its {what}" if what in ("loss", "gradient") else f"made without the {what}, which"
            lines.append(
                f"step {step:,} {done} is not finite ({self.skipped.in_a_row:,} in a row, {self.skipped.total:,} in all; the "
                f"run stops after {self._limit:,} in a row)"
            )
        return lines

    def metrics(self) -> dict[str, float]:
        """For the log, once something was skipped: `train/skipped_steps`, over the workdir's whole life."""
        return {"train/skipped_steps": float(self.skipped.total)} if self.skipped.total else {}

    def _end(self, what: str) -> UserError:
        s, where = self.skipped, ""
        if self._is_main and self._batch is not None:
            file = self._workdir / f"bad_batch_{s.last:08d}.json"
            try:
                file.write_text(json.dumps({"step": s.last, "images": self._batch(s.last)}, indent=1))
                where = f"; its images are listed in {file}"
                if self._can_replay():
                    where += f", and `jitjax replay {self._workdir} --step {s.last}` looks at it"
            except OSError:  # a full disk does not hide the fault
                pass
        good = self._last_good()
        return UserError(
            f"the {what} is not finite: {s.in_a_row:,} optimizer steps in a row over all starts, from step {s.first:,} to "
            f"step {s.last:,}{where}{'; ' + good if good else ''}. Lower --config.optim.lr or set --config.optim.clip_norm=1; "
            f"a finite step, or deleting {self._workdir / FILE}, begins the count anew"
        )

    def _can_replay(self) -> bool:
        """Whether the command finds the run's loss and images: those of a script it does not have."""
        try:
            saved = json.loads((self._workdir / "config.json").read_text())
            there = (self._workdir / "shapes").is_dir() if saved["data"]["synthetic"] else bool(saved["data"]["path"])
            return there and not saved.get("objective")
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self) -> Skipped:
        try:
            known = json.loads((self._workdir / FILE).read_text())
            return Skipped(**{field.name: int(known[field.name]) for field in dataclasses.fields(Skipped)})
        except (OSError, ValueError, KeyError, TypeError):  # none, or torn by a full disk: begin anew
            return Skipped()

    def _write(self) -> None:
        if not self._is_main:
            return
        with contextlib.suppress(OSError):  # the checkpoint will report the disk
            atomic.write_text(self._workdir / FILE, json.dumps(dataclasses.asdict(self.skipped)) + "\n")


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
