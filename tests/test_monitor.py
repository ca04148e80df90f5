"""How a run reports: metrics.jsonl, console and log.txt, W&B, TensorBoard, throughput, grids."""

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from conftest import wandb_records
from PIL import Image

from jitjax.errors import UserError
from jitjax.monitor import LateLog, Monitor, Throughput, print_status, save_animation, save_grid, save_strip
from jitjax.monitor import images as grids
from jitjax.monitor.console import Console
from jitjax.monitor.metrics import MetricsFile
from jitjax.monitor.view import View
from jitjax.settings import Wandb

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
    assert (result.returncode, result.stderr) == (0, "")
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


def test_lines_that_are_missing_are_reported(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for resume_step, said in ((2, ""), (5, "metrics.jsonl has no lines of steps 3 to 5\n")):
        Monitor(tmp_path, total_steps=9, resume_step=resume_step).close()
        assert capsys.readouterr().out.split("stopped")[0].endswith(said)
        assert ("no lines" in (tmp_path / "log.txt").read_text()) == bool(said)


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
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[1]["train/epoch_loss"] == pytest.approx((loss[1] + loss[2]) / 2, rel=1e-15)
    assert records[6]["train/epoch_loss"] == pytest.approx((loss[3] + loss[4] + loss[5] + loss[7]) / 4, rel=1e-15)


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
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


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


# ---------------------------------------------------------------- console

STATUS = {
    "train/loss": 0.5,
    "train/learning_rate": 2e-4,
    "train/grad_norm": 0.25,
    "train/tokens_per_second": 626_123.4,
    "train/samples_per_second": 2445.8,
    "perf/mfu": 0.41,
    "perf/data_wait": 0.004,
    "perf/peak_memory_gib": 3.0,
}


def on_terminal(width, script):
    """What is on the screen after a script has run in a terminal of this width: its lines, from top to bottom.

    Understands what rich sends: carriage return, newline, erase line, cursor up; colours are ignored.
    """
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=env | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8"},
        stdin=writer,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    output = b""
    try:
        while piece := os.read(reader, 1 << 16):
            output += piece
    except OSError:  # the other end is closed
        pass
    os.close(reader)
    assert process.wait() == 0, output.decode()
    shown, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|.|\n", output.decode(), flags=re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            shown += [""] * (row + 1 - len(shown))
        elif token == "\x1b[2K":
            shown[row] = ""
        elif re.fullmatch(r"\x1b\[\d+A", token):
            row -= int(token[2:-1])
        elif not token.startswith("\x1b"):
            shown[row] = shown[row][:column].ljust(column) + token + shown[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in shown]


def test_a_failed_run_says_what_it_knows(tmp_path, capsys):
    monitor = Monitor(tmp_path, total_steps=400, steps_per_epoch=100, title="JiT-B/4")
    monitor.write(50, STATUS)
    monitor.close(1)
    assert "failed after 0:00:00, last logged step 50 of 400" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_one_view_stands_below_the_notes_and_shows_all_there_is(width, tmp_path):
    shown = on_terminal(
        width,
        f"""
        import logging, time
        from jitjax.monitor import Monitor
        monitor = Monitor({str(tmp_path)!r}, total_steps=400, steps_per_epoch=100, title="JiT-B/4")
        monitor.note("a [bracketed] note")
        monitor.note("compiling ...")
        for step in range(1, 201):
            monitor.write(step, {STATUS})
            if step % 50 == 0:
                monitor.status(step, {STATUS})
                time.sleep(0.6)  # the view is drawn meanwhile
        logging.getLogger("jitjax").warning("bad files")
        print("a stray print")
        monitor.checkpoint(150, "runs/a/checkpoints/150")
        monitor.image(200, "samples", "runs/a/samples/step_00000200.png")
        monitor.scores(100, {{"eval/fid": 12.345, "eval/kid_std": 0.5}})
        monitor.close(143)
        """,
    )
    notes, view = shown[:7], [line for line in shown if line.startswith("JiT-B/4")]
    assert notes == [
        "a [bracketed] note",
        "compiling ...",
        "warning: bad files",
        "a stray print",
        "checkpoint of step 150: runs/a/checkpoints/150",
        "preview of step 200: runs/a/samples/step_00000200.png",
        "scores of step 100: eval/fid 12.345, eval/kid_std 0.5",
    ]
    assert len(view) == 1 and view[0].endswith(" 200/400 (50%)") and shown[7] == view[0]
    closing = next(i for i, line in enumerate(shown) if line.startswith("stopped as asked"))
    assert all(len(line) <= width for line in shown[:closing])
    text = "\n".join(shown[8:closing])
    for field in ("epoch 2.00", "loss 0.5000 ▁▁▁▁", "lr 2.00e-04", "grad norm 0.25", "tokens/s 626,123", "images/s 2,445.8"):
        assert field in text
    for field in ("MFU 41.0%", "input wait 0.4%", "memory 3.0 GiB", "last checkpoint step 150", "last preview step 200"):
        assert field in text
    assert "last score fid 12.35 (step 100)" in text
    assert shown[closing].startswith("stopped as asked at step 200 of 400 after 0:00:0")
    assert shown[closing].endswith("; last checkpoint: step 150")
    assert " ".join(shown[closing + 1 :]) == f"the same command resumes from the last checkpoint in {tmp_path} "


def test_elsewhere_each_interval_is_one_plain_line_with_the_time_left_by_the_clock():
    now = [1000.0]
    stream = io.StringIO()
    console = Console(1000, steps_per_epoch=80, stream=stream, clock=lambda: now[0])
    console.status(100, {"train/loss": 0.5, "time/step": 1.0})  # no history yet: 900 steps of a second
    now[0] += 4 * 3600  # 200 steps, previews and all, in four hours: 72 s a step
    console.status(300, STATUS)
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 100/1,000 (10%)  epoch 1.25  elapsed 0:00:00  left 0:15:00  loss 0.5000",
        "step 300/1,000 (30%)  epoch 3.75  elapsed 4:00:00  left 14:00:00  loss 0.5000  lr 2.00e-04  grad norm 0.25  "
        "tokens/s 626,123  images/s 2,445.8  MFU 41.0%  input wait 0.4%  memory 3.0 GiB",
    ]


