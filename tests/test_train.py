"""Whole runs: stop and resume, fine-tuning, what a workdir refuses, and that training learns the classes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from conftest import ROOT, small_settings, wandb_records
from PIL import Image

from jitjax import (
    checkpoint,
    cli,
    data,
    distributed,
    from_settings,
    memory,
    pipeline,
    processes,
    run_record,
    runtime,
    settings,
    snapshots,
)
from jitjax.data import order
from jitjax.errors import UserError
from jitjax.monitor import late
from jitjax.plan import fit_devices
from jitjax.signals import StopAfter
from jitjax.train import train
from jitjax.workdir import fitted


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir):
    return checkpoint.load_weights(workdir)


def assert_same_run(a, b):
    """Losses, learning rates, norms, weights and EMAs equal, bit for bit."""
    keys = ("step", "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch_loss")
    assert [[m.get(k) for k in keys] for m in metrics(a)] == [[m.get(k) for k in keys] for m in metrics(b)]
    chex.assert_trees_all_equal((weights(a).params, weights(a).ema), (weights(b).params, weights(b).ema))


CONFIG_FILE = """
import json, sys
sys.path.insert(0, {tests!r})
from conftest import small_config
def get_config():
    return small_config(**{overrides!r})
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """20 steps on 8 devices, 2 micro-batches: 16 steps an epoch of 512 images, checkpoints every 4."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    asked, reached = [], StopAfter.reached
    with mock.patch.object(StopAfter, "reached", lambda *args: asked.append(args[1:]) or reached(*args)):
        assert train(small_settings(**RUN), workdir) == 0
    assert [steps for steps, _ in asked] == list(range(1, 21))
    seconds = json.loads((workdir / "time.json").read_text())["seconds"]
    assert asked[0][1] > seconds["startup"] + seconds["compile"]  # `stop_after` counts them
    return workdir


RUN = dict(
    total_steps=20,
    optim__accumulation_steps=2,
    checkpoint__every_steps=4,
    preview__every_steps=10,
    checkpoint__keep_every=8,
)


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    """kill -9 in the middle; the same command again goes on from the last complete checkpoint and ends bit for bit where
    the uninterrupted run does, epoch means included."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=RUN))
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={workdir}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (workdir / "checkpoints" / "8").is_dir():  # complete: Orbax renames it into place
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()[-2000:]
    (workdir / "metrics.jsonl").open("a").write('{"step": 999, "train/lo')  # as a crash may leave it
    assert train(small_settings(**RUN), workdir) == 0
    assert_same_run(uninterrupted, workdir)
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == [8, 12, 16, 20]


def test_sigterm_saves_and_resumes(uninterrupted, tmp_path):
    """A polite stop saves at once; the resumed run loses nothing. Here with FSDP on a 4x2 mesh after a start with a sharded
    optimizer, equal within rounding, and with W&B."""

    class Stop(Exception):
        pass

    def stop_at_11(step, number=signal.SIGTERM):
        if step == 11:
            os.kill(os.getpid(), number)

    from jitjax.monitor import LateLog

    original = LateLog.add
    try:
        LateLog.add = lambda self, step, metrics, waited: (stop_at_11(step), original(self, step, metrics, waited))[1]
        assert train(small_settings(**RUN), tmp_path) == 128 + signal.SIGTERM
    finally:
        LateLog.add = original
    assert checkpoint.find(tmp_path)[1] == 11
    settings = small_settings(**RUN, mesh__data=4, mesh__fsdp=2, wandb__enabled=True, wandb__mode="offline")
    assert train(settings, tmp_path) == 0
    a, b = metrics(uninterrupted), metrics(tmp_path)
    assert [line["step"] for line in b] == list(range(1, 21))
    assert [m["train/loss"] for m in b[:11]] == [m["train/loss"] for m in a[:11]]
    np.testing.assert_allclose([m["train/loss"] for m in b], [m["train/loss"] for m in a], rtol=5e-6)
    np.testing.assert_allclose([m["train/grad_norm"] for m in b], [m["train/grad_norm"] for m in a], rtol=2e-5)
    (file,) = tmp_path.glob("wandb/offline-*/*.wandb")
    records = wandb_records(file)
    config = records["run"][0]["run"]["config"]["update"]
    assert (config["optim"]["lr"], config["devices"], config["effective_batch"]) == (1e-3, 8, 32)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config["parameters"] == saved["parameters"] == sum(p.size for p in weights(tmp_path).params.values())
    history = {record["history"]["item"]["_step"]: record["history"]["item"] for record in records["history"]}
    assert [step for step in history if "train/loss" in history[step]] == list(range(12, 21))
    assert history[16]["train/epoch_loss"] == metrics(tmp_path)[15]["train/epoch_loss"] and "samples.path" in history[20]
    summary = {k: v for record in records["summary"] for k, v in record["summary"]["update"].items()}
    assert summary["time/starts"] == 2 and 0 < summary["time/goodput"] < 1


