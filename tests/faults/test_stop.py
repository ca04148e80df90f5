"""Asked to stop at any moment, by any signal, in any process; while input does not come, and while the disk refuses."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from programs import Processes, free_port, steps_done, wait_until, write_config

from jitjax import checkpoint
from jitjax.monitor.metrics import read_last
from jitjax.signals import SIGNALS

RUN = dict(total_steps=400, checkpoint__every_steps=200, checkpoint__grace_seconds=30.0, log__every_steps=1, batch_size=4)
ENDS_WITHIN = 60.0  # the grace period, and as much again for a busy machine
slow = pytest.mark.slow


def bad_lines(run: Processes, rank: int = 0) -> list[str]:
    """What a process says that is not progress."""
    lines = run.log(rank).read_text().splitlines()
    return [line for line in lines if line.startswith(("error", "warning", "Traceback", "  File"))]


def saved(workdir: Path) -> list[int]:
    return checkpoint.steps_in(workdir / "checkpoints")


def logs(run: Processes) -> str:
    return "\n".join(run.log(rank).read_text()[-3000:] for rank in range(len(run.processes)))


# ---------------------------------------------------------------- any moment


def in_import(run: Processes, draw: random.Random) -> None:
    time.sleep(0.5 * draw.random())


def in_start_up(run: Processes, draw: random.Random) -> None:
    wait_until((run.workdir / ".lock").exists, processes=run.processes)
    time.sleep(draw.random())


def compiling(run: Processes, draw: random.Random) -> None:
    wait_until(lambda: "compiling" in run.log().read_text(), processes=run.processes)


def in_steps(run: Processes, draw: random.Random) -> None:
    run.train()
    time.sleep(0.2 * draw.random())


def in_save(run: Processes, draw: random.Random) -> None:
    run.train(until=lambda: any((run.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")))


@slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_any_moment(tmp_path, number):
    """Once or twice, to the process or to its input workers as well: the documented code, no traceback once the program runs,
    and the run goes on from where it was saved."""
    draw, workdir = random.Random(5), tmp_path / "run"
    config = write_config(
        tmp_path / "config.py", **RUN | dict(total_steps=10**6, checkpoint__every_steps=10, data__num_workers=1)
    )
    for moment in (in_import, in_start_up, compiling, in_steps, in_save):
        for twice in (False, True):
            before = max(saved(workdir), default=0)
            with Processes(config, workdir) as run:
                moment(run, draw)
                group = draw.random() < 0.5
                for _ in range(1 + twice):
                    (os.killpg if group else os.kill)(run.processes[0].pid, number)
                    time.sleep(0.15)
                (code,) = run.wait(ENDS_WITHIN)
                text = run.log().read_text()
                if moment in (in_import, in_start_up):  # not yet asked for, or with nothing to save
                    assert code in (-number, 128 + number) or "Failed to import the site module" in text, text
                else:
                    assert code == 128 + number, text
                    assert "Traceback" not in text and "resource_tracker" not in text and len(bad_lines(run)) <= 1
                    if not (twice and number == signal.SIGINT):
                        assert f"stopped by {number.name} at step {max(saved(workdir)):,}" in text
            assert max(saved(workdir), default=0) >= before
    assert checkpoint.find(workdir)[1] == max(saved(workdir))


LOST = """
import gc, signal, time
from jitjax import signals

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored

def callback(*_):
    gc.callbacks.remove(callback)
    raise KeyboardInterrupt

signals.keep_interrupts()
gc.callbacks.append(callback)
try:
    gc.collect()
    time.sleep(30)
except KeyboardInterrupt:
    print("arrived")
"""


def test_a_ctrl_c_is_not_lost_in_a_callback_of_the_interpreter():
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("arrived\n", "")


IMPORTING = """
import signal
from jitjax import signals

signal.signal(signal.SIGINT, signal.default_int_handler)
signals.keep_interrupts()
try:
    import jax
except KeyboardInterrupt:
    print("raised in the import")
