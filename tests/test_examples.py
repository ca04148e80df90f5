"""What stands in docs/examples: the notebook runs from top to bottom and learns; data and a loss of one's own train a run."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import jitjax
from jitjax import data, diffusion
from jitjax.data.shapes import CLASSES
from jitjax.errors import UserError

FOLDER = ROOT / "docs" / "examples"
SMALL = {
    **{"model.depth": 1, "model.width": 32, "model.heads": 2, "model.bottleneck": 8, "model.context_length": 2},
    **{"model.context_start": 0, "batch_size": 2, "total_steps": 3, "preview.every_steps": None, "log.every_steps": 1},
}


def example(name):
    """The module of a script in docs/examples, under its own name, so that its classes can be pickled."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


AT_ITS_END = """
assert np.mean(losses[-10:]) < 0.35 * np.mean(losses[:10]), losses
red, blue = (drawn[k::2, 4:12, 4:12].mean((0, 1, 2)) for k in (0, 1))
assert red[0] > red[2] + 30 and blue[2] > blue[0] + 30, (red, blue)  # each class is drawn in its colour
assert predicted.shape == (4, 16, 16, 3)
"""


def test_the_notebook_runs_and_learns(tmp_path):
    """Its code cells as one program, on one device, as on a laptop. (Last lines are pictures, for a kernel to show.)"""
    notebook = json.loads((FOLDER / "training_on_arrays.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells), "run it and save it with its outputs"
    program = tmp_path / "training_on_arrays.py"
    program.write_text("\n".join(["".join(cell["source"]) for cell in cells] + [AT_ITS_END]))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "True\n" in done.stdout  # a pipeline that was saved and loaded samples the same


def test_own_data_trains_and_is_recognised(tmp_path):
    stripes = example("own_data")
    assert stripes.main(tmp_path / "run", **SMALL) == 0
    pipe = jitjax.load(tmp_path / "run")
    assert pipe.class_names == stripes.NAMES and len(losses(tmp_path / "run")) == 3
    changed = data.of_source(stripes.Stripes(), stripes.COUNT, image_size=16, checksum="2", class_names=stripes.NAMES)
    settings = jitjax.settings.from_mapping(json.loads((tmp_path / "run/config.json").read_text()), ignore_unknown=True)
    with pytest.raises(UserError, match="changed since the checkpoint"):
        jitjax.train.train(settings, tmp_path / "run", dataset=changed)


@pytest.mark.slow
def test_own_objective_is_what_is_minimised_and_remembered(tmp_path):
    huber = example("own_objective")
    small = SMALL | {"data.image_size": 8}
    assert huber.main(huber.pseudo_huber, tmp_path / "huber", **small) == 0
    settings = jitjax.settings.from_mapping(json.loads((tmp_path / "huber/config.json").read_text()), ignore_unknown=True)
    with pytest.raises(UserError, match="objective: pseudo_huber -> published"):
        jitjax.train.train(settings, tmp_path / "huber")
    # Step 1 of a trainer with the same seed and images gives the first loss of that run, and the published loss another.
    images, labels = first_batch(tmp_path / "huber" / "shapes" / "train", settings)
    for objective, equal in ((huber.pseudo_huber, True), (None, False)):
        trainer = jitjax.Trainer(settings, images=512, class_names=CLASSES, objective=objective)
        _, metrics = trainer.step(trainer.init(), images, labels)
        assert (abs(float(metrics["train/loss"]) / losses(tmp_path / "huber")[0] - 1) < 1e-5) == equal


def test_the_regulariser_is_the_dispersive_loss():
    """By the distances of all pairs, of activations that have much in common."""
    objective = example("own_objective")
    tokens = 3 + np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    x, t = jnp.zeros((4, 8, 8, 3)), jnp.zeros(4)
    added = objective.dispersive(x, x, x, t, {"blocks.2.attn": jnp.asarray(tokens)}) - objective.published(x, x, x, t)
    apart = np.mean(np.square(tokens[:, None] - tokens[None]), axis=(2, 3))
    np.testing.assert_allclose(added, 0.5 * np.log(np.mean(np.exp(-2 * apart), axis=1)), rtol=1e-4)


@pytest.mark.slow
def test_a_regulariser_gets_activations_and_moves_the_weights():
    """Its gradient goes through the activations it asked for, also under rematerialisation; what cannot be had is refused."""
    dispersive = example("own_objective").dispersive
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    settings = SMALL | {"data.image_size": 8, "dtype": "float32", "model.depth": 3, "remat": "full"}
    trainers = [jitjax.Trainer(settings, images=64, objective=objective) for objective in (dispersive, None)]
    params, key = trainers[0].init().params, jax.random.key(1)
    gradients = [jax.grad(lambda p: t.loss(p, images, None, key).mean())(params) for t in trainers]  # noqa: B023
    with_it, without = (float(jnp.max(jnp.abs(g["patch_embed.proj2.kernel"]))) for g in gradients)
    assert without < 1e-9 < with_it  # a fresh last layer is zero, and so are the gates
    with pytest.raises(UserError, match="asks for blocks.2.attn, which a model of depth 1 does not have"):
        shallow = jitjax.Trainer(SMALL | {"data.image_size": 8}, images=64, objective=dispersive)
        shallow.loss(shallow.init().params, images, None, key)


@pytest.mark.parametrize("class_loss", [0, 100])
@pytest.mark.parametrize(
    ("reduced", "what"),
    [
        (lambda error: jnp.mean(error), r"an array of shape \(\) and type float32"),
        (lambda error: jnp.mean(error, axis=(1, 2)), r"an array of shape \(2, 3\) and type float32"),
        (lambda error: jnp.mean(error, axis=(1, 2, 3)).astype(int), r"an array of shape \(2,\) and type int32"),
        (lambda error: (jnp.mean(error, axis=(1, 2, 3)), {}), "a tuple"),
        (lambda error: None, "a NoneType"),
    ],
)
def test_an_objective_that_gives_no_number_per_image_is_refused(reduced, what, class_loss):
    """Means and sums over images would take it, and eval/loss be wrong."""

    def objective(output, x, e, t):
        return reduced(jnp.square(output - x))

    settings = SMALL | {"data.image_size": 8, "model.depth": 2, "model.context_start": 1}
    settings |= {"model.class_conditional": True, "model.class_loss": class_loss}
    trainer = jitjax.Trainer(settings, images=64, num_classes=5, objective=objective)
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, int)
    with pytest.raises(UserError, match=f"the objective returns {what} for 2 images: .* number per image"):
        trainer.loss(trainer.init().params, images, labels, jax.random.key(0))


def first_batch(path, settings):
    dataset = data.open_dataset(path, settings.data.image_size)
    batches = data.make_iterator(dataset, seed=0, global_batch=2 * jax.device_count())
    batch = next(batches)
    batches.close()
    return batch["image"], batch["label"]


def test_trainer_refuses_arrays_that_are_no_effective_batch():
    trainer = jitjax.Trainer(SMALL | {"data.image_size": 8}, images=64, num_classes=2)
    images, labels = np.zeros((trainer.plan.global_batch, 8, 8, 3), np.uint8), np.ones(trainer.plan.global_batch, int)
    for bad in ((images[1:], labels), (images.astype(np.float32), labels), (images, labels + 1), (images, None)):
        with pytest.raises(UserError, match="images: one effective batch is|whole numbers in"):
            trainer.step(trainer.init(), *bad)
    with pytest.raises(UserError, match="exactly one run length"):
        jitjax.Trainer({"optim.schedule": "cosine"}, images=64)


def test_trainer_loss_refuses_what_the_step_refuses_and_is_differentiable_under_jit():
    trainer = jitjax.Trainer(SMALL | {"data.image_size": 8, "dtype": "float32"}, images=64, num_classes=2)
    images, labels, key = np.zeros((3, 8, 8, 3), np.uint8), np.array([0, 1, 1]), jax.random.key(0)
    params = trainer.init().params
    for bad in ((images / 255, labels), (images[:, 1:], labels), (images, labels + 1), (images, labels[1:]), (images, None)):
        with pytest.raises(UserError, match="images: a batch is|whole numbers in"):
            trainer.loss(params, *bad, key)
    expected = trainer.loss(params, images, labels, key)
    np.testing.assert_allclose(jax.jit(trainer.loss)(params, images, labels, key), expected, rtol=1e-5)


def test_trainer_takes_its_classes_from_settings_or_argument_and_refuses_contradictions():
    settings = SMALL | {"data.image_size": 8}
    labelled = jitjax.Trainer(settings | {"model.class_conditional": True, "model.num_classes": 4}, images=64)
    assert labelled.geometry.num_classes == 4 and labelled.settings.model.class_conditional
    for more, arguments in (
        ({"model.num_classes": 10}, {"num_classes": 4}),
        ({}, {"num_classes": 7, "class_names": ("a", "b")}),
        ({"model.class_conditional": True}, {}),
    ):
        with pytest.raises(UserError, match="contradict each other|needs a number of classes"):
            jitjax.Trainer(settings | more, images=64, **arguments)
    without = jitjax.Trainer(settings, images=64)
    images, params = np.zeros((2, 8, 8, 3), np.uint8), without.init().params
    for labels in (None, [0, 0]):  # zeros are what a data set without classes gives
        assert without.loss(params, images, labels, jax.random.key(0)).shape == (2,)
    with pytest.raises(UserError, match="training without labels"):
        without.loss(params, images, [0, 1], jax.random.key(0))


def test_trainer_begins_from_init_from_and_says_so_of_a_young_ema(tmp_path, caplog):
    settings = SMALL | {"data.image_size": 8, "dtype": "float32", "optim.ema_decays": (0.9999,)}
    trainer = jitjax.Trainer(settings, images=64)
    state, _ = trainer.step(trainer.init(), np.zeros((trainer.plan.global_batch, 8, 8, 3), np.uint8))
    pipe = trainer.pipeline(state)
    assert any("EMA 0.9999 is 100% first weights after 1 steps" in note for note in pipe.notes)
    pipe.save(tmp_path / "saved", samples=0)
    caplog.clear()
    tuned = jitjax.Trainer(settings | {"init_from": str(tmp_path / "saved"), "seed": 7}, images=64).init()
    name = "blocks.0.attn.qkv.kernel"
    np.testing.assert_array_equal(tuned.params[name], pipe.weights["model"][name])
    assert "parameters loaded" in caplog.text
    with pytest.raises(UserError, match="no such file or folder"):
        jitjax.Trainer(settings | {"init_from": str(tmp_path / "nothing")}, images=64).init()


def test_arrays_as_a_data_set():
    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    found = data.of_arrays(images, [1, 0, 1, 1], ("a", "b"))
    assert (len(found), found.num_classes, int(found[2]["label"])) == (4, 2, 1)
    np.testing.assert_array_equal(found[2]["image"], images[2])
    assert data.of_arrays(images, [1, 0, 1, 0], ("a", "b")).fingerprint != found.fingerprint
    for arrays in ((images / 255,), (images[:, :4],), (images, [0, 1]), (images, [0, 1, 2, 0], ("a", "b")), (images, [0] * 4)):
        with pytest.raises(UserError, match="images: |labels: "):
            data.of_arrays(*arrays)
    with pytest.raises(UserError, match=r"labels: one whole number for each of 4 images is needed, these are \(4,\) float64"):
        data.of_arrays(images, [0.0, 1.0, 0.0, 1.0], ("a", "b"))
    with pytest.raises(UserError, match="class_names: 'a' is there twice"):
        data.of_arrays(images, [0, 1, 0, 1], ("a", "a"))


def test_a_source_that_returns_nothing_is_named():
    class Silent(example("own_data").Stripes):
        def read(self, indices, images, labels):
            super().read(indices, images, labels)

    with pytest.raises(UserError, match=r"own data: read\(\) returned None: a list of \(k, reason\) is needed"):
        data.of_source(Silent(), 8, image_size=16, checksum="1")[0]


def test_a_label_without_a_name_ends_the_run():
    """A network would take it for another class without a word."""
    stripes = example("own_data")
    few = data.of_source(stripes.Stripes(), 8, image_size=16, checksum="1", class_names=stripes.NAMES[:1])
    assert int(few[0]["label"]) == 0
    with pytest.raises(UserError, match="stripes 1 has label 1, and class_names has 1 names"):
        few[1]


@pytest.mark.slow
def test_objective_sees_what_made_the_networks_input():
    """With the identity as a network (x-prediction of z), the objective can rebuild z from its arguments."""
    seen = {}

    def objective(output, x, e, t):
        seen.update(z=diffusion.noised(x, e, t), x=x)
        return jnp.mean(jnp.square(output - x), axis=(1, 2, 3))

    trainer = jitjax.Trainer(SMALL | {"data.image_size": 8, "dtype": "float32"}, images=64, objective=objective)
    with jax.disable_jit():
        loss = trainer.loss(trainer.init().params, np.full((2, 8, 8, 3), 255, np.uint8), np.zeros(2, int), jax.random.key(0))
    np.testing.assert_allclose(seen["x"], 1.0)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-5)  # a fresh network predicts 0 for images of 1
    assert float(jnp.std(seen["z"])) > 0.1


