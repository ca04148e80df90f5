"""NVIDIA cards: what a program is compiled by, what fits, how fast they are, and which are here. Imports no JAX."""

from __future__ import annotations

import dataclasses
import subprocess

from jitjax import runtime


@dataclasses.dataclass(frozen=True)
class Card:
    """A card that a program can be planned for. All but `memory`, `flops` and `link` are attributes of a `jax.Device`, by which
    kernels are chosen. `memory`: bytes, as nvidia-smi reports it. `flops`: dense (not sparse) bf16 operations per second, from
    NVIDIA's datasheets for the SXM modules; None where no speed of this program was measured. `link`: bytes per second and card
    in ring all-reduces over the NVLink of eight; None where that is not known."""

    device_kind: str
    compute_capability: str
    core_count: int
    memory: int
    platform: str = "gpu"
    flops: float | None = None
    link: float | None = None

    @property
    def usable(self) -> float:
        """Bytes that JAX takes of it."""
        return self.memory * float(runtime.ENVIRONMENT["XLA_PYTHON_CLIENT_MEM_FRACTION"])


CARDS = {
    "h200": Card("NVIDIA H200", "9.0", 132, 143_771 * 2**20, flops=989e12, link=360e9),
    "h100": Card("NVIDIA H100 80GB HBM3", "9.0", 132, 81_559 * 2**20, flops=989e12, link=360e9),
    "a100": Card("NVIDIA A100-SXM4-80GB", "8.0", 108, 81_920 * 2**20),
    "a100-40gb": Card("NVIDIA A100-SXM4-40GB", "8.0", 108, 40_960 * 2**20),
    "l40s": Card("NVIDIA L40S", "8.9", 142, 46_068 * 2**20),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", "8.9", 128, 24_564 * 2**20),
}
WITH_FLOPS = tuple(name for name, card in CARDS.items() if card.flops)


def name_of(device_kind: str) -> str | None:
    """The key of `CARDS` for a `jax.Device.device_kind`, which is nvidia-smi's name; None for others.

    >>> name_of("NVIDIA H100 80GB HBM3")
    'h100'
    """
    for name, card in CARDS.items():
        if card.device_kind == device_kind:
            return name
    words = device_kind.lower().split()  # whole ones: a GH200 is no H200
    if {"pcie", "nvl", "mig"}.intersection(words):  # the same names with a lower power limit and clock, or a part of the card
        return None
    return next((name for name in WITH_FLOPS if name in words), None)


def measured_name(device_kind: str) -> str | None:
    """`name_of` a card whose `flops` are known, the only ones that estimates are for; None for others."""
    name = name_of(device_kind)
    return name if name in WITH_FLOPS else None


def datasheet_flops(device_kind: str) -> float | None:
    """The datasheet's operations per second of one card by `jax.Device.device_kind`; None for a card whose are not listed."""
    name = name_of(device_kind)
    return CARDS[name].flops if name else None


def here() -> list[str]:
    """Names of this machine's cards, without starting JAX on them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        return []
