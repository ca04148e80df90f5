"""From host batches to global jax.Arrays, a few batches ahead of the training loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

_PATIENCE_S = 10.0
_SILENT_S = 30.0  # of waiting, after which a warning names the worker and its file
_log = logging.getLogger("jitjax.data")


class DeviceIterator(Iterator[dict[str, Any]]):
    """Endless batches on the devices; made by `to_device`.

    wait_seconds: how long the consumer has waited for data in `next()` so far.
    """

    def __init__(self, host_iterator: Iterator[dict[str, Any]], sharding: Any, buffer: int):
        self.wait_seconds = 0.0
        self._host = host_iterator
        self._sharding = sharding
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=buffer)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._transfer, name="to_device", daemon=True)
        self._thread.start()

    def _transfer(self) -> None:
        import jax

        try:
            for batch in self._host:
                item = {k: jax.make_array_from_process_local_data(self._sharding, v) for k, v in batch.items()}
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:  # handed to the consumer, who sees it in next()
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise ValueError("the iterator is closed")
        start, patience = time.perf_counter(), _SILENT_S
        while True:
            try:
                item = self._ready.get(timeout=patience)
                break
            except queue.Empty:
                _log.warning("no input for %.0f s: waiting for %s", time.perf_counter() - start, self.describe())
                patience *= 2
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def describe(self) -> str:
        """Whom the next batch waits for, in words. From any thread."""
        describe = getattr(self._host, "describe", None)
        return describe() if describe is not None else "the input"

    def close(self) -> None:
        """Stops the transfer and the host iterator's workers. Safe to call twice."""
        self._stop.set()
        # it may be waiting for a worker that hangs; closing the workers frees it
        self._thread.join(timeout=_PATIENCE_S)
        close = getattr(self._host, "close", None)
        if close is not None:
            close()


def to_device(host_iterator: Iterator[dict[str, Any]], sharding: Any, buffer: int = 2) -> DeviceIterator:
    """Moves batches to the devices in a thread, `buffer` batches ahead.

    Args:
      host_iterator: yields {name: numpy array} with this process's share of each global batch (rows first).
      sharding: a `jax.sharding.Sharding` of the global batch, e.g. NamedSharding(mesh, jitjax.sharding.BATCH).

    Returns:
      An iterator of {name: global jax.Array} with `wait_seconds` and `close()`. An error in the pipeline is raised by
      `next()`.
    """
    return DeviceIterator(host_iterator, sharding, buffer)
