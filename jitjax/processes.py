"""What all processes of a run must know alike, exchanged through JAX.

Every process must make the same calls in the same order; with one process they cost nothing. How processes find and watch each
other: `jitjax.distributed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jitjax.errors import UserError

LONGEST_TEXT = 1000  # bytes


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def text_of_process_0(text: str | None, longest: int = LONGEST_TEXT) -> str:
    """What process 0 says, "" for None; a text of more than `longest` bytes is cut off."""
    if jax.process_count() == 1:
        return text or ""
    padded = np.zeros(longest, np.uint8)
    written = np.frombuffer((text or "").encode()[:longest], np.uint8)
    padded[: len(written)] = written
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="ignore")


def numbers_of_process_0(numbers: Sequence[int]) -> list[int]:
    """The list of process 0, of numbers that fit into 32 bits."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    padded = np.resize(np.asarray(numbers or [0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def require_same(own: Mapping[str, Any]) -> None:
    """Processes make one run only with the same settings and images: with others each would move its part of the state in
    another way.

    Args:
      own: what this process has, by name; values for JSON.

    Raises:
      UserError: another process has something else. Those that differ from process 0 name what.
    """
    own = json.loads(json.dumps(own))
    first = json.loads(text_of_process_0(json.dumps(own), longest=1 << 16))
    differing = [
        f"{name}: {first.get(name)} there, {own.get(name)} here" for name in first | own if first.get(name) != own.get(name)
    ]
    if not any_process(bool(differing)):
        return
    if not differing:
        raise UserError("another process of this run was started with other settings or images, which its last line names")
    raise UserError(
        f"process {jax.process_index()} was started with other settings or images than process 0 ({'; '.join(differing)}): "
        "give all processes the same flags, config file and data set"
    )
