"""TensorBoard event files, by TensorBoard's own writer: `tensorboard --logdir WORKDIR`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from jitjax.errors import UserError


class TensorBoardRun:
    """Writes `workdir/tensorboard`. A disk that fails switches it off, with one line; training goes on.

    Args:
      workdir: the run's folder.
      resume_step: TensorBoard hides what an earlier start of this run wrote after this step.
      report: takes one line of text for the user.

    Raises:
      UserError: the package is not installed.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int = 0, report: Callable[[str], None] = print):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UserError(
                "--config.log.tensorboard=True needs its package: pip install -e '.[tensorboard]' in jitjax's folder"
            ) from error
        self._event, self._summary, self._report = event_pb2, summary_pb2, report
        try:
            self._writer: EventFileWriter | None = EventFileWriter(str(Path(workdir) / "tensorboard"), flush_secs=30)
        except OSError as error:
            self._writer = None
            report(f"TensorBoard is off for this run ({error}); metrics.jsonl has every step")
            return
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Scalars of one optimizer step."""
        values = [self._summary.Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._add(step, values)

    def log_image(self, step: int, name: str, path: str | os.PathLike) -> None:
        """An image file, shown at `step`."""
        if self._writer is None:
            return
        with Image.open(path) as image:
            width, height = image.size
        encoded = Path(path).read_bytes()
        image = self._summary.Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
        self._add(step, [self._summary.Summary.Value(tag=name, image=image)])

    def finish(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except Exception as error:
                self._report(f"TensorBoard's last values are lost ({error}); metrics.jsonl is complete")

    def _add(self, step: int, values: list[Any]) -> None:
        self._write(self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=values)))

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.add_event(event)
        except Exception as error:  # raised by the writer's thread, whatever the file system made of it
            self._writer = None
            self._report(f"TensorBoard is off from here on ({error}); metrics.jsonl goes on")
