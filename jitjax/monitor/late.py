"""Metrics stay on the device and are written one interval late, so that the training loop never waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jitjax.monitor.monitor import Monitor
from jitjax.monitor.throughput import Throughput

SKIPPED = "train/skipped_micro_batches"
Observer = Callable[[int, Mapping[str, float]], None]


class _Interval:
    """Some consecutive steps: their metrics on the device, when the last one ended, what the loop did meanwhile."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, Any]]] = []
        self.end: Future[float] | None = None
        self.waited = self.paused = 0.0
        self.facts: Mapping[str, float] = {}


class LateLog:
    """Collects the metrics of each optimizer step and hands them to the monitor when they are surely there.

    Args:
      monitor, meter: where metrics go, and what turns times into rates.
      samples_per_step: images of one optimizer step, over all devices.
      steps_per_epoch: for `train/epoch_loss`, written with the last step of each epoch.
      memory: peak of device memory in bytes, or None where it is not known; for `perf/peak_memory_gib`.
      observers: called with (step, metrics as floats) for every step, in order, once its whole interval is written; what
        they raise passes through.
      facts: metrics of the run as a whole, e.g. where its time went; asked when an interval ends, written with its last step.
    """

    def __init__(
        self,
        monitor: Monitor,
        meter: Throughput,
        *,
        samples_per_step: int,
        steps_per_epoch: int,
        memory: Callable[[], int | None] = lambda: None,
        observers: Sequence[Observer] = (),
        facts: Callable[[], Mapping[str, float]] = dict,
    ):
        self._monitor, self._meter, self._memory = monitor, meter, memory
        self._observers, self._facts = tuple(observers), facts
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

    def failure(self) -> str:
        """What the runtime says of the last step, if that has failed on the device; else "". Does not wait; for any thread."""
        last = (self._current.metrics or self._previous.metrics)[-1:]
        for step, metrics in last:
            value = next(iter(metrics.values()))
            try:
                if value.is_ready():  # so is one that will never have a value
                    value.block_until_ready()
            except RuntimeError as error:  # as JAX's are
                return f"step {step:,} failed on the device: {' '.join(str(error).split())[:300]}"
        return ""

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
        self._finish(previous)  # an observer may raise
        self._previous.facts = dict(self._facts())

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
        end = interval.end.result()
        speed = self._meter.close(steps, steps * self._samples_per_step, end)
        if (peak := self._memory()) is not None:
            speed["perf/peak_memory_gib"] = peak / 2**30
        self._write(interval, speed, ago=time.perf_counter() - end)

    def _write(self, interval: _Interval, speed: dict[str, float], ago: float = 0.0) -> None:
        written = []
        for step, on_device in interval.metrics:
            metrics = {name: float(value) for name, value in on_device.items()}
            if not metrics.get(SKIPPED):
                metrics.pop(SKIPPED, None)
            if step == interval.metrics[-1][0]:
                metrics.update(speed)
                metrics.update(interval.facts)
            epoch_start = step - self._steps_per_epoch if step % self._steps_per_epoch == 0 else None
            self._monitor.write(step, metrics, epoch_start=epoch_start)
            written.append((step, metrics))
        if speed:
            self._monitor.status(*written[-1], ago=ago)
        for step, metrics in written:
            for observe in self._observers:
                observe(step, metrics)
