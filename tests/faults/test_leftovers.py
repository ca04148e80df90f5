"""Killed runs leave nothing for ever, and nothing of a live run is touched."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from jitjax import leftovers
from jitjax.workdir import Workdir

SHARE = """
import os, signal, sys
from multiprocessing import resource_tracker, shared_memory
from jitjax import leftovers
leftovers.name_segments(os.getpid())
segment = shared_memory.SharedMemory(create=True, size=1000)
resource_tracker.unregister(segment._name, "shared_memory")  # killed with the group: it cannot clean up
print(segment.name, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_segments_go_with_the_next_start():
    process = subprocess.Popen(
        [sys.executable, "-c", SHARE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    segment = Path("/dev/shm") / process.stdout.readline().strip()
    leftovers.remove_segments()
    assert segment.exists()  # its run is alive
    process.kill()
    process.communicate()
    assert segment.exists()
    assert leftovers.remove_segments() >= 1
    assert not segment.exists()


def test_half_written_files_go_and_the_rest_stays(tmp_path):
    """With the next start, right after the kill; what the user keeps there is not touched."""
    partial = [".shapes.ab12.partial", ".config.json.x7f", ".run.json.abc", "time.json.tmp"]
    stay = ["config.json", "metrics.jsonl", "notes.txt", ".mine.partial", "samples.tmp"]
    for name in partial + stay:
        (tmp_path / name).write_text("x")
    Workdir(tmp_path).close()
    assert {*stay} <= {p.name for p in tmp_path.iterdir()} <= {*stay, ".lock", "samples"}
