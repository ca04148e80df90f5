"""The program in processes of its own, for tests that stop it, starve it and kill it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT

from jitjax.monitor.metrics import read_last

CONFIG_FILE = """
import sys
sys.path.insert(0, {tests!r})
from conftest import small_config
def get_config():
    return small_config(**{overrides!r})
"""


def write_config(file: Path, **overrides: Any) -> Path:
    file.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=overrides))
    return file


def wait_until(condition: Callable[[], Any], seconds: float = 300.0, processes: Sequence[subprocess.Popen] = ()) -> Any:
    """The first true value of `condition()`, which must come before any of `processes` ends."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        assert all(process.poll() is None for process in processes), "ended by itself"
        time.sleep(0.005)
    return value


def steps_done(workdir: Path) -> int:
    """The last whole line of metrics.jsonl, 0 without one."""
    try:
        return max((line["step"] for line in read_last(workdir / "metrics.jsonl", 1)), default=0)
    except FileNotFoundError:
        return 0


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _default_signals() -> None:
    """A shell's background jobs start with SIGINT ignored, `nohup`'s with SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Processes:
    """`count` processes of one run on this host, one CPU device each. A context manager that kills what is left.

    Process k writes to <k>.log beside the config file.
    """

    def __init__(self, config: Path, workdir: Path, *flags: str, count: int = 1):
        self.config, self.workdir = config, workdir
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={workdir}", *flags]
        self.processes = []
        for rank in range(count):
            environ = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
            if count > 1:
                environ |= dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(rank))
            with open(self.log(rank), "w") as log:
                options = dict(
                    cwd=ROOT, env=environ, stdout=log, stderr=log, preexec_fn=_default_signals, start_new_session=True
                )
                self.processes.append(subprocess.Popen(command, **options))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too, also one that is stopped
            process.wait()

    def log(self, rank: int = 0) -> Path:
        return self.config.parent / f"{rank}.log"

    def train(self, until: Callable[[], Any] = lambda: True) -> None:
        """Wait for this start's first steps, and for more."""
        wait_until(lambda: "first step after" in self.log().read_text() and until(), processes=self.processes)

    def worker(self, rank: int = 0) -> psutil.Process:
        """The one input worker of a process."""
        children = psutil.Process(self.processes[rank].pid).children()
        (found,) = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        return found

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes, in order."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
