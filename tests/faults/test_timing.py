"""Where the time went, over several starts of one workdir."""

import json

import pytest

from jitjax.timing import TimeAccount


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_life_of_four_starts(tmp_path):
    """10 steps saved, 5 more lost to a crash and made again; then 10 more lost to a damaged checkpoint: goodput counts each
    step once, and no second is missing."""
    clock = Clock()

    def start(resumed_from):
        clock.now += 1000.0  # between two starts
        account = TimeAccount(tmp_path, resumed_from=resumed_from, clock=clock)
        clock.now += 7.0
        account.switch("compile")
        clock.now += 20.0
        account.switch("step")
        return account

    def spend(account, kind, seconds):
        with account.measure(kind):
            clock.now += seconds

    first = start(0)
    clock.now += 100.0
    first.reached(10)
    first.saved(10)
    spend(first, "save", 2.0)
    clock.now += 50.0
    first.reached(15)  # killed here: more than 30 s since the file was written, so it knows

    second = start(10)
    assert (second.seconds["step"], second.seconds["lost"], second.starts) == (100.0, 50.0, 2)
    clock.now += 60.0
    spend(second, "input_wait", 3.0)
    second.saved(15)
    clock.now += 30.0
    second.saved(20)

    third = start(10)  # 15 and 20 are damaged
    assert (third.seconds["step"], third.seconds["lost"]) == (100.0, 50.0 + 90.0)
    clock.now += 40.0
    third.reached(14)

    fourth = start(12)  # a checkpoint that the account does not know: half of the 4 steps
    assert (fourth.seconds["step"], fourth.seconds["lost"]) == (120.0, 160.0)
    metrics = fourth.metrics()
    assert metrics["time/starts"] == 4.0 and metrics["time/save_seconds"] == 2.0 and metrics["time/startup_seconds"] == 28.0
    assert sum(fourth.seconds.values()) == clock.now - 100.0 - 4 * 1000.0
    assert metrics["time/goodput"] == pytest.approx(120 / (clock.now - 4100.0))
    assert str(fourth) == (
        "goodput (share of the time spent in training steps) 30.5% of 0:06:33 over 4 starts: lost 0:02:40, step 0:02:00, "
        "compile 0:01:20, startup 0:00:28, input wait 0:00:03, save 0:00:02"
    )


def test_nested_kinds_do_not_count_twice(tmp_path):
    clock = Clock()
    account = TimeAccount(tmp_path, resumed_from=0, begun=90.0, clock=clock)
    account.switch("step")
    clock.now += 2.0
    with account.measure("evaluation"):
        clock.now += 3.0
        with account.measure("input_wait"):
            clock.now += 1.0
        clock.now += 0.5
        assert json.loads((tmp_path / "time.json").read_text())["doing"] == "evaluation" and account.now == ("evaluation", 0.5)
    assert json.loads((tmp_path / "time.json").read_text())["doing"] == "step"
    assert account.goodput == 2.0 / 16.5
    assert {kind: s for kind, s in account.seconds.items() if s} == {
        "startup": 10.0, "step": 2.0, "evaluation": 3.5, "input_wait": 1.0
    }  # fmt: skip


def test_a_torn_file_begins_anew(tmp_path):
    (tmp_path / "time.json").write_text('{"starts": 3, "sec')
    account = TimeAccount(tmp_path, resumed_from=0)
    assert account.starts == 1
    account.saved(1)
    assert json.loads((tmp_path / "time.json").read_text())["starts"] == 1
