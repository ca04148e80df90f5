"""The pipeline: what is saved is loaded, images depend on (seed, index, label) alone, what does not fit is refused."""

import dataclasses
import errno
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_settings
from PIL import Image

import jitjax
from jitjax import atomic, cli, convert, draw, model, pipeline
from jitjax.data.shapes import CLASSES
from jitjax.diffusion import Diffusion
from jitjax.errors import UserError
from jitjax.geometry import make_geometry
from jitjax.train import train

NAMES = ("cat", "dog", "bird", "œuvre", "猫")
FAST = dict(steps=3, batch_size=8)


def make_pipe(prediction="x", names=NAMES, seed=0):
    geometry = make_geometry(
        "JiT-nano/4", 8, len(names) or 0, depth=2, width=32, heads=2, bottleneck=8, context_length=2, context_start=1
    )
    params = jax.jit(model.init_fn(geometry))(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    noisy = {n: v + 0.1 * jax.random.normal(k, v.shape) for (n, v), k in zip(params.items(), keys, strict=True)}
    half, tenth = ({name: value / k for name, value in noisy.items()} for k in (2, 10))
    process = Diffusion(prediction=prediction, noise_scale=1.5, t_eps=0.03, sample_t_eps=0.04)
    return pipeline.Pipeline(geometry, process, {"model": noisy, "0.9999": half, "0.9996": tenth}, "0.9999", tuple(names))


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def test_saved_and_loaded_whole(pipe, tmp_path):
    for prediction in ("x", "epsilon", "v"):
        made = make_pipe(prediction)
        made.save(tmp_path / prediction)
        written = sorted(p.name for p in (tmp_path / prediction).iterdir())
        assert written == ["README.md", "config.json", "model.safetensors"]
        back = jitjax.load(tmp_path / prediction)
        assert (back.geometry, back.diffusion, back.class_names) == (made.geometry, made.diffusion, made.class_names)
        assert list(back.weights) == list(made.weights) and back.which == "0.9999"
        for name, params in made.weights.items():
            for key, value in params.items():
                np.testing.assert_array_equal(back.weights[name][key], value)
    np.testing.assert_array_equal(back.sample([0, 4], **FAST), made.sample(["cat", "猫"], **FAST))


def test_a_run_becomes_a_pipeline_with_everything(tmp_path):
    settings = small_settings(total_steps=2, prediction="v", diffusion__noise_scale=0.5, preview__t_eps=0.02)
    assert train(settings, tmp_path / "run") == 0
    pipe = jitjax.load(tmp_path / "run")
    assert pipe.diffusion == Diffusion("v", 0.5, 0.05, 0.02) and pipe.step == 2
    assert pipe.class_names == CLASSES
    assert list(pipe.weights) == ["model", "0.9", "0.5"] and pipe.which == "0.9"
    same = jitjax.load(tmp_path / "run" / "checkpoints" / "2", which="model_ema2")
    assert same.which == "0.5"
    with pytest.raises(UserError, match="predicts v, and whoever reads"):
        convert.main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "a.pth")])
    with pytest.raises(UserError, match=r"init_from=.* predicts v, this run predicts x: set --config.prediction=v"):
        train(small_settings(total_steps=1, init_from=str(tmp_path / "run")), tmp_path / "other")
    with pytest.raises(UserError, match=r"init_from=.* is a model of width .*, this run's is 96: set --config.model.name"):
        wide = small_settings(total_steps=1, init_from=str(tmp_path / "run"), model__width=96, prediction="v")
        train(wide, tmp_path / "other")
    pipe.save(tmp_path / "exported")  # an exported folder starts a run as its workdir does
    assert jitjax.load(tmp_path / "exported").which == "0.9"
    assert jitjax.load(same.save(tmp_path / "second", samples=0)).which == "0.5"  # the EMA in use comes first
    assert jitjax.load(pipe.using("model").save(tmp_path / "raw", samples=0)).which == "0.9"
    settings = dataclasses.replace(settings, init_from=str(tmp_path / "exported"))
    assert train(settings, tmp_path / "b") == 0


