"""The one way in which this program tells a user that something must be changed."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake. The message is one line that names the flag, the value and the remedy; no traceback is
    shown.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def cli(main: Callable[[], int | None]) -> int:
    """Runs a command line's `main` and returns its exit code: `raise SystemExit(cli(main))`.

    A `UserError` becomes `error: ...` on stderr and exit code 2 (argparse's own code for bad usage); Ctrl-C becomes
    130.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
