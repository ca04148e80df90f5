"""Checkpoints that know whether they are whole: damage, copies, lost folders, failed saves, rotation, numbers gone wrong."""

import dataclasses
import errno
import logging
import os
import random
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jitjax import checkpoint, finite, manifest, retention, run_record, saving, sharding
from jitjax.errors import UserError
from jitjax.step import TrainState

MANIFEST_WRITE = manifest.write
META = {"geometry": {"width": 3}, "ema_decays": ["0.9"]}


def a_state(step: int) -> TrainState:
    """A few hundred numbers in the shape of a train state, over 8 devices, other ones at every step."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 1, 4), sharding.AXES)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    numbers = np.random.default_rng(step).normal(size=(8, 16)).astype(np.float32)
    params = {"w": jax.device_put(numbers, split), "b": jax.device_put(numbers[0], whole)}
    return TrainState(
        step=jax.device_put(np.int32(step), whole),
        params=params,
        opt_state={"mu": {k: v * 2 for k, v in params.items()}, "count": jax.device_put(np.int32(step), whole)},
        ema={"0.9": {k: v * 3 for k, v in params.items()}},
        loss_scale={"scale": jax.device_put(np.float32(1), whole)},
    )


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), a_state(0))


def assert_is(state: TrainState, step: int) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(a_state(step)), strict=True))


def write(workdir: Path, *steps: int, **options) -> None:
    saved = saving.Checkpoints(workdir, **{"keep_last": 9, **options})
    for step in steps:
        saved.save(a_state(step), step, META)
    saved.close()


def resumed(workdir: Path) -> int:
    """The step that a run in `workdir` goes on from, whose every number must be that step's."""
    saved = saving.Checkpoints(workdir, keep_last=9)
    state, step, _ = saved.resume(LIKE)
    saved.close()
    assert_is(state, step)
    return step


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with whole checkpoints 10, 20 and 30. Read it or copy it."""
    workdir = tmp_path_factory.mktemp("three")
    write(workdir, 10, 20, 30)
    return workdir


@pytest.fixture
def copy(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


def files_of(workdir: Path, step: int) -> list[Path]:
    """Files whose bytes count."""
    folder = workdir / "checkpoints" / str(step)
    return sorted(p for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)) not in manifest.UNCOVERED)


# ---------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(copy):
    """One bit, anywhere in any file of a checkpoint: never accepted (0.1.0 accepted 137 of 150 with wrong values)."""
    draw, folder = random.Random(7), copy / "checkpoints" / "30"
    files = files_of(copy, 30)
    run = checkpoint.read_run(copy)["run"]
    assert checkpoint.defect(folder, run) is None
    flips = [(file, draw.randrange(file.stat().st_size * 8)) for file in files]  # each file at least once
    weights = [file.stat().st_size for file in files]
    flips += [(file, draw.randrange(file.stat().st_size * 8)) for file in draw.choices(files, weights, k=150)]
    for file, bit in flips:
        before = file.read_bytes()
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert checkpoint.defect(folder, run), f"bit {bit} of {file}"
        file.write_bytes(before)
    assert checkpoint.defect(folder, run) is None


def test_files_outside_the_checksums_do_not_matter(copy):
    """Orbax writes two files after the checksums; whatever stands in them, the values read are right."""
    for name in manifest.UNCOVERED:
        file = copy / "checkpoints" / "30" / name
        file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    assert resumed(copy) == 30


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "truncated": lambda folder: truncate(max(folder.rglob("d/*"), key=lambda p: p.stat().st_size)),
    "file deleted": lambda folder: max(folder.rglob("d/*"), key=lambda p: p.stat().st_size).unlink(),
    "item deleted": lambda folder: shutil.rmtree(folder / "ema"),
    "meta emptied": lambda folder: os.truncate(folder / "meta" / "metadata", 0),
    "checksums deleted": lambda folder: (folder / manifest.FILE).unlink(),
    "emptied": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a stray file": lambda folder: (folder / "params" / "ocdbt.process_7").write_text("x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_taken(copy, damage, caplog):
    """Damage of the newest costs one interval and one line; damage of the two newest two."""
    DAMAGES[damage](copy / "checkpoints" / "30")
    assert resumed(copy) == 20
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1 and "\n" not in lines[0] and str(copy / "checkpoints" / "30") in lines[0]
    DAMAGES[damage](copy / "checkpoints" / "20")
    assert resumed(copy) == 10
    assert checkpoint.find(copy) == (copy, 10)
    assert caplog.messages[-1] == "step 10 is used instead"
    with pytest.raises(UserError, match=r"checkpoints/20 cannot be used: .*; other steps: 10, 30"):
        checkpoint.find(copy / "checkpoints" / "20")


def test_what_a_live_run_deletes_meanwhile_gives_way_to_a_newer_one(copy, caplog, monkeypatch):
    """While it is verified, and while its weights are read."""
    folder, verify = copy / "checkpoints", checkpoint.defect

    def rotate(newer: int) -> None:
        write(copy, newer)
        for step in checkpoint.steps_in(folder)[:-1]:
            retention.delete(folder, step)

    def verify_one_that_goes(path, run=None):
        if path.name == "30":
            rotate(40)
        return verify(path, run)

    def read_one_that_goes(path, step, mesh):
        if step == 40:
            rotate(50)
            raise UserError("it cannot be read")
        return step

    monkeypatch.setattr(checkpoint, "defect", verify_one_that_goes)
    monkeypatch.setattr(checkpoint, "_read_weights", read_one_that_goes)
    assert checkpoint.find(copy) == (copy, 40)
    assert checkpoint.load_weights(copy) == 50 and not caplog.messages
    with pytest.raises(UserError, match=r"no complete checkpoint at .*checkpoints/40: .*; steps there: 50"):
        checkpoint.load_weights(folder / "40")


def test_a_workdir_may_be_called_best(copy):
    """`best` means the best checkpoint where nothing has that name."""
    run = copy.rename(copy.parent / "best")
    run_record.write_best(run, {"step": 20, "metric": "eval/fid", "value": 3.0})
    for path, step in ((run, 30), (run / "checkpoints", 30), (run / "checkpoints" / "10", 10)):
        assert checkpoint.find(path) == (run, step)
    for path in (run / "best", run / "checkpoints" / "best"):
        assert checkpoint.find(path) == (run, 20)


def test_what_else_lies_there_does_not_matter(copy, caplog):
    """A file and a folder of something else named like later steps, Orbax's own metadata gone, notes."""
    folder = copy / "checkpoints"
    (folder / "40").write_text("x")
    (folder / "50").mkdir()
    (folder / "50" / "notes.txt").write_text("x")
    (folder / "notes.txt").write_text("x")
    for name in manifest.UNCOVERED:
        (folder / "30" / name).unlink(missing_ok=True)
    assert resumed(copy) == 30
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line == f"checkpoint {folder / '50'} is not used: incomplete: no params, ema, optimizer, meta"


