"""The evidence: `python tests/parity_report.py` prints the largest error of every fixture beside its tolerance.

Absolute is the largest absolute error, relative is that over the largest magnitude of the reference. Names of checks as
arguments print only those; `--full` compares with the large files of ../shared/parity throughout. `--mutations` prints which
deliberate mistake is noticed by which comparison. Exit code 1 if anything is beyond its tolerance, or a mistake goes unnoticed.
About three minutes on two cores.
"""

from __future__ import annotations

import sys
import time

import jax
import parity_files
import pytest
from parity_checks import CHECKS


def errors(names: list[str]) -> int:
    count = beyond = 0
    print(f"{'fixture':20} {'what':40} {'absolute':>9} {'relative':>9}  {'allowed':25} {'used':>7}")
    for name in names or CHECKS:
        begun = time.perf_counter()
        try:
            rows = CHECKS[name]()
        except pytest.skip.Exception as reason:
            print(f"{name}: left out, {reason}", flush=True)
            continue
        for row in rows:
            relative = f"{row.relative:9.1e}" if row.relative == row.relative else f"{'-':>9}"
            used = f"{row.excess:7.1%}" if row.excess < 1e4 else f"{row.excess:7.0e}"
            print(
                f"{row.fixture:20} {row.quantity:40} {row.absolute:9.1e} {relative}  {row.tolerance:25} {used}"
                f"{'' if row.ok else '  <-- beyond'}",
                flush=True,
            )
            count, beyond = count + 1, beyond + (not row.ok)
        print(f"{name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    print(f"{count} rows, {beyond} beyond their tolerance (jax {jax.__version__}, {jax.default_backend()})")
    return int(beyond > 0)


def mutations() -> int:
    from parity_mutations import MUTATIONS, Outdated, caught

    unnoticed = outdated = 0
    print(f"{'mistake':58} {'noticed by':52} {'error/allowed':>13}")
    for mutation in MUTATIONS:
        try:
            rows = caught(mutation)
        except Outdated as error:
            outdated += 1
            print(f"{mutation.mistake:58} {error}", flush=True)
            continue
        unnoticed += not rows
        row = max(rows, key=lambda row: row.excess, default=None)
        by = f"{row.fixture}: {row.quantity}" if row else "NOT NOTICED"
        size = "" if not row else f"{row.excess:.3g}" if row.excess < 1e30 else "(equality)"
        print(f"{mutation.mistake:58} {by:52} {size:>13}", flush=True)
    print(f"{len(MUTATIONS)} mistakes, {unnoticed} unnoticed, {outdated} that no longer apply to the source")
    return int(unnoticed + outdated > 0)


if __name__ == "__main__":
    parity_files.USE_FULL = "--full" in sys.argv
    chosen = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with jax.default_matmul_precision("highest"):
        raise SystemExit(mutations() if "--mutations" in sys.argv else errors(chosen))