def drawn(view, width=100):
    """The live view as text."""
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()


def test_the_view_says_what_the_loop_does_and_time_left_waits_for_it():
    """Steps of a second, a status every ten: what takes longer than ten seconds was not in the estimate."""
    now, doing = [0.0], ["compile", 0.0]
    view = View(100, None, "", clock=lambda: now[0], begun=0.0, activity=lambda: (doing[0], now[0] - doing[1]))
    now[0] = 30.0
    assert "compiling, and reading the first batch ...  0:00:30" in drawn(view)
    doing[:] = "step", now[0]
    for step in (10, 20):
        now[0] += 10.0
        view.update(step, {"time/step": 1.0})
    doing[:] = "preview", now[0]
    now[0] += 7.0
    assert "drawing a preview ...  0:00:07" in drawn(view) and view.seconds_left() == 73.0
    now[0] += 40.0
    assert "drawing a preview ...  0:00:47" in drawn(view) and view.seconds_left() == 70.0
    doing[:] = "input_wait", now[0]
    assert "training" in drawn(view)
    now[0] += 5.0
    assert "waiting for input ...  0:00:05" in drawn(view)
    now[0] += 5.0
    view.update(30, {"time/step": 1.0})  # 20 steps in 67 seconds
    assert view.seconds_left() == pytest.approx(70 * 67 / 20)
    view.update(100, {})
    doing[:] = "save", now[0]
    assert "saving ...  0:00:00" in drawn(view) and "left" not in view.line()
    view.end()
    assert "saving" not in drawn(view)


def test_a_status_counts_from_when_its_step_was_done():
    now = [100.0]
    stream = io.StringIO()
    console = Console(100, stream=stream, clock=lambda: now[0], begun=90.0)
    now[0] += 20.0
    console.status(10, {}, ago=10.0)
    console.status(20, {}, ago=0.0)
    times = [re.search(r"elapsed (\S+)  left (\S+)", line).groups() for line in stream.getvalue().splitlines()]
    assert times == [("0:00:20", "?"), ("0:00:30", "0:01:20")] and console.elapsed == 30.0


