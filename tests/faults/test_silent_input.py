"""Input that does not answer: the worker and the file are named, the run can still be stopped and saves."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import psutil
import pytest
from conftest import ROOT
from test_train import CONFIG_FILE

from jitjax import checkpoint
from jitjax.data import device, make_iterator, readers, to_device
from jitjax.data.dataset import DataSet


@dataclasses.dataclass(frozen=True)
class StuckAtFive:
    """Eight images; the file of the sixth is on a disk that does not answer (a pipe without a writer)."""

    pipe: str

    def read(self, indices, images, labels):
        images[:] = 0
        for k, index in enumerate(indices.tolist()):
            readers.at(index)
            labels[k] = index
            if index == 5:
                os.close(os.open(self.pipe, os.O_RDONLY))
        return []

    def name(self, index):
        return f"cats/{index}.jpg"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_worker_and_file_are_named(tmp_path, workers, monkeypatch, caplog):
    monkeypatch.setattr(device, "_SILENT_S", 0.2)
    os.mkfifo(tmp_path / "pipe")
    dataset = DataSet("", "folder", 8, ("a",), {"count": 8, "classes": 1, "checksum": ""}, StuckAtFive(str(tmp_path / "pipe")))
    host = make_iterator(dataset, seed=0, global_batch=8, num_workers=workers, flip=False)
    batches = to_device(host, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    taken = []
    consumer = threading.Thread(target=lambda: taken.append(next(batches)))
    consumer.start()
    try:
        wait_for(lambda: "at cats/5.jpg for" in host.describe())
        if workers:
            (process,) = [child for child in psutil.Process().children() if f"process {child.pid}," in host.describe()]
            assert f"worker 0 of 2 (process {process.pid}, sleeping), at cats/5.jpg for 0 s" in host.describe()
            process.suspend()
            wait_for(lambda: f"(process {process.pid}, stopped), at cats/5.jpg" in host.describe())
            process.resume()
        wait_for(lambda: "waiting for " in caplog.text and "at cats/5.jpg" in caplog.text)
        assert not taken
        with open(tmp_path / "pipe", "w"):  # the disk is back
            consumer.join(60)
            assert sorted(taken[0]["label"].tolist()) == list(range(8))
            batches.close()
    finally:
        batches.close()
    assert len([line for line in caplog.messages if line.startswith("no input for ")]) < 20


@pytest.mark.slow
def test_a_run_whose_worker_is_stopped_saves_when_asked_to_stop(tmp_path):
    """0.1.0 neither said a word nor answered SIGTERM. The worker, which does not end by itself, goes as well."""
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    overrides = dict(total_steps=100_000, data__num_workers=1, log__every_steps=1)
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=overrides))
    command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={workdir}"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        file = workdir / "metrics.jsonl"
        wait_for(lambda: run.poll() is not None or (file.exists() and file.read_bytes().count(b"\n") > 2))
        workers = [c for c in psutil.Process(run.pid).children() if any("spawn_main" in word for word in c.cmdline())]
        assert len(workers) == 1
        workers[0].suspend()
        size = -1
        while size != (size := file.stat().st_size):  # what was read ahead is used up
            time.sleep(1)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM at step" in output
    assert checkpoint.find(workdir)[1] == int(file.read_text().splitlines()[-1].split(",")[0].split(":")[1])
    assert not workers[0].is_running()


TWO = """
import sys
from jitjax import cli, train
if __name__ == "__main__":
    train.HANG_SECONDS_OF_SEVERAL = 20.0  # the other one waits a tenth longer, and both look once a second
    cli.program(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_of_two_processes_the_one_without_input_is_named(tmp_path):
    """Both stand still, the other one in a collective: both end, and each says whom they waited for."""
    script, config, workdir = tmp_path / "two.py", tmp_path / "config.py", tmp_path / "run"
    script.write_text(TWO)
    overrides = dict(total_steps=100_000, batch_size=8, data__num_workers=1, log__every_steps=1, hang_factor=2.0)
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=overrides))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_NUM_CPU_DEVICES="1", PYTHONPATH=str(ROOT))
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), f"--config={config}", f"--workdir={workdir}"],
            cwd=ROOT,
            env=os.environ | cluster | {"JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        file = workdir / "metrics.jsonl"
        wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") > 2)
        (worker,) = [c for c in psutil.Process(runs[1].pid).children() if any("spawn_main" in word for word in c.cmdline())]
        worker.suspend()
        errors = [run.communicate(timeout=120)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    named = rf"no step for \d+ s after step \d+ .*waiting for input \(worker 0 of 1 \(process {worker.pid}, stopped\)"
    for rank, (run, error) in enumerate(zip(runs, errors, strict=True)):
        assert run.returncode == 3, error
        assert re.match(("error: process 1 stopped: " if rank == 0 else "error: ") + named, error.splitlines()[-1]), error
