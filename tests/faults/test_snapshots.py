"""Snapshots of power-function EMAs are written beside training, whole, and a disk that refuses is noticed."""

import jax
import numpy as np
import pytest
from test_checkpoint import LIKE, META, a_state

from jitjax import ema, host_copy, saving, snapshots
from jitjax.errors import UserError, closing
from jitjax.snapshots import Snapshots


def emas(step):
    """As in a train state: over 8 devices, some arrays split."""
    return {"0.9": a_state(1).params, "power:0.1": a_state(step).params, "power:0.05": a_state(step + 1).params}


def test_they_hold_the_numbers_of_their_moment(tmp_path):
    """Though the next step overwrites them right after the call."""
    written, state = Snapshots(tmp_path), emas(3)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    for step in (10, 20):
        written.save(state, step)
        state = jax.block_until_ready(overwrite(state))
    written.check()
    written.close()
    found = {(step, sigma): read() for step, sigma, read in ema.find_snapshots(tmp_path)}
    assert found.keys() == {(10, 0.1), (10, 0.05), (20, 0.1), (20, 0.05)}
    for sigma, step in ((0.1, 3), (0.05, 4)):
        for name, value in a_state(step).params.items():
            np.testing.assert_array_equal(found[10, sigma][name], np.asarray(value, np.float16))
            assert not found[20, sigma][name].any()


def test_without_page_locked_memory_they_are_written_too(tmp_path, monkeypatch, caplog):
    def full(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.0GiB.")

    monkeypatch.setattr(host_copy, "to_host", full)
    written = Snapshots(tmp_path)
    written.save(emas(3), 10)
    written.close()
    assert caplog.text.count("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.0GiB.): training waits for") == 2
    found = {sigma: read() for _, sigma, read in ema.find_snapshots(tmp_path)}
    for sigma, step in ((0.1, 3), (0.05, 4)):
        for name, value in a_state(step).params.items():
            np.testing.assert_array_equal(found[sigma][name], np.asarray(value, np.float16))


def test_a_copy_that_fails_after_it_began_is_one_line(tmp_path, monkeypatch):
    """An error of the runtime that came up while the run closes would end it as a bug."""

    def full(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.0GiB.")

    monkeypatch.setattr(jax, "device_get", full)
    with (
        pytest.raises(UserError, match="of power:0.1 at step 10 reached the host .*1.0GiB.*: free host memory"),
        closing(Snapshots(tmp_path)) as written,
    ):
        written.save(emas(3), 10)
        written.settle()


def test_a_disk_that_refuses_for_a_while_costs_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(snapshots, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(snapshots, "_ATTEMPTS", 1000)
    folder = tmp_path / "ema"
    folder.write_text("in the way")
    written = Snapshots(folder)
    written.save(emas(3), 10)
    while "training goes on, attempt 2" not in caplog.text:
        written.check()
    folder.unlink()
    written.settle()
    written.close()
    assert len(ema.find_snapshots(folder)) == 2 and len(list(folder.iterdir())) == 2


def test_one_that_cannot_be_written_stops_the_run_and_no_checkpoint_follows_it(tmp_path, monkeypatch):
    """A run that continued from such a checkpoint would never have the snapshot."""
    monkeypatch.setattr(snapshots, "_RETRY_SECONDS", 0.0)
    (tmp_path / "ema").write_text("in the way")
    written = Snapshots(tmp_path / "ema")
    saved = saving.Checkpoints(tmp_path, before_commit=written.settle)
    saved.save(a_state(5), 5, META)
    saved.wait()
    written.save(emas(3), 10)
    saved.save(a_state(10), 10, META)
    with pytest.raises(UserError, match="ema/00000010-0.1.safetensors: cannot be written.*the last good checkpoint is step 5"):
        saved.wait()
    for look in (written.check, written.check, written.close):
        with pytest.raises(UserError, match="00000010-0.1.safetensors: cannot be written"):
            look()
    written.close()  # raised once
    saved.close()  # so is this: `wait` has said it
    fresh = saving.Checkpoints(tmp_path)
    assert fresh.resume(LIKE)[1] == 5
    fresh.close()


@pytest.mark.parametrize("first", [None, ValueError("a bug"), UserError("the loss is not finite")])
def test_what_fails_in_closing_hides_nothing(first, capsys):
    class Disk:
        def close(self):
            raise UserError("the disk is full")

    with pytest.raises(type(first or UserError()), match=str(first or "the disk is full")):
        with closing(Disk()):
            if first is not None:
                raise first
    assert capsys.readouterr().err == ("error: the disk is full\n" if first else "")


def test_numbers_that_are_not_finite_are_not_tried_again(tmp_path, caplog):
    written, bad = Snapshots(tmp_path), emas(3)
    bad["power:0.1"] = {name: value * np.nan for name, value in bad["power:0.1"].items()}
    written.save(bad, 10)
    with pytest.raises(UserError, match="nothing was written"):
        written.close()
    assert [(step, sigma) for step, sigma, _ in ema.find_snapshots(tmp_path)] == [(10, 0.05)] and not caplog.text
