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
    return _text(multihost_utils.broadcast_one_to_all(_padded(text, longest)))


def text_of_first(text: str | None) -> str:
    """The text of the lowest process that has one, "" where none has; cut off behind `LONGEST_TEXT` bytes."""
    if jax.process_count() == 1:
        return text or ""
    rows = np.asarray(multihost_utils.process_allgather(_padded(text, LONGEST_TEXT)))
    return next(filter(None, map(_text, rows)), "")


def _padded(text: str | None, size: int) -> np.ndarray:
    return np.frombuffer((text or "").encode()[:size].ljust(size, b"\0"), np.uint8)


def _text(padded: np.ndarray) -> str:
    return bytes(padded).rstrip(b"\0").decode(errors="ignore")


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
      UserError: a process has something else. All name the first that differs from process 0, and what: whichever of them
        ends the run, its line is the one that is seen.
    """
    text = json.dumps(own)
    own, first = json.loads(text), json.loads(text_of_process_0(text, longest=numbers_of_process_0([len(text)])[0]))
    differing = [
        f"{name}: {str(first.get(name))[:200]} there, {str(own.get(name))[:200]} here"
        for name in first | own
        if first.get(name) != own.get(name) and str(first.get(name)) != str(own.get(name))  # NaN is like itself
    ]
    what = "; ".join(differing)[:700]
    problem = (
        f"process {jax.process_index()} was started with other settings or images than process 0 ({what}): give all processes "
        "the same flags, config file and data set"
    )
    if problem := text_of_first(problem if differing else None):
        raise UserError(problem)
