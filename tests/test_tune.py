"""Finding the learning rate by short runs."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, small_settings
from test_train import CONFIG_FILE

from jitjax import cli, tune
from jitjax.anomalies import Anomalies
from jitjax.errors import UserError
from jitjax.settings import to_dict

NO_LOSS = {"loss": math.nan, "first_loss": math.nan}
EXTRACTOR = str(Path(__file__).parent / "mean_colour.onnx")


@pytest.mark.parametrize("start", [1e-5, 1.9e-4, 3e-3])
@pytest.mark.parametrize("best", [2e-4, 7e-4])
def test_the_valley_is_found_from_any_side_and_each_rate_is_tried_once(start, best):
    tried = []

    def score(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    found = tune.valley(score, start, 2.0)
    assert abs(math.log2(found / best)) <= 0.25 + 1e-9  # half a step of the finest grid
    assert len(tried) == len(set(tried)) <= 5 + abs(math.log2(start / best)) + 1


def test_rates_that_fail_bound_the_valley():
    assert tune.valley(lambda rate: math.inf if rate > 5e-4 else -rate, 2e-4, 2.0) == pytest.approx(4e-4)


def complete(folder, trial, value, steps=8, settings=None):
    """The files of a complete run."""
    folder = folder / trial.folder
    folder.mkdir(parents=True)
    settings = trial.of(small_settings(total_steps=steps) if settings is None else settings)
    (folder / "config.json").write_text(json.dumps({**to_dict(settings), "planned_steps": steps}))
    (folder / "best.json").write_text(json.dumps({"metric": "eval/fd", "value": value - 1}))  # an earlier, better score
    (folder / "scores.jsonl").write_text(json.dumps({"step": steps, "ema": "0.9", "eval/fd": value}) + "\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "train/loss": 0.25}) + "\n")


def test_complete_trials_are_read_and_the_winner_named(tmp_path):
    scores = {(1e-4, 100): 12, (2e-4, 100): 9, (4e-4, 100): 5, (8e-4, 100): 7, (2.83e-4, 100): 6, (5.66e-4, 100): 4}
    for (lr, warmup), value in (scores | {(5.66e-4, 10): 3}).items():
        complete(tmp_path, tune.Trial(lr, warmup), value)
    said = []
    config = ["--config=configs/h200.py", "--config.optim.power_emas=(0.1,0.05)", "--config.data.path=my photographs"]
    settings = small_settings(total_steps=8)
    assert tune.tune(config, settings, tmp_path, start=2e-4, factor=2.0, warmups=[100, 10], say=said.append) == 0
    assert any("best: eval/fd 3 with lr 0.000566 after 10 steps" in line for line in said)
    shown = next(line for line in said if line.startswith("train with it")).partition(": ")[2]
    flags = ["--config.optim.lr=0.000566", "--config.optim.warmup_steps=10", "--workdir", f"{tmp_path}-best"]
    assert shlex.split(shown) == ["jitjax", "train", *config, *flags]  # a shell takes it as it is
    complete(tmp_path / "unfinished", tune.Trial(1e-4, 1), 5)
    folder = tmp_path / "unfinished" / tune.Trial(1e-4, 1).folder
    (folder / "config.json").write_text(json.dumps({"planned_steps": 9}))
    assert tune.result_of(folder) is None and tune.result_of(tmp_path / "nothing") is None


def test_a_rate_that_does_not_work_counts_as_the_worst(tmp_path, monkeypatch):
    """Also the first one. What a run warns of at its start is shown once."""

    def run_trial(trial, arguments, settings, folder, say):
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("now  warning: too few steps\nnow  first step after 1 s\nnow  warning: a jump\n")
        if trial.lr > fails:
            return None, "the loss is not finite at step 7"
        return {"metric": "eval/fd", "value": math.nan if trial.lr > null else 1 / trial.lr} | NO_LOSS, ""

    monkeypatch.setattr(tune, "run_trial", run_trial)
    said, arguments = [], dict(start=8e-4, factor=2.0, warmups=[1])
    fails, null = 5e-4, 1.5e-4
    assert tune.tune([], small_settings(), tmp_path / "a", **arguments, say=said.append) == 0
    assert any("with lr 0.000141" in line for line in said) and said.count("warning: too few steps") == 1
    assert not any("jump" in line for line in said) and any("failed: its eval/fd is not finite" in line for line in said)
    fails = 0
    with pytest.raises(UserError, match=r"no rate from 2.5e-05 to 0.0016 works"):
        tune.tune([], small_settings(), tmp_path / "b", **arguments, say=said.append)


def test_what_is_no_matter_of_the_rate_ends_the_search(tmp_path, monkeypatch):
    """Also of a later trial. What a rate does to a run, its message calls not finite."""
    ran = []

    def run_trial(trial, *args):
        ran.append(trial.lr)
        return ({"metric": "eval/fd", "value": 1.0} | NO_LOSS, "") if len(ran) < 3 else (None, "the GPU is out of memory")

    monkeypatch.setattr(tune, "run_trial", run_trial)
    with pytest.raises(UserError, match=r"lr_5e-05_warmup_1: the GPU is out of memory"):
        tune.tune([], small_settings(), tmp_path, start=1e-4, factor=2.0, warmups=[1, 2], say=str)
    assert len(ran) == 3
    anomalies = Anomalies(tmp_path, policy="stop")
    with pytest.raises(UserError, match=tune.BROKE_DOWN):
        anomalies.add(1, {"train/loss": math.nan, "train/grad_norm": math.nan})


def test_rates_that_no_run_takes_are_the_end_of_the_range(tmp_path, monkeypatch):
    tried = []

    def run_trial(trial, *args):
        tried.append(trial.lr)
        return {"metric": "eval/fd", "value": 1 / trial.lr} | NO_LOSS, ""

    monkeypatch.setattr(tune, "run_trial", run_trial)
    said = []
    assert tune.tune([], small_settings(), tmp_path, start=80.0, factor=2.0, warmups=[1], say=said.append) == 0
    assert max(tried) == 80 and any("with lr 80 " in line for line in said)


# A run as tune sees it: says that it is there, and saves when it is asked to stop.
SAVES = """
import os, pathlib, signal, sys, time
def save(number, frame):
    with open("signals", "a") as file:
        file.write(f"{number} ")
    time.sleep(0.5)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, save)
