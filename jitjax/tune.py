"""The learning rate and warm-up with which short runs score best: `jitjax tune`. Imports no JAX; each trial is a process.

A trial is a run of its own, `<workdir>/lr_0.0004_warmup_100/`, trained by the program itself and scored at its end. The score
is assumed to have one valley over the logarithm of the rate: the search goes downhill by a factor until the valley is
bracketed, then by its square root once. Warm-ups are compared at the best rate.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jitjax import signals, tables
from jitjax.errors import UserError
from jitjax.evaluation import higher_is_better
from jitjax.monitor.metrics import read_last, read_records
from jitjax.settings import INT32, RUN_LENGTHS, Eval, Settings, differing_fields, fields
from jitjax.workdir import BEST_FILE, saved_config

DOWN = 5
# Of the fields that a run may change, those on which a trial's score depends.
COMPARED = {"batch_size", "optim.accumulation_steps", "data.path", *RUN_LENGTHS}
COMPARED |= {f"eval.{field.name}" for field in dataclasses.fields(Eval)}
COMPARED -= {"eval.every_steps", "eval.every_epochs", "eval.batch_size"}
BATCH = {"batch_size", "optim.accumulation_steps"}  # of these, what a trial that is continued would not take over
HIGHEST = fields()["optim.lr"].rule.high
DIVERGED = 10  # times the first training loss
FAILED, BROKE_DOWN = 2, "not finite"  # exit code of a run that cannot go on, and what its message says where the rate is why


@dataclasses.dataclass(frozen=True)
class Trial:
    lr: float
    warmup: int  # steps

    @property
    def folder(self) -> str:
        return f"lr_{self.lr:.4g}_warmup_{self.warmup}"

    def of(self, settings: Settings) -> Settings:
        """The trial's own settings."""
        optim = dataclasses.replace(settings.optim, lr=self.lr, warmup_steps=self.warmup)
        return dataclasses.replace(settings, optim=optim)

    @property
    def flags(self) -> list[str]:
        return [f"--config.optim.lr={self.lr!r}", f"--config.optim.warmup_steps={self.warmup}"]


class Stopped(Exception):
    """A trial was stopped; the exit code is its argument."""


def valley(value: Callable[[float], float], start: float, factor: float, limit: int = 12) -> float:
    """The argument with the least value among start * factor**k, and then among the neighbours by sqrt(factor).

    Args:
      value: called once for each argument. Assumed to have one valley over the logarithm; infinite for an argument that does
        not work. Where the first three do not, up to `DOWN` steps down are tried.
      limit: most steps downhill.
    """
    known: dict[float, float] = {}

    def at(power: float) -> float:
        if power not in known:
            known[power] = value(start * factor**power)
        return known[power]

    best = min((0.0, 1.0, -1.0), key=at)
    while math.isinf(at(best)) and best > -DOWN:  # too high, as a rule
        best -= 1
    if math.isinf(at(best)):
        return start * factor**best
    direction = (best > 0) - (best < 0)
    while direction and abs(best) < limit and at(best + direction) < at(best):
        best += direction
    return start * factor ** min((best, best - 0.5, best + 0.5), key=at)


