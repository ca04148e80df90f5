"""User-facing errors."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one line that names the flag, the value and the remedy. It is shown without a traceback."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())