pathlib.Path("pid").write_text(str(os.getpid()))
os.rename("pid", "ready")
time.sleep(60)
"""


def wait_for(file):
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_to_the_trial_once_and_ends_the_search(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def send():
        wait_for(tmp_path / "ready")
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # under nohup, and in the background, some are ignored
    try:
        threading.Thread(target=send).start()
        with pytest.raises(tune.Stopped) as stopped:
            tune.run([sys.executable, "-c", SAVES])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert stopped.value.args == (128 + number,) and (tmp_path / "signals").read_text().split() == [str(int(number))]


def test_a_signal_that_comes_while_a_trial_begins_ends_it(monkeypatch):
    """Between fork and exec the trial itself cannot hear it."""

    def popen(*arguments, begin=subprocess.Popen, **options):
        process = begin(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    begun = time.monotonic()
    with pytest.raises(tune.Stopped) as stopped:
        tune.run([sys.executable, "-c", "import time; time.sleep(60)"])
    assert stopped.value.args == (128 + signal.SIGTERM,) and time.monotonic() - begun < 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_trial_saves_when_tune_is_killed(tmp_path):
    code = f"import sys; from jitjax import tune; tune.run([sys.executable, '-c', {SAVES!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for(tmp_path / "signals")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_keys_of_a_terminal_reach_a_trial(tmp_path):
    """A terminal signals its whole foreground group. Ctrl-Z pauses the trial until SIGCONT, Ctrl-C reaches it once, and what
    tune ignores (SIGHUP under nohup) never."""
    code = f"""
import signal, sys
from jitjax import tune
for number, handler in ((signal.SIGTSTP, signal.SIG_DFL), (signal.SIGINT, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_IGN)):
    signal.signal(number, handler)
try:
    tune.run([sys.executable, "-c", {SAVES!r}])
except tune.Stopped as stopped:
    sys.exit(stopped.args[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, process_group=0)

    def wait_until_both_are(states):
        until, stats = time.monotonic() + 60, [Path(f"/proc/{pid}/stat") for pid in (process.pid, trial)]
        while not all(stat.read_text().rpartition(")")[2].split()[0] in states for stat in stats):
            assert time.monotonic() < until
            time.sleep(0.05)

    try:
        wait_for(tmp_path / "ready")
        trial = (tmp_path / "ready").read_text()
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTSTP)
            wait_until_both_are("T")
            os.killpg(process.pid, signal.SIGCONT)
            wait_until_both_are("SR")
        os.killpg(process.pid, signal.SIGHUP)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert (tmp_path / "signals").read_text().split() == ["2"]