def tune(
    config_arguments: Sequence[str],
    settings: Settings,
    workdir: Path,
    *,
    start: float,
    factor: float,
    warmups: Sequence[int],
    say: Callable[[str], None] = print,
) -> int:
    """Train the trials, print a table and the command that trains with the winner. Trials that are complete are not repeated.

    Args:
      config_arguments: --config and overrides, as given to `jitjax train`.
      start: the first learning rate.
      factor: between two rates.
      warmups: in steps; the first is used while the rate is searched.

    Returns:
      0, or the exit code of a trial that was stopped.

    Raises:
      UserError: a trial failed for another reason than its rate, no rate works, or a run made no score.
    """
    found: dict[Trial, float] = {}
    scored: dict[Trial, dict[str, Any]] = {}
    shown: list[str] = []

    def score(trial: Trial) -> float:
        if trial in found:
            return found[trial]
        folder = workdir / trial.folder
        if trial.lr > HIGHEST:  # no field takes it: the end of the range
            return math.inf
        record, problem = run_trial(trial, config_arguments, settings, folder, say)
        for warning in warnings_of(folder):
            if warning not in shown:
                shown.append(warning)
                say(warning)
        if record is None and BROKE_DOWN not in problem:  # a mistake or a fault: other rates would meet it, too
            raise UserError(f"{trial.folder}: {problem}")
        if record and not math.isfinite(record["value"]):
            problem = f"its {record['metric'] or 'score'} is {BROKE_DOWN}"
        elif record and record["loss"] > DIVERGED * record["first_loss"]:  # the EMA's score may not show it yet
            problem = f"it diverged: the training loss went from {record['first_loss']:.3g} to {record['loss']:.3g}"
        if problem:
            say(f"{trial.folder}: failed: {problem}")
            found[trial] = math.inf
            return math.inf
        scored[trial] = record
        sign = -1 if higher_is_better(record["metric"]) else 1
        found[trial] = sign * record["value"]
        say(f"{trial.folder}: {record['metric']} {record['value']:.5g}")
        return found[trial]

    try:
        rate = valley(lambda lr: score(Trial(round_to(lr, 3), warmups[0])), start, factor)
        for warmup in warmups[1:] if scored else ():
            score(Trial(round_to(rate, 3), warmup))
    except Stopped as stopped:
        if stopped.args[0] > FAILED:  # neither a bug nor a run that cannot go on: what the trial wrote is above
            say("stopped: the same command goes on")
        return stopped.args[0]
    say(f"\n{table(found, scored)}")
    if not scored:
        rates = sorted(trial.lr for trial in found)
        raise UserError(f"no rate from {rates[0]:g} to {rates[-1]:g} works, see above: mend that, or give another --start")
    best = min(scored, key=found.get)
    score_of_best = f"{scored[best]['metric']} {scored[best]['value']:.5g}"
    say(f"\nbest: {score_of_best} with lr {best.lr:g} after {best.warmup:,} steps of warm-up")
    command = ["jitjax", "train", *config_arguments, *best.flags, "--workdir", f"{workdir}-best"]
    say(f"train with it, after setting the run's own length: {shlex.join(command)}")
    say(
        "found for this model, data, effective batch and length of run; for others search again. Measured once "
        "(docs/method.md, Learning rate), with Muon and p_mean 0.6: the best rate of JiT-S/4 is 1e-3 with 64 images a step, "
        "2e-3 or more with 256; with JiT-B/4 and 256, 7e-4 and 1.4e-3 are level"
    )
    return 0


def round_to(number: float, digits: int) -> float:
    """`number` with so many significant digits."""
    return float(f"{number:.{digits}g}")


