"""What a run prints: the live view on a terminal, plain lines elsewhere, log.txt, and the status of a run from its files."""

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

import numpy as np
import pytest
import rich.console
from conftest import ROOT

from jitjax import cli
from jitjax.errors import UserError
from jitjax.monitor import Monitor, print_status, save_grid
from jitjax.monitor.console import Console
from jitjax.monitor.view import View

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
    (tmp_path / "scores.jsonl").write_text(
        '{"step": 100, "eval/fid": 9.0}\n{"step": 200, "ema": "0.9", "eval/fid": 7.5}\n{"step": 9000, "eval/fid": 1.0}\n'
    )
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
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl"):
        print_status(tmp_path, total_steps=1000)


def test_the_status_of_a_run_before_its_first_step(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"planned_steps": 9, "steps_per_epoch": 3, "model": {"name": "JiT-B/4"}}))
    assert cli.main(["status", str(tmp_path)]) == 0  # the reference of its scores is read before there are metrics
    assert "step 0/9" in (shown := capsys.readouterr().out) and shown.endswith("no step written yet\n")
    (tmp_path / "config.json").write_text("[]")
    assert cli.main(["status", str(tmp_path)]) == 2 and "config.json cannot be read" in capsys.readouterr().err