def test_lines_break_between_words_on_a_terminal_and_nowhere_else(tmp_path):
    path = "runs/" + "x" * 90
    text = " ".join(f"word{i}" for i in range(40)) + f" {path} end"
    shown = on_terminal(
        80,
        f"""
        from jitjax.monitor import Monitor
        monitor = Monitor({str(tmp_path)!r}, total_steps=4, next_commands=["jitjax " + "sample " * 20])
        monitor.note({text!r})
        monitor.close()
        """,
    )
    rows = shown[: shown.index("end") + 1] if "end" in shown else shown
    assert " ".join(rows) == text and path in rows and all(len(row) <= 80 for row in rows if row != path)
    assert "next: jitjax " + "sample " * 19 + "sample" in shown  # to be copied in one piece
    assert text in (tmp_path / "log.txt").read_text()
    stream = io.StringIO()
    Console(4, stream=stream).note(text)
    assert stream.getvalue() == text + "\n"


def test_the_shown_loss_is_smoothed_and_one_that_is_not_finite_is_shown_as_it_is():
    stream = io.StringIO()
    console = Console(1000, stream=stream)
    for step in range(1, 501):
        console.observe(step, {"train/loss": 0.4 if step % 2 else 0.6})
    console.status(500, {"train/loss": 0.6})
    console.observe(501, {"train/loss": math.nan})
    console.status(501, {"train/loss": math.nan})
    smoothed, raw = (re.search(r"loss (\S+)", line)[1] for line in stream.getvalue().splitlines())
    assert 0.49 < float(smoothed) < 0.51 and raw == "nan"


def test_every_printed_line_is_appended_to_the_log_with_the_time(tmp_path, capsys):
    for start in (0, 50):
        monitor = Monitor(tmp_path, total_steps=100, resume_step=start, next_commands=["jitjax sample runs/a"])
        monitor.note("compiling ...")
        monitor.write(start + 50, {"train/loss": 0.5})
        monitor.status(start + 50, {"train/loss": 0.5})
        monitor.note("Füchse 狐")
        monitor.close()
    logged = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("  ", 1)[1] for line in logged] == capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  ", line) for line in logged)
    assert len(logged) == 12 and logged[5].endswith("next: jitjax sample runs/a") and str(tmp_path) in logged[4]


