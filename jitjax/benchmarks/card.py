"""The card itself: the speed of a plain matmul, and its clock and power while something runs."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp


def matmul_peak(size: int | None = None, groups: int = 20, seconds: float = 2.0) -> dict[str, float]:
    """Throughput of a square bf16 matmul of random numbers on one device, in TFLOP/s.

    Returns:
      matmul_tflops: median over the first `groups` groups of ten matmuls, a burst of a fraction of a second.
      matmul_tflops_sustained: median over the second half of `seconds` of them, where a card may reach its power limit.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (512 if on_cpu else 8192)
    device = jax.local_devices()[0]
    draw = functools.partial(jax.random.normal, shape=(size, size), dtype=jnp.bfloat16)
    a, b = (jax.device_put(draw(jax.random.key(i)), device) for i in (0, 1))
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready([matmul(a, b) for _ in range(10)])
    rates, times = [], [time.perf_counter()]
    while len(rates) < groups or times[-1] - times[0] < (0 if on_cpu else seconds):
        out = None
        for _ in range(10):
            out = matmul(a, b)
        out.block_until_ready()
        times.append(time.perf_counter())
        rates.append(10 * 2 * size**3 / (times[-1] - times[-2]) / 1e12)
    return {
        "matmul_tflops": round(statistics.median(rates[:groups]), 3),
        "matmul_tflops_sustained": round(statistics.median(rates[len(rates) // 2 :]), 3),
    }


class CardMonitor:
    """Clock, power and temperature of the first device while a `with` block runs, from `nvidia-smi`, twice a second."""

    FIELDS = ("clocks.sm", "power.draw", "power.limit", "temperature.gpu")

    def __enter__(self) -> CardMonitor:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        which = visible or str(jax.local_devices()[0].local_hardware_id or 0)
        command = ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "500"]
        self._process = None
        if jax.default_backend() == "gpu":
            try:
                self._process = subprocess.Popen(
                    [*command, "-i", which], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            except OSError:
                pass
        return self

    def __exit__(self, *_: Any) -> None:
        self._text = ""
        if self._process is not None:
            self._process.terminate()
            self._text = self._process.communicate()[0]

    def report(self) -> dict[str, Any] | None:
        """Medians over the samples; None where nvidia-smi is missing or says nothing."""
        return card_medians(self._text)


def card_medians(text: str) -> dict[str, Any] | None:
    """Medians of the columns of `CardMonitor.FIELDS` in what nvidia-smi printed; None without a whole line."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append([float(value) for value in line.split(",")])
        except ValueError:  # [N/A], or a line cut off at the end
            continue
    rows = [row for row in rows if len(row) == len(CardMonitor.FIELDS)]
    if not rows:
        return None
    medians = (statistics.median(column) for column in zip(*rows, strict=True))
    names = ("sm_clock_mhz", "power_w", "power_limit_w", "temperature_c")
    return dict(zip(names, medians, strict=True)) | {"samples": len(rows)}