@pytest.mark.slow
def test_the_same_command_on_another_machine(uninterrupted, tmp_path):
    """From 8 devices to 2, to 1 and back to 8, with nothing changed but the machine: the same steps on the same data, with
    losses within rounding."""
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=RUN))
    assert train(small_settings(**RUN, stop_after="5 steps"), workdir) == 0
    for devices in (2, 1):
        command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={workdir}"]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        command.append("--config.stop_after=5steps")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        micro = 16 // devices
        assert f"{devices} devices make the same steps with batch_size=2, accumulation_steps={micro}\n" in done.stdout
    assert train(small_settings(**RUN), workdir) == 0
    a, b = metrics(uninterrupted), metrics(workdir)
    assert [line["step"] for line in b] == list(range(1, 21))
    np.testing.assert_allclose([m["train/loss"] for m in b], [m["train/loss"] for m in a], rtol=5e-6)
    np.testing.assert_allclose([m["train/grad_norm"] for m in b], [m["train/grad_norm"] for m in a], rtol=2e-5)
    with pytest.raises(UserError, match=r"5 devices cannot share an effective batch of 32: use 1, 2, 4"):
        fit_devices(small_settings(**RUN), 32, 5)
    assert fit_devices(small_settings(**RUN, mesh__fsdp=8), 32, 4).mesh.fsdp == 4


@pytest.fixture(scope="module")
def begun_on_four(tmp_path_factory):
    """4 steps of 32 images on 4 devices: 2 micro-batches of 4 images."""
    folder = tmp_path_factory.mktemp("four")
    config, workdir = folder / "config.py", folder / "run"
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=ON_FOUR))
    command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={workdir}", "--config.stop_after=4steps"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir


ON_FOUR = dict(batch_size=4, optim__accumulation_steps=2, total_steps=None, epochs=1.0)


def images_read(monkeypatch):
    """The image of each example that is read from now on, some ahead of the steps."""
    read, original = {}, order.ExampleOrder.images

    def images(self, examples):
        found = original(self, examples)
        read.update(zip(np.asarray(examples).tolist(), found.tolist(), strict=True))
        return found

    monkeypatch.setattr(order.ExampleOrder, "images", images)
    return read


