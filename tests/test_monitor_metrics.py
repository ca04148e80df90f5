"""What a run writes about its steps: metrics.jsonl over crashes and resumes, metrics that come late, throughput."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import json_lines, run_python

from jitjax.monitor import LateLog, Monitor, Throughput
from jitjax.monitor.metrics import MetricsFile
from jitjax.settings import Wandb

# ---------------------------------------------------------------- metrics.jsonl


def test_floats_keep_full_precision_and_non_finite_ones_become_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    values = {"a": 0.1 + 0.2, "b": math.pi * 1e-30, "c": np.float32(0.1), "nan": math.nan, "inf": -math.inf, "n": 3}
    file.write(1, values)
    assert json_lines(tmp_path / "metrics.jsonl") == [  # readable before the file is closed
        {"step": 1, "a": 0.1 + 0.2, "b": math.pi * 1e-30, "c": float(np.float32(0.1)), "nan": None, "inf": None, "n": 3}
    ]


@pytest.mark.parametrize("tail", ["", '{"step": 6, "train/lo', '{"step": 4'], ids=["whole", "torn", "torn early step"])
def test_resume_drops_later_and_torn_lines_and_keeps_the_others_byte_for_byte(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 6):
        file.write(step, {"train/loss": step / 7})
    file.close()
    before = path.read_bytes()
    path.write_bytes(before + tail.encode())
    MetricsFile(path, resume_step=3).close()
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])


def test_resume_keeps_a_last_line_that_lost_only_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    file = MetricsFile(path, resume_step=2)
    file.write(3, {})
    assert json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_lines_that_are_missing_are_reported(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for resume_step, said in ((2, ""), (5, "metrics.jsonl has no lines of steps 3 to 5\n")):
        Monitor(tmp_path, total_steps=9, resume_step=resume_step).close()
        assert capsys.readouterr().out.split("stopped")[0].endswith(said)
        assert ("no lines" in (tmp_path / "log.txt").read_text()) == bool(said)


@pytest.mark.parametrize(("resume_step", "saved"), [(0, False), (0, True), (5, False)])
def test_a_run_that_ends_early_says_what_the_same_command_does(tmp_path, capsys, resume_step, saved):
    monitor = Monitor(tmp_path, total_steps=9, resume_step=resume_step)
    if saved:
        monitor.checkpoint(3, tmp_path)
    monitor.close(1)
    resumes = f"the same command resumes from the last checkpoint in {tmp_path}"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (resumes if saved or resume_step else "the same command begins again: nothing was saved yet")


def test_epoch_loss_is_the_mean_of_the_whole_epoch_across_a_crash_and_resume(tmp_path):
    loss = {step: 1 / (step + 3) for step in range(1, 9)}
    monitor = Monitor(tmp_path, total_steps=8)
    monitor.write(1, {"train/loss": loss[1]})
    monitor.write(2, {"train/loss": loss[2]}, epoch_start=0)
    for step in (3, 4):
        monitor.write(step, {"train/loss": loss[step]})
    monitor.write(5, {"train/loss": 1000.0})  # after the checkpoint: lost, and done again
    monitor = Monitor(tmp_path, total_steps=8, resume_step=4)
    monitor.write(5, {"train/loss": loss[5]})
    monitor.write(6, {"train/loss": math.nan})  # a skipped step has no loss
    monitor.write(7, {"train/loss": loss[7]}, epoch_start=2)
    monitor.close()
    records = json_lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[1]["train/epoch_loss"] == pytest.approx((loss[1] + loss[2]) / 2, rel=1e-15)
    assert records[6]["train/epoch_loss"] == pytest.approx((loss[3] + loss[4] + loss[5] + loss[7]) / 4, rel=1e-15)


class Scalar:
    """A number on a device that is there, is not there yet, or never will be."""

    def __init__(self, ready, error=""):
        self.ready, self.error = ready, error

    def copy_to_host_async(self):
        pass

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        assert self.ready, "waited for the device"


def test_a_step_that_failed_on_the_device_is_known_without_waiting(tmp_path):
    monitor = Monitor(tmp_path, total_steps=9)
    log = LateLog(monitor, Throughput(1, now=0.0), samples_per_step=1, steps_per_epoch=9)
    assert log.failure() == ""
    for number, loss in ((1, jnp.float32(0.5)), (2, Scalar(True)), (3, Scalar(False))):
        log.add(number, {"train/loss": loss}, 0.0)
        assert log.failure() == ""
    log.add(4, {"train/loss": Scalar(True, "RESOURCE_EXHAUSTED: Out of memory\n  while ...")}, 0.0)
    assert log.failure() == "step 4 failed on the device: RESOURCE_EXHAUSTED: Out of memory while ..."
    log.close()
    monitor.close()


def test_a_full_disk_neither_stops_the_run_nor_loses_or_tears_a_line(tmp_path):
    output = run_python(f"""
        import resource
        from jitjax.monitor import Monitor
        monitor = Monitor({str(tmp_path)!r}, total_steps=9)
        monitor.write(1, {{"train/loss": 0.5}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))  # writes beyond 50 bytes fail
        for step in range(2, 7):
            monitor.write(step, {{"train/loss": 0.5}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        monitor.write(7, {{"train/loss": 0.5}})
        monitor.close()
    """)
    assert output.count("cannot be written") == 1
    assert [record["step"] for record in json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, total_steps=2, is_main=False, wandb=Wandb(enabled=True), tensorboard=True)
    monitor.write(1, {"train/loss": 0.5}, epoch_start=0)
    monitor.status(1, {"train/loss": 0.5})
    monitor.image(1, "samples", "none.png")
    monitor.checkpoint(1, "none")
    monitor.scores(1, {"eval/fid": 1.0})
    monitor.summary({"devices": 1})
    monitor.note("hello")
    monitor.close()
    assert not any(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- metrics that come late


def late_log(tmp_path, **options):
    monitor = Monitor(tmp_path, total_steps=1000)
    return LateLog(monitor, Throughput(16, now=time.perf_counter()), samples_per_step=4, steps_per_epoch=5, **options)


def test_observers_see_every_step_in_order_and_once_even_when_one_of_them_raises(tmp_path):
    seen = []

    def observe(step, metrics):
        seen.append((step, metrics["train/loss"]))
        if step == 6:
            raise RuntimeError("roll back")

    log = late_log(tmp_path, observers=[observe], memory=lambda: 3 << 29, facts=lambda: {"time/starts": len(seen)})
    for step in range(1, 9):
        log.add(step, {"train/loss": jnp.float32(step / 4)}, waited=0.0)
        if step % 4 == 0:
            log.interval()
    with pytest.raises(RuntimeError):
        log.flush()
    log.flush()
    log.close()
    assert seen == [(step, step / 4) for step in range(1, 7)]
    records = json_lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))  # the interval was written first
    assert [record["step"] for record in records if "train/epoch_loss" in record] == [5]
    speeds = [record for record in records if "train/samples_per_second" in record]
    assert [(record["step"], record["perf/peak_memory_gib"]) for record in speeds] == [(4, 1.5), (8, 1.5)]
    assert [(record["step"], record["time/starts"]) for record in records if "time/starts" in record] == [(4, 0), (8, 4)]


# ---------------------------------------------------------------- throughput


def test_throughput_excludes_pauses_and_start_up_and_counts_each_interval_alone():
    meter = Throughput(256, now=0.0, flops_per_sample=150e9, peak_flops=1e15)
    meter.restart(now=60.0)  # compiled
    meter.waited(1.5)
    meter.paused(10.0)
    first = meter.close(steps=100, samples=51_200, now=100.0)
    assert first["train/samples_per_second"] == pytest.approx(51_200 / 30)
    assert first["train/tokens_per_second"] == pytest.approx(51_200 * 256 / 30)
    assert first["time/step"] == pytest.approx(0.3)
    assert first["perf/data_wait"] == pytest.approx(0.05)
    assert first["perf/mfu"] == pytest.approx(51_200 / 30 * 150e9 / 1e15)
    second = meter.close(steps=100, samples=51_200, now=120.0)
    assert second["time/step"] == pytest.approx(0.2) and second["perf/data_wait"] == 0 == second["time/paused"]
