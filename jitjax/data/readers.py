"""Which image each reading thread is at, so that one that does not answer can be named. Imports no JAX.

A thread notes the image before it reads it, in shared memory where it belongs to a worker process. That takes about a
microsecond; decoding takes a hundred or more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from typing import Any

import psutil

from jitjax import leftovers

WORKER = 0  # number of this worker process
_ROW = struct.Struct("<qqd")  # process, index of the image + 1 (0: none), when it began by time.monotonic()
_STATES = {psutil.STATUS_STOPPED: "stopped", psutil.STATUS_DISK_SLEEP: "waiting for the disk", psutil.STATUS_ZOMBIE: "dead"}


_here = threading.local()  # whom this thread reports to


def at(index: int) -> None:
    """Called by a data set's source before it reads image `index`; without it, the first one of several that are read at once
    is named."""
    if readers := getattr(_here, "readers", None):
        readers.note(index)


class Readers:
    """A table with a row for each thread of each worker; picklable, for the workers.

    Args:
      workers: worker processes; 0: the threads are this process's own.
      threads: of each worker.
    """

    def __init__(self, workers: int, threads: int):
        self._workers, self._threads = workers, threads
        self._segment: shared_memory.SharedMemory | None = None
        if workers:
            try:
                self._segment = leftovers.new_segment(_ROW.size * workers * threads)
            except OSError:  # /dev/shm is full, or there is none: workers that hang have no name
                pass
        self._begin()

    def _begin(self) -> None:
        size = _ROW.size * max(1, self._workers) * self._threads
        self._table = self._segment.buf if self._segment is not None else memoryview(bytearray(size))
        self._numbers, self._local = itertools.count(), threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"_workers": self._workers, "_threads": self._threads, "_name": self._segment and self._segment.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state.pop("_name")
        self.__dict__.update(state)
        try:
            self._segment = name and shared_memory.SharedMemory(name)
        except OSError:  # the main process has closed it again
            self._segment = None
        self._begin()

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Inside, this thread reads image `index`, and those that the source names by `at`."""
        _here.readers = self
        self.note(index)
        try:
            yield
        finally:
            self.note(-1)

    def note(self, index: int) -> None:
        """This thread reads image `index` next; -1: none."""
        row = getattr(self._local, "row", None)
        if row is None:
            thread = next(self._numbers) % self._threads
            row = self._local.row = _ROW.size * (WORKER * self._threads + thread)
        _ROW.pack_into(self._table, row, os.getpid(), index + 1, time.monotonic())

    def describe(self, worker: int, name: Callable[[int], str]) -> str:
        """E.g. "worker 3 of 8 (process 4711, stopped), at cats/7.jpg for 61 s".

        Args:
          name: calls an image by its index.
        """
        rows = [_ROW.unpack_from(self._table, _ROW.size * (worker * self._threads + k)) for k in range(self._threads)]
        who = "this process"
        if self._workers:
            who = f"worker {worker} of {self._workers}"
            process = max(process for process, _, _ in rows)
            if not process:
                return f"{who}, which has read nothing yet"
            who += f" (process {process}, {_state(process)})"
        reading = [(began, index - 1) for _, index, began in rows if index]
        if not reading:
            return f"{who}, between two files"
        began, index = min(reading)
        return f"{who}, at {name(index)} for {time.monotonic() - began:.0f} s"

    def processes(self) -> set[int]:
        """The worker processes that have begun to read."""
        rows = range(0, len(self._table) - _ROW.size + 1, _ROW.size) if self._workers else ()
        return {_ROW.unpack_from(self._table, row)[0] for row in rows} - {0}

    def close(self) -> None:
        """Free the shared memory. Safe to call twice; nothing else may follow."""
        segment, self._segment = self._segment, None
        if segment is not None:
            self._begin()
            segment.close()
            segment.unlink()


def _state(process: int) -> str:
    try:
        status = psutil.Process(process).status()
    except psutil.NoSuchProcess:
        return "ended"
    return _STATES.get(status, status)
