"""NVIDIA cards: what a program is compiled by and what fits, and which are in this machine. Imports no JAX."""

from __future__ import annotations

import dataclasses
import subprocess

from jitjax import runtime


@dataclasses.dataclass(frozen=True)
class Card:
    """A card that a program can be planned for. The first four attributes are those of a `jax.Device`, by which kernels are
    chosen; `memory` in bytes as nvidia-smi reports it."""

    device_kind: str
    compute_capability: str
    core_count: int
    memory: int
    platform: str = "gpu"

    @property
    def usable(self) -> float:
        """Bytes that JAX takes of it."""
        return self.memory * float(runtime.ENVIRONMENT["XLA_PYTHON_CLIENT_MEM_FRACTION"])


CARDS = {
    "h200": Card("NVIDIA H200", "9.0", 132, 143_771 * 2**20),
    "h100": Card("NVIDIA H100 80GB HBM3", "9.0", 132, 81_559 * 2**20),
    "a100": Card("NVIDIA A100-SXM4-80GB", "8.0", 108, 81_920 * 2**20),
    "a100-40gb": Card("NVIDIA A100-SXM4-40GB", "8.0", 108, 40_960 * 2**20),
    "l40s": Card("NVIDIA L40S", "8.9", 142, 46_068 * 2**20),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", "8.9", 128, 24_564 * 2**20),
}


def name_of(device_kind: str) -> str | None:
    """The key of `CARDS` for a `jax.Device.device_kind`, which is nvidia-smi's name; None for others."""
    return next((name for name, card in CARDS.items() if card.device_kind == device_kind), None)


def here() -> list[str]:
    """Names of this machine's cards, without starting JAX on them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        return []
