"""What all processes of a run must know alike, exchanged through JAX.

Every process must make the same calls in the same order; with one process they cost nothing. How processes find and watch each
other: `jitjax.distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST_TEXT = 1000  # bytes


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def text_of_process_0(text: str | None) -> str:
    """What process 0 says, "" for None; a text of more than 1,000 bytes is cut off."""
    if jax.process_count() == 1:
        return text or ""
    padded = np.zeros(LONGEST_TEXT, np.uint8)
    written = np.frombuffer((text or "").encode()[:LONGEST_TEXT], np.uint8)
    padded[: len(written)] = written
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="ignore")


def numbers_of_process_0(numbers: Sequence[int]) -> list[int]:
    """The list of process 0, of numbers that fit into 32 bits."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    padded = np.resize(np.asarray(numbers or [0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(padded).tolist()
