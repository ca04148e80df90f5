"""`kill -9` at random moments of one run: it continues from the last complete checkpoint, ends bit for bit where an undisturbed
run does, and leaves nothing behind.

    python -m pytest tests/faults/test_kills.py               # a few kills
    python -m pytest -m slow tests/faults/test_kills.py       # 30 kills
"""

import itertools
import os
import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from programs import Processes, steps_done, wait_until, write_config
from test_train import assert_same_run

from jitjax import checkpoint

# Batches of 24 KB, which the workers pass through shared memory.
RUN = dict(
    batch_size=16, optim__accumulation_steps=2, data__image_size=16, data__num_workers=2, data__flip=True, log__every_steps=1
)


def being_saved(workdir: Path) -> bool:
    """Whether a checkpoint is being written, or an old one deleted."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def in_first_seconds(run: Processes, draw: random.Random, usual: float) -> None:
    """While the data set is being drawn."""
    wait_until(lambda: any(run.workdir.glob(".shapes.*")), processes=run.processes)


def in_start_up(run: Processes, draw: random.Random, usual: float) -> None:
    """Any moment until training usually begins."""
    time.sleep(usual * draw.random())


def in_steps(run: Processes, draw: random.Random, usual: float) -> None:
    """After a few steps."""
    run.train()
    until = steps_done(run.workdir) + draw.randint(1, 9)
    wait_until(lambda: steps_done(run.workdir) >= until, processes=run.processes)


def in_save(run: Processes, draw: random.Random, usual: float) -> None:
    """While one of the next checkpoints is being written (arrays, metadata, its name) or an old one deleted."""
    for _ in range(draw.randint(1, 3)):
        wait_until(lambda: not being_saved(run.workdir), processes=run.processes)
        wait_until(lambda: being_saved(run.workdir), processes=run.processes)
    time.sleep(0.06 * draw.random())


@pytest.mark.parametrize(
    "kills, steps",
    [pytest.param(4, 60, marks=pytest.mark.slow), pytest.param(30, 400, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_killed_at_random_moments(tmp_path, kills, steps):
    draw, workdir = random.Random(7), tmp_path / "run"
    saves = dict(checkpoint__every_steps=3, checkpoint__keep_last=2)
    config = write_config(tmp_path / "config.py", **RUN, **saves, total_steps=steps)
    owners, inside, usual = [], 0, 0.0
    for moment in [in_first_seconds, *itertools.islice(itertools.cycle([in_steps, in_save, in_start_up]), kills - 1)]:
        complete, begun = checkpoint.steps_in(workdir / "checkpoints"), time.monotonic()
        with Processes(config, workdir) as run:
            moment(run, draw, usual)
            text = run.log().read_text()
            assert run.processes[0].poll() is None, text[-2000:]
            children = psutil.Process(run.processes[0].pid).children()
            inside += being_saved(workdir)
            (os.killpg if draw.random() < 0.5 else os.kill)(run.processes[0].pid, signal.SIGKILL)
            run.wait()
            assert not psutil.wait_procs(children, 30)[1]  # input workers end with it
        if "first step after" in text:
            usual = usual or time.monotonic() - begun
            resumed = re.search(r"resumed from step ([\d,]+)", text)
            assert (resumed and int(resumed[1].replace(",", ""))) == max(complete, default=None)
        owners.append(run.processes[0].pid)
    with open(workdir / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 999, "train/lo')  # as a crash may leave it
    undisturbed = write_config(tmp_path / "undisturbed.py", **RUN, total_steps=steps)
    for which, folder in ((config, workdir), (undisturbed, tmp_path / "undisturbed")):
        with Processes(which, folder) as run:
            assert run.wait() == [0], run.log().read_text()[-2000:]
            owners.append(run.processes[0].pid)
    print(f"{kills} kills, {inside} of them while a checkpoint was being written or deleted")
    assert inside >= kills // 6  # a save may end between the last look and the kill

    assert_same_run(tmp_path / "undisturbed", workdir)
    assert len(checkpoint.steps_in(workdir / "checkpoints")) == 2 == len(list((workdir / "checkpoints").iterdir()))
    assert {path.name for path in workdir.glob(".*")} <= {".lock"}
    assert not [path for owner in owners for path in Path("/dev/shm").glob(f"jj{owner:x}_*")]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(workdir) in " ".join(p.info["cmdline"] or ())]
