"""The card itself: the speed of a plain matmul, and its clock and power while something runs."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


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
    """Clock, power and temperature of this process's devices while a `with` block runs, from `nvidia-smi`, twice a second."""

    FIELDS = ("clocks.sm", "power.draw", "power.limit", "temperature.gpu")

    def __init__(self, mesh: Mesh):
        self._which = [_smi_name(device) for device in mesh.local_mesh.devices.flat]

    def __enter__(self) -> CardMonitor:
        query = ",".join(("index", "uuid", *self.FIELDS))
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "500"]
        self._process = None
        if jax.default_backend() == "gpu":
            try:
                self._process = subprocess.Popen(
                    [*command, "-i", ",".join(self._which)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            except OSError:
                pass
        return self

    def __exit__(self, *_: Any) -> None:
        self._text = ""
        if self._process is not None:
            self._process.terminate()
            self._text = self._process.communicate()[0]

    def report(self) -> list[dict[str, Any]] | None:
        """Medians over the samples, for each device; None where nvidia-smi is missing or says nothing."""
        return card_medians(self._text, self._which)


def _smi_name(device: jax.Device) -> str:
    """What nvidia-smi, which does not read CUDA_VISIBLE_DEVICES, calls a device: its index or UUID."""
    number = device.local_hardware_id or 0
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)


def card_medians(text: str, which: Sequence[str]) -> list[dict[str, Any]] | None:
    """Medians of the columns of `CardMonitor.FIELDS` in what nvidia-smi printed behind index and UUID, for each card in `which`
    (one or the other); None without a whole line of every card."""
    rows: dict[str, list[list[float]]] = {}
    for line in text.splitlines():
        try:
            index, uuid, *values = (value.strip() for value in line.split(","))
            row = [float(value) for value in values]
        except ValueError:  # no such line, [N/A], or a line cut off at the end
            continue
        for name in which:
            if len(row) == len(CardMonitor.FIELDS) and (name == index or uuid.startswith(name)):
                rows.setdefault(name, []).append(row)
    if set(rows) != set(which):
        return None
    names = ("sm_clock_mhz", "power_w", "power_limit_w", "temperature_c")
    return [
        dict(zip(names, map(statistics.median, zip(*rows[name], strict=True)), strict=True)) | {"samples": len(rows[name])}
        for name in which
    ]