def run_trial(
    trial: Trial, config_arguments: Sequence[str], settings: Settings, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str]:
    """Train and score one trial, or read what a complete one scored: (`result_of` it, "") or (None, why not).

    Raises:
      Stopped: by a signal, or without having saved; the same command goes on.
      UserError: the run made no score or was killed, or one that is there is of another configuration.
    """
    record, before = result_of(folder), saved_config(folder) or {}
    if differing := differing_fields(before, trial.of(settings), also=BATCH if record is None else COMPARED):
        raise UserError(
            f"--workdir={folder.parent} holds trials of another configuration ({trial.folder}: {'; '.join(differing)}): "
            "use another workdir"
        )
    if record is not None:
        return record, ""
    command = [sys.executable, "-m", "jitjax", "train", *config_arguments, *trial.flags, f"--workdir={folder}"]
    if settings.eval.every_steps is None and settings.eval.every_epochs is None:
        command.append(f"--config.eval.every_steps={INT32}")  # once, at the end
    say(f"{trial.folder}: training ...")
    begun = time.monotonic()
    code, errors = run(command)
    if code == FAILED:
        return None, (errors.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    sys.stderr.write(errors if code else "")
    if code < 0:
        why = ", mostly because memory ran out" if code == -signal.SIGKILL else ""
        raise UserError(f"{trial.folder}: killed by {signal.Signals(-code).name}{why}: the same command goes on")
    if code:
        raise Stopped(code)
    record = result_of(folder)
    if record is None:
        raise UserError(f"{folder}: the run is complete but has no score at its last step")
    say(f"{trial.folder}: trained in {(time.monotonic() - begun) / 60:.1f} minutes")
    return record, ""


def run(command: Sequence[str]) -> tuple[int, str]:
    """The exit code of a trial and what it wrote to stderr. A signal that asks us to stop is passed on to the trial.

    The trial has a session of its own, so that a terminal's Ctrl-C reaches it once, by us. Ctrl-Z pauses both.

    Raises:
      Stopped: such a signal came, and the trial has ended; what it wrote to stderr is printed.
    """
    arrived, begun = [], []

    def pass_on(number: int, frame: Any) -> None:
        arrived.append(number)
        for process in begun:
            process.send_signal(number)

    def pause(number: int, frame: Any) -> None:
        for process in begun:
            process.send_signal(signal.SIGSTOP)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here, until SIGCONT
        signal.signal(number, pause)
        for process in begun:
            process.send_signal(signal.SIGCONT)

    handlers = {**dict.fromkeys(signals.SIGNALS, pass_on), signal.SIGTSTP: pause}
    heeded = [number for number in handlers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handlers[number]) for number in heeded}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process = subprocess.Popen(command, text=True, start_new_session=True, preexec_fn=_end_with_parent, **pipes)
        begun.append(process)
        if arrived:
            process.send_signal(arrived[0])
        errors = process.communicate()[1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        sys.stderr.write(errors)
        raise Stopped(process.returncode if process.returncode > 0 else 128 + arrived[0])
    return process.returncode, errors


def _end_with_parent() -> None:
    """In a trial before it begins: SIGTERM when its parent is gone, even by SIGKILL, so that it saves (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def result_of(folder: Path) -> dict[str, Any] | None:
    """{"metric", "value", "loss"} at the last step of a complete run, and "first_loss"; NaN for what is not finite; None for
    one that is not complete."""
    try:
        steps = json.loads((folder / "config.json").read_text())["planned_steps"]
        (last,) = read_last(folder / "scores.jsonl", 1)
        (training,) = read_last(folder / "metrics.jsonl", 1)
        first = next(read_records(folder / "metrics.jsonl"))
        if last["step"] != steps:
            return None
        metric = json.loads((folder / BEST_FILE).read_text())["metric"] if (folder / BEST_FILE).exists() else None
        last = {None: None, **last}  # no checkpoint is the best where no score was finite
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if metric not in last:
        return None
    numbers = {"value": last[metric], "loss": training.get("train/loss"), "first_loss": first.get("train/loss")}
    return {"metric": metric} | {name: math.nan if number is None else number for name, number in numbers.items()}


def warnings_of(folder: Path) -> list[str]:
    """What a run's log warns of before the first step."""
    try:
        lines = [line.partition("  ")[2] for line in (folder / "log.txt").read_text(errors="replace").splitlines()]
    except OSError:
        return []
    before = itertools.takewhile(lambda line: not line.startswith("first step after"), lines)
    return [line for line in before if line.startswith("warning: ")]


def table(found: dict[Trial, float], scored: dict[Trial, dict[str, Any]]) -> str:
    """The trials by warm-up and rate, with what they scored."""
    cells = [("learning rate", "warm-up", "score", "last training loss")]
    for trial in sorted(found, key=lambda t: (t.warmup, t.lr)):
        record = scored.get(trial)
        made = (f"{record['value']:.5g}", f"{record['loss']:.4f}") if record else ("failed", "")
        cells.append((f"{trial.lr:g}", f"{trial.warmup:,}", *made))
    return tables.columns(cells)