def test_none_whole_stops_and_changes_nothing(copy):
    for step in (10, 20, 30):
        truncate(copy / "checkpoints" / str(step) / "meta" / "metadata")
    before = sorted(str(p) for p in copy.rglob("*"))
    for read in (saving.Checkpoints(copy).latest, lambda: resumed(copy)):
        with pytest.raises(UserError, match=r"none of its checkpoints \(10, 20, 30\) is whole"):
            read()
    with pytest.raises(UserError, match=r"none of the checkpoints .* is whole"):
        checkpoint.find(copy)
    assert sorted(str(p) for p in copy.rglob("*")) == before


def test_a_copy_under_another_step_is_foreign(copy, caplog):
    shutil.copytree(copy / "checkpoints" / "30", copy / "checkpoints" / "50")
    assert resumed(copy) == 30
    assert "it is a copy of step 30" in caplog.text


def test_another_runs_checkpoint_is_foreign(copy, tmp_path, caplog):
    write(tmp_path / "other", 40)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "40", copy / "checkpoints" / "40")
    assert resumed(copy) == 30
    assert "written by another run" in caplog.text


def test_a_folder_of_checkpoints_alone_can_be_resumed(three, tmp_path):
    """Moved to another disk without the workdir around it: the run's identity is taken from the checkpoints."""
    shutil.copytree(three / "checkpoints", tmp_path / "checkpoints")
    assert resumed(tmp_path) == 30
    assert checkpoint.read_run(tmp_path)["run"] == checkpoint.read_run(three)["run"]


@pytest.mark.parametrize("lose", [lambda c: shutil.rmtree(c), lambda c: (shutil.rmtree(c), c.mkdir())])
@pytest.mark.parametrize("old", [False, True])
def test_lost_checkpoints_stop_the_run(copy, lose, old):
    """Never start over where there was something; also in a workdir of 0.1.0, which has no run.json."""
    (copy / "metrics.jsonl").write_text('{"step": 1}\n{"step": 34}\n{"st')
    lose(copy / "checkpoints")
    if old:
        (copy / "run.json").unlink()
    with pytest.raises(UserError, match="put it back, or use another workdir"):
        saving.Checkpoints(copy).latest()


