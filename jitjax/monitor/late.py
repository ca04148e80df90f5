"""Metrics stay on the device and are written one interval late, so that the training loop never waits for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jitjax.errors import UserError
from jitjax.monitor.monitor import Monitor
from jitjax.monitor.throughput import Throughput

NON_FINITE_PATIENCE = 100  # optimizer steps in a row without a finite loss after which a run stops
SKIPPED = "train/skipped_micro_batches"
Observer = Callable[[int, Mapping[str, float]], None]


class StopWhenNonFinite:
    """An observer that ends a run whose loss has stayed non-finite for `patience` optimizer steps in a row."""

    def __init__(self, patience: int = NON_FINITE_PATIENCE):
        self._patience, self._count = patience, 0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises:
        UserError: the loss has not been finite for too long.
        """
        self._count = 0 if math.isfinite(metrics["train/loss"]) else self._count + 1
        if self._count >= self._patience:
            raise UserError(
                f"the loss has not been finite for {self._count} optimizer steps: lower --config.optim.lr or set "
                "--config.optim.clip_norm=1; the same command resumes from the last checkpoint"
            )


class _Interval:
    """Some consecutive steps: their metrics on the device, when the last one ended, what the loop did meanwhile."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, Any]]] = []
        self.end: Future[float] | None = None
        self.waited = self.paused = 0.0


class LateLog:
    """Collects the metrics of each optimizer step and hands them to the monitor when they are surely there.

    Args:
      monitor, meter: where metrics go, and what turns times into rates.
      samples_per_step: images of one optimizer step, over all devices.
      steps_per_epoch: for `train/epoch_loss`, written with the last step of each epoch.
      observers: called with (step, metrics as floats) for every step, in order, once its whole interval is written; what
        they raise passes through. Default: `StopWhenNonFinite`.
    """

    def __init__(
        self,
        monitor: Monitor,
        meter: Throughput,
        *,
        samples_per_step: int,
        steps_per_epoch: int,
        observers: Sequence[Observer] | None = None,
    ):
        self._monitor, self._meter = monitor, meter
        self._observers = (StopWhenNonFinite(),) if observers is None else tuple(observers)
        self._samples_per_step, self._steps_per_epoch = samples_per_step, steps_per_epoch
        self._previous, self._current = _Interval(), _Interval()
        # Waits for the end of an interval where the loop does not, and returns when the device finished it.
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="interval_end")

    def add(self, step: int, metrics: dict[str, Any], waited: float) -> None:
        """The metrics (device scalars) of one step, whose batch the loop waited for `waited` seconds."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._current.metrics.append((step, metrics))
        self._current.waited += waited

    def paused(self, seconds: float) -> None:
        """Time since the last step that was not training: a preview, a save."""
        self._current.paused += seconds

    def first_step_done(self) -> None:
        """Write the first step without a speed, and start the clock behind it: it was compilation."""
        interval, self._current = self._current, _Interval()
        self._write(interval, speed={})
        self._meter.restart(time.perf_counter())

    def interval(self) -> None:
        """Close the current interval and write the one before."""
        if not self._current.metrics:
            return
        last = next(iter(self._current.metrics[-1][1].values()))
        self._current.end = self._watcher.submit(lambda: (last.block_until_ready(), time.perf_counter())[1])
        previous, self._previous, self._current = self._previous, self._current, _Interval()
        self._finish(previous)  # last: an observer may raise

    def flush(self) -> None:
        """Write everything; waits for the device."""
        self.interval()
        previous, self._previous = self._previous, _Interval()
        self._finish(previous)

    def close(self) -> None:
        self._watcher.shutdown(wait=False, cancel_futures=True)

    def _finish(self, interval: _Interval) -> None:
        if interval.end is None:
            return
        self._meter.waited(interval.waited)
        self._meter.paused(interval.paused)
        steps = len(interval.metrics)
        speed = self._meter.close(steps, steps * self._samples_per_step, interval.end.result())
        self._write(interval, speed)

    def _write(self, interval: _Interval, speed: dict[str, float]) -> None:
        written = []
        for step, on_device in interval.metrics:
            metrics = {name: float(value) for name, value in on_device.items()}
            if not metrics.get(SKIPPED):
                metrics.pop(SKIPPED, None)
            if step == interval.metrics[-1][0]:
                metrics.update(speed)
            epoch_start = step - self._steps_per_epoch if step % self._steps_per_epoch == 0 else None
            self._monitor.write(step, metrics, epoch_start=epoch_start)
            written.append((step, metrics))
        if speed:
            self._monitor.status(*written[-1])
        for step, metrics in written:
            for observe in self._observers:
                observe(step, metrics)
