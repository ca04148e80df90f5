"""Our numbers are the official code's. `python tests/parity_report.py` prints every error beside its tolerance."""

import jax
import parity_checks
import pytest

# Second proofs: on files that a clone lacks, and the Euler sampler, whose step is half of the Heun sampler's.
SLOW = ("forward_B16_256", "forward_L16_256", "trajectory_wd0_full", "sampler_euler")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in parity_checks.CHECKS],
)
def test_equals_the_official_code(name):
    with jax.default_matmul_precision("highest"):
        rows = parity_checks.CHECKS[name]()
    assert rows
    beyond = [row for row in rows if not row.ok]
    assert not beyond, "\n".join(map(str, beyond))
