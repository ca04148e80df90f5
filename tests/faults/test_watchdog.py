"""Hangs: noticed, named, with the stacks of all threads; not where something may take long."""

import subprocess
import sys
import threading

from conftest import ROOT

from jitjax.watchdog import Watchdog

HANG = """
import queue, time
from jitjax.watchdog import Watchdog
def reads_the_next_batch():
    queue.Queue().get()
with Watchdog(factor=5, least_seconds=0.5, period=0.05, describe=lambda: "worker 3, cats/7.jpg") as dog:
    with dog.untimed("compiling"):
        time.sleep(1.0)
    for step in range(1, 11):
        time.sleep(0.02)
        dog.step(step)
    with dog.untimed("saving"):
        time.sleep(1.0)
    print("still here", flush=True)
    with dog.phase("input"):
        reads_the_next_batch()
"""


def test_a_hang_is_noticed_and_named():
    done = subprocess.run([sys.executable, "-c", HANG], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (3, "still here\n")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no step for ") and "after step 10" in last
    assert "waiting for input (worker 3, cats/7.jpg)" in last
    assert "in reads_the_next_batch" in done.stderr  # the stack of the main thread


def watch(clock_steps, **options):
    barked = threading.Event()
    with Watchdog(leave=lambda code, line: barked.set(), period=0.01, **options) as dog:
        clock_steps(dog)
        return barked.wait(0.3)


def test_slow_but_alive_is_no_hang():
    """30 times the usual is the limit, not a constant: a step of an hour may take a day."""

    def hourly(dog):
        dog._intervals.extend([3600.0] * 5)
        dog._started -= 24 * 3600.0
        dog._step = 5

    assert not watch(hourly)
    assert watch(hourly, factor=10)


def test_a_step_that_failed_on_the_device_ends_a_run_that_waits_for_something_else():
    """One of several processes is out of memory: it waits for the others, and they for its step."""
    left, failure = [], ["step 7 failed on the device: RESOURCE_EXHAUSTED"]
    ended = threading.Event()

    def leave(code, line):
        left.append((code, line))
        ended.set()

    options = dict(failed=lambda: failure[0], failed_seconds=0.05, leave=leave, period=0.01)
    with Watchdog(**options) as dog, dog.untimed("saving"):
        assert not ended.wait(0.3)
    with Watchdog(**options | dict(failed_seconds=60)):
        assert not ended.wait(0.3)  # the loop has time to meet it itself
    with Watchdog(**options) as dog, dog.phase("the other processes"):
        assert ended.wait(10)
    assert left == [(3, f"{failure[0]}; stopped without saving, the same command continues from the last checkpoint")]
    ended.clear()
    failure.clear()  # to ask for it raises
    with Watchdog(**options, least_seconds=0.05):
        assert ended.wait(10)
    assert "no step for" in left[1][1]
