"""`metrics.jsonl`: one JSON object a line, `{"step": 12, "train/loss": 0.4375, ...}`, in ascending order of step."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one line an optimizer step and hands it to the operating system at once.

    A run that resumes at step s writes the steps after s again, so lines with a later step, and a last line that a
    crash tore, go first. Lines ascend, so that is one cut at the end of the file: done by `ftruncate`, which either
    happens or not, needs no free space on a full disk, and leaves every retained byte where it was.

    Args:
      path: the file; made when absent.
      resume_step: the last step to keep; 0 starts anew.

    last_step: of the lines that were kept, 0 without one.

    Raises:
      OSError: the file cannot be opened or cut.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._unwritten = b""
        try:
            self.last_step = _cut_after(self._fd, resume_step)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the line of one step (`line_of`).

        Raises:
          OSError: e.g. the disk is full. The line is kept and goes out, whole and in order, with a later call.
        """
        self._unwritten += line_of({"step": step, **metrics}).encode()
        while self._unwritten:
            # A nearly full disk takes part of a line: go on from there next time, so that no line is torn or doubled.
            self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]

    def read(self, name: str, after: int, upto: int) -> list[float]:
        """The values of one metric in steps `after` < step <= `upto`, in order of step; nulls are left out.

        Reads the file from its end, so it costs as much as the steps it returns, not as the run is long.
        """
        values = []
        for _, line in _lines_backwards(self._fd):
            record = _parse(line)
            if record is None or record["step"] > upto:
                continue
            if record["step"] <= after:
                break
            if record.get(name) is not None:
                values.append(record[name])
        return values[::-1]

    def close(self) -> None:
        os.close(self._fd)


def read_last(path: str | os.PathLike, count: int) -> list[dict[str, Any]]:
    """The last `count` lines of a file, in order of step, also while a run writes it; a torn line is left out.

    Raises:
      OSError: there is no such file, or it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        records = (_parse(line) for _, line in _lines_backwards(fd))
        return list(itertools.islice((record for record in records if record is not None), count))[::-1]
    finally:
        os.close(fd)


def read_records(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The lines of a file with a step in each (`metrics.jsonl`, `scores.jsonl`), in their order; torn lines are left out.

    Raises:
      OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        yield from (record for line in file if (record := _parse(line)) is not None)


def line_of(record: Mapping[str, Any]) -> str:
    """A line of such a file. Floats keep full precision; infinities and NaN, which JSON lacks, become null."""
    return json.dumps({name: _json(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _json(value: Any) -> str | int | float | None:
    if isinstance(value, str | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's object, or None for one that was torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _lines_backwards(fd: int) -> Iterator[tuple[int, bytes]]:
    """(offset of the line's end, line with its newline), last line first."""
    if not os.fstat(fd).st_size:
        return  # an empty file cannot be mapped
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        end = len(data)
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            yield end, data[start:end]
            end = start


def _cut_after(fd: int, step: int) -> int:
    """Cuts off the lines of steps after `step`; the step of the last one that stays."""
    keep, complete, last = 0, True, 0
    for end, line in _lines_backwards(fd):
        record = _parse(line)
        if record is not None and record["step"] <= step:
            keep, complete, last = end, line.endswith(b"\n"), record["step"]
            break
    if keep != os.fstat(fd).st_size:
        os.ftruncate(fd, keep)
    if not complete:
        os.write(fd, b"\n")  # only the newline was lost
    os.fsync(fd)
    return last
