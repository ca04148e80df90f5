"""How a run is asked to stop, and the exit codes with which it ends. Imports no JAX."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jitjax.errors import UserError

# Exit codes: 0 complete, or `stop_after` reached; 1 a bug; 2 a user's mistake or a run that cannot go on (one line says what);
# 3 stopped without saving, also by lack of memory after a save; 128 + n saved and stopped by signal n. After 3 and 128 + n the
# same command continues the run.
NOT_SAVED = 3
_WAKE = signal.SIGURG  # ends a wait of the main thread; ignored by default, so harmless where nobody handles it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Stopped(Exception):
    """Raised in `StopRequest.interruptible` when a signal arrives."""


def keep_interrupts() -> None:
    """Make every Ctrl-C count from now on, in two places where Python's own handling fails.

    While JAX is being imported it ends the process: native modules abort if their import is interrupted, and nothing has begun.
    Inside a callback of the interpreter, whose exceptions Python prints and drops (JAX has one for garbage collection), it is
    sent again a moment later.
    """
    before = sys.unraisablehook

    def handle(number, frame):
        if getattr(getattr(sys.modules.get("jax"), "__spec__", None), "_initializing", False):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        raise KeyboardInterrupt

    def hook(lost):
        if issubclass(lost.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            before(lost)

    sys.unraisablehook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)


class StopRequest:
    """Remembers a signal that asks for a stop, so that the loop can save and leave. A context manager.

    A thread reads the signals as the system delivers them, so the deadline and a second Ctrl-C work also while the main
    thread waits in native code. Signals that were ignored before (`nohup`) stay ignored.

    Args:
      grace_seconds: time from the signal to the end of the process. If it has not left by itself it ends with code 3.
      last_good: describes the newest checkpoint, for the line that the deadline prints.
      tell: called in a thread with the signal that has arrived, to pass it on.
    """

    def __init__(
        self,
        *,
        grace_seconds: float = 60.0,
        last_good: Callable[[], str] = lambda: "",
        tell: Callable[[int], None] = lambda number: None,
    ):
        self.signal = 0
        self._grace, self._last_good, self._tell = grace_seconds, last_good, tell
        self._arrived, self._finished = threading.Event(), threading.Event()
        self._saved = False
        self._on_disk: Callable[[], bool] = lambda: False
        self._interruptible = False
        self._before: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._wakeup = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # whoever called us handles signals
        reader, writer = self._sockets = socket.socketpair()
        writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        self._before[_WAKE] = signal.signal(_WAKE, self._leave_wait)
        return self

    def __exit__(self, *error: Any) -> None:
        self._finished.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._sockets is not None:
            signal.set_wakeup_fd(self._wakeup)
            self._sockets[1].close()  # ends the thread, which closes the other

    @property
    def requested(self) -> bool:
        return bool(self.signal)

    @property
    def exit_code(self) -> int:
        """128 + signal number, 0 without a request."""
        return 128 + self.signal if self.signal else 0

    @property
    def name(self) -> str:
        """E.g. "SIGTERM"; "another process" where the request came from one (`request`)."""
        return signal.Signals(self.signal).name if self.signal else ""

    def request(self, number: int) -> None:
        """As if signal `number` had arrived: where another process of the run received it."""
        if number and not self.signal:
            self.signal = number
            self._arrived.set()
            threading.Thread(target=self._deadline, name="grace", daemon=True).start()

    def request_from_thread(self, number: int) -> None:
        """As `request`; a wait of the main thread within `interruptible` ends too."""
        self.request(number)
        if self._before:
            signal.pthread_kill(threading.main_thread().ident, _WAKE)

    def saved(self) -> None:
        """All that matters is on disk. What still has to be closed may take longer than the grace period without being called
        a failure."""
        self._saved = True

    @contextlib.contextmanager
    def already_saved(self, on_disk: Callable[[], bool]) -> Iterator[None]:
        """Around work that may outlast the grace period. Where `on_disk()` (a thread asks), nothing is lost by ending it."""
        before, self._on_disk = self._on_disk, on_disk
        try:
            yield
        finally:
            self._on_disk = before

    def wait(self, seconds: float) -> bool:
        """Whether a request has arrived, at the latest after `seconds`. (A signal to the process group may kill an input
        worker a moment before this process learns of it.)"""
        return self._arrived.wait(seconds)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around a wait for something that may never come: a signal, also an earlier one, raises `Stopped` there."""
        self._interruptible = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: Any) -> None:
        # In the main thread, between two bytecodes; perhaps before the thread has read the number.
        self.request(number)
        self._leave_wait()

    def _leave_wait(self, *_: Any) -> None:
        if self.signal and self._interruptible:
            self._interruptible = False
            raise Stopped

    def _listen(self, reader: socket.socket) -> None:
        interrupts = 0
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number not in SIGNALS:
                        continue
                    interrupts += number == signal.SIGINT
                    if interrupts > 1 and not self._finished.is_set():
                        leave(130, "interrupted again: stopped without saving" + self._last())
                    self.request(number)

    def _deadline(self) -> None:
        self._tell(self.signal)
        if not self._finished.wait(self._grace):
            if self._saved:
                leave(self.exit_code)
            if self._on_disk():
                note = f"stopped by {self.name} before the preview or evaluation was done" + self._last()
                leave(self.exit_code, note, kind="note")
            leave(NOT_SAVED, f"not saved within {self._grace:g} s of {self.name}: stopped without saving" + self._last())

    def _last(self) -> str:
        try:
            text = self._last_good()
        except Exception:
            text = ""
        return f"; {text}" if text else ""


@dataclasses.dataclass(frozen=True)
class StopAfter:
    """End this invocation after some time or steps: `--config.stop_after=2h` or `=500steps`."""

    seconds: float = float("inf")
    steps: float = float("inf")

    @classmethod
    def parse(cls, text: str) -> StopAfter:
        """ "": never; "500 steps", "90 s", "30 min", "2 h", "1.5 d".

        Raises:
          UserError: anything else.
        """
        if not text.strip():
            return cls()
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
        units = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
        if match and float(match[1]) > 0:
            if match[2] in ("step", "steps") and float(match[1]).is_integer():
                return cls(steps=int(match[1]))
            if match[2] in units:
                return cls(seconds=float(match[1]) * units[match[2]])
        raise UserError(f"--config.stop_after={text}: give a number and a unit: steps, s, min, h or d, e.g. 2h or 500steps")

    def reached(self, steps: int, seconds: float) -> bool:
        """Whether this invocation, with `steps` done in `seconds`, is to end."""
        return steps >= self.steps or seconds >= self.seconds


def leave(code: int, line: str = "", kind: str = "error") -> None:
    """End the process now, whatever its threads are doing: one line on stderr, no traceback. Never returns."""
    with contextlib.suppress(Exception):
        if line:
            sys.stderr.write(f"{kind}: {line}\n")
        sys.stderr.flush()
    # stdout may be held by the thread that hangs: not flushed
    os._exit(code)


def end(code: int, patience: float = 10.0) -> None:
    """End the process with `code` after its exit handlers, but at the latest after `patience` seconds.

    Python waits for every non-daemon thread at exit: Orbax's held the process for 300 s after an error, and W&B's process may
    not answer at all. And it tears daemon threads out of native code, which may abort. Call it last, when everything that
    matters is on disk. Never returns.
    """

    def enforce() -> None:
        time.sleep(patience)
        os._exit(code)

    threading.Thread(target=enforce, name="end", daemon=True).start()
    atexit._run_exitfuncs()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