"""


def test_a_ctrl_c_while_jax_is_imported_ends_the_process(tmp_path):
    """Of a JAX that is interrupted by its own import."""
    (tmp_path / "jax.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# ---------------------------------------------------------------- input does not come


def stop_worker(run: Processes, rank: int) -> None:
    """SIGSTOP to the input worker of one process; returns when all that was read ahead is used up."""
    run.worker(rank).suspend()
    before = -1
    while before != (before := steps_done(run.workdir)):
        time.sleep(1)


@pytest.mark.parametrize(
    "rank, number",
    [
        pytest.param(0, signal.SIGTERM, marks=slow),  # the one that waits for the other
        pytest.param(1, signal.SIGUSR1, marks=slow),  # the one whose input hangs
        pytest.param(1, signal.SIGINT, marks=slow),
        pytest.param(0, signal.SIGHUP, marks=slow),
        pytest.param(0, signal.SIGXCPU, marks=slow),
    ],
)
def test_of_two_processes_one_without_input(tmp_path, rank, number):
    """The worker of process 1 is stopped, then any process is asked to stop: both save and end."""
    more = dict(total_steps=100_000, checkpoint__every_steps=None, data__num_workers=1)
    config, workdir = write_config(tmp_path / "config.py", **RUN | more), tmp_path / "run"
    with Processes(config, workdir, count=2) as run:
        run.train()
        stop_worker(run, 1)
        run.processes[rank].send_signal(number)
        assert run.wait(ENDS_WITHIN) == [128 + number] * 2, logs(run)
    assert saved(workdir) == [checkpoint.find(workdir)[1]] == [steps_done(workdir)]


# ---------------------------------------------------------------- the disk refuses


@contextlib.contextmanager
def full(disk, workdir):
    disk.fill()
    yield "no space for a checkpoint"
    disk.free()


@contextlib.contextmanager
def forbidden(disk, workdir):
    """As a folder of another user, also for root."""
    if subprocess.run(["chattr", "+i", str(workdir / "checkpoints")]).returncode:
        pytest.skip("this file system has no attributes")
    try:
        yield "checkpoints cannot be written (Operation not permitted)"
    finally:
        subprocess.run(["chattr", "-i", str(workdir / "checkpoints")], check=True)


@contextlib.contextmanager
def moved(disk, workdir):
    workdir.rename(workdir.with_name("elsewhere"))
    yield "No such file or directory"
    workdir.with_name("elsewhere").rename(workdir)


@pytest.mark.parametrize(
    "fault, numbers, count, rank",
    [
        pytest.param(full, [signal.SIGTERM], 1, 0, marks=slow),
        pytest.param(full, SIGNALS, 1, 0, marks=slow),
        *[pytest.param(fault, [signal.SIGTERM], 1, 0, marks=slow) for fault in (forbidden, moved)],
        *[pytest.param(fault, [signal.SIGTERM], 2, rank, marks=slow) for fault in (full, forbidden) for rank in (0, 1)],
    ],
)
def test_a_disk_that_refuses_is_said_and_costs_no_checkpoint(small_disk, tmp_path, fault, numbers, count, rank):
    """One line in each process and code 2 (another start would not help), the last checkpoint is whole; once it is mended
    the same command goes on."""
    config, workdir = write_config(tmp_path / "config.py", **RUN), (small_disk.folder if fault is full else tmp_path) / "run"
    for number in numbers:
        with Processes(config, workdir, count=count) as run:
            run.train(until=lambda: re.search("(checkpoint of|resumed from) step 200", run.log().read_text()))
            with fault(small_disk, workdir) as words:
                run.processes[rank].send_signal(number)
                assert run.wait(ENDS_WITHIN) == [2] * count, logs(run)
                for k in range(count):
                    (line,) = [line for line in bad_lines(run, k) if "metrics.jsonl cannot be written" not in line]
                    assert line.startswith("error: "), logs(run)
                    assert words in line and "the last good checkpoint is step 200" in line, logs(run)
        assert saved(workdir) == [200] and checkpoint.find(workdir)[1] == 200
    with Processes(config, workdir, count=count) as run:
        assert run.wait() == [0] * count, logs(run)
        assert "resumed from step 200" in run.log().read_text()
    assert [line["step"] for line in read_last(workdir / "metrics.jsonl", 1000)] == list(range(1, 401))


@slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(small_disk, tmp_path):
    """A save in the middle fails, training goes on, a later one succeeds; so it does when checkpoints/ is deleted meanwhile."""
    config, workdir = write_config(tmp_path / "config.py", **RUN | dict(total_steps=1200)), small_disk.folder / "run"
    with Processes(config, workdir) as run:
        run.train(until=lambda: saved(workdir) == [200])
        small_disk.fill()
        wait_until(lambda: "saving step" in run.log().read_text(), processes=run.processes)
        small_disk.free()
        wait_until(lambda: saved(workdir) not in ([200], []), processes=run.processes)
        shutil.rmtree(workdir / "checkpoints")
        assert run.wait() == [0], logs(run)
        lines = [line for line in bad_lines(run) if "metrics.jsonl cannot be written" not in line]
        assert lines and all(line.startswith("warning: saving step") and "training goes on" in line for line in lines)
    assert saved(workdir)[-1] == 1200 == checkpoint.find(workdir)[1]
    assert [line["step"] for line in read_last(workdir / "metrics.jsonl", 2000)] == list(range(1, 1201))


# ---------------------------------------------------------------- one run in a workdir


@slow
def test_only_one_of_many_starts_has_the_workdir(tmp_path):
    """Four at one instant, then two processes of another run: all but the first end with 2 and one line. The one that runs is
    suspended for a while meanwhile, and goes on."""
    config, workdir = write_config(tmp_path / "config.py", **RUN), tmp_path / "run"
    with contextlib.ExitStack() as stack:
        starts = []
        for number in range(4):
            (tmp_path / str(number)).mkdir()
            shutil.copy(config, tmp_path / str(number))
            starts.append(stack.enter_context(Processes(tmp_path / str(number) / "config.py", workdir)))
        wait_until(lambda: [start.processes[0].poll() for start in starts].count(2) == 3)
        (winner,) = [start for start in starts if start.processes[0].poll() is None]
        for start in set(starts) - {winner}:
            assert len(bad_lines(start)) == 1 and "is in use by a live run" in bad_lines(start)[0], logs(start)
        winner.train()
        winner.processes[0].send_signal(signal.SIGSTOP)
        with Processes(config, workdir, count=2) as group:
            assert group.wait() == [2, 2], logs(group)
            assert all(len(bad_lines(group, k)) == 1 for k in range(2)), logs(group)
            assert "is in use by a live run" in bad_lines(group)[0]
        winner.processes[0].send_signal(signal.SIGCONT)
        assert winner.wait() == [0] and not bad_lines(winner), logs(winner)


# ---------------------------------------------------------------- input workers, and the host


@slow
def test_a_worker_without_memory_ends_the_run_in_one_line(tmp_path):
    config = write_config(tmp_path / "config.py", **RUN | dict(total_steps=10**6, data__num_workers=1, data__image_size=64))
    with Processes(config, tmp_path / "run") as run:
        run.train()
        run.worker().rlimit(psutil.RLIMIT_AS, (2**20, 2**20))
        assert run.wait(ENDS_WITHIN) == [2], logs(run)
        errors = [line for line in bad_lines(run) if line.startswith("error")]  # behind what the dying worker says itself
        assert len(errors) == 1 and "memory" in errors[0] and errors[0] == run.log().read_text().splitlines()[-1], logs(run)


@slow
@pytest.mark.parametrize("fault", ["signal", "hang"])
def test_one_process_per_card(tmp_path, fault):
    """docs/launch/one_process_per_card.sh with two processes on the CPU: a signal to it reaches both; one that hangs is
    named by the other and killed."""
    config, workdir = write_config(tmp_path / "config.py", **RUN | dict(total_steps=10**6)), tmp_path / "run"
    environ = os.environ | dict(CARDS="2", PORT=free_port(), JAX_NUM_CPU_DEVICES="1")
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    command = ["bash", "docs/launch/one_process_per_card.sh", f"--config={config}", f"--workdir={workdir}"]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: steps_done(workdir) > 5, processes=[launcher])
        if fault == "signal":
            launcher.send_signal(signal.SIGUSR1)
            assert launcher.wait(ENDS_WITHIN) == 128 + signal.SIGTERM
            assert checkpoint.find(workdir)[1] == steps_done(workdir)
        else:
            (hangs,) = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("JAX_PROCESS_ID") == "1"]
            hangs.suspend()
            assert launcher.wait(240) == 128 + signal.SIGKILL
            assert "error: process 1 has not answered for" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