def test_accepted_changes_leave_the_effective_batch_alone_on_other_cards(begun_on_four, tmp_path, monkeypatch):
    """4 cards, then 8 with another learning rate: the rest of the epoch's 16 steps with the images that are left."""
    workdir, read = shutil.copytree(begun_on_four, tmp_path / "run"), images_read(monkeypatch)
    assert train(small_settings(**ON_FOUR, optim__lr=2e-3), workdir, accept_config_changes=True) == 0
    log = (workdir / "log.txt").read_text()
    assert "8 devices make the same steps with batch_size=4, accumulation_steps=1\n" in log
    assert re.findall("accepted: .*", log) == ["accepted: optim.lr: 0.001 -> 0.002"]
    assert [line["step"] for line in metrics(workdir)] == list(range(1, 17))
    assert json.loads((workdir / "config.json").read_text())["effective_batch"] == 32
    assert min(read) == 128
    before = order.ExampleOrder(0, 512, 32).images(np.arange(128)).tolist()
    assert sorted([*before, *(read[k] for k in range(128, 512))]) == list(range(512))
    assert checkpoint.read_meta(workdir / "checkpoints" / "16")["examples"] == 512
    with pytest.raises(UserError, match=r"or set another --config.batch_size, with --accept_config_changes"):
        fitted(small_settings(**ON_FOUR), begun_on_four, 5)


def test_another_effective_batch_goes_on_with_the_images_that_were_not_seen(begun_on_four, tmp_path, monkeypatch):
    """4 steps of 32 images, then 128 a step: after 4 + 3 steps every image was seen once, also over a further start, which no
    longer needs the flag."""
    workdir = shutil.copytree(begun_on_four, tmp_path / "run")
    changed = dict(ON_FOUR, batch_size=8)
    first = images_read(monkeypatch)
    assert train(small_settings(**changed, stop_after="1steps"), workdir, accept_config_changes=True) == 0
    log = (workdir / "log.txt").read_text()
    assert re.findall("accepted: .*", log) == [
        "accepted: effective batch (batch_size x devices x accumulation_steps): 32 -> 128"
    ]
    assert "the data go on after the 128 images of the steps so far\n" in log
    second = images_read(monkeypatch)
    assert train(small_settings(**changed), workdir) == 0
    assert (min(first), min(second)) == (128, 256)
    before = order.ExampleOrder(0, 512, 32).images(np.arange(128)).tolist()
    after = [*(first[k] for k in range(128, 256)), *(second[k] for k in range(256, 512))]
    assert sorted([*before, *after]) == list(range(512))
    assert "the data go on" not in (workdir / "log.txt").read_text().removeprefix(log)
    assert checkpoint.find(workdir)[1] == 7
    assert checkpoint.read_meta(workdir / "checkpoints" / "7")["examples"] == 512


def test_out_of_memory_is_answered_for_the_cards_that_are_here(begun_on_four, tmp_path, monkeypatch):
    workdir, asked, answer = shutil.copytree(begun_on_four, tmp_path / "run"), [], memory.out_of_memory

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(from_settings, "make_step", lambda *_: exhausted)
    monkeypatch.setattr(
        memory, "out_of_memory", lambda error, settings, *a, **k: asked.append(settings) or answer(error, settings, *a, **k)
    )
    with pytest.raises(UserError, match="out of memory: use a smaller"):
        train(small_settings(**ON_FOUR), workdir)
    assert [(settings.batch_size, settings.optim.accumulation_steps) for settings in asked] == [(4, 1)]


@pytest.mark.parametrize("at, code", [(2, 2), (4, 3)])
def test_out_of_memory_after_a_save_is_worth_another_start(begun_on_four, tmp_path, monkeypatch, at, code):
    """Exit code 3: a launcher starts it again. Where no start would get further it is 2."""
    workdir, make_step = shutil.copytree(begun_on_four, tmp_path / "run"), from_settings.make_step
    start = checkpoint.find(workdir)[1]

    def make(*args):
        step, calls = make_step(*args), []

        def until(state, batch):
            calls.append(1)
            if len(calls) == at:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return step(state, batch)

        return until

    monkeypatch.setattr(from_settings, "make_step", make)
    settings = small_settings(**ON_FOUR, checkpoint__every_steps=start + 2)
    with pytest.raises(UserError, match="out of memory") as failed:
        train(settings, workdir, accept_config_changes=True)
    assert failed.value.exit_code == code
    assert cli.guarded(lambda: (_ for _ in ()).throw(failed.value)) == code


