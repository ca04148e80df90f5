"""What a run records beside its checkpoints: `run.json`, whose they are and the last step saved, and `best.json`, the best one.

Each checkpoint carries the run's identity as well (`jitjax.manifest`), so one of another run is noticed; the last step saved
tells a run whose checkpoints are gone from one that has not saved yet. Readers of the two files: `jitjax.checkpoint`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jitjax import atomic, checkpoint, ema, manifest, processes
from jitjax.errors import UserError
from jitjax.monitor.metrics import line_of, read_records
from jitjax.workdir import BEST_FILE


def identity(workdir: Path, *, had_folder: bool) -> dict[str, Any]:
    """{"run": identifier, "saved": last step saved or None}; made where the workdir has none.

    Args:
      had_folder: whether the folder of checkpoints, which is there now, was there before this start.

    Raises:
      UserError: run.json is damaged, or checkpoints of jitjax 0.1.0 are gone.
    """
    run = checkpoint.read_run(workdir)
    if run is not None:
        return run
    folder = workdir / checkpoint.DIRECTORY
    steps = checkpoint.steps_in(folder)
    found = next((known["run"] for step in steps[::-1] if (known := _manifest(folder / str(step)))), None)
    if not steps and _last_metric_step(workdir):
        # A workdir of jitjax 0.1.0, which wrote no run.json, or whose run.json is gone as well.
        state = "is empty" if had_folder else "is missing"
        if not had_folder:
            folder.rmdir()
        raise UserError(
            f"--workdir={workdir}: {checkpoint.DIRECTORY}/ {state} though metrics.jsonl reaches step "
            f"{_last_metric_step(workdir):,}: put it back, or use another workdir"
        )
    run = {"run": found or uuid.uuid4().hex, "saved": steps[-1] if steps else None}
    write(workdir, run)
    return run


def require_shared(workdir: Path, run: Mapping[str, Any], *, seconds: float = 20.0) -> None:
    """All processes write their parts of a checkpoint to one folder, and wait for each other there: with another one they would
    wait for ever at the first save. All must call it.

    Args:
      run: of process 0, from `identity`; of the others it is not read. seconds: that a shared disk may take to show a new file.

    Raises:
      UserError: a process does not find the run of process 0 in its workdir.
    """
    known, end = processes.text_of_process_0(run.get("run")), time.monotonic() + seconds
    while not (seen := _is_run(workdir, known)) and time.monotonic() < end:
        time.sleep(0.2)
    problem = f"process {jax.process_index()} does not find the run of process 0 in --workdir={workdir}: give all processes"
    if problem := processes.text_of_first(None if seen else f"{problem} one folder, on a disk that all of them see"):
        raise UserError(problem)


def _is_run(workdir: Path, known: str) -> bool:
    try:
        return (checkpoint.read_run(workdir) or {}).get("run") == known
    except UserError:  # while it is written, or not to be read here
        return False


def lost(workdir: Path, run: Mapping[str, Any]) -> str | None:
    """For a workdir without checkpoints: what to tell the user if `run` (from `identity`) has saved one; None if it has not."""
    if run.get("saved") is None:
        return None
    return (
        f"--workdir={workdir}: {checkpoint.DIRECTORY}/ holds no checkpoint though step {run['saved']:,} was "
        "saved: put it back, or use another workdir"
    )


def write(workdir: Path, run: Mapping[str, Any]) -> None:
    """Write run.json, durably: `run` is what `identity` returns.

    Raises:
      OSError: no space, no permission, or the disk failed.
    """
    atomic.write_text(workdir / checkpoint.RUN_FILE, json.dumps(run) + "\n", durable=True)


def write_best(workdir: Path, best: Mapping[str, Any]) -> None:
    """Write best.json, durably: {"step", "metric", "value", "how"}.

    Raises:
      OSError: as for `write`.
    """
    atomic.write_text(workdir / BEST_FILE, json.dumps(best) + "\n", durable=True)


def forget_after(workdir: Path, step: int) -> None:
    """Take back what was recorded of later steps, which a run that goes on from a checkpoint of `step` makes again: their
    scores, the mark of the best checkpoint if it is one of theirs, and their EMA snapshots, which would be mixed with those of
    a run that goes on otherwise. (`metrics.jsonl` is cut where it is opened.)"""
    ema.remove_snapshots(workdir / ema.FOLDER, after=step)
    scores, best = workdir / checkpoint.SCORES_FILE, None
    with contextlib.suppress(UserError):
        best = checkpoint.read_best(workdir)
    if best is not None and best["step"] > step:
        (workdir / BEST_FILE).unlink(missing_ok=True)
    if scores.exists() and any(line["step"] > step for line in read_records(scores)):
        atomic.write_text(scores, "".join(line_of(line) for line in read_records(scores) if line["step"] <= step))


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return manifest.read(folder)
    except (ValueError, OSError):
        return None


def _last_metric_step(workdir: Path) -> int:
    """The last step in metrics.jsonl, 0 without one."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the last line may be torn
            continue
    return 0
