"""`jitjax replay`: a step is made again with the run's own numbers, what is wrong in it is named, the workdir is only read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEEPER, small_settings

from jitjax import checkpoint, cli, data, model, replay
from jitjax.diffusion import Diffusion
from jitjax.errors import UserError
from jitjax.geometry import geometry_of
from jitjax.pipeline import Pipeline
from jitjax.train import train


def contents(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Seven steps of 2 micro-batches on 8 devices, a checkpoint each, with dropout."""
    workdir = tmp_path_factory.mktemp("run")
    overrides = dict(batch_size=1, optim__accumulation_steps=2, model__proj_dropout=0.2, total_steps=7)
    train(small_settings(**overrides, checkpoint__every_steps=1, checkpoint__keep_last=9), workdir)
    return workdir


def test_a_step_is_the_runs_own(run, tmp_path, monkeypatch, capsys):
    """Bit for bit what the run logged, from the checkpoint before a damaged one; statistics that agree with the checkpoints on
    both sides of the step; nothing in the workdir touched."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    (workdir / "checkpoints" / "5" / "meta" / "metadata").write_text("damaged")
    before = contents(workdir)
    assert cli.main(["replay", str(workdir), "--step", "6", "--json"]) == 0
    assert contents(workdir) == before
    record = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").open()][5]
    assert record["from"] == 4 and record["logged"] == logged
    assert {name: record["metrics"][name] for name in replay.LOGGED} == {name: logged[name] for name in replay.LOGGED}

    assert np.mean([image["loss"] for image in record["images"]]) == pytest.approx(logged["train/loss"], rel=1e-6)
    norm = np.sqrt(sum(row["grad_norm"] ** 2 for row in record["layers"]))
    assert norm == pytest.approx(logged["train/grad_norm"], rel=1e-6)
    old, new = (checkpoint.load_weights(run / "checkpoints" / str(step)).params for step in (5, 6))
    for row in record["layers"]:
        names = [name for name in old if (name.rpartition(".")[0] or name) == row["layer"]]
        length = np.sqrt(sum(float(jnp.sum(old[name] ** 2)) for name in names))
        moved = np.sqrt(sum(float(jnp.sum((new[name] - old[name]) ** 2)) for name in names))
        assert row["param_norm"] == pytest.approx(length, rel=1e-5)
        assert row["update_ratio"] is None or row["update_ratio"] == pytest.approx(moved / length, rel=1e-3)
    assert {len(record["images"]), len({image["index"] for image in record["images"]})} == {16}
    assert all(f"/{image['file'].split('/')[-2]}/" in image["file"] for image in record["images"])

    lines = replay.report(record, worst=3)
    assert lines[1:3] == ["metrics.jsonl has the same numbers", "everything is finite"]
    shown = [float(line.split()[0]) for line in lines[-3:]]
    assert shown == pytest.approx(sorted((image["loss"] for image in record["images"]), reverse=True)[:3], rel=1e-3)


@pytest.mark.slow
def test_on_fewer_devices_the_same_within_rounding(run, monkeypatch):
    """Three devices here, of which two divide the 16 images: 8 micro-batches on each. From the run's beginning."""
    monkeypatch.setattr(replay.jax, "local_devices", lambda: jax.devices()[:3])
    monkeypatch.setattr(checkpoint, "steps_in", lambda folder: [])
    record = replay.replay(run, 2)
    assert record["from"] == 0 and len(record["images"]) == 16
    assert record["metrics"]["train/loss"] == pytest.approx(record["logged"]["train/loss"], rel=2e-6)
    assert record["metrics"]["train/grad_norm"] == pytest.approx(record["logged"]["train/grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_what_is_wrong_is_named(tmp_path, capsys):
    """Weights, all finite, with which images of one class overflow in block 1. The run skips and stops, and names its batch;
    the replay names the same files, the block, and the images of that class as those without a loss."""
    workdir, config = tmp_path / "run", small_settings(**DEEPER)
    geometry = geometry_of(config.model, 8, 8)
    params = dict(jax.jit(model.init_fn(geometry))(jax.random.key(1)))
    params["y_embedder.table"] = params["y_embedder.table"].at[2].set(3e38)
    params["blocks.1.adaln.kernel"] += 10
    Pipeline(geometry=geometry, diffusion=Diffusion(), weights={"model": params}, which="model").save(tmp_path / "bad")
    poisoned = small_settings(**DEEPER, init_from=str(tmp_path / "bad"), nan_limit=2, log__every_steps=1)
    with pytest.raises(UserError, match=r"not finite: 2 optimizer steps in a row .*replay .* --step 2` looks at it") as error:
        train(poisoned, workdir)
    named = json.loads((workdir / "bad_batch_00000002.json").read_text())
    assert str(workdir / "bad_batch_00000002.json") in str(error.value) and named["step"] == 2

    record = replay.replay(workdir, 2)
    assert [{key: image[key] for key in ("index", "file")} for image in record["images"]] == named["images"]
    dataset = data.open_dataset(str(workdir / "shapes"), 8)
    assert [image["label"] for image in record["images"]] == [int(dataset[i["index"]]["label"]) for i in record["images"]]
    bad = [image for image in record["images"] if not np.isfinite(image["loss"])]
    assert bad == [image for image in record["images"] if image["label"] == 2 and not image["label_dropped"]] != []
    assert next(row["at"] for row in record["activations"] if row["nonfinite"]) == "blocks.1.attn"
    assert all(row["update_ratio"] in (0, None) and row["param_nonfinite"] == 0 for row in record["layers"])
    text = "\n".join(replay.report(record))
    assert f"not finite: the loss of {len(bad)} of 16 images; activations, first at blocks.1.attn; gradients of" in text
    assert "The step changed nothing" in text and bad[0]["file"] in text


def test_a_step_behind_another_effective_batch_has_the_images_of_the_run(run, tmp_path):
    """7 steps of 16 images, then 2 of 32."""
    workdir, changed = shutil.copytree(run, tmp_path / "run"), dict(batch_size=2, optim__accumulation_steps=2, total_steps=9)
    settings = small_settings(**changed, model__proj_dropout=0.2, checkpoint__every_steps=1, checkpoint__keep_last=9)
    assert train(settings, workdir, accept_config_changes=True) == 0
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    for step in (8, 9):
        record = replay.replay(workdir, step)
        assert all(record["metrics"][name] == logged[step - 1][name] for name in replay.LOGGED)


def test_a_step_on_other_images_than_the_checkpoint_before_it(run, tmp_path):
    """A start that went on with changed images made it on those, and the next checkpoint says so."""
    workdir = shutil.copytree(run, tmp_path / "run")
    for step in (5, 6, 7):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    changed = shutil.copytree(workdir / "shapes", tmp_path / "changed") / "train"
    next(changed.rglob("*.png")).unlink()
    again = dict(batch_size=1, optim__accumulation_steps=2, model__proj_dropout=0.2, total_steps=7)
    again |= dict(data__synthetic="", data__path=str(changed), data__allow_changed=True)
    settings = small_settings(**again, checkpoint__every_steps=1, checkpoint__keep_last=9)
    assert train(settings, workdir, accept_config_changes=True) == 0
    logged, lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()], []
    record = replay.replay(workdir, 5, say=lines.append)
    assert all(record["metrics"][name] == logged[4][name] for name in replay.LOGGED)
    assert lines[0] == "the images changed between the checkpoints 4 and 5 and are taken as they were at the latter"
    with pytest.raises(UserError, match="does not hold the images that the run was trained on"):
        replay.replay(workdir, 4)


def test_a_step_before_every_checkpoint_is_compared_with_a_later_one(run, tmp_path):
    """Configuration, effective batch and images."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for step in range(1, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "checkpoints" / "6" / "meta" / "metadata").write_text("damaged")
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | {"effective_batch": 8, "seed": 1}))
    lines = []
    assert replay.replay(workdir, 1, say=lines.append)["from"] == 0
    assert lines[0].startswith("the configuration changed after checkpoint 7 and is taken as it is now: ")
    assert "seed: 0 -> 1" in lines[0] and "effective batch: 16 -> 8" in lines[0]
    next((workdir / "shapes").rglob("*.png")).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="does not hold the images that the run was trained on"):
            replay.replay(workdir, 1)
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)  # then by their number
    (workdir / "config.json").write_text(json.dumps(saved | {"data": saved["data"] | {"synthetic": ""}}))
    with pytest.raises(UserError, match="images that a script gave it"):
        replay.replay(workdir, 1)


def test_mistakes(run, tmp_path, capsys):
    for arguments, message in (
        ([str(run), "--step", "8"], "--step 8: the run has steps 1 to 7"),
        ([str(tmp_path), "--step", "1"], "config.json cannot be read"),
        ([str(run), "--step", "3", "--data_path", str(tmp_path / "other")], "does not hold the images that the run"),
    ):
        if "other" in arguments[-1]:
            shutil.copytree(run / "shapes", tmp_path / "other")
            next((tmp_path / "other").rglob("*.png")).unlink()
        assert cli.main(["replay", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