def test_host_memory_that_is_lacking_is_not_taken_for_the_cards(begun_on_four, tmp_path, monkeypatch):
    workdir = shutil.copytree(begun_on_four, tmp_path / "run")
    reason = f"Out of memory while trying to allocate 2.0GiB. Please set the environment variable {runtime.HOST_MEMORY_LIMIT}"

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {reason} to allocate larger host memory")

    monkeypatch.setattr(from_settings, "make_step", lambda *_: exhausted)
    monkeypatch.setattr(runtime, "host_memory_limit", lambda: 100)
    # More than the machine has is no remedy.
    for limit, remedy in (("99", f"Free some, set {runtime.HOST_MEMORY_LIMIT} higher than 99, or"), ("100", "Free some, or")):
        monkeypatch.setenv(runtime.HOST_MEMORY_LIMIT, limit)
        with pytest.raises(UserError, match=f"out of host memory: .*{remedy} keep fewer EMAs"):
            train(small_settings(**ON_FOUR), workdir)
    assert f"the runtime says: RESOURCE_EXHAUSTED: {reason}" in (workdir / "log.txt").read_text()


def test_the_runtimes_own_words_are_there_before_the_run_has_begun(tmp_path, monkeypatch, capsys):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.0GiB.")

    monkeypatch.setattr(from_settings, "first_state", exhausted)
    with pytest.raises(UserError, match="out of memory before the first step"):
        train(small_settings(), tmp_path / "run")
    assert "the runtime says: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.0GiB." in capsys.readouterr().err


@pytest.mark.slow
def test_the_clock_of_the_host_may_jump(uninterrupted, tmp_path, monkeypatch):
    """A day back after step 5, 400 days on after step 10: nothing but times in logs depends on it."""
    true, jumps = time.time, iter([0.0] * 5 + [-86400.0] * 5 + [400 * 86400.0] * 1000)
    offset = [0.0]

    from jitjax.monitor import LateLog

    def add(self, *args, original=LateLog.add):
        offset[0] = next(jumps)
        return original(self, *args)

    monkeypatch.setattr(LateLog, "add", add)
    monkeypatch.setattr(time, "time", lambda: true() + offset[0])
    assert train(small_settings(**RUN), tmp_path) == 0
    assert_same_run(uninterrupted, tmp_path)


def test_workdir_tells_its_story(uninterrupted):
    """Names that scripts outside rely on: one line a step with these metrics, config, grids."""
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all({"train/loss", "train/learning_rate", "train/grad_norm"} <= line.keys() for line in lines)
    assert {"train/samples_per_second", "train/tokens_per_second"} <= lines[-1].keys()
    assert {"time/goodput", "time/starts", "time/compile_seconds", "time/lost_seconds"} <= lines[-1].keys()
    assert [line["step"] for line in lines if "time/goodput" in line] == list(range(2, 21, 2))
    spent = json.loads((uninterrupted / "time.json").read_text())
    assert spent["step"] == 20 and list(spent["saves"]) == ["4", "8", "12", "16", "20"]
    assert all(spent["seconds"][kind] > 0 for kind in ("startup", "compile", "input_wait", "step", "save", "preview"))
    log = (uninterrupted / "log.txt").read_text()
    (total,) = re.findall(r"goodput \(share of the time spent in training steps\) \S+% of (\S+) over 1 start: ", log)
    (took,) = re.findall(r"finished at step 20; this start took (\S+)", log)
    assert took >= total  # both from the first line of the start, and the one is printed after the other
    assert "left alone" not in log and re.search(r"  next: jitjax sample \S+ --cfg_scale 2\.9 --out \S+", log)
    first = [line["train/loss"] for line in lines[:16]]
    assert lines[15]["train/epoch_loss"] == pytest.approx(np.mean(first), rel=1e-6)
    assert [line["step"] for line in lines if "train/epoch_loss" in line] == [16]
    saved = json.loads((uninterrupted / "config.json").read_text())
    assert saved["optim"]["accumulation_steps"] == 2 and saved["effective_batch"] == 32 and saved["devices"] == 8
    for name in ("step_00000010.png", "step_00000020.png"):
        with Image.open(uninterrupted / "samples" / name) as grid:
            assert grid.width > 8 * 8


