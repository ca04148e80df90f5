"""User-facing errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jitjax import tables


class UserError(Exception):
    """A user's mistake: one line that names the flag, the value and the remedy. It is shown without a traceback."""

    exit_code = 2  # `jitjax.signals` has their meanings

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@contextlib.contextmanager
def naming(flag: str, value: Any) -> Iterator[None]:
    """A `UserError` about what the user named with `flag` begins with the flag, where it does not name it itself."""
    try:
        yield
    except UserError as error:
        problem = str(error).removeprefix(f"{Path(value).expanduser()}: ")
        raise UserError(problem if flag in problem else f"{flag}={value}: {problem}") from None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """What keeps files from being written, e.g. a full disk, in one line. For commands that continue what is there."""
    try:
        yield
    except OSError as error:
        remedy = "free space, and the same command continues, or name another"
        raise UserError(f"{what} cannot be written ({error.strerror or error}): {remedy}") from error


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """Like `contextlib.closing`, but a mistake noticed in closing does not hide what went wrong before: it is printed in a line
    of its own."""
    try:
        yield thing
    except BaseException:
        try:
            thing.close()
        except UserError as error:
            tables.say(f"error: {error}", sys.stderr)
        raise
    thing.close()