def test_a_stream_that_cannot_print_a_character_prints_its_escape():
    raw = io.BytesIO()
    console = Console(10, stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.note("狐")
    assert raw.getvalue() == b"\\u72d0\n"


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


def test_the_status_of_a_run_started_elsewhere_comes_from_its_files_also_while_it_writes(tmp_path):
    monitor = Monitor(tmp_path, total_steps=1000)
    for step in range(1, 301):
        speed = {"time/step": 2.0, "time/paused": 50.0, "train/tokens_per_second": 626_123.4, "perf/peak_memory_gib": 3.0}
        monitor.write(step, {"train/loss": 0.5, "train/learning_rate": 2e-4, **(speed if step % 100 == 0 else {})})
    monitor.write(301, {"train/loss": 0.5, "train/learning_rate": 2e-4})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 302, "train/lo')  # a line under way
    for folder in ("checkpoints/100", "checkpoints/300", "checkpoints/400.partial-1", "samples"):
        (tmp_path / folder).mkdir(parents=True)
    save_grid(tmp_path / "samples" / "step_00000200.png", np.zeros((1, 8, 8, 3), np.uint8))
    (tmp_path / "scores.jsonl").write_text('{"step": 100, "eval/fid": 9.0}\n{"step": 200, "ema": "0.9", "eval/fid": 7.5}\n')
    account = {"starts": 2, "doing": "preview", "seconds": {"step": 1800.0, "save": 1800.0}}
    (tmp_path / "time.json").write_text(json.dumps(account))
    stream = io.StringIO()
    print_status(tmp_path, total_steps=1000, steps_per_epoch=100, title="runs/a", stream=stream)
    shown = " ".join(stream.getvalue().split())
    assert shown.startswith("runs/a step 301/1,000 (30%) epoch") and len(stream.getvalue().splitlines()) == 2
    for field in ("epoch 3.01", "left 0:29:10", "loss 0.5000", "lr 2.00e-04", "tokens/s 626,123", "memory 3.0 GiB"):
        assert field in shown  # 700 steps of 2.5 s
    assert "last checkpoint step 300 last preview step 200 last score fid 7.5 (step 200) last step written 0:00:0" in shown
    assert re.search(", last heard of 0:00:0. ago drawing a preview;", shown)
    on_screen = on_terminal(
        80,
        f"""
        from jitjax.monitor import print_status
        print_status({str(tmp_path)!r}, total_steps=1000, steps_per_epoch=100, title="runs/a")
        """,
    )
    assert on_screen[0].startswith("runs/a ━") and on_screen[0].endswith(" 301/1,000 (30%)")
    assert {" ".join(on_screen).count(word) for word in ("626,123", "fid 7.5", "last step written")} == {1}
    assert "; elapsed 1:00:00 in 2 starts, 50% of it training steps" in shown
    monitor.close()
    with pytest.raises(UserError, match="metrics.jsonl"):
        print_status(tmp_path / "samples", total_steps=1000)


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
    records = lines(tmp_path / "metrics.jsonl")
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


# ---------------------------------------------------------------- W&B

FIVE = ("train/loss", "train/learning_rate", "train/grad_norm", "train/epoch_loss", "train/samples_per_second")
WANDB_RUN = """
    from jitjax.monitor import Monitor
    from jitjax.settings import Wandb
    monitor = Monitor({workdir!r}, total_steps=9, resume_step={first} - 1, run_config={{"seed": 3, "optim": {{"lr": 0.5}}}},
        wandb=Wandb(enabled=True, project="shapes", entity="us", group="ours", tags="a, b", mode="offline"))
    monitor.summary({{"devices": 8}})
    for step in range({first}, {last} + 1):
        if step == {last} - 1:
            monitor.image(step + 1, "samples", {image!r})  # the next step's metrics are one interval late
        monitor.write(step, {{"train/loss": 1 / step}})
        monitor.status(step, {{}})
    monitor.scores({first}, {{"eval/fid": 7.5}})
    monitor.close()
"""


def wandb_history(records):
    """{step: {name: value}}"""
    return {record["history"]["item"]["_step"]: record["history"]["item"] for record in records.get("history", [])}


def test_a_resumed_run_goes_on_in_the_same_wandb_run_with_every_step_image_and_score(tmp_path):
    save_grid(tmp_path / "grid.png", np.zeros((4, 8, 8, 3), np.uint8))
    for first, last in ((1, 5), (4, 9)):
        output = run_python(WANDB_RUN.format(workdir=str(tmp_path), first=first, last=last, image=str(tmp_path / "grid.png")))
        run_id = (tmp_path / "wandb_run_id").read_text().strip()
        assert output.count(f"wandb sync --id {run_id} {tmp_path}/wandb/offline-run-*-{run_id}") == 1
        assert "warning" not in output.lower() and "failed" not in output
    first, second = map(wandb_records, sorted(tmp_path.glob("wandb/offline-*/*.wandb"), key=os.path.getmtime))
    for records, steps in ((first, range(1, 6)), (second, range(4, 10))):
        run = records["run"][0]["run"]
        named = ("run_id", "project", "entity", "display_name", "run_group", "job_type")
        assert [run[name] for name in named] == [run_id, "shapes", "us", tmp_path.name, "ours", "train"]
        assert run["tags"] == ["a", "b"]
        assert {k: v for k, v in run["config"]["update"].items() if k != "_wandb"} == {"seed": 3, "optim": {"lr": 0.5}}
        metrics = [record["metric"] for record in records["metric"]]
        assert {m["name"]: m["step_metric"] for m in metrics if "step_metric" in m and "name" in m} == dict.fromkeys(
            FIVE, "step"
        )
        assert {m["name"] for m in metrics if m.get("options", {}).get("hidden")} == {"step", "eval/step"}
        history = wandb_history(records)
        assert {step: (row["step"], row["train/loss"]) for step, row in history.items()} == {s: (s, 1 / s) for s in steps}
        assert [step for step, row in history.items() if "samples.path" in row] == [max(steps)]
        scored = [(row["eval/step"], row["eval/fid"]) for row in history.values() if "eval/fid" in row]
        assert scored == [(min(steps), 7.5)]
        assert {"devices": 8} in [record["summary"]["update"] for record in records["summary"]]
        assert records["exit"][0]["exit"]["exit_code"] == 0


def test_an_unreachable_wandb_server_leaves_offline_files_and_no_trace_of_the_key(tmp_path):
    key = "0123456789abcdef" * 2 + "01234567"
    output = run_python(
        f"""
        from jitjax.monitor.wandb_run import WandbRun
        from jitjax.settings import Wandb
        run = WandbRun({str(tmp_path)!r}, {{}}, Wandb(enabled=True), init_timeout=1, finish_timeout=20)
        run.log(1, {{"train/loss": 0.5}})
        run.finish()
        """,
        WANDB_API_KEY=key,
        WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens there
    )
    connecting, failed, offline = output.splitlines()
    assert "connecting" in connecting and "going on offline" in failed and "wandb sync" in offline
    (path,) = tmp_path.glob("wandb/offline-*/*.wandb")
    assert wandb_history(wandb_records(path))[1]["train/loss"] == 0.5
    assert key not in output
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("signal", "when"), [("SIGSTOP", "while training"), ("SIGSTOP", "at the end"), ("SIGKILL", "while training")]
)
def test_a_wandb_process_that_hangs_or_dies_costs_a_warning_and_nothing_else(tmp_path, signal, when):
    output = run_python(
        f"""
        import os, psutil, signal
        from jitjax.monitor.wandb_run import WandbRun
        from jitjax.settings import Wandb
        options = Wandb(enabled=True, mode="offline")
        run = WandbRun({str(tmp_path)!r}, {{}}, options, finish_timeout=1, answer_timeout=1)
        (core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        os.kill(core.pid, signal.{signal})
        if {when == "while training"}:
            for step in range(1, 4001):  # far more than the pipe between the two holds
                run.log(step, {{f"train/{{i}}": 0.5 for i in range(20)}})
                if step % 1000 == 0:
                    run.send()
        run.finish()
        print("ended", core.is_running() and core.status() != "zombie")
        """
    )
    assert output.count("W&B failed and is off from here on") == 1 and output.endswith("ended False\n")
    assert output.count("\n") == 3