def test_images_depend_on_seed_index_and_label_alone(pipe):
    labels = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    options = dict(steps=3, cfg_scale=2.0, interval=(0.1, 1.0))
    whole = pipe.sample(labels, batch_size=16, **options)
    assert whole.shape == (11, 8, 8, 3) and whole.dtype == np.uint8
    small = pipe.sample(labels, batch_size=8, **options)
    assert np.abs(whole.astype(int) - small).max() <= 1  # rounding differs between batch sizes
    (indices, last), *_ = pipe.sample_batches([labels[9]], indices=[9], **options)
    assert indices == [9] and np.abs(last[0].astype(int) - whole[9]).max() <= 1
    assert np.abs(pipe.sample(labels[:1], seed=1, **options).astype(int) - whole[:1]).max() > 8
    assert np.abs(whole[0].astype(int) - whole[5]).max() > 8  # the same label, another index


def test_one_device_draws_what_eight_draw(pipe, monkeypatch):
    eight = pipe.sample([0, 1, 2], **FAST)
    one = jax.devices()[:1]
    monkeypatch.setattr(pipeline.sharding.jax, "devices", lambda *_: one)
    assert np.abs(pipe.sample([0, 1, 2], **FAST).astype(int) - eight).max() <= 1


def test_the_prediction_type_is_used():
    """The same weights read as x, epsilon and v give three different pictures."""
    pictures = [make_pipe(p).sample([1], **FAST).astype(int) for p in ("x", "epsilon", "v")]
    assert min(np.abs(a - b).mean() for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True)) > 5


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(labels=[5]), r"label 5 is out of range: this model has classes \[0, 5\)"),
        (dict(labels=[-3]), r"label -3 is out of range"),
        (dict(labels=[1.5]), r"label 1.5: must be a whole number or a class name"),
        (dict(labels=[True]), r"label True: must be"),
        (dict(labels=["catt"]), r"'catt' is none of the 5 classes of this model; near: cat"),
        (dict(labels=["7"]), r"label 7 is out of range"),
        (dict(labels=[0], steps=0), r"steps=0: must be a whole number in \[1"),
        (dict(labels=[0], steps=2.5), r"steps=2.5: must be"),
        (dict(labels=[0], interval=(0.9, 0.1)), r"interval=\(0.9,0.1\): the first time must be smaller"),
        (dict(labels=[0], method="rk45"), r"method=rk45: must be one of"),
        (dict(labels=[0], cfg_scale=float("nan")), r"cfg_scale=nan: must be a number"),
        (dict(labels=[0], guidance=2.0), r"guidance is no option of the sampler"),
        (dict(labels=[0], batch_size=0), r"batch_size=0: must be a whole number"),
        (dict(labels=[0], seed=-1), r"seed=-1: must be a whole number"),
        (dict(labels=[0], dtype="int8"), r"dtype=int8: must be one of"),
        (dict(labels=[0, 1], num=3), r"num=3 with 2 labels"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipe, call, message):
    with pytest.raises(UserError, match=message) as error:
        pipe.sample(**call)
    assert "\n" not in str(error.value)


def test_a_model_without_classes(tmp_path):
    pipe = make_pipe(names=())
    assert pipe.sample(num=3, **FAST).shape == (3, 8, 8, 3)
    with pytest.raises(UserError, match="trained without classes"):
        pipe.sample([0])
    with pytest.raises(UserError, match="guidance needs a model with classes"):
        pipe.sample(num=1, cfg_scale=2.0)


def test_a_model_trained_without_labels_has_no_classes_to_draw_although_it_has_their_embeddings(tmp_path):
    """Only the null class of the embedding is trained; in every form that the weights may take."""
    settings = small_settings(total_steps=1, model__class_conditional=False, model__num_classes=8)
    assert train(settings, tmp_path / "run") == 0
    jitjax.load(tmp_path / "run").save(tmp_path / "exported")
    convert.main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "one.safetensors")])
    convert.main(["--from", str(tmp_path / "one.safetensors"), "--to", str(tmp_path / "again")])
    for form in ("run", "exported", "one.safetensors", "again"):
        pipe = jitjax.load(tmp_path / form)
        assert (pipe.geometry.num_classes, pipe.classes, draw.label_numbers(pipe, "all", 3)) == (8, 0, [8, 8, 8])
        with pytest.raises(UserError, match="trained without classes"):
            pipe.sample([0])
        with pytest.raises(UserError, match="guidance needs a model with classes"):
            pipe.sample(num=1, cfg_scale=2.0)
    assert "without classes" in (tmp_path / "exported" / "README.md").read_text()


