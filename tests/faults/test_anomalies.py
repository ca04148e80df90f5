"""Numbers gone wrong: counted across starts, stopped in time, the batch named; overflows of float16 are none."""

import json
import math

import numpy as np
import pytest

from jitjax.anomalies import Anomalies, is_spike
from jitjax.errors import UserError

GOOD = {"train/loss": 0.2, "train/grad_norm": 1.0}
BAD_GRADIENT = {"train/loss": 0.2, "train/grad_norm": math.inf}  # 0.1.0 went on for ever, as only losses were looked at
BAD_LOSS = {"train/loss": math.nan, "train/grad_norm": math.nan}
BAD_PART = {**GOOD, "train/skipped_micro_batches": 1.0}  # of several, one was left out


@pytest.mark.parametrize("bad", [BAD_GRADIENT, BAD_LOSS, BAD_PART])
def test_a_requeue_loop_meets_the_same_stop(tmp_path, bad):
    """Killed after 3 skipped steps, started again from the same checkpoint, again and again: the fourth start's second skipped
    step is the tenth in a row."""
    for start in range(3):
        anomalies = Anomalies(tmp_path, limit=10)
        for step in (21, 22, 23):
            anomalies.add(step, bad)
        assert anomalies.skipped.in_a_row == 3 * start + 3
    anomalies = Anomalies(
        tmp_path,
        limit=10,
        last_good=lambda: "the last good checkpoint is step 20",
        batch=lambda step: [{"index": 5, "file": f"cats/{step}.jpg"}],
    )
    with pytest.raises(UserError, match=r"10 optimizer steps in a row .*the last good checkpoint is step 20"):
        anomalies.add(21, bad)
    images = json.loads((tmp_path / "bad_batch_00000021.json").read_text())["images"]
    assert images == [{"index": 5, "file": "cats/21.jpg"}]
    with pytest.raises(UserError):  # and every later start meets it at once
        Anomalies(tmp_path, limit=10).add(21, bad)
    assert Anomalies(tmp_path, limit=10).add(21, GOOD)[0].startswith("step 21 is finite again")


def test_skipped_steps_are_printed_and_logged(tmp_path):
    anomalies = Anomalies(tmp_path, limit=100)
    lines = [line for step in range(1, 20) for line in anomalies.add(step, BAD_GRADIENT)]
    assert lines[0].startswith("step 1 skipped: its gradient is not finite (1 in a row, 1 in all")
    assert len(lines) == 5  # 1, 2, 4, 8, 16: no flood
    assert anomalies.metrics() == {"train/skipped_steps": 19.0}
    anomalies.add(20, GOOD)
    assert (anomalies.skipped.in_a_row, anomalies.skipped.total) == (0, 19)
    (line,) = anomalies.add(21, BAD_PART)
    assert line.startswith("step 21 made without the gradient of 1 micro-batch, which is not finite (1 in a row, 20 in all")


@pytest.mark.parametrize(
    ("facts", "suggested"),
    [
        ({"data": {"path": "photos", "synthetic": ""}}, True),
        ({"data": {"path": "photos", "synthetic": ""}, "objective": "huber"}, False),
        ({"data": {"path": "", "synthetic": ""}}, False),
    ],
)
def test_replay_is_suggested_where_it_finds_loss_and_images(facts, suggested, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError) as error:
        Anomalies(tmp_path, policy="stop", batch=lambda step: []).add(7, BAD_GRADIENT)
    assert "bad_batch_00000007.json" in str(error.value) and ("jitjax replay" in str(error.value)) == suggested


def test_policy_stop_stops_at_the_first(tmp_path):
    with pytest.raises(UserError, match="1 optimizer steps in a row"):
        Anomalies(tmp_path, policy="stop").add(7, BAD_GRADIENT)


def test_overflows_of_float16_are_no_faults_until_they_do_not_end(tmp_path):
    anomalies = Anomalies(tmp_path, policy="stop", dynamic_loss_scale=True)
    for begin in range(0, 200, 20):
        assert [anomalies.add(begin + i, BAD_LOSS) for i in range(19)] == [[]] * 19
        anomalies.add(begin + 19, GOOD)
    assert anomalies.skipped.total == 0
    with pytest.raises(UserError, match="not finite"):
        for step in range(200, 230):
            anomalies.add(step, BAD_LOSS)


def test_spikes_are_reported_and_noise_is_not(tmp_path):
    """Losses as they are: a falling curve with 3% noise. 2,000 steps without a false alarm, one spike of 3 times found."""
    draw = np.random.default_rng(0)
    losses = [(0.17 + math.exp(-step / 100)) * (1 + 0.03 * draw.normal()) for step in range(2000)]
    anomalies = Anomalies(tmp_path)
    assert not [line for step, loss in enumerate(losses) for line in anomalies.add(step, {**GOOD, "train/loss": loss})]
    (line,) = anomalies.add(2000, {**GOOD, "train/loss": 0.51})
    assert line.startswith("loss spike at step 2,000: 0.51, usual 0.1")
    assert not is_spike(9.0, losses[:10])  # too few to say what is usual