def test_a_run_killed_before_its_first_save_starts_over(tmp_path):
    saved = saving.Checkpoints(tmp_path)
    assert saved.latest() is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert saving.Checkpoints(tmp_path).latest() is None


def test_checkpoints_of_0_1_0_are_read(tmp_path, caplog):
    """As jitjax 0.1.0 wrote them, by Orbax's CheckpointManager and without checksums: read with a note; damage that shows
    only while reading still costs no more than one checkpoint."""
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (10, 20):
            state = a_state(step)
            items = dict(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "loss_scale": state.loss_scale}),
                meta=ocp.args.JsonSave({**META, "examples": step * 4}),
            )
            manager.save(step, args=ocp.args.Composite(**items), force=True)
    assert resumed(tmp_path) == 20
    assert "has no checksums (written by jitjax 0.1.0)" in caplog.text
    shutil.copytree(tmp_path / "checkpoints" / "20", tmp_path / "checkpoints" / "30")
    assert resumed(tmp_path) == 20  # 80 examples are not 30 steps
    DAMAGES["truncated"](tmp_path / "checkpoints" / "20" / "optimizer")
    caplog.clear()
    assert resumed(tmp_path) == 10
    assert "it cannot be read (" in caplog.text


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_saved(copy, part, value):
    """One number anywhere: refused, with the last good checkpoint named; it is still there, however often one tries."""
    state = a_state(40)
    tree = getattr(state, part)
    leaves, structure = jax.tree.flatten(tree)
    leaves[0] = leaves[0].at[-1].set(value) if leaves[0].ndim else jnp.float32(value)
    bad = dataclasses.replace(state, **{part: jax.tree.unflatten(structure, leaves)})
    for _ in range(3):
        saved = saving.Checkpoints(copy, keep_last=1)
        assert saved.latest() == 30
        with pytest.raises(UserError, match=r"not finite at step 40, .* the last good checkpoint is step 30"):
            saved.save(bad, 40, META)
        saved.close()
    assert resumed(copy) == 30


# ---------------------------------------------------------------- rotation and failed saves


def test_the_state_may_be_donated_at_once(tmp_path):
    """What is written are the numbers at the time of the call, though the next step overwrites them right after."""
    saved = saving.Checkpoints(tmp_path, keep_last=9)
    state = a_state(1)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    saved.reserve(LIKE)
    saved.save(state, 1, META)
    state = jax.block_until_ready(step(state))
    saved.close()
    assert resumed(tmp_path) == 1


