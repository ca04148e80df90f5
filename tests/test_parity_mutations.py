"""The parity tests notice mistakes: each mutation of one line puts some number beyond its tolerance."""

import parity_mutations
import pytest
from conftest import shared


@pytest.fixture(autouse=True)
def reference():
    shared("parity")


@pytest.mark.parametrize("mutation", parity_mutations.MUTATIONS, ids=lambda m: m.mistake.replace(" ", "-"))
def test_a_mistake_is_noticed(mutation):
    assert parity_mutations.caught(mutation), f"{mutation.check} does not notice: {mutation.mistake}"


@pytest.mark.parametrize("name", ["step", "init"])  # the others are those of test_parity.py
def test_without_a_mistake_the_same_check_passes(name):
    beyond = [row for row in parity_mutations.CHECKS[name]() if not row.ok]
    assert not beyond
