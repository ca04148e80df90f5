"""Worker processes with a progress bar, for `jitjax prepare`. They end with their parent and stop when it asks."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress
import rich.text

from jitjax.errors import UserError

_LOG_SECONDS = 10  # between lines where stderr is no terminal


class Stopped(Exception):
    """The work is being interrupted."""


_progress: Any = None
_stop: Any = None
_shared: Any = None  # the input or the index: large, so sent once per worker instead of once per shard


def _share(progress: Any, stop: Any, shared: Any) -> None:
    global _progress, _stop, _shared
    _progress, _stop, _shared = progress, stop, shared


def _init_worker(progress: Any, stop: Any, shared: Any) -> None:
    _share(progress, stop, shared)
    obey_parent()


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def obey_parent() -> None:
    """In a worker process: leaves Ctrl-C to the parent, and ends when the parent does, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def shared() -> Any:
    """In a worker: the object that the pool was made with."""
    return _shared


def step(images: int = 1) -> None:
    """In a worker: reports progress. Raises Stopped where the parent wants to end."""
    with _progress.get_lock():
        _progress.value += images
    if _stop.is_set():
        raise Stopped


class Pool:
    """Worker processes with a progress bar. Leaving the context by an error stops them within one image."""

    def __init__(self, workers: int | None, total: int, jobs: int, unit: str, shared: Any):
        """workers: None for one on each core, 0 to work in this process."""
        self._workers = max(1, min(available_cpus() if workers is None else workers, jobs))
        self._total, self._unit = total, unit
        context = multiprocessing.get_context("spawn")
        self._done, self._stop = context.Value("q", 0), context.Event()
        if workers == 0:
            set_shared = functools.partial(_share, self._done, self._stop, shared)
            self._executor = concurrent.futures.ThreadPoolExecutor(1, initializer=set_shared)
            return
        self._executor = concurrent.futures.ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_init_worker, initargs=(self._done, self._stop, shared)
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=kind is not None)

    def run(self, function: Callable, calls: list[tuple[Any, tuple]]) -> Iterator[tuple[Any, Any]]:
        """Yields (key, function(*arguments)) as they finish; a few calls more than workers are under way, to bound
        memory.
        """
        waiting, running, due = collections.deque(calls), {}, time.monotonic() + _LOG_SECONDS
        with progress_bar() as bar:
            task = bar.add_task(self._unit, total=self._total)
            while waiting or running:
                while waiting and len(running) < self._workers + 2:
                    key, arguments = waiting.popleft()
                    running[self._executor.submit(function, *arguments)] = key
                finished, _ = concurrent.futures.wait(running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
                bar.update(task, completed=self._done.value)
                if not bar.console.is_terminal and time.monotonic() > due:  # a log file: Rich would write but the last line
                    due = time.monotonic() + _LOG_SECONDS
                    print(f"{self._done.value}/{self._total} {self._unit}", file=sys.stderr, flush=True)
                for future in finished:
                    key = running.pop(future)
                    try:
                        yield key, future.result()
                    except concurrent.futures.BrokenExecutor:
                        raise UserError(
                            "a worker was killed, mostly because memory ran out; run again with fewer --workers"
                        ) from None
            bar.update(task, completed=self._done.value)


def progress_bar() -> rich.progress.Progress:
    """Bar, count, rate and time left on stderr; where that is no terminal, one line at the end."""
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.description},"),
        _Rate(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    return rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))


class _Rate(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(f"{task.completed / max(task.elapsed or 0, 1e-9):.0f} images/s")