def test_another_config_is_refused_by_field(uninterrupted):
    before = (uninterrupted / "config.json").read_text()
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.002"):
        train(small_settings(**RUN, optim__lr=2e-3), uninterrupted)
    with pytest.raises(UserError, match=r"effective batch .*: 32 -> 16"):
        train(small_settings(**RUN, batch_size=1), uninterrupted)
    with pytest.raises(UserError, match=r"another model \(width: 32 -> 64; optim.ema_decays: \(0.5,0.9\) -> \(0.9\)\)"):
        changed = small_settings(**RUN, model__width=64, optim__ema_decays=(0.9,))
        train(changed, uninterrupted, accept_config_changes=True)
    assert (uninterrupted / "config.json").read_text() == before
    assert checkpoint.find(uninterrupted)[1] == 20


def test_a_live_workdir_is_refused(tmp_path):
    from jitjax.workdir import Workdir

    script = (
        "import sys, time; from jitjax.workdir import Workdir; w = Workdir(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="in use by a live run"):
            Workdir(tmp_path)
        with pytest.raises(UserError, match="in use by a live run"):  # before the images are looked for
            train(small_settings(data__synthetic="", data__path="/nowhere"), tmp_path)
        other.kill()
    Workdir(tmp_path).close()


def test_finetuning_carries_weights_and_null_class(tmp_path):
    """Unconditional pretraining, then --init_from with classes: everything but the class embedding is loaded bit for bit, the
    null class becomes the new embedding's null class, optimizer and schedule start afresh."""
    pretrained, finetuned = tmp_path / "a", tmp_path / "b"
    train(small_settings(model__class_conditional=False, total_steps=3), pretrained)
    start = dict(total_steps=1, optim__warmup_steps=10)
    train(small_settings(**start, init_from=str(pretrained)), finetuned)  # the one step has learning rate 0: parameters stay
    assert "warning: the warm-up takes 10 steps and the run 1" in (finetuned / "log.txt").read_text()
    old, new = weights(pretrained), weights(finetuned)
    assert old.params["y_embedder.table"].shape[0] == 1 and new.params["y_embedder.table"].shape[0] == 9
    for name, value in new.params.items():
        if name == "y_embedder.table":
            np.testing.assert_array_equal(value[-1], old.params[name][-1])
            for decay in ("0.9", "0.5"):  # averages moved one step towards the unchanged parameters
                rest = float(decay) * np.asarray(old.ema[decay][name][-1]) + (1 - float(decay)) * np.asarray(value[-1])
                np.testing.assert_allclose(new.ema[decay][name][-1], rest, atol=1e-6)
        else:
            np.testing.assert_array_equal(value, old.params[name], err_msg=name)
    assert new.step == 1
    again = tmp_path / "c"  # one checkpoint instead of a workdir
    train(small_settings(init_from=str(pretrained / "checkpoints" / "3"), total_steps=1, optim__warmup_steps=10), again)
    np.testing.assert_array_equal(weights(again).params["final.adaln.kernel"], new.params["final.adaln.kernel"])
    with pytest.raises(UserError, match="no such file or folder"):
        pipeline.load("a" * 300)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        train(small_settings(init_from=str(tmp_path / "nowhere"), total_steps=1), tmp_path / "d")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(data__synthetic="", data__path="/nowhere"), r"--config\.data\.path"),
        (dict(data__image_size=9), r"not a multiple of the patch size 4"),
        (dict(model__name="JiT-X/4"), r"--config\.model\.name='JiT-X/4' is unknown.*JiT-B"),
        (dict(batch_size=128), r"holds 512 images, fewer than one effective batch of 1024.*batch_size=64"),
        (dict(mesh__data=3), r"each one of 1, 2, 4, 8"),
        (dict(model__proj_dropout=1.0), r"model\.proj_dropout=1\.0: must be a number in \[0, 1\)"),
        (dict(model__mlp_ratio=float("nan")), r"model\.mlp_ratio=nan: must be a number in \(0, 64\]"),
        (dict(model__num_classes=5), r"--config\.model\.num_classes=5 but .* has 8 class folders"),
        (dict(epochs=1.0), r"exactly one run length"),
        (dict(total_steps=None), r"exactly one run length"),
        (dict(dtype="bf16"), r"--config\.dtype=bf16: must be one of bfloat16"),
        (dict(optim__ema_decays=()), r"--config\.optim\.ema_decays=\(\): must be numbers in"),
    ],
)
def test_mistakes_are_one_line(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        train(small_settings(**overrides), tmp_path)
    assert "\n" not in str(error.value)


def test_labels_on_a_flat_folder_are_refused(tmp_path):
    images = tmp_path / "flat"
    images.mkdir()
    for i in range(32):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(images / f"{i}.png")
    with pytest.raises(UserError, match="read without labels.*--config.data.labels"):
        train(small_settings(data__synthetic="", data__path=str(images)), tmp_path / "run")
    unlabelled = dict(model__class_conditional=False, total_steps=3)
    assert train(small_settings(**unlabelled, data__synthetic="", data__path=str(images)), tmp_path / "run") == 0


def test_what_an_allowed_change_of_the_data_set_does_to_labels_is_printed(tmp_path):
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    fields = dict(data__synthetic="", data__path=str(tmp_path / "images"), data__allow_changed=True)
    assert train(small_settings(**fields, total_steps=1), tmp_path / "run") == 0
    (tmp_path / "images" / "a").rename(tmp_path / "images" / "z")
    assert train(small_settings(**fields, total_steps=2), tmp_path / "run") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("accepted: the data set changed since the checkpoint (checksum ") == 1
    assert log.count("warning: 3 of 3 labels stand for other classes than they were trained on (first: 0 was a, is b)") == 1


def test_a_workdir_among_the_images_is_refused_and_nothing_is_left_in_them(tmp_path):
    """Its folders would be classes without images. Beside the split that is read it may lie."""
    images = tmp_path / "train"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(images / name / f"{i}.png")
    own = dict(data__synthetic="", total_steps=1)
    for workdir in (images, images / "runs" / "a"):
        with pytest.raises(UserError, match=r"--workdir=.* lies among the images of .*train: name a folder elsewhere"):
            train(small_settings(**own, data__path=str(images)), workdir)
    assert sorted(path.name for path in images.iterdir()) == ["a", "b"]
    assert train(small_settings(**own, data__path=str(tmp_path), data__split="train"), tmp_path / "run") == 0


def test_a_broken_image_is_reported_once_and_replaced(tmp_path):
    """Training on a folder with a file that cannot be decoded: one warning that names it, and the run goes on."""
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for i in range(60):
            Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(images / name / f"{i}.png")
    (images / "a" / "0.png").write_bytes(b"not a picture")
    overrides = dict(data__synthetic="", data__path=str(images), data__num_workers=1, batch_size=16)
    overrides["total_steps"] = 15  # epochs of 7 steps
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=overrides))
    command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("0.png") == 1 and "warning: " in done.stdout + done.stderr