def test_the_first_save_compiles_nothing(tmp_path):
    """Training stands still for a save: what can be prepared while the first step compiles is not left to the first one."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **more: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    state, saved = a_state(1), saving.Checkpoints(tmp_path)
    jax.clear_caches()
    saved.reserve(LIKE).join()
    assert compiled  # the event has this name
    compiled.clear()
    saved.save(state, 1, META)
    assert not compiled
    saved.close()


def test_nothing_compiles_after_close(tmp_path, monkeypatch):
    """A thread that still compiles when Python ends would end it with an abort, in a script that caught an early error."""
    begun = threading.Event()

    def slow(groups):
        begun.set()
        time.sleep(0.3)

    monkeypatch.setattr(finite, "compile_all_finite", slow)
    saved = saving.Checkpoints(tmp_path)
    thread = saved.reserve(LIKE)
    assert begun.wait(10)
    saved.close()
    assert not thread.is_alive()


def test_rotation_keeps_the_newest_whole_and_multiples(tmp_path):
    write(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [3, 6, 7, 8]


def test_rotation_does_not_count_damaged_ones(copy):
    """30 is damaged and 20 is what the run resumed from: 20 stays until as many newer ones are whole as should stay."""
    DAMAGES["truncated"](copy / "checkpoints" / "30")
    saved = saving.Checkpoints(copy, keep_last=2)
    assert saved.latest() == 20
    saved.save(a_state(25), 25, META)
    saved.wait()
    assert {20, 25} <= set(saved.steps())
    saved.save(a_state(30), 30, META)  # takes the damaged one's name
    saved.close()
    assert saved.steps() == [25, 30] and resumed(copy) == 30


def test_a_best_one_that_cannot_be_marked_stays_and_is_marked_later(tmp_path, caplog, monkeypatch):
    """The checkpoint itself was written, so the save counts; deleting goes on around it."""
    saved, committed = saving.Checkpoints(tmp_path, keep_last=1), []
    monkeypatch.setattr(saved, "_committed", committed.append)

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_record, "write_best", refuse)
        saved.save(a_state(1), 1, META, best={"metric": "eval/fid", "value": 3.0})
        saved.save(a_state(2), 2, META)
        saved.wait()
    line = "step 1 is the best, but best.json cannot be written (No space left on device): tried again with the next save; it "
    assert caplog.text.count(line + 'should say {"step": 1, "metric": "eval/fid", "value": 3.0}') == 2
    assert saved.steps() == [1, 2] == committed and checkpoint.read_best(tmp_path) is None and saved.best()["step"] == 1
    saved.save(a_state(3), 3, META)
    saved.close()
    assert saved.steps() == [1, 3] and saved.best() == {"step": 1, "metric": "eval/fid", "value": 3.0}


def test_a_disk_that_is_full_does_not_cost_the_best_one(tmp_path, monkeypatch):
    """Neither the mark of the best one can be written nor the files of the next best; at the end there is room again."""
    saved = saving.Checkpoints(tmp_path, keep_last=1)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_record, "write_best", refuse)
        saved.save(a_state(1), 1, META, best={"metric": "eval/fid", "value": 3.0})
        saved.wait()
        patched.setattr(manifest, "write", refuse)
        saved.save(a_state(2), 2, META, best={"metric": "eval/fid", "value": 2.0})
        with pytest.raises(UserError, match="the last good checkpoint is step 1"):
            saved.wait()
        assert saved.best()["step"] == 1
        patched.setattr(manifest, "write", MANIFEST_WRITE)
        saved.save(a_state(3), 3, META)
        saved.wait()
    assert saved.steps() == [1, 3] and checkpoint.read_best(tmp_path) is None
    saved.close()
    assert checkpoint.read_best(tmp_path)["step"] == 1


def test_the_best_one_is_known_from_the_moment_it_is_saved(tmp_path, monkeypatch):
    """A score that comes before the files are written is compared with it, and with the one before if that save fails."""
    saved, wait = saving.Checkpoints(tmp_path, keep_last=1), threading.Event()
    saved.save(a_state(1), 1, META, best={"metric": "eval/fid", "value": 3.0})
    saved.wait()

    def refuse(*args, **kwargs):
        wait.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write", refuse)
    saved.save(a_state(2), 2, META, best={"metric": "eval/fid", "value": 2.0})
    assert saved.best()["step"] == 2
    wait.set()
    with pytest.raises(UserError, match="the last good checkpoint is step 1"):
        saved.wait()
    assert saved.best()["step"] == 1


def test_nothing_is_deleted_while_nobody_knows_which_is_the_best(tmp_path, caplog):
    saved = saving.Checkpoints(tmp_path, keep_last=1)
    saved.save(a_state(1), 1, META, best={"metric": "eval/fid", "value": 3.0})
    saved.wait()
    (tmp_path / "best.json").write_text("{")
    saved.save(a_state(2), 2, META)
    saved.close()
    assert (
        saved.steps() == [1, 2] and "no old checkpoint is deleted" in caplog.text and "best.json is unreadable" in caplog.text
    )


def test_checkpoints_deleted_by_somebody_else_do_not_matter():
    assert retention.superseded([5], [], keep_last=1, keep_every=None) == []
    assert retention.superseded([], [3], keep_last=1, keep_every=None) == []


def test_a_failed_save_is_noticed_and_loses_nothing(copy, caplog, monkeypatch):
    """The disk refuses in the background: the next look at the checkpoints says so, earlier ones are still known and there
    (Orbax before 0.12.10 forgot them), a later save succeeds, and nothing half written is left."""
    saved = saving.Checkpoints(copy, keep_last=1)
    assert saved.latest() == 30

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write", refuse)
        saved.save(a_state(40), 40, META)
        saved._thread.join()
        assert not saved.retry_due()  # noticed; the time to try again is later
    assert "saving step 40 failed (no space left for a checkpoint); training goes on" in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records if "orbax" not in record.pathname)
    with pytest.raises(UserError, match="the last good checkpoint is step 30"):
        saved.wait()
    assert saved.latest() == 30 and saved.steps() == [10, 20, 30]
    monkeypatch.setattr(saving, "_RETRY_SECONDS", 0.0)
    assert saved.retry_due()
    saved.save(a_state(41), 41, META)
    saved.wait()
    assert not saved.retry_due() and saved.latest() == 41
    saved.close()
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["41"]


def test_too_many_failed_saves_stop_the_run(copy, monkeypatch):
    saved = saving.Checkpoints(copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").write_text("in the way")
    for step in range(40, 45):
        saved.save(a_state(step), step, META)
    with pytest.raises(UserError, match=r"5 saves in a row failed .*run the same command again"):
        saved.retry_due()
    saved.close()  # does not say it again
