"""Where a run stands that was started elsewhere, from the files in its workdir."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from jitjax import tables, timing
from jitjax.errors import UserError
from jitjax.monitor.metrics import read_last
from jitjax.monitor.view import ACTIVITIES, SCORES, View, duration

STEPS = 5000  # optimizer steps that are read, from the end


def print_status(
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    steps_per_epoch: int | None = None,
    title: str = "",
    stream: TextIO | None = None,
) -> None:
    """Prints where a run stands that was started elsewhere: on a terminal the view of its own terminal, elsewhere plain lines,
    from the files in its workdir.

    Args:
      workdir: the run's folder, on this machine or mounted.
      total_steps, steps_per_epoch, title, stream: as for `Console`.

    Raises:
      UserError: the run's metrics cannot be read.
    """
    workdir, file = Path(workdir), sys.stdout if stream is None else stream
    path = workdir / "metrics.jsonl"
    try:
        records = read_last(path, STEPS) if path.exists() else []  # not there before the reference of scores was read
        written = path.stat().st_mtime if records else 0.0
    except OSError as error:
        raise UserError(f"{workdir}: cannot read {path.name} ({error.strerror}): give the workdir of a run") from error
    now = 0.0  # by the measured times of steps and pauses
    view = View(total_steps, steps_per_epoch, title, clock=lambda: now, begun=None)
    known: dict[str, Any] = {}  # speeds stand only in the last line of each interval
    ended = None  # the step of the last such line
    for record in records:
        step = record["step"]
        known |= record
        view.observe(step, record.get("train/loss"))
        if record.get("time/step") is not None:
            now += record["time/step"] * (step - (step if ended is None else ended)) + (record.get("time/paused") or 0.0)
            view.update(step, known)
            ended = step
    for name, folder, pattern in (("checkpoint", "checkpoints", r"(\d+)"), ("preview", "samples", r"step_(\d+)\.png")):
        matches = (re.fullmatch(pattern, entry.name) for entry in (workdir / folder).glob("*"))
        if steps := [int(match[1]) for match in matches if match]:
            view.marks = {**view.marks, name: max(steps)}
    scores = workdir / "scores.jsonl"
    if scores.exists() and records:  # those of later steps are of a run that went back since
        *_, last = [None, *(line for line in read_last(scores, STEPS) if line["step"] <= records[-1]["step"])]
        if last:
            view.scores = last["step"], {name: x for name, x in last.items() if name.startswith(SCORES) and x is not None}
    if (console := Console(file=file, highlight=False)).is_terminal:
        console.print(view)
    else:
        marks, scores = view.last()
        rest = "".join(f"  {label} {text}" for label, text in (marks | scores).items())
        tables.say(f"{title}  {view.line()}{rest}".strip(), file)
    doing, spent = _account(workdir, written)
    steps = f"last step written {duration(time.time() - written)} ago" if records else "no step written yet"
    tables.say(f"{steps}{doing}{spent}", file)


def _account(workdir: Path, written: float) -> tuple[str, str]:
    """What the run was doing when last heard of, where that was after its last step was written, and how long it has taken over
    all its starts; from `time.json`, which lags by half a minute but for what is named here."""
    try:
        account = json.loads((workdir / timing.FILE).read_text())
        seconds, starts, kind = account["seconds"], account["starts"], account.get("doing")
        total = sum(seconds.values())
        share = f", {seconds['step'] / total:.0%} of it training steps" if total else ""
        told = (workdir / timing.FILE).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):  # a run that has just begun has none
        return "", ""
    doing = ""
    if kind in timing.LONG and told >= written:  # it may have been killed since
        doing = f", last heard of {duration(time.time() - told)} ago {ACTIVITIES[kind]}"
    return doing, f"; elapsed {duration(total)} in {starts} {'start' if starts == 1 else 'starts'}{share}"