def test_no_space_and_no_permission(tmp_path, monkeypatch):
    """One line, before any training: a file where the folder should be, a folder that is not there, a full disk."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(small_settings(), tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    with pytest.raises(UserError, match=r"no space for a checkpoint, which takes 1 MiB"):
        train(small_settings(), tmp_path / "full")
    assert not (tmp_path / "full" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_training_learns_the_classes(tmp_path):
    """After a short run the mean colour of nearly every sample is nearest to its own class's; before training it is not."""
    config = small_settings(
        data__image_size=16,
        model__width=64,
        model__depth=3,
        batch_size=8,
        total_steps=250,
        optim__lr=2e-3,
        optim__ema_decays=(0.98,),
        preview__every_steps=250,
        preview__num_images=64,
        preview__steps=10,
        preview__cfg_scale=2.0,
        log__every_steps=50,
    )
    train(config, tmp_path)
    truth = {}
    for folder in sorted((tmp_path / "shapes" / "train").iterdir()):
        truth[folder.name] = np.mean([np.asarray(Image.open(p), np.float32).mean((0, 1)) for p in folder.iterdir()], 0)
    means = np.stack(list(truth.values()))

    from jitjax import diffusion, model, sampling

    loaded = weights(tmp_path)
    labels = np.arange(64) % 8

    def share_recognised(params):
        module = model.merge(model.graphdef_of(loaded.geometry), params)
        noise = jax.random.normal(jax.random.key(1), (64, 16, 16, 3))
        images = diffusion.to_uint8(sampling.sample(module, noise, labels, steps=10, cfg_scale=2.0))
        colours = np.asarray(images, np.float32).mean((1, 2))
        nearest = np.argmin(((colours[:, None] - means[None]) ** 2).sum(-1), axis=1)
        return float((nearest == labels).mean())

    assert share_recognised(loaded.ema["0.98"]) > 0.8
    assert share_recognised(jax.jit(model.init_fn(loaded.geometry))(jax.random.key(0))) < 0.4


