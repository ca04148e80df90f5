"""Snapshots of a run's power-function EMAs, written while training goes on. Files and their use: `jitjax.ema`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jitjax import checkpoint, ema, host_copy, settings, sharding
from jitjax.errors import UserError

_ATTEMPTS, _RETRY_SECONDS = 5, 60.0
_log = logging.getLogger(__name__)


class Snapshots:
    """Writes snapshots into `folder`, in a thread. With several processes every one makes the same calls, process 0 writes."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._pending: list[Future] = []
        self._closing = threading.Event()

    def save(self, emas: Mapping[str, Mapping[str, jax.Array]], step: int) -> None:
        """Begin to copy the power-function ones of `emas` to the host and return; they may be donated at once. One that cannot
        be written is reported in one line and tried again; `check` says when that was of no use."""
        for name, params in emas.items():
            if not name.startswith(settings.POWER):
                continue
            whole = _to_host(name, params) if jax.process_count() == 1 else sharding.replicated(params)
            if jax.process_index() == 0:
                self._pending.append(self._pool.submit(self._write, step, float(name.removeprefix(settings.POWER)), whole))

    def check(self) -> None:
        """Cheap: for every turn of a loop.

        Raises:
          UserError: a snapshot could not be written, or holds numbers that are not finite.
        """
        for written in list(self._pending):
            if written.done():
                written.result()
                self._pending.remove(written)

    def settle(self) -> None:
        """Until those begun are on disk. A checkpoint that follows them waits for it: a run that continues from there does not
        make them again.

        Raises:
          UserError: as for `check`.
        """
        for written in list(self._pending):
            written.result()

    def close(self) -> None:
        """Like `settle`, but does not try again where the disk refuses."""
        self._closing.set()
        try:
            self.settle()
        finally:
            self._pool.shutdown()
            self._pending.clear()  # raised once

    def _write(self, step: int, sigma_rel: float, params: Any) -> None:
        try:
            params = jax.device_get(params)
        except jax.errors.JaxRuntimeError as error:  # the copy had only begun when `save` returned; the EMA has moved on
            raise UserError(
                f"no copy of power:{sigma_rel:g} at step {step:,} reached the host ({checkpoint.reason_of(error)}): free host "
                "memory, or keep fewer of --config.optim.power_emas, and run the same command again"
            ) from error
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                ema.write_snapshot(self._folder, step, sigma_rel, params)
                return
            except UserError as error:
                if attempt == _ATTEMPTS or error.__cause__ is None:  # the disk is not to blame: no use trying again
                    raise
                _log.warning("%s; training goes on, attempt %d of %d", error, attempt, _ATTEMPTS)
            self._closing.wait(_RETRY_SECONDS)


def _to_host(name: str, params: Mapping[str, jax.Array]) -> Any:
    try:
        return host_copy.to_host(params)
    except jax.errors.JaxRuntimeError as error:
        reason = checkpoint.reason_of(error)
        _log.warning("no copy of %s fits into page-locked host memory (%s): training waits for this snapshot", name, reason)
        return jax.device_get(params)
