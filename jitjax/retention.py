"""Which checkpoints of a run stay, and the deletion of the others: those that newer ones supersede, and the unfinished ones.

The newest that are known to be whole stay, the best one, and for good the multiples of `keep_every`. Nothing is decided by
number alone: a checkpoint that nobody has verified never displaces one that is known to be whole. Imports no JAX.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix for a folder that is being written
_log = logging.getLogger(__name__)


def superseded(
    steps: Sequence[int], whole: Collection[int], *, keep_last: int, keep_every: int | None, best: Collection[int] = ()
) -> list[int]:
    """Steps to delete, ascending. Those known to be whole are worth more than those that nobody has verified.

    Args:
      steps: of all checkpoints there are, ascending.
      whole: those known to be whole.
      keep_last: how many of the newest stay.
      keep_every: multiples of it stay for good.
      best: steps of the best checkpoints, which stay.
    """
    known = [step for step in steps if step in whole]
    if not known:
        return []
    keep = set(known[-keep_last:])
    others = [step for step in steps if step not in keep and step < max(known)]
    spare = keep_last - len(keep)
    keep.update(others[len(others) - spare :] if spare > 0 else [])
    keep.update(best)
    return [step for step in others if step not in keep and not (keep_every and step % keep_every == 0)]


def delete(folder: Path, step: int) -> bool:
    """Delete the checkpoint of `step` in `folder`, <workdir>/checkpoints. Returns whether it is none any more; a warning says
    what went wrong."""
    # Renamed first, so that a checkpoint half deleted by a kill is not taken for a damaged one.
    source, doomed = folder / str(step), folder / f"{step}{TEMPORARY}"
    try:
        os.rename(source, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        _log.warning("checkpoint %d could not be deleted (%s)", step, error.strerror)
    return not os.path.exists(source)


def remove_unfinished(folder: Path) -> None:
    """Delete what is left in `folder` of saves that failed, as far as it goes. For a moment after a failure other threads of
    Orbax write on, so one call need not get everything: hence again before and after the next save, and at the end."""
    for path in folder.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
