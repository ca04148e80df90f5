"""Killed runs leave nothing for ever, and nothing of a live run is touched."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT

from jitjax import atomic, leftovers
from jitjax.errors import UserError
from jitjax.workdir import Workdir, saved_config

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
    for folder in ("ema", "samples"):
        (tmp_path / folder).mkdir()
    written = ["config.json", "best.json", "parameters.txt", "wandb_run_id", "ema/1-0.05.safetensors", "samples/step_1.png"]
    partial = [".shapes.ab12.partial", "ema/.tmpA1b"]
    for name in written:
        with pytest.raises(KeyboardInterrupt), patch.object(Path, "unlink"), atomic.writing(tmp_path / name) as file:
            partial.append(str(file.relative_to(tmp_path)))
            raise KeyboardInterrupt
    other = subprocess.Popen(["sleep", "60"])  # another command, which draws into the run's folder at the moment
    drawn = f"samples/.drawn.png.{other.pid}-0123abcd{atomic.SUFFIX}"
    stay = ["config.json", "metrics.jsonl", "notes.txt", ".mine.partial", "samples.tmp", "ema/1-0.05.safetensors", drawn]
    for name in partial + stay:
        (tmp_path / name).write_text("x")
    Workdir(tmp_path).close()
    other.kill()
    other.wait()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {*stay} <= left <= {*stay, "ema", ".lock", "samples"}


def test_a_deleted_lock_is_taken_again_and_never_shared(tmp_path):
    run = Workdir(tmp_path)
    (tmp_path / ".lock").unlink()
    run.require_lock()
    with pytest.raises(UserError, match="is in use by a live run"):
        Workdir(tmp_path)
    (tmp_path / ".lock").unlink()
    second = Workdir(tmp_path)  # faster than the next look
    with pytest.raises(UserError, match="is in use by a live run"):
        run.require_lock()
    second.close()


def test_a_torn_config_is_named_and_a_deleted_one_does_not_matter(tmp_path):
    assert saved_config(tmp_path) is None
    (tmp_path / "config.json").write_text('{"seed": 1, "da')
    with pytest.raises(UserError, match=r"config\.json is unreadable .* move it away to go on"):
        saved_config(tmp_path)
