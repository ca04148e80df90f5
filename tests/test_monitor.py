"""What a run tells: metrics.jsonl, the status line, W&B, throughput, grids."""

import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitjax.monitor import Monitor, Throughput, save_grid
from jitjax.monitor.console import Console, human_count, human_time, status_line
from jitjax.monitor.metrics import MetricsFile
from jitjax.monitor.tracker import WandbTracker

ROOT = Path(__file__).parents[1]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_python(script, **env):
    """Runs a script in a process of its own: W&B keeps state in the process, and a resumed run is a new one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=clean | {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---------------------------------------------------------------- metrics.jsonl


def test_floats_keep_full_precision_and_non_finite_ones_become_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    values = {"a": 0.1 + 0.2, "b": math.pi * 1e-30, "c": np.float32(0.1), "nan": math.nan, "inf": -math.inf, "n": 3}
    file.write(1, values)
    assert lines(tmp_path / "metrics.jsonl") == [  # readable before the file is closed
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
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_epoch_loss_is_the_mean_of_the_whole_epoch_across_a_crash_and_resume(tmp_path):
    loss = {step: 1 / (step + 3) for step in range(1, 9)}
    monitor = Monitor(tmp_path, {}, total_steps=8)
    monitor.write(1, {"train/loss": loss[1]})
    monitor.write(2, {"train/loss": loss[2]}, epoch_start=0)
    for step in (3, 4):
        monitor.write(step, {"train/loss": loss[step]})
    monitor.write(5, {"train/loss": 1000.0})  # after the checkpoint: lost, and done again
    monitor = Monitor(tmp_path, {}, total_steps=8, resume_step=4)
    monitor.write(5, {"train/loss": loss[5]})
    monitor.write(6, {"train/loss": math.nan})  # a skipped step has no loss
    monitor.write(7, {"train/loss": loss[7]}, epoch_start=2)
    monitor.close()
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[1]["train/epoch_loss"] == pytest.approx((loss[1] + loss[2]) / 2, rel=1e-15)
    assert records[6]["train/epoch_loss"] == pytest.approx((loss[3] + loss[4] + loss[5] + loss[7]) / 4, rel=1e-15)


def test_a_full_disk_neither_stops_the_run_nor_loses_or_tears_a_line(tmp_path):
    output = run_python(f"""
        import resource
        from jitjax.monitor import Monitor
        monitor = Monitor({str(tmp_path)!r}, {{}}, total_steps=9)
        monitor.write(1, {{"train/loss": 0.5}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))  # writes beyond 50 bytes fail
        for step in range(2, 7):
            monitor.write(step, {{"train/loss": 0.5}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        monitor.write(7, {{"train/loss": 0.5}})
        monitor.close()
    """)
    assert output.count("cannot be written") == 1
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, {"wandb": {"enabled": True}}, total_steps=2, is_main=False)
    monitor.write(1, {"train/loss": 0.5}, epoch_start=0)
    monitor.status(1, {"train/loss": 0.5})
    monitor.image(1, "samples", "none.png")
    monitor.note("hello")
    monitor.close()
    assert not any(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- status line


def screen(output):
    """The lines that a terminal shows after this output: carriage return, newline and "erase line" understood."""
    shown, column = [""], 0
    output = output.replace("\x1b[2K", "\0")
    for char in output:
        if char == "\r":
            column = 0
        elif char == "\n":
            shown.append("")
        elif char == "\0":
            shown[-1] = ""
        else:
            shown[-1] = shown[-1][:column].ljust(column) + char + shown[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in shown]


def test_on_a_terminal_the_status_line_stays_one_line_below_the_notes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    reader, writer = pty.openpty()
    with open(writer, "w") as terminal:
        console = Console(200, stream=terminal)
        console.status(50, {"train/loss": 0.75, "train/learning_rate": 1e-4, "time/step": 2.0})
        console.note("saved checkpoint 50")
        console.status(100, {"train/loss": 0.5})
        console.close()
        output = ""
        while output.count("\n") < 2:  # the note's and the last
            output += os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert screen(output)[0] == "saved checkpoint 50"
    assert screen(output)[1].startswith("[##########..........] 100/200 50%  loss 0.5000  ETA ")
    assert screen(output)[2:] == [""]


def test_elsewhere_each_interval_is_one_plain_line_with_the_time_left_by_the_clock():
    now = [1000.0]
    stream = io.StringIO()
    console = Console(1000, stream=stream, clock=lambda: now[0])
    console.status(100, {"train/loss": 0.5, "time/step": 1.0})  # no history yet: 900 steps of a second
    now[0] += 4 * 3600  # 200 steps, previews and all, in four hours: 72 s a step
    console.status(300, {"train/loss": 0.25, "train/tokens_per_second": 626_123.0, "perf/data_wait": 0.004})
    assert stream.getvalue().splitlines() == [
        "[##..................] 100/1000 10%  loss 0.5000  ETA 15m 00s",
        "[######..............] 300/1000 30%  loss 0.2500  626K tok/s  ETA 14h 00m  data wait 0.4%",
    ]


def test_a_narrow_terminal_keeps_what_matters_most_on_one_line():
    metrics = {
        "train/loss": 0.5, "train/learning_rate": 1e-4, "train/tokens_per_second": 626e3, "perf/data_wait": 0.004
    }  # fmt: skip
    assert [status_line(300, 1000, metrics, 725, width) for width in (90, 79, 50, 20)] == [
        "[##......] 300/1000 30%  loss 0.5000  lr 1.00e-04  626K tok/s  ETA 12m 05s  data wait 0.4%",
        "[##......] 300/1000 30%  loss 0.5000  626K tok/s  ETA 12m 05s  data wait 0.4%",
        "300/1000 30%  loss 0.5000  626K tok/s  ETA 12m 05s",
        "300/1000 30%  loss 0",
    ]


def test_a_closed_terminal_does_not_stop_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")
    console = Console(10, stream=stream)
    console.status(1, {})
    console.note("still here")
    console.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that closing the stream can flush what is left
    stream.close()
    console.status(2, {})


def test_units_that_people_read():
    assert [human_time(s) for s in (0.4, 59.6, 725, 4349, 273_600)] == ["0s", "1m 00s", "12m 05s", "1h 12m", "3d 4h"]
    assert [human_count(n) for n in (7.25, 950, 12_345, 626_123, 999_999, 1_250_000)] == [
        "7.2", "950", "12.3K", "626K", "1.00M", "1.25M"
    ]  # fmt: skip
    assert "loss nan" in status_line(1, 2, {"train/loss": math.nan}, None)


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


# ---------------------------------------------------------------- W&B

WANDB_RUN = """
    from jitjax.monitor import Monitor
    monitor = Monitor({workdir!r}, {{"seed": 3, "wandb": {wandb}}}, total_steps=9, resume_step={first} - 1)
    for step in range({first}, {last} + 1):
        if step == {last} - 1:
            monitor.image(step + 1, "samples", {image!r})  # the next step's metrics are one interval late
        monitor.write(step, {{"train/loss": 1 / step}})
    monitor.close()
"""


def wandb_records(path):
    """Run id and {step: {name: value}} of W&B's transaction log: records cut into 32 KiB blocks, as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, run_id, history = path.read_bytes(), 7, b"", None, {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            message, record = Record.FromString(record), b""
            if message.WhichOneof("record_type") == "run":
                run_id = message.run.run_id
            for item in message.history.item:
                name = item.key or "/".join(item.nested_key)
                history.setdefault(message.history.step.num, {})[name] = json.loads(item.value_json)
    return run_id, history


def test_a_resumed_run_goes_on_in_the_same_wandb_run_with_every_step_and_image(tmp_path):
    save_grid(tmp_path / "grid.png", np.zeros((4, 8, 8, 3), np.uint8))
    settings = {"enabled": True, "project": "shapes", "name": None, "mode": "offline"}
    for first, last in ((1, 5), (4, 9)):
        script = WANDB_RUN.format(
            workdir=str(tmp_path), wandb=settings, first=first, last=last, image=str(tmp_path / "grid.png")
        )
        assert run_python(script) == ""  # nothing went wrong, and W&B left the console alone
    (first_id, first), (second_id, second) = (
        wandb_records(path) for path in sorted(tmp_path.glob("wandb/offline-*/*.wandb"), key=os.path.getmtime)
    )
    assert first_id == second_id == (tmp_path / "wandb_run_id").read_text().strip()
    for history, steps in ((first, range(1, 6)), (second, range(4, 10))):
        assert {step: values["train/loss"] for step, values in history.items()} == {step: 1 / step for step in steps}
        assert [step for step, values in history.items() if "samples/path" in values] == [max(steps)]


def test_an_unreachable_wandb_server_leaves_offline_files(tmp_path):
    output = run_python(
        f"""
        from jitjax.monitor.tracker import WandbTracker
        tracker = WandbTracker({str(tmp_path)!r}, {{}}, project="p", init_timeout=1, finish_timeout=40)
        tracker.log(1, {{"train/loss": 0.5}})
        tracker.finish()
        """,
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens there
    )
    assert output.count("\n") == 1 and "going on offline" in output
    (path,) = tmp_path.glob("wandb/offline-*/*.wandb")
    assert wandb_records(path)[1][1]["train/loss"] == 0.5


def fake_wandb(monkeypatch, **functions):
    module = types.SimpleNamespace(
        login=lambda **_: True, Settings=lambda **_: None, Image=str, teardown=lambda: None, **functions
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


def broken(*args, **kwargs):
    raise ConnectionError("no route\nto host")


@pytest.mark.parametrize("failure", ["missing", "init", "log", "finish"])
def test_a_failing_wandb_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, capsys, failure):
    run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda **k: None, starting_step=0)
    if failure in ("log", "finish"):
        setattr(run, failure, broken)
    fake_wandb(monkeypatch, init=broken if failure == "init" else lambda **_: run)
    if failure == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    monitor = Monitor(tmp_path, {"wandb": {"enabled": True, "project": "p", "mode": "offline"}}, total_steps=50)
    for step in range(1, 51):
        monitor.write(step, {"train/loss": 0.5})
    monitor.close()
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == list(range(1, 51))
    assert capsys.readouterr().out.count("\n") == 1


def test_a_hanging_wandb_neither_blocks_the_loop_nor_the_end(tmp_path, monkeypatch):
    released, warnings = threading.Event(), []
    fake_wandb(monkeypatch, init=lambda **_: released.wait())
    tracker = WandbTracker(tmp_path, {}, project="p", mode="offline", warn=warnings.append, finish_timeout=0.2, queue_size=10)
    for step in range(1, 1001):
        tracker.log(step, {"train/loss": 0.5})
    tracker.log_image(1000, "samples", "grid.png")
    tracker.finish()
    assert not released.is_set()  # all of it while W&B hangs
    released.set()
    assert any("991 entries were not sent" in text for text in warnings) and len(warnings) == 2


def test_steps_that_wandb_has_seen_before_a_resume_are_not_sent_again(tmp_path, monkeypatch):
    sent = []
    run = types.SimpleNamespace(
        starting_step=7, log=lambda values, step: sent.append(step), finish=lambda exit_code: sent.append(exit_code)
    )
    fake_wandb(monkeypatch, init=lambda **_: run)
    tracker = WandbTracker(tmp_path, {}, project="p")
    for step in range(5, 10):
        tracker.log(step, {"train/loss": 0.5})
    tracker.finish(exit_code=1)
    assert sent == [7, 8, 9, 1]


# ---------------------------------------------------------------- grids


def test_grid_places_images_row_by_row_with_two_pixels_between(tmp_path):
    images = np.arange(5 * 6 * 4 * 3, dtype=np.uint8).reshape(5, 6, 4, 3)
    path = save_grid(tmp_path / "samples" / "grid.png", images, columns=3)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (6 * 2 + 2, 4 * 3 + 4, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(grid[row * 8 : row * 8 + 6, column * 6 : column * 6 + 4], image)
    assert (grid[6:8] == 255).all() and (grid[:, 4:6] == 255).all()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_grid_captions_stand_above_their_images(tmp_path):
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    grid = np.asarray(Image.open(save_grid(tmp_path / "g.png", images, columns=2, labels=["star", ""])))
    captions, below = grid[:12], grid[12:]
    assert captions[:, :32].min() < 100 and (captions[:, 34:] == 255).all()
    assert (below[:, :32] == 128).all()
