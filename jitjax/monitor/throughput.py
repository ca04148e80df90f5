"""Speed of the loop, from timestamps that the caller passes in."""

from __future__ import annotations


class Throughput:
    """Samples and tokens a second between two calls of `close`, pauses taken out.

    Every `now` is in seconds of one clock (`time.perf_counter()`). An interval ends when the metrics of its last step
    have arrived from the device, so it measures the device and not how fast the host enqueues.

    Args:
      tokens_per_sample: image tokens of one image (256 for 64 px at patch 4; context tokens do not count).
      now: when the first interval starts.
      flops_per_sample: operations to train on one image (`jitjax.flops.train_flops`), for `perf/mfu`.
      peak_flops: operations a second of all devices together (datasheet); None leaves `perf/mfu` out.
    """

    def __init__(self, tokens_per_sample: int, now: float, *, flops_per_sample: float = 0.0, peak_flops: float | None = None):
        self.tokens_per_sample = tokens_per_sample
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.restart(now)

    def restart(self, now: float) -> None:
        """Starts the interval afresh, e.g. after compilation."""
        self._start, self._waited, self._paused = now, 0.0, 0.0

    def waited(self, seconds: float) -> None:
        """The loop stood still this long for its next batch."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Previews, evaluation or a checkpoint took this long; the time is not training and does not count."""
        self._paused += seconds

    def close(self, steps: int, samples: int, now: float) -> dict[str, float]:
        """Ends the interval and starts the next one.

        Args:
          steps: optimizer steps in the interval.
          samples: images in the interval, over all devices.
          now: when the interval ended.

        Returns:
          train/samples_per_second, train/tokens_per_second, time/step (seconds), time/paused (seconds), perf/data_wait
          (share of the training time in which the loop waited for input: at most this much would be won by faster
          input) and, where the peak is known, perf/mfu.
        """
        seconds = max(now - self._start - self._paused, 1e-9)
        rate = samples / seconds
        metrics = {
            "train/samples_per_second": rate,
            "train/tokens_per_second": rate * self.tokens_per_sample,
            "time/step": seconds / max(steps, 1),
            "time/paused": self._paused,
            "perf/data_wait": min(self._waited / seconds, 1.0),
        }
        if self.peak_flops:
            metrics["perf/mfu"] = rate * self.flops_per_sample / self.peak_flops
        self.restart(now)
        return metrics