ABORTS = "import os, sys; sys.stderr.write('Check failed'); sys.stderr.flush(); os.abort()"
FAILS_TO_SAVE = """
import pathlib, signal, sys, time
def fail(*_):
    sys.stderr.write("error: disk full")
    sys.exit(2)
signal.signal(signal.SIGTERM, fail)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    "code, ended, wrote, goes_on",
    [
        (ABORTS, "killed by SIGABRT: the same command goes on", "Check failed", False),
        ("raise ValueError('a bug')", 1, "ValueError: a bug", False),
        ("import sys; sys.stderr.write('no answer'); sys.exit(3)", 3, "no answer", True),
        (FAILS_TO_SAVE, 2, "error: disk full", False),
    ],
)
def test_what_a_trial_wrote_before_it_ended_is_shown(code, ended, wrote, goes_on, tmp_path, monkeypatch, capfd):
    """That the same command goes on is said only where it does."""
    monkeypatch.chdir(tmp_path)
    run, said = tune.run, []
    monkeypatch.setattr(tune, "run", lambda command: run([sys.executable, "-c", code]))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code is FAILS_TO_SAVE:
        threading.Thread(target=lambda: (wait_for(tmp_path / "ready"), os.kill(os.getpid(), signal.SIGTERM))).start()
    try:
        found = tune.tune([], small_settings(), tmp_path, start=1e-4, factor=2.0, warmups=[1], say=said.append)
    except UserError as error:
        found = str(error).partition(": ")[2]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == ended and wrote in capfd.readouterr().err and ("stopped: the same command goes on" in said) == goes_on


def test_a_trial_that_was_killed_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "run", lambda command: (-signal.SIGKILL, ""))
    with pytest.raises(
        UserError, match=r"lr_0.0001_warmup_1: killed by SIGKILL, mostly because memory ran out: the same command goes on"
    ):
        tune.tune([], small_settings(), tmp_path, start=1e-4, factor=2.0, warmups=[1], say=str)


def test_a_run_without_a_finite_score_is_complete_and_failed(tmp_path, monkeypatch):
    """No checkpoint is the best, so there is no best.json."""
    trial = tune.Trial(1e-4, 1)
    complete(tmp_path, trial, 5)
    folder = tmp_path / trial.folder
    (folder / "best.json").unlink()
    (folder / "scores.jsonl").write_text(json.dumps({"step": 8, "eval/fd": None}) + "\n")
    assert math.isnan(tune.result_of(folder)["value"])
    monkeypatch.setattr(tune, "valley", lambda value, start, factor: (value(start), start)[1])
    with pytest.raises(UserError, match="no rate from 0.0001 to 0.0001 works"):
        tune.tune([], small_settings(total_steps=8), tmp_path, start=1e-4, factor=2.0, warmups=[1, 5], say=str)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(total_steps=2000), "total_steps: 8 -> 2000"),
        (dict(total_steps=8, seed=3), "seed: 7 -> 3"),
        (dict(total_steps=8, batch_size=16), "batch_size: 2 -> 16"),
        (dict(total_steps=8, eval__metric="loss"), "eval.metric: -> loss"),
        (dict(total_steps=8, eval__num_images=17), "eval.num_images: 5000 -> 17"),
        (dict(total_steps=8, optim__schedule="cosine"), "optim.schedule: constant -> cosine"),
    ],
)
def test_trials_of_another_configuration_are_refused(change, says, tmp_path):
    trial, before = tune.Trial(1e-4, 1), dict(seed=7, batch_size=2)
    complete(tmp_path, trial, 5, settings=small_settings(total_steps=8, **before))
    with pytest.raises(
        UserError, match=r"trials of another configuration .lr_0.0001_warmup_1: .*use another workdir"
    ) as refused:
        tune.tune([], small_settings(**before | change), tmp_path, start=1e-4, factor=2.0, warmups=[1], say=str)
    assert says in str(refused.value)
    free = dict(total_steps=8, log__every_steps=3, eval__every_steps=8, wandb__name="x")
    assert tune.run_trial(trial, [], small_settings(**before | free), tmp_path / trial.folder, str)[0]["value"] == 5


def test_an_unfinished_trial_of_another_configuration_is_refused(tmp_path, monkeypatch):
    """With a remedy that tune has. What is scored, and how long is trained, is not decided yet."""
    trial, before = tune.Trial(1e-4, 1), dict(total_steps=8, batch_size=2)
    complete(tmp_path, trial, 5, settings=small_settings(**before))
    (tmp_path / trial.folder / "scores.jsonl").unlink()
    for change in (dict(seed=3), dict(batch_size=16)):
        with pytest.raises(UserError, match=f"another configuration .*{next(iter(change))}: .*: use another workdir"):
            tune.tune([], small_settings(**before | change), tmp_path, start=1e-4, factor=2.0, warmups=[1], say=str)
    monkeypatch.setattr(tune, "run", lambda command: (tune.FAILED, "error: it began"))
    free = dict(total_steps=9, eval__reference="other")
    assert tune.run_trial(trial, [], small_settings(**before | free), tmp_path / trial.folder, str) == (None, "it began")


def test_a_trial_that_diverged_has_failed_whatever_its_score(tmp_path):
    """After a few steps an EMA is still near the initial weights, and scores like them. A spike is no divergence."""
    scores = {1e-4: 12, 2e-4: 9, 4e-4: 5, 8e-4: 1, 2.83e-4: 7, 5.66e-4: 6}
    for lr, value in scores.items():
        complete(tmp_path, trial := tune.Trial(lr, 1), value)
        losses = (0.4, 1.6e10) if lr == 8e-4 else (0.4, 0.9)
        lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in zip((1, 8), losses, strict=True)]
        (tmp_path / trial.folder / "metrics.jsonl").write_text("\n".join(lines))
    said = []
    assert tune.tune([], small_settings(total_steps=8), tmp_path, start=2e-4, factor=2.0, warmups=[1], say=said.append) == 0
    assert any("best: eval/fd 5 with lr 0.0004" in line for line in said)
    assert "lr_0.0008_warmup_1: failed: it diverged: the training loss went from 0.4 to 1.6e+10" in said


def test_a_result_with_null_is_one_that_is_not_finite(tmp_path):
    trial = tune.Trial(1e-4, 1)
    complete(tmp_path, trial, 5)
    for name, line in (("scores", {"step": 8, "eval/fd": None}), ("metrics", {"step": 8, "train/loss": None})):
        (tmp_path / trial.folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    found = tune.result_of(tmp_path / trial.folder)
    assert math.isnan(found["value"]) and math.isnan(found["loss"]) and "nan" in tune.table({trial: 1.0}, {trial: found})


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["tune", "--config=configs/quickstart.py"]
    for flags, says in (
        ([], "--workdir is missing"),
        (["--workdir=x", "--warmup=-1"], "--warmup=-1: give steps"),
        (["--workdir=x", "--config.optim.warmup_steps=5"], "is what tune searches for: use --warmup"),
        (["--workdir=x", "--config.stop_after=5steps"], "--config.stop_after=5steps ends a trial before it is scored"),
        (["--workdir=x", "--start=200"], "--start=200: a rate is at most 100"),
    ):
        assert cli.main([*command, *flags]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(UserError, match="lr_0.0001_warmup_1: .*nosuch"):
        tune.tune(["--config=configs/nosuch.py"], small_settings(), tmp_path, start=1e-4, factor=2.0, warmups=[1])


@pytest.mark.slow
def test_trials_train_score_and_continue(tmp_path, monkeypatch):
    """Six runs of four steps."""
    config = tmp_path / "config.py"
    scored = dict(eval__num_images=16, eval__steps=2, eval__batch_size=1, eval__extractor=EXTRACTOR)
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=scored))
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(ROOT))
    said = []
    arguments = dict(start=1e-3, factor=8.0, warmups=[1])
    for _ in range(2):  # the second time nothing is trained
        assert tune.tune([f"--config={config}"], small_settings(**scored), tmp_path / "t", **arguments, say=said.append) == 0
    assert sum("training ..." in line for line in said) == len(list((tmp_path / "t").iterdir()))
    assert said[-2].startswith("train with it, after setting the run's own length: jitjax train --config=")