def test_nearest_finds_planted_copies(tmp_path, capsys):
    """Three of six samples are training images: at no distance, the right ones, and shown; the others are nothing special."""
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 256, (12, 16, 16, 3), np.uint8) for name in ("train", "val", "samples")}
    for name in ("train", "val"):
        (tmp_path / name / "one").mkdir(parents=True)
        for k, picture in enumerate(pictures[name]):
            Image.fromarray(picture).save(tmp_path / name / "one" / f"{k:02}.png")
    samples = np.concatenate([pictures["train"][[7, 0, 11]], pictures["samples"][:3]])
    np.savez(tmp_path / "samples.npz", arr_0=samples)

    def stream(batches):
        return ({"features": batch.reshape(len(batch), -1).astype(np.float32)} for batch in batches)

    distance, which = example("nearest").main(
        tmp_path / "samples.npz",
        tmp_path / "train",
        tmp_path / "val",
        tmp_path / "pairs.png",
        SimpleNamespace(name="pixels", stream=stream),
    )
    assert which[:3].tolist() == [7, 0, 11] and not distance[:3].any() and distance[3:].min() > 1000
    with Image.open(tmp_path / "pairs.png") as shown:
        shown = np.asarray(shown)
    assert shown.shape == (32, 6 * 16, 3) and np.array_equal(shown[:16, :48], shown[16:, :48])
    printed = capsys.readouterr().out
    assert "6 samples, 12 training images, 12 held-out ones; pixels" in printed and "samples: 0.00, 0.00" in printed
