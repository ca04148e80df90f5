"""Joins the status line, `metrics.jsonl` and W&B, so that the loop says everything once."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jitjax.errors import UserError
from jitjax.monitor.console import Console
from jitjax.monitor.metrics import MetricsFile
from jitjax.monitor.tracker import NullTracker, WandbTracker


class _Warnings(logging.Handler):
    """Shows what the package logs as notes, so that a warning of the input pipeline does not break the status line.

    Takes the package's logger over until `close`, whatever level and handlers absl has given the root logger.
    """

    def __init__(self, note: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._note, self._logger = note, logging.getLogger("jitjax")
        self._before = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        self._logger.addHandler(self)

    def close(self) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        self._note(f"{record.levelname.lower()}: {record.getMessage()}")


class Monitor:
    """Tells the user and the workdir about a run. Only the first process does; in the others every method does nothing.

    Args:
      workdir: holds `metrics.jsonl` and W&B's files; must exist.
      config: the resolved configuration as a plain dict, for W&B. Its `wandb` entry (`enabled`, `project`, `name`,
        `mode`) decides about W&B; without one W&B is off.
      total_steps: optimizer steps of the whole run.
      resume_step: the step of the checkpoint that the run goes on from; later lines of `metrics.jsonl` are dropped.
      is_main: whether this is the first process (`jax.process_index() == 0`).

    Raises:
      UserError: `metrics.jsonl` cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Mapping[str, Any],
        *,
        total_steps: int,
        resume_step: int = 0,
        is_main: bool = True,
    ):
        self._console = Console(total_steps) if is_main else None
        self._file: MetricsFile | None = None
        self._tracker: NullTracker | WandbTracker = NullTracker()
        self._disk_full = False
        # In the other processes, too: each reads its own share of the data and may find bad files there.
        self._warnings = _Warnings(self.note if is_main else lambda text: print(text, file=sys.stderr, flush=True))
        if not is_main:
            return
        path = Path(workdir) / "metrics.jsonl"
        try:
            self._file = MetricsFile(path, resume_step)
        except OSError as error:
            raise UserError(f"--workdir: cannot write {path} ({error.strerror}): free it or use another") from error
        settings = config.get("wandb") or {}
        if settings.get("enabled"):
            self._tracker = WandbTracker(
                workdir,
                config,
                project=settings.get("project") or "jitjax",
                name=settings.get("name"),
                mode=settings.get("mode") or "online",
                warn=self.note,
            )

    def write(self, step: int, metrics: Mapping[str, float], *, epoch_start: int | None = None) -> None:
        """Stores the metrics of one optimizer step; steps ascend.

        Args:
          step: the optimizer step, from 1.
          metrics: Python or numpy numbers by name.
          epoch_start: given for the last step of an epoch: the step after which that epoch began. Adds
            `train/epoch_loss`, the mean of `train/loss` over steps (epoch_start, step], those before a resume included.
        """
        if self._file is None:
            return
        if epoch_start is not None:
            losses = self._file.read("train/loss", epoch_start, step - 1)
            if metrics.get("train/loss") is not None and math.isfinite(metrics["train/loss"]):
                losses.append(float(metrics["train/loss"]))
            if losses:
                metrics = {**metrics, "train/epoch_loss": math.fsum(losses) / len(losses)}
        try:
            self._file.write(step, metrics)
            self._disk_full = False
        except OSError as error:
            if not self._disk_full:
                self.note(f"warning: {self._file.path} cannot be written ({error.strerror}); its lines wait in memory")
            self._disk_full = True
        self._tracker.log(step, metrics)

    def status(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows progress, loss, learning rate, tokens/s, time left and data wait, as far as `metrics` has them."""
        if self._console is not None:
            self._console.status(step, metrics)

    def image(self, step: int, name: str, path: str | os.PathLike) -> None:
        """Sends an image file (already complete) to W&B under `name`, at `step`."""
        self._tracker.log_image(step, name, path)

    def note(self, text: str) -> None:
        """Prints a line of its own without breaking the status line."""
        if self._console is not None:
            self._console.note(text)

    def close(self, exit_code: int = 0) -> None:
        """Ends everything; W&B shows the run as failed when `exit_code` is not 0. A second call does nothing."""
        self._warnings.close()
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._console.close()
        self._tracker.finish(exit_code)
