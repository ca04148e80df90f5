"""Disks that are full, read-only or gone, for real: small file systems mounted for the tests (by root)."""

import logging

import pytest
from conftest import small_settings
from test_checkpoint import META, a_state, resumed, write

from jitjax import checkpoint, saving
from jitjax.errors import UserError
from jitjax.train import train


def test_a_disk_that_fills_up_during_a_write(small_disk, caplog, monkeypatch):
    """There is room when the save begins and none before it ends: said in one line, nothing lost, nothing half written; with
    room again the next save succeeds."""
    workdir = small_disk.folder / "run"
    write(workdir, 10)
    saved = saving.Checkpoints(workdir)
    assert saved.latest() == 10
    small_disk.fill(leave=16384)  # the state has 3 KB, a checkpoint of it a few more
    saved.save(a_state(20), 20, META)
    saved._thread.join()
    assert not saved.retry_due()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "orbax" not in r.pathname]
    assert line.startswith("saving step 20 failed (no space left for a checkpoint); training goes on")
    assert line.endswith("the last good checkpoint is step 10") and saved.latest() == 10
    small_disk.free()
    monkeypatch.setattr(saving, "_RETRY_SECONDS", 0.0)
    assert saved.retry_due()
    saved.save(a_state(21), 21, META)
    saved.close()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["21"] and resumed(workdir) == 21


def test_a_run_does_not_begin_where_it_cannot_save(small_disk):
    """Full or read-only at the first start or at a later one: one line before the first step; afterwards all is as before."""
    workdir = small_disk.folder / "run"

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            train(small_settings(), workdir)
        assert "\n" not in str(error.value)

    small_disk.fill(leave=0)
    refused("No space left on device|no space for a checkpoint")
    small_disk.free()
    assert train(small_settings(stop_after="2 steps"), workdir) == 0
    small_disk.fill(leave=2**19)
    refused("no space for a checkpoint, which takes 1 MiB where 0 MiB are free")
    small_disk.free()
    small_disk.remount("ro")
    refused("Read-only file system")
    small_disk.remount("rw")
    assert train(small_settings(), workdir) == 0
    assert checkpoint.find(workdir)[1] == 4
