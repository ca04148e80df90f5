"""`python -m jitjax.bench step|sample|checkpoint|input|kernels ...`: the same as `jitjax bench ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jitjax import cli


def main(argv: Sequence[str]) -> int:
    """`jitjax bench` with these arguments, for scripts.

    Raises:
      UserError: a mistake in the flags or the configuration, or a result that is not as it must be.
    """
    return cli.dispatch(["bench", *argv])


if __name__ == "__main__":
    cli.program(["bench", *sys.argv[1:]])