def test_no_such_weights(pipe, tmp_path):
    with pytest.raises(UserError, match="no weights '0.5': use one of model, 0.9999"):
        pipe.using("0.5")
    with pytest.raises(UserError, match="no such file or folder"):
        jitjax.load(tmp_path / "nowhere")
    assert pipe.using("params").which == pipe.using("raw").which == "model" and pipe.using("model_ema1").which == "0.9999"


def test_the_network_itself(pipe):
    net = pipe.using("model").model()
    z = jnp.ones((2, 8, 8, 3))
    assert net(z, jnp.array([0.3, 0.6]), jnp.array([1, 5])).shape == z.shape


# ---------------------------------------------------------------- jitjax sample


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    return str(pipe.save(tmp_path_factory.mktemp("exported") / "m"))


def test_sample_writes_a_grid_a_folder_and_an_npz(pipe, exported, tmp_path, capsys):
    common = [exported, "--steps=2", "--num=10", "--cfg_scale=2"]
    assert cli.main(["sample", *common, f"--out={tmp_path / 'grid.png'}"]) == 0
    assert re.search(r"10 images in [\d.]+ s with compilation -> ", capsys.readouterr().out)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 8 * 3
    assert cli.main(["sample", *common, f"--out={tmp_path / 'folder'}"]) == 0
    assert cli.main(["sample", *common, f"--out={tmp_path / 'all.npz'}"]) == 0
    with np.load(tmp_path / "all.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # class-balanced, in the official order
    pngs = sorted((tmp_path / "folder").glob("*.png"))
    assert [p.name for p in pngs] == [f"{i:05d}.png" for i in range(10)]
    np.testing.assert_array_equal(images, [np.asarray(Image.open(p)) for p in pngs])
    np.testing.assert_array_equal(images, pipe.sample(labels.tolist(), steps=2, cfg_scale=2.0))
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


def test_an_interrupted_sample_continues(exported, tmp_path, capsys, monkeypatch):
    """Stopped after a batch, the same command draws the rest, and the result is that of an uninterrupted one."""
    for out in ("folder", "all.npz"):
        argv = ["sample", exported, "--steps=2", "--num=20", "--batch_size=8", f"--out={tmp_path / out}"]
        assert cli.main([*argv[:-1], f"--out={tmp_path / ('whole_' + out)}"]) == 0
        sink = draw.Npz if out.endswith("npz") else draw.Folder
        write = sink.write

        def once(self, indices, images, write=write):
            write(self, indices, images)
            raise KeyboardInterrupt

        monkeypatch.setattr(sink, "write", once)
        assert cli.main(argv) == 130
        monkeypatch.setattr(sink, "write", write)
        capsys.readouterr()
        assert cli.main([*argv, "--seed=1"]) == 2  # another set of images is not mixed in
        assert "seed: 0 -> 1" in capsys.readouterr().err
        assert cli.main(argv) == 0
        said = r"12 images \(8 were there\) in [\d.]+ s: [\d.]+ s for the first 8 with compilation, then [\d.]+ images/s -> "
        assert re.search(said, capsys.readouterr().out)
    with np.load(tmp_path / "all.npz") as a, np.load(tmp_path / "whole_all.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    for i in range(20):
        assert (tmp_path / f"folder/{i:05d}.png").read_bytes() == (tmp_path / f"whole_folder/{i:05d}.png").read_bytes()
    record = json.loads((tmp_path / "folder" / draw.RECORD).read_text())
    assert record["num"] == 20 and record["class_names"] == list(NAMES)


def test_images_of_an_interrupted_sample_that_were_deleted_are_drawn_again(exported, tmp_path, monkeypatch):
    """Also if the next call is interrupted before its first batch."""
    argv, write = ["sample", exported, "--steps=1", "--num=6", "--batch_size=2"], draw.Npz.write
    for writes in (write, lambda *_: None):

        def once(*arguments, writes=writes):
            writes(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(draw.Npz, "write", once)
        assert cli.main([*argv, f"--out={tmp_path / 'a.npz'}"]) == 130
        if writes is write:
            (tmp_path / ".a.npz.partial.npy").unlink()
    monkeypatch.setattr(draw.Npz, "write", write)
    for name in ("a.npz", "whole.npz"):
        assert cli.main([*argv, f"--out={tmp_path / name}"]) == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "whole.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


def test_sample_replaces_its_own_files_only(exported, tmp_path, capsys):
    """Pictures of others stay; a folder's PNGs that are empty or cut are drawn again; a mistake leaves nothing behind."""
    common, folder = ["sample", exported, "--steps=1", "--num=3"], tmp_path / "folder"
    for mistake in ("--seed=-1", "--cfg_scale=nan", "--method=x", "--batch_size=0"):
        for out in (folder, tmp_path / "x.npz"):
            assert cli.main([*common, mistake, f"--out={out}"]) == 2
    assert not list(tmp_path.iterdir())
    assert cli.main([*common, f"--out={folder}"]) == 0
    whole = [(folder / f"{i:05d}.png").read_bytes() for i in range(3)]
    (folder / "00000.png").write_bytes(b"")
    (folder / "00002.png").write_bytes(whole[2][:100])
    assert cli.main([*common, f"--out={folder}"]) == 0
    assert "2 images (1 were there)" in capsys.readouterr().out
    middle = len(whole[1]) // 2
    (folder / "00001.png").write_bytes(whole[1][:middle] + bytes([255 - whole[1][middle]]) + whole[1][middle + 1 :])
    assert cli.main([*common, f"--out={folder}"]) == 0
    assert "1 images (2 were there)" in capsys.readouterr().out
    assert [(folder / f"{i:05d}.png").read_bytes() for i in range(3)] == whole
    for name in ("grid.png", "film.gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        mine, flags = (tmp_path / name).read_bytes(), [f"--out={tmp_path / 'g2.png'}", f"--path={tmp_path / name}"]
        assert cli.main([*common, *(flags if name == "film.gif" else [f"--out={tmp_path / name}"])]) == 2
        assert f"{name} exists and is no picture of jitjax's" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == mine
        (tmp_path / name).unlink()
    (tmp_path / "new.txt").write_text("my notes\n")
    assert cli.main([*common, f"--out={tmp_path / 'new.png'}"]) == 2
    assert "new.txt, which is no such list" in capsys.readouterr().err
    (tmp_path / "new.txt").write_text("0\ta name\n")
    assert cli.main([*common, f"--out={tmp_path / 'new.png'}"]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert cli.main([*common, f"--out={tmp_path / 'grid.png'}", f"--path={tmp_path / 'film.gif'}"]) == 0


def test_a_number_is_a_name_where_classes_have_numbers_for_names(pipe):
    """As in a set with the folders 1, 2, 3, ...: 0 could mean the first class, and 1 the second."""
    count = pipe.geometry.num_classes
    numbered = dataclasses.replace(pipe, class_names=tuple(str(k + 1) for k in range(count)))
    assert [numbered.label_of("1"), numbered.label_of(str(count)), numbered.label_of(0)] == [0, count - 1, 0]
    with pytest.raises(UserError, match=r"label '0': the classes of this model have numbers for names \(1, 2"):
        numbered.label_of("0")
    assert dataclasses.replace(pipe, class_names=()).label_of("0") == 0


def test_a_disk_that_is_full_costs_one_line(exported, tmp_path, capsys, monkeypatch):
    """/dev/full takes no byte."""
    for name, flags in (("grid.png", []), ("film.gif", [f"--out={tmp_path / 'g.png'}"])):
        flag = "--path" if flags else "--out"

        def create(partial, name=name):
            partial.symlink_to("/dev/full") if partial.name.startswith(f".{name}") else partial.touch()

        monkeypatch.setattr(atomic, "_create", create)
        assert cli.main(["sample", exported, "--steps=1", "--num=3", *flags, f"{flag}={tmp_path / name}"]) == 2
        said = capsys.readouterr().err
        assert f"{name} cannot be written (No space left on device)" in said and said.count("\n") == 1


def test_an_npz_has_its_space_before_it_is_written_to(exported, tmp_path, capsys, monkeypatch):
    """A mapped file without space on the disk would end the process with SIGBUS."""
    argv = ["sample", exported, "--steps=1", "--num=40", "--batch_size=8", f"--out={tmp_path / 'a.npz'}"]

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((os, "posix_fallocate"), (np.lib.format, "open_memmap")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert "a.npz cannot be written (No space left on device)" in said and said.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def stop(sink, *_):
        file = os.stat(sink._partial)
        assert 512 * file.st_blocks >= file.st_size > 40 * 8 * 8 * 3
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(draw.Npz, "write", stop)
        assert cli.main(argv) == 130
    with monkeypatch.context() as patch:  # a file system that cannot reserve
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "not supported")))
        assert cli.main(argv) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_an_npz_that_was_killed_while_it_tidied_up(exported, tmp_path, capsys, monkeypatch):
    argv = ["sample", exported, "--steps=1", "--num=3", f"--out={tmp_path / 'a.npz'}"]
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(argv) == 130
    whole = (tmp_path / "a.npz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
    assert cli.main([*argv, "--seed=1"]) == 2 and "seed: 0 -> 1" in capsys.readouterr().err
    assert cli.main(argv) == 0 and "0 images (3 were there)" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"] and (tmp_path / "a.npz").read_bytes() == whole
    assert cli.main(argv) == 2 and "a.npz exists already" in capsys.readouterr().err


def test_what_an_interrupted_npz_left_may_be_damaged(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw, "describe", lambda *_: {"a": 1})
    argv = ["sample", exported, "--steps=1", "--num=3", f"--out={tmp_path / 'a.npz'}"]
    array, log = tmp_path / ".a.npz.partial.npy", tmp_path / ".a.npz.partial.json"
    good = '{"a": 1, "done": [0]}'
    for content, size in (("{}", 9999), ("[]", 9999), ('{"a": 1, "done": [7]}', 9999), (good, 300), (good, 20), ("[", 9999)):
        np.save(array, np.zeros((3, 8, 8, 3), np.uint8))
        array.write_bytes(array.read_bytes()[:size])
        log.write_text(content)
        assert cli.main(argv) == 2
        assert "delete" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--path=x.png", "--out=x.png"], "--path=x.png is --out too"),
        (["--steps=0", "--out=x.png"], "argument --steps: 0 must be 1 or more"),
        (["--seed=-1", "--out=x.png"], "argument --seed: -1 must be 0 or more"),
        (["--path=/dev/null/x.gif", "--out=x.png"], "--path: the folder /dev/null cannot be made"),
        (["--labels=9", "--out=x.png"], "label 9 is out of range"),
        (["--labels=catt", "--out=x.png"], "near: cat"),
        (["--labels=--5", "--out=x.png"], "label '--5' is none of the"),
        (["--labels=²", "--out=x.png"], "label '²' is none of the"),
        (["--path=x/00000.png", "--out=x"], "--path=x/00000.png lies among the images of --out=x"),
        (["--which=0.5", "--out=x.png"], "no weights '0.5'"),
        (["--num=0", "--out=x.png"], "--num=0: must be at least 1"),
        (["--out=/proc/x.npz"], "--out=/proc/x.npz cannot be written (No such file or directory)"),
        (["--out=x.jpg"], "--out=x.jpg: use FILE.png, FILE.npz, or a folder"),
        (["--interval=0.9,0.1", "--out=x.png"], "the first time must be smaller"),
        (["--interval=0.9", "--out=x.png"], "give two times"),
        (["--num=5000", "--out=x.png"], "do not fit into one grid"),
    ],
)
def test_sample_mistakes(exported, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", exported, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
