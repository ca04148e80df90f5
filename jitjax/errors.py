"""User-facing errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from jitjax import tables


class UserError(Exception):
    """A user's mistake: one line that names the flag, the value and the remedy. It is shown without a traceback."""

    exit_code = 2  # `jitjax.signals` has their meanings

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


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
