"""Previews and scores of a run in mid-training, which checkpoint is the best, and what of these a stop left to the next start.

Neither the weights nor the order of the data depend on any of it. What was trained is saved before (`train.loop`), since a
preview or an evaluation may outlast the time that a scheduler grants.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitjax import checkpoint, processes, step
from jitjax.errors import UserError
from jitjax.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from jitjax.train import Run


def due(every: int | None, number: int, total: int) -> bool:
    """Whether what comes every so many steps, and at the last one of `total`, comes at step `number`. None: it never comes."""
    return every is not None and (number == total or number % every == 0)


def missed(run: Run, number: int) -> tuple[bool, bool]:
    """Whether preview and scores of step `number`, with which this start begins, were due and are not there: a stop or a crash
    came between the save and them. All processes must ask, and get what process 0 sees."""
    if not number:
        return False, False
    total = run.plan.total_steps
    show = due(run.plan.preview_steps, number, total) and not _grid(run, number).exists()
    score = due(run.plan.eval_steps, number, total) and checkpoint.scores_of(run.folder.path, number) is None
    seen = run.peers.agree((show + 2 * score) if run.peers.rank == 0 else 0)
    return bool(seen & 1), bool(seen & 2)


def inspect(
    run: Run,
    stop: StopRequest,
    state: step.TrainState,
    number: int,
    save: Callable[[dict[str, float], dict[str, Any]], None],
    *,
    show: bool,
    score: bool,
) -> tuple[dict[str, float] | None, dict[str, Any] | None, bool]:
    """Draw a preview, score the live EMA, both or neither. All processes must call it.

    When the run is asked to stop, the preview is left out if it has not begun, and the evaluation ends between two of its
    batches: the next start makes up for them (`missed`).

    Args:
      number: of the optimizer step.
      save: called with the scores and the mark of the best checkpoint if these scores are the best so far.

    Returns:
      Scores and mark, None without; and whether everything was done.
    """

    def go_on() -> None:
        # As for a step: all go on or none, and a signal that came behind the vote waits for the next one.
        if agreed := run.peers.agree(stop.signal):
            stop.request(agreed)
            raise Stopped

    what, monitor = "preview", run.monitor
    with stop.already_saved(lambda: run.checkpoints.is_whole(number)):
        try:
            if show:
                go_on()
                with run.account.measure("preview"), writable(run, number):
                    path = run.preview(state.ema[run.preview_ema], _grid(run, number))
                    monitor.image(number, "samples", path)
            if not score:
                return None, None, True
            what = "evaluation"
            with run.account.measure("evaluation"):
                scores = evaluate(run, state, number, go_on)
        except Stopped:
            monitor.note(f"asked to stop: the {what} of step {number:,} is left to the next start")
            return None, None, False
    best = mark(run, number, scores, save)
    # Last, as this is what tells the next start that nothing was missed.
    run.folder.append(checkpoint.SCORES_FILE, {"step": number, "ema": run.eval_ema, "how": run.evaluation.how, **scores})
    return scores, best, True


def mark(run: Run, number: int, scores: dict[str, float], save: Callable[..., None]) -> dict[str, Any] | None:
    """Save the checkpoint as the best one if these scores are the best so far; returns the mark. All processes must call it,
    and go by the scores of process 0."""
    before = run.checkpoints.best()
    best = json.loads(processes.text_of_process_0(json.dumps(run.evaluation.best(scores, before))))
    if best and before and not run.evaluation.compares_with(before):
        run.monitor.note(
            f"the best checkpoint so far, of step {before['step']:,}, was scored otherwise and is not compared "
            f"({before['metric']}; {before.get('how')})"
        )
    if best:
        run.monitor.summary({"best/step": number, best["metric"].replace("eval/", "best/"): best["value"]})
        save(scores, best)
    return best


def mark_again(run: Run, number: int, save: Callable[..., None]) -> None:
    """As `mark`, with the scores that were written for step `number`, from which this start continues: a disk that was nearly
    full may have taken the scores and refused the mark. All processes must call it."""
    if run.evaluation is None or not number:
        return
    line = checkpoint.score_line(run.folder.path, number) if run.peers.rank == 0 else None
    value = line.get(run.evaluation.metric) if line and line.get("how") == run.evaluation.how else None
    known = json.loads(processes.text_of_process_0(json.dumps(value)))
    if known is not None:
        mark(run, number, {run.evaluation.metric: known}, save)


@contextlib.contextmanager
def writable(run: Run, number: int) -> Iterator[None]:
    """Around writing the preview of step `number`. A disk that refuses it costs one line and that picture, and the run goes on.

    Raises:
      UserError: the disk refuses it at the last step. The next start draws it.
    """
    try:
        yield
    except OSError as error:
        what = f"the preview of step {number:,} cannot be written ({error.strerror or error})"
        if number == run.plan.total_steps:
            raise UserError(f"{what}: free space; the same command draws it") from error
        run.monitor.note(f"warning: {what}; training goes on")


def evaluate(run: Run, state: step.TrainState, number: int, go_on: Callable[[], None]) -> dict[str, float]:
    """Score the live EMA, and log it. `go_on` is called before each batch."""
    begun = time.perf_counter()
    run.monitor.note("evaluating ...")
    scores, notes = run.evaluation(state.ema[run.eval_ema], go_on)
    run.monitor.scores(number, scores)
    for note in notes:
        run.monitor.note(f"evaluation: {note}")
    run.monitor.note(f"evaluation of EMA {run.eval_ema} took {time.perf_counter() - begun:.1f} s")
    return scores


def _grid(run: Run, number: int) -> Path:
    return run.folder.path / "samples" / f"step_{number:08d}.png"