def test_settings_survive_their_json():
    config = small_settings(optim__ema_decays=(0.9, 0.99), preview__interval=(0.1, 0.9))
    assert settings.from_mapping(json.loads(json.dumps(settings.to_dict(config)))) == config


def test_a_signal_behind_the_vote_waits_for_the_next_one(tmp_path, monkeypatch):
    """What one process alone knows must not end its loop: the others are in the next step, which would wait for it for ever."""
    vote = distributed.Peers.agree

    def vote_then_signal(self, value):
        agreed = vote(self, value)
        if self._doing == "step 3, waiting for input":
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    monkeypatch.setattr(distributed.Peers, "agree", vote_then_signal)
    assert train(small_settings(total_steps=5), tmp_path) == 128 + signal.SIGTERM
    assert checkpoint.steps_in(tmp_path / checkpoint.DIRECTORY) == [3]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Two processes with four devices each train on the same batches to the same losses as one process with eight."""
    overrides = dict(total_steps=6, checkpoint__every_steps=3, preview__every_steps=6, model__width=96)  # splits matrices
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=overrides))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={tmp_path / 'two'}"]
    cluster = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=cluster | {"JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    assert train(small_settings(**overrides), tmp_path / "one") == 0
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["step"] for m in two] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([m["train/loss"] for m in two], [m["train/loss"] for m in one], rtol=2e-6)
    with (
        Image.open(tmp_path / "one/samples/step_00000006.png") as a,
        Image.open(tmp_path / "two/samples/step_00000006.png") as b,
    ):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2


def test_a_process_alone_meets_a_failed_step_itself(tmp_path, monkeypatch):
    """And says which batch would fit, with the exit code that fits; it waits for input at most."""

    def stop(**options):
        assert options["failed"]() == ""
        raise KeyboardInterrupt

    monkeypatch.setattr(late.LateLog, "failure", lambda self: "step 1 failed")
    monkeypatch.setattr(sys.modules["jitjax.train"], "Watchdog", stop)
    with pytest.raises(KeyboardInterrupt):
        train(small_settings(total_steps=3), tmp_path)


def test_processes_with_other_workdirs_are_no_run(tmp_path, monkeypatch):
    """They would wait for each other's parts of the first checkpoint for ever."""
    for name in ("mine", "theirs"):
        (tmp_path / name / checkpoint.DIRECTORY).mkdir(parents=True)
    run = run_record.identity(tmp_path / "theirs", had_folder=False)
    monkeypatch.setattr(processes, "text_of_process_0", lambda text: run["run"])
    run_record.require_shared(tmp_path / "theirs", {})
    other = "process 0 does not find the run of process 0 in --workdir=.*mine: give all processes one folder"
    with pytest.raises(UserError, match=other):
        run_record.require_shared(tmp_path / "mine", {}, seconds=0.1)
    run_record.identity(tmp_path / "mine", had_folder=False)
    with pytest.raises(UserError, match=other):
        run_record.require_shared(tmp_path / "mine", {}, seconds=0.1)
    # A process that sees it says what the one says that does not.
    monkeypatch.setattr(processes, "text_of_first", lambda text: text or "process 2 does not find it")
    with pytest.raises(UserError, match="process 2 does not find it"):
        run_record.require_shared(tmp_path / "theirs", {})


