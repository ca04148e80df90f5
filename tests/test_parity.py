"""Our numbers are the official code's. `python tests/parity_report.py` prints every error beside its tolerance."""

import jax
import parity_checks
import pytest


@pytest.mark.parametrize("name", sorted(parity_checks.CHECKS, key=lambda name: "L16" not in name))  # the longest first
def test_equals_the_official_code(name):
    with jax.default_matmul_precision("highest"):
        rows = parity_checks.CHECKS[name]()
    assert rows
    beyond = [row for row in rows if not row.ok]
    assert not beyond, "\n".join(map(str, beyond))