def test_without_the_package_or_a_folder_wandb_is_off_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monitor = Monitor(tmp_path, total_steps=5, wandb=Wandb(enabled=True, mode="offline"))
    for step in range(1, 6):
        monitor.write(step, {"train/loss": 0.5})
        monitor.status(step, {})
    monitor.image(5, "samples", "none.png")
    assert len(lines(tmp_path / "metrics.jsonl")) == 5
    monitor.close()
    assert capsys.readouterr().out.count("W&B is off for this run") == 1


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_files_hold_every_step_once_after_a_resume_and_the_images(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_grid(tmp_path / "grid.png", np.full((4, 8, 8, 3), 7, np.uint8))
    for first, last in ((1, 5), (4, 9)):
        monitor = Monitor(tmp_path, total_steps=9, resume_step=first - 1, tensorboard=True)
        for step in range(first, last + 1):
            monitor.write(step, {"train/loss": 1 / step / first})
        monitor.image(last, "samples", tmp_path / "grid.png")
        monitor.scores(last, {"eval/fid": 7.5})
        monitor.close()
        time.sleep(1.1)  # files are read in the order of the second in which they were opened
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(step, pytest.approx(1 / step / (1 if step < 4 else 4))) for step in range(1, 10)]
    assert [(event.step, event.value) for event in events.Scalars("eval/fid")] == [(9, 7.5)]
    (image,) = events.Images("samples")
    assert image.step == 9 and image.encoded_image_string == (tmp_path / "grid.png").read_bytes()