def test_processes_with_other_settings_or_images_are_no_run(tmp_path, monkeypatch):
    """As process 1 sees it: process 0 was started with another learning rate, length or data set."""
    images = np.zeros((8, 8, 8, 3), np.uint8)
    mine, theirs = (data.of_arrays(images[:n], np.zeros(n, int), ("a",)) for n in (8, 7))
    own, said = small_settings(total_steps=3, optim__lr=0.1), []
    where = dict(data__path="/elsewhere", data__num_workers=5, eval__reference="/scratch/r.npz", wandb__name="a")
    cases = [
        (small_settings(total_steps=3, optim__lr=0.1, **where), mine, "", None),
        (
            small_settings(total_steps=4, optim__lr=0.5),
            mine,
            "",
            r"total_steps: 4 there, 3 here; optim.lr: 0.5 there, 0.1 here",
        ),
        (own, theirs, "", r"images \(count\): 7 there, 8 here"),
        (own, mine, "huber", r"objective: huber there, published here"),
    ]

    def of(made, dataset, objective):
        images = {f"images ({name})": value for name, value in dataset.fingerprint.items()}
        return settings.of_all_processes(made) | images | {"objective": objective or "published"}

    for first, dataset, objective, message in cases:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "text_of_process_0", lambda text, longest: said.append(text) or text)
            processes.require_same(of(first, dataset, objective))
            patch.setattr(processes, "text_of_process_0", lambda text, longest: said[-1])
            if message is None:
                processes.require_same(of(own, mine, ""))
                continue
            with pytest.raises(UserError, match=rf"was started with other settings or images than process 0 \(.*{message}"):
                processes.require_same(of(own, mine, ""))
    processes.require_same({"a": float("nan")})
    weights = settings.of_all_processes(small_settings(total_steps=3, init_from="/a"))
    assert weights == settings.of_all_processes(small_settings(total_steps=3, init_from="/b"))
    assert weights != settings.of_all_processes(small_settings(total_steps=3))
    # One that has what process 0 has says the same line: whichever ends first ends the run, and with its line alone.
    theirs = "process 2 was started with other settings or images than process 0 (optim.lr: 0.1 there, 0.5 here)"
    monkeypatch.setattr(processes, "text_of_first", lambda text: text or theirs)
    with pytest.raises(UserError, match=re.escape(theirs)):
        processes.require_same(of(own, mine, ""))


def test_a_run_that_fails_while_a_save_is_written_says_that_it_resumes(tmp_path, monkeypatch, capsys):
    made = from_settings.make_step

    def make(*args):
        step, states = made(*args), []

        def run(state, batch):
            if states:
                raise UserError("the second step fails")
            states.append(step(state, batch))
            return states[0]

        return run

    monkeypatch.setattr(from_settings, "make_step", make)
    monkeypatch.setattr(snapshots.Snapshots, "settle", lambda self: time.sleep(2))  # in the save, before it counts
    with pytest.raises(UserError, match="the second step fails"):
        train(small_settings(total_steps=3, checkpoint__every_steps=1), tmp_path / "run")
    assert "the same command resumes from the last checkpoint" in capsys.readouterr().out
