"""Previews and scores beside saves: what a signal or a crash in them costs, and that the next start makes up for it."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from conftest import json_lines, small_settings
from programs import Processes, wait_until, write_config

from jitjax import checkpoint, distributed, ema, sampler
from jitjax.errors import UserError
from jitjax.preview import Preview
from jitjax.train import train

EXTRACTOR = str(Path(__file__).parents[1] / "mean_colour.onnx")
RUN = dict(
    total_steps=6,
    optim__power_emas=(0.1,),
    preview__every_steps=2,
    eval__every_steps=2,
    eval__num_images=16,
    eval__steps=2,
    eval__batch_size=1,
    eval__extractor=EXTRACTOR,
    checkpoint__keep_last=1,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert train(small_settings(**RUN), workdir) == 0
    return workdir


class Crash(Exception):
    pass


# At each of the steps 2, 4 and 6 the sampler is called three times: for the preview, and for two batches of the evaluation.
@pytest.mark.parametrize(
    "call, crash, saves, left",
    [
        (4, False, {}, "the evaluation of step 4"),
        (5, False, {}, "the evaluation of step 4"),
        (8, False, {}, "the evaluation of step 6"),
        (5, True, {"checkpoint__every_steps": 2}, None),
        (7, True, {}, None),
    ],
    ids=["signal in a preview", "in an evaluation", "in the last one", "crash in an evaluation", "in the last preview"],
)
def test_what_was_trained_is_saved_and_the_next_start_makes_up_for_the_rest(
    undisturbed, tmp_path, monkeypatch, call, crash, saves, left
):
    draw, calls = sampler.Sampler.__call__, []

    def stop_at(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == call and crash:
            raise Crash
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, *args, **kwargs)

    settings, step = small_settings(**RUN, **saves), 6 if call > 6 else 4
    with monkeypatch.context() as patch:
        patch.setattr(sampler.Sampler, "__call__", stop_at)
        if crash:
            with pytest.raises(Crash):
                train(settings, tmp_path)
        else:
            assert train(settings, tmp_path) == 128 + signal.SIGTERM
    assert len(calls) == call
    assert checkpoint.find(tmp_path)[1] == step
    assert [line["step"] for line in json_lines(tmp_path / "scores.jsonl")] == list(range(2, step, 2))
    if left:
        assert f"asked to stop: {left} is left to the next start" in (tmp_path / "log.txt").read_text()
    assert train(settings, tmp_path) == 0
    for name in ("scores.jsonl", "best.json"):
        assert (tmp_path / name).read_text() == (undisturbed / name).read_text()
    grids = sorted((undisturbed / "samples").glob("*.png"))
    assert [grid.name for grid in grids] == [f"step_0000000{step}.png" for step in (2, 4, 6)]
    assert all((tmp_path / "samples" / grid.name).read_bytes() == grid.read_bytes() for grid in grids)
    chex.assert_trees_all_equal(checkpoint.load_weights(tmp_path).ema, checkpoint.load_weights(undisturbed).ema)
    snapshots = {file.name for file in (tmp_path / "ema").iterdir()}
    assert snapshots == {file.name for file in (undisturbed / "ema").iterdir()}
    best = checkpoint.read_best(tmp_path)["step"]
    assert set(checkpoint.steps_in(tmp_path / "checkpoints")) == {best, 6}
    meta = checkpoint.read_meta(tmp_path / "checkpoints" / str(best))
    assert meta["scores"] == {k: v for k, v in json_lines(tmp_path / "scores.jsonl")[best // 2 - 1].items() if "eval/" in k}


def test_a_signal_behind_the_vote_on_a_batch_waits_for_the_next_one(tmp_path, monkeypatch):
    """What one process alone knows must not end its evaluation: the others are in the batch, which would wait for ever."""
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    vote, draw, calls = distributed.Peers.agree, sampler.Sampler.__call__, []

    def vote_then_signal(self, value):
        agreed = vote(self, value)
        if len(calls) == 1:  # the preview is drawn: this is the first batch's
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    monkeypatch.setattr(sampler.Sampler, "__call__", lambda *args, **size: calls.append(args) or draw(*args, **size))
    monkeypatch.setattr(distributed.Peers, "agree", vote_then_signal)
    assert train(small_settings(**RUN), tmp_path) == 128 + signal.SIGTERM
    assert len(calls) == 2 and checkpoint.steps_in(tmp_path / "checkpoints") == [2]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_one_gets_a_signal_in_an_evaluation(tmp_path, rank):
    """The evaluation alone would take hours. Both leave it, and both save."""
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    config = write_config(tmp_path / "config.py", **RUN | {"eval__num_images": 1_000_000, "total_steps": 1000})
    with Processes(config, tmp_path / "run", count=2) as run:
        wait_until(lambda: "evaluating ..." in run.log().read_text(), processes=run.processes)
        time.sleep(5)
        run.processes[rank].send_signal(signal.SIGTERM)
        assert run.wait(60) == [128 + signal.SIGTERM] * 2, run.log().read_text()
    assert "asked to stop: the evaluation of step 2 is left to the next start" in run.log().read_text()
    assert checkpoint.steps_in(tmp_path / "run/checkpoints") == [2]


def test_a_complete_run_is_left_alone_where_nothing_is_missing(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "again")
    times = {file: file.stat().st_mtime_ns for folder in ("samples", "ema") for file in (workdir / folder).iterdir()}
    assert train(small_settings(**RUN), workdir) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert (workdir / "scores.jsonl").read_text() == (undisturbed / "scores.jsonl").read_text()


def test_a_save_goes_before_a_preview_where_more_than_a_grace_period_is_at_stake(tmp_path):
    run = dict(total_steps=5, preview__every_steps=2, checkpoint__keep_every=1)
    for grace, saved in ((1e-9, [2, 4, 5]), (60.0, [5])):
        workdir = tmp_path / f"{grace:g}"
        assert train(small_settings(**run, checkpoint__grace_seconds=grace), workdir) == 0
        assert checkpoint.steps_in(workdir / "checkpoints") == saved


def test_saves_by_time_do_not_wait_for_the_log(tmp_path):
    run = dict(total_steps=4, log__every_steps=1000, checkpoint__every_minutes=1e-9, checkpoint__keep_every=1)
    assert train(small_settings(**run), tmp_path) == 0
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [1, 2, 3, 4]


def test_the_best_checkpoint_is_marked_by_the_next_start_where_a_full_disk_took_the_scores_alone(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    best = checkpoint.read_best(workdir)
    lines = json_lines(workdir / "scores.jsonl")
    lines[-1] |= {best["metric"]: best["value"] / 2}
    (workdir / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(small_settings(**RUN), workdir) == 0
    assert checkpoint.read_best(workdir) == best | {"step": 6, "value": best["value"] / 2}
    lines[-1] |= {best["metric"]: best["value"] / 4, "how": "otherwise"}
    (workdir / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(small_settings(**RUN), workdir) == 0
    assert checkpoint.read_best(workdir)["value"] == best["value"] / 2


def test_a_torn_line_of_scores_does_not_take_the_next_one_along(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    file = workdir / "scores.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert checkpoint.scores_of(workdir, 6) is None
    assert train(small_settings(**RUN), workdir) == 0
    assert checkpoint.scores_of(workdir, 6) == checkpoint.scores_of(undisturbed, 6)


def test_what_was_recorded_of_steps_that_are_made_again_is_taken_back(undisturbed, tmp_path):
    """The newest checkpoint is damaged, and the learning rate another one from there on."""
    workdir = tmp_path / "run"
    kept = dict(RUN, checkpoint__every_steps=2, checkpoint__keep_last=3)
    assert train(small_settings(**kept), workdir) == 0
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
    before = json_lines(workdir / "scores.jsonl")
    assert train(small_settings(**kept, optim__lr=0.1), workdir, accept_config_changes=True) == 0
    after = json_lines(workdir / "scores.jsonl")
    assert [line["step"] for line in after] == [2, 4, 6] and after[0] == before[0]
    assert all(a["eval/fd_mean_colour"] != b["eval/fd_mean_colour"] for a, b in zip(after[1:], before[1:], strict=True))
    best = checkpoint.read_best(workdir)
    assert best["value"] == min(line["eval/fd_mean_colour"] for line in after)


def test_ema_snapshots_of_steps_that_are_made_again_are_taken_back(tmp_path):
    """They would be mixed with those of the steps as they are made now, which need not be at the same steps."""
    workdir, kept = tmp_path / "run", dict(optim__power_emas=(0.1,), checkpoint__every_steps=2, checkpoint__keep_last=3)
    assert train(small_settings(**kept, total_steps=6, checkpoint__ema_every_steps=1), workdir) == 0
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
    before = {step: read() for step, _, read in ema.find_snapshots(workdir / "ema")}
    assert list(before) == [1, 2, 3, 4, 5, 6]
    changed = small_settings(**kept, total_steps=6, checkpoint__ema_every_steps=3, optim__lr=0.1)
    assert train(changed, workdir, accept_config_changes=True) == 0
    after = {step: read() for step, _, read in ema.find_snapshots(workdir / "ema")}
    assert list(after) == [1, 2, 3, 6]
    assert all(np.array_equal(after[step][name], before[step][name]) for step in (1, 2) for name in after[step])
    assert all(any(not np.array_equal(after[step][name], before[step][name]) for name in after[step]) for step in (3, 6))


def test_a_disk_that_takes_no_preview_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    draw, calls = Preview.__call__, []

    def full(self, params, path):
        calls.append(path)
        if len(calls) != 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return draw(self, params, path)

    monkeypatch.setattr(Preview, "__call__", full)
    settings = small_settings(total_steps=6, preview__every_steps=2)
    with pytest.raises(UserError, match=r"preview of step 6 cannot be written .No space left.*the same command draws it"):
        train(settings, tmp_path)
    assert "warning: the preview of step 2 cannot be written" in " ".join(capsys.readouterr().out.split())
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1] == 6
    monkeypatch.undo()
    assert train(settings, tmp_path) == 0
    assert sorted(file.name for file in (tmp_path / "samples").glob("*.png")) == ["step_00000004.png", "step_00000006.png"]
