"""Joins the console, `log.txt`, `metrics.jsonl`, W&B and TensorBoard, so that the loop reports everything once."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jitjax.errors import UserError
from jitjax.monitor.console import Console
from jitjax.monitor.metrics import MetricsFile
from jitjax.monitor.tensorboard import TensorBoardRun
from jitjax.monitor.view import duration
from jitjax.monitor.wandb_run import SCORE_STEP, WandbRun
from jitjax.settings import Wandb

_NO_WANDB = Wandb(enabled=False)


class _Warnings(logging.Handler):
    """Prints what the package logs as notes, so that a warning of the input pipeline does not break the live view.

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
    """Reports a run to its user and its workdir. Only the first process does; in the others every method does nothing.

    Args:
      workdir: holds `metrics.jsonl`, `log.txt` and the files of W&B and TensorBoard; must exist.
      total_steps: optimizer steps of the whole run.
      steps_per_epoch: for the epoch on the console; None leaves it out.
      resume_step: the step of the checkpoint that the run continues from; later lines of `metrics.jsonl` are dropped.
      is_main: whether this is the first process (`jax.process_index() == 0`).
      title: the run's name on the console, e.g. the model's.
      begun: when this start began, by `time.perf_counter`; default now.
      activity: what the run is doing, for the live view; see `Console`.
      next_commands: what the closing lines of a finished run suggest, e.g. `jitjax sample runs/a`.
      run_config: plain dict of the resolved configuration; stored with the W&B run, not read.
      wandb: whether and how to use W&B.
      tensorboard: also write TensorBoard event files.

    Raises:
      UserError: `metrics.jsonl` cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        steps_per_epoch: int | None = None,
        resume_step: int = 0,
        is_main: bool = True,
        title: str = "",
        begun: float | None = None,
        activity: Callable[[], tuple[str, float]] | None = None,
        next_commands: Sequence[str] = (),
        run_config: Mapping[str, Any] | None = None,
        wandb: Wandb = _NO_WANDB,
        tensorboard: bool = False,
    ):
        self._workdir, self._next_commands = Path(workdir), tuple(next_commands)
        self._total_steps, self._step = total_steps, resume_step
        self._checkpoint: int | None = None  # of this start
        self._resumed = resume_step > 0
        self._console: Console | None = None
        self._file: MetricsFile | None = None
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoardRun | None = None
        self._disk_full = False
        if not is_main:
            # Each process reads its own share of the data and may find bad files there.
            self._warnings = _Warnings(lambda text: print(text, file=sys.stderr, flush=True))
            return
        path = self._workdir / "metrics.jsonl"
        try:
            self._file = MetricsFile(path, resume_step)
        except OSError as error:
            raise UserError(f"--workdir: cannot write {path} ({error.strerror}): free it or use another") from error
        self._console = Console(
            total_steps,
            steps_per_epoch=steps_per_epoch,
            title=title,
            log_path=self._workdir / "log.txt",
            step=resume_step,
            activity=activity,
            begun=begun,
        )
        try:
            if tensorboard:
                self._tensorboard = TensorBoardRun(workdir, resume_step=resume_step, report=self.note)
        except UserError:
            self._console.close()
            self._file.close()
            raise
        self._warnings = _Warnings(self.note)
        if self._file.last_step < resume_step:
            self.note(f"warning: {path} has no lines of steps {self._file.last_step + 1:,} to {resume_step:,}")
        if wandb.enabled:
            self._wandb = WandbRun(workdir, run_config or {}, wandb, report=self.note)

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
        self._step = step
        self._console.observe(step, metrics)
        if self._wandb is not None:
            self._wandb.log(step, metrics)
        if self._tensorboard is not None:
            self._tensorboard.log(step, metrics)

    def status(self, step: int, metrics: Mapping[str, Any], *, ago: float = 0.0) -> None:
        """Shows progress, loss, speed and time left, as far as `metrics` has them; sends to W&B what was written.

        Args:
          ago: seconds since the step was done.
        """
        if self._console is not None:
            self._console.status(step, metrics, ago=ago)
        if self._wandb is not None:
            self._wandb.send()

    def image(self, step: int, name: str, path: str | os.PathLike) -> None:
        """Reports an image file (already complete), e.g. a preview, and sends it to W&B and TensorBoard under `name`."""
        if self._console is None:
            return
        self._console.mark("preview", step)
        self.note(f"preview of step {step:,}: {path}")
        if self._wandb is not None:
            self._wandb.log_extra(step, {name: Path(path)})
        if self._tensorboard is not None:
            self._tensorboard.log_image(step, name, path)

    def checkpoint(self, step: int, path: str | os.PathLike) -> None:
        """Reports a checkpoint that has been written."""
        self._checkpoint = step
        if self._console is not None:
            self._console.mark("checkpoint", step)
            self.note(f"checkpoint of step {step:,}: {path}")

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """Reports scores of the weights at `step` (names begin with `eval/`). `metrics.jsonl` does not hold them."""
        if self._console is None:
            return
        self._console.scores(step, values)
        self.note(f"scores of step {step:,}: " + ", ".join(f"{name} {value:.6g}" for name, value in values.items()))
        if self._wandb is not None:
            self._wandb.log_extra(step, {SCORE_STEP: step, **values})
        if self._tensorboard is not None:
            self._tensorboard.log(step, values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets values of the run as a whole in W&B, e.g. parameters, devices, goodput."""
        if self._wandb is not None:
            self._wandb.summary(values)

    def note(self, text: str) -> None:
        """Prints a line of its own and appends it to `log.txt`."""
        if self._console is not None:
            self._console.note(text)

    def close(self, exit_code: int = 0) -> None:
        """Prints where things are and what to do next, and ends everything. A second call does nothing.

        Args:
          exit_code: 0 for a finished run, 128 + signal number for one that was asked to stop, else a failure; W&B
            shows the run as failed when it is not 0.
        """
        self._warnings.close()
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._console.end()
        if self._wandb is not None:
            self._wandb.finish(exit_code)
        if self._tensorboard is not None:
            self._tensorboard.finish()
        self._console.close(*self._closing_lines(exit_code), commands=() if exit_code else self._next_commands)

    def _closing_lines(self, exit_code: int) -> list[str]:
        took = duration(self._console.elapsed)
        if exit_code == 0:
            what = "finished" if self._step >= self._total_steps else "stopped"  # by stop_after
            return [
                f"{what} at step {self._step:,}; this start took {took}",
                f"in {self._workdir}: checkpoints/, samples/, metrics.jsonl, log.txt",
            ]
        where = f"step {self._step:,} of {self._total_steps:,}"
        # A failure comes between two lines of the log: how many steps there were since the last one is not known here.
        what = f"stopped as asked at {where} after {took}" if exit_code > 128 else f"failed after {took}, last logged {where}"
        at = f"; last checkpoint: step {self._checkpoint:,}" if self._checkpoint is not None else ""
        saved = self._resumed or self._checkpoint is not None
        again = f"resumes from the last checkpoint in {self._workdir}" if saved else "begins again: nothing was saved yet"
        return [f"{what}{at}", f"the same command {again}"]
