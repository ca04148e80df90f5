"""Where the time went, over several starts of one workdir."""

import json

import pytest

from jitjax.timing import TimeAccount


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_life_of_three_starts(tmp_path):
    """10 steps saved, 5 more lost to a crash and made again: goodput counts them once."""
    clock = Clock()

    def spend(account, kind, seconds):
        with account.measure(kind):
            clock.now += seconds

    first = TimeAccount(tmp_path, resumed_from=0, clock=clock)
    spend(first, "compile", 20.0)
    spend(first, "step", 100.0)
    first.reached(10)
    with first.measure("save"):
        clock.now += 2.0
    first.saved()
    spend(first, "step", 50.0)
    first.reached(15)  # killed here: more than 30 s since the file was written, so it knows

    second = TimeAccount(tmp_path, resumed_from=10, clock=clock)
    assert (second.seconds["step"], second.seconds["lost"], second.starts) == (100.0, 50.0, 2)
    spend(second, "step", 50.0)
    second.reached(15)
    second.saved()

    third = TimeAccount(tmp_path, resumed_from=15, clock=clock)
    assert (third.seconds["step"], third.seconds["lost"]) == (150.0, 50.0)
    assert third.goodput == pytest.approx(150 / (20 + 150 + 2 + 50))
    assert third.metrics()["time/starts"] == 3.0 and third.metrics()["time/save_seconds"] == 2.0


def test_nested_kinds_do_not_count_twice(tmp_path):
    clock = Clock()
    account = TimeAccount(tmp_path, resumed_from=0, clock=clock)
    with account.measure("step"):
        clock.now += 3.0
        with account.measure("input_wait"):
            clock.now += 1.0
            account.add("save", 0.5)
    assert account.seconds["step"] == 3.0 and account.seconds["input_wait"] == 0.5 and account.seconds["save"] == 0.5


def test_a_torn_file_begins_anew(tmp_path):
    (tmp_path / "time.json").write_text('{"starts": 3, "sec')
    account = TimeAccount(tmp_path, resumed_from=0)
    assert account.starts == 1
    account.saved()
    assert json.loads((tmp_path / "time.json").read_text())["starts"] == 1
