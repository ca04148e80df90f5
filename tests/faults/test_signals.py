"""Being asked to stop: real signals to real processes, also while they wait for what never comes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from jitjax.errors import UserError
from jitjax.signals import SIGNALS, StopAfter

LOOP = """
import sys, threading, time, queue, ctypes, signal
from jitjax.signals import StopRequest, Stopped, end
mode, grace = sys.argv[1], float(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
with StopRequest(grace_seconds=grace, last_good=lambda: "the last good checkpoint is step 7") as stop:
    print("ready", flush=True)
    if mode == "loop":
        while not stop.requested:
            time.sleep(0.01)
    elif mode == "input":
        try:
            with stop.interruptible():
                queue.Queue().get()
        except Stopped:
            pass
    elif mode in ("native", "native, saved"):  # no bytecode is run, and the system call is entered again after a signal
        libc = ctypes.CDLL(None)
        with stop.already_saved(lambda: mode == "native, saved"):
            while True:
                libc.sleep(5)
    if mode == "slow save":
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(60)
    print("saved", flush=True)
threading.Thread(target=time.sleep, args=(60,)).start()  # as Orbax's after an error
end(stop.exit_code, patience=0.5)
"""


def started(mode: str, grace: float = 30.0, hangup=signal.SIG_DFL) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, mode, str(grace)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),  # also where the tests themselves run under nohup
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("mode", ["loop", "input"])
def test_every_signal_saves_and_says_which(mode, number):
    process = started(mode)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "saved\n", "")


@pytest.mark.parametrize("mode", ["native", "slow save"])
def test_what_is_not_saved_in_time_is_said(mode):
    """The deadline also holds where Python's own handlers never run."""
    process = started(mode, grace=0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and out == ""
    assert err == ("error: not saved within 0.5 s of SIGTERM: stopped without saving; the last good checkpoint is step 7\n")


def test_what_is_on_disk_counts_as_saved_though_a_preview_does_not_end():
    process = started("native, saved", grace=0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert err == "note: stopped by SIGTERM before the preview or evaluation was done; the last good checkpoint is step 7\n"


@pytest.mark.parametrize("mode", ["native", "slow save"])
def test_a_second_interrupt_stops_at_once(mode):
    process = started(mode)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("error: interrupted again") and err.count("\n") == 1


def test_nohup_is_respected():
    process = started("loop", hangup=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


def test_stop_after():
    assert StopAfter.parse("500 steps").reached(500, 0) and not StopAfter.parse("500steps").reached(499, 1e9)
    assert StopAfter.parse("1.5h").reached(0, 5400) and not StopAfter.parse("90 min").reached(10**9, 5399)
    assert not StopAfter.parse("").reached(10**9, 1e9)
    for text in ("2", "h", "-1h", "0s", "1.5 steps", "2 weeks"):
        with pytest.raises(UserError, match="--config.stop_after="):
            StopAfter.parse(text)


def test_handlers_are_put_back():
    from jitjax.signals import StopRequest

    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(grace_seconds=60) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.wait(5) and stop.name == "SIGUSR1" and stop.exit_code == 128 + signal.SIGUSR1
    assert [signal.getsignal(number) for number in SIGNALS] == before