def test_tensorboard_without_its_package_is_refused_by_name(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"] + ["tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
        Monitor(tmp_path, total_steps=1, tensorboard=True)


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


def has_ink(area):
    return bool((np.asarray(area) < 100).any())


def test_captions_that_fit_stand_above_their_images(tmp_path):
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    grid = np.asarray(Image.open(save_grid(tmp_path / "g.png", images, columns=2, captions=["star", ""])))
    assert grid.shape == (grids.LINE + 32, 32 * 2 + 2, 3)
    captions, below = grid[: grids.LINE], grid[grids.LINE :]
    assert has_ink(captions[:, :32]) and (captions[:, 34:] == 255).all()
    assert (below[:, :32] == 128).all()


@pytest.mark.parametrize("size", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("names", [["star", "golden retriever"], ["Schäferhund", "Жираф"], ["中国の犬", "狐"]])
def test_every_size_and_script_shows_which_class_is_which(tmp_path, size, names, by_column):
    """Each image has a caption above it, or above its column: the name, or a number that the legend below or the text
    file explains; never the box that stands for a missing glyph."""
    colour = (250, 150, 200)  # unlike any shade of the text
    images = np.broadcast_to(np.array(colour, np.uint8), (4, size, size, 3))
    path = save_grid(tmp_path / "g.png", images, columns=2, captions=names + names[:: 1 if by_column else -1])
    grid = np.asarray(Image.open(path))
    solid = (grid == colour).all(axis=-1)
    rows, columns = np.flatnonzero(solid.sum(1) >= 2 * size), np.flatnonzero(solid.sum(0) >= 2 * size)
    assert len(rows) == len(columns) == 2 * size and solid.sum() == 4 * size * size  # every pixel of all four images
    for top in (rows[0],) if by_column else (rows[0], rows[size]):
        for left in (columns[0], columns[size]):
            assert has_ink(grid[top - grids.LINE : top, left : left + size])
    legend = grid[rows[-1] + 1 :]
    if len(legend):
        assert has_ink(legend)
    drawable = all(grids._font(name) is not None for name in names)
    text = tmp_path / "g.txt"
    if drawable:
        assert not text.exists()
    else:
        assert len(legend)
        assert dict(line.split("\t") for line in text.read_text(encoding="utf-8").splitlines()) == {
            str(i): name for i, name in enumerate(names) if grids._font(name) is None
        }


def test_without_fontconfig_what_pillow_cannot_draw_goes_to_the_text_file(tmp_path):
    """Pillow's own font has ASCII and little else: not even an accent."""
    run_python(
        f"""
        import numpy as np
        from jitjax.monitor import save_grid
        images = np.zeros((3, 64, 64, 3), np.uint8)
        save_grid({str(tmp_path / "g.png")!r}, images, captions=["cat", "épée", "bad\\udcffbytes"])
        """,
        PATH="/nonexistent",
    )
    assert (tmp_path / "g.txt").read_text(encoding="utf-8") == "1\tépée\n"
    assert Image.open(tmp_path / "g.png").height > 2 * (64 + grids.LINE) + 2  # with a legend


def test_a_name_too_long_for_the_picture_is_whole_in_the_text_file(tmp_path):
    name = "a name with synonyms, " * 20
    path = save_grid(tmp_path / "g.png", np.zeros((1, 32, 32, 3), np.uint8), captions=[name])
    assert (tmp_path / "g.txt").read_text() == f"0\t{name.strip()}\n"
    assert Image.open(path).width <= grids.LONGEST_ENTRY


def test_captions_that_do_not_fit_stand_as_the_labels_that_commands_take(monkeypatch):
    """Above the image and in the legend, in the order of the labels; an image without a class has none."""
    entries, images = [], np.zeros((4, 8, 8, 3), np.uint8)
    monkeypatch.setattr(grids, "_font", lambda text: (entries.append(text), grids.ImageFont.load_default(size=12))[1])
    grids.draw_grid(
        images, columns=4, captions=["magenta cross", "black diamond", "", "magenta cross"], labels=[12, 3, 1000, 12]
    )
    assert {"12  magenta cross", "3  black diamond", "12", "3"} <= set(entries) and not {"0", "1", "1000"} & set(entries)


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_state(tmp_path):
    states = [
        np.full((2, 16, 16, 3), 10 * step, np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None, None] for step in range(4)
    ]
    strip = np.asarray(Image.open(save_strip(tmp_path / "s.png", states)))
    assert strip.shape == (2 * 16 + 2, 4 * 16 + 3 * 2, 3)
    for row in range(2):
        for column in range(4):
            assert (strip[row * 18 : row * 18 + 16, column * 18 : column * 18 + 16] == 10 * column + row).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_shows_the_states_in_order_and_holds_the_last(tmp_path, suffix):
    states = [np.full((2, 16, 16, 3), 40 * step, np.uint8) for step in range(4)]
    path = save_animation(tmp_path / f"path{suffix}", states, milliseconds=50, hold_milliseconds=700)
    with Image.open(path) as film:
        shown = []
        for frame in range(film.n_frames):
            film.seek(frame)
            film.load()
            shown.append((np.asarray(film.convert("RGB"))[0, 0, 0], film.info["duration"]))
    assert shown == [(0, 50), (40, 50), (80, 50), (120, 700)]
    with pytest.raises(ValueError, match="mp4"):
        save_animation(tmp_path / "path.mp4", states)
