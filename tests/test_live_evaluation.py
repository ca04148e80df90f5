"""Scores during training, the best checkpoint, power-function EMAs in a run, and the sweep's search."""

import errno
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from conftest import small_settings

import jitjax
from jitjax import atomic, checkpoint, cli, ema, manifest, processes, sweep
from jitjax import data as data_lib
from jitjax import settings as settings_lib
from jitjax.data.shapes import draw_dataset
from jitjax.errors import UserError
from jitjax.evaluation import higher_is_better, live
from jitjax.prepare import prepare
from jitjax.train import train

EXTRACTOR = str(Path(__file__).parent / "mean_colour.onnx")  # the mean colour of an image: three features
SCORED = dict(eval__every_steps=2, eval__num_images=16, eval__steps=2, eval__batch_size=1, eval__extractor=EXTRACTOR)
RUN = dict(total_steps=6, optim__power_emas=(0.05, 0.1), checkpoint__keep_last=1, checkpoint__ema_every_steps=1)


def scoring(metric):
    """What decides which score is the best."""
    evaluation = live.LiveEvaluation.__new__(live.LiveEvaluation)
    evaluation.metric, evaluation.how = metric, "so"
    return evaluation


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    workdir = tmp_path_factory.mktemp("scored")
    shapes = str(draw_dataset(tmp_path_factory.mktemp("held_out") / "shapes", image_size=8) / "train")
    assert train(small_settings(**RUN, **SCORED, eval__held_out=shapes, eval__metric="mind"), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def unscored(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unscored")
    assert train(small_settings(**RUN), workdir) == 0
    return workdir


def test_evaluation_does_not_touch_the_run(scored, unscored):
    """Losses, norms, weights and EMAs are the same with and without it, bit for bit."""
    keys = ("step", "train/loss", "train/learning_rate", "train/grad_norm")
    assert [[m[k] for k in keys] for m in metrics(scored)] == [[m[k] for k in keys] for m in metrics(unscored)]
    chex.assert_trees_all_equal(jitjax.load(scored).weights, jitjax.load(unscored).weights)


def test_scores_are_written_and_the_best_checkpoint_stays(scored):
    lines = [json.loads(line) for line in (scored / "scores.jsonl").read_text().splitlines()]
    assert [(line["step"], line["ema"]) for line in lines] == [(2, "power:0.05"), (4, "power:0.05"), (6, "power:0.05")]
    assert all({"eval/mind", "eval/kid", "eval/seam_index", "eval/loss"} <= line.keys() for line in lines)
    buckets = [value for name, value in lines[-1].items() if name.startswith("eval/loss_t")]
    assert len(buckets) == 5 and np.mean(buckets) == pytest.approx(lines[-1]["eval/loss"])
    best = min(lines, key=lambda line: line["eval/mind"])
    how = "16 images of EMA power:0.05 against 512 images of mean"
    assert all(how in line["how"] and "steps 2, method abm2" in line["how"] for line in lines)
    expected = {"step": best["step"], "metric": "eval/mind", "value": best["eval/mind"], "how": best["how"]}
    assert json.loads((scored / "best.json").read_text()) == expected
    steps = {int(path.name) for path in (scored / "checkpoints").iterdir()}
    assert steps == {best["step"], 6}  # keep_last is 1
    assert jitjax.load(scored / "checkpoints/best").step == jitjax.load(scored / "best").step == best["step"]


def test_scores_are_of_the_first_power_function_ema_unless_another_is_named(scored, tmp_path, capsys):
    argv = ["evaluate", str(scored), f"--reference={scored / 'shapes/train'}", "--num=8", "--steps=1"]
    argv.append(f"--extractor={EXTRACTOR}")
    for flags, which in (([], "power:0.05"), (["--which=0.5"], "0.5")):
        assert cli.main([*argv, *flags, f"--json={tmp_path / 'scores.json'}"]) == 0
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["weights"] == which
        depends = ("t_eps", "steps", "method", "grid", "cfg_scale", "labels", "dtype")
        assert [found[name] for name in depends] == [0.05, 1, "heun", "uniform", 1.0, "all", "float32"]
        assert "t_eps 0.05" in capsys.readouterr().out
    capsys.readouterr()
    assert list(jitjax.load(scored).weights) == ["model", "power:0.05", "power:0.1", "0.9", "0.5"]
    settings_lib.check(small_settings(optim__power_emas=(0.1,), eval__which="0.5"))
    with pytest.raises(UserError, match="eval.which=0.7: not among the run's EMAs power:0.1, 0.9, 0.5"):
        settings_lib.check(small_settings(optim__power_emas=(0.1,), eval__which="0.7"))


def test_any_ema_length_is_rebuilt_from_a_runs_snapshots(scored):
    """The directly tracked EMA comes out of its own snapshots, and lengths between the two lie between them."""
    pipe = jitjax.load(scored)
    assert "power:0.1" in pipe.weights and len(ema.find_snapshots(scored / "ema")) == 12
    name = "final.linear.kernel"
    rebuilt = jitjax.load(scored, "power:0.08")
    assert rebuilt.which == "power:0.08" and "off" in rebuilt.notes[-1]
    low, mid, high = (np.asarray(p[name]) for p in (pipe.weights["power:0.05"], rebuilt.params, pipe.weights["power:0.1"]))
    raw = np.asarray(pipe.weights["model"][name])
    assert np.linalg.norm(low - raw) < np.linalg.norm(mid - raw) < np.linalg.norm(high - raw)
    assert rebuilt.sample([0], steps=1, batch_size=8).shape == (1, 8, 8, 3)


def test_power_function_emas_are_saved_too_and_left_out_where_a_format_has_no_place(scored, tmp_path, capsys):
    run = jitjax.load(scored, "power:0.08")
    back = jitjax.load(run.save(tmp_path / "exported"))
    assert list(back.weights) == ["model", "power:0.08", "power:0.05", "power:0.1", "0.9", "0.5"] and back.which == "power:0.08"
    for name, params in run.weights.items():
        chex.assert_trees_all_equal(back.weights[name], jax.device_get(params))
    assert "EMA power:0.08 unless another is asked for" in (tmp_path / "exported/README.md").read_text()
    assert back.using("model_ema1").which == "0.9"
    for target, sets in ((tmp_path / "whole.pth", "model, model_ema1, model_ema2"), (tmp_path / "run", "model, model_ema1")):
        assert cli.main(["convert", "--from", str(tmp_path / "exported"), "--to", str(target)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"-> {target}: {sets}" in said and "power:0.08, power:0.05, power:0.1 left out" in said
    chex.assert_trees_all_equal(jitjax.load(tmp_path / "whole.pth", "0.5").params, back.weights["0.5"])
    one = tmp_path / "one.safetensors"
    assert cli.main(["convert", "--from", str(tmp_path / "exported"), "--to", str(one), "--which", "power:0.1"]) == 0
    chex.assert_trees_all_equal(jitjax.load(one).params, back.weights["power:0.1"])


def test_no_score_no_best(unscored):
    with pytest.raises(UserError, match="no checkpoint of this run was scored"):
        jitjax.load(unscored / "checkpoints/best")


@pytest.mark.parametrize("metric", ["fiid", "kid_std", "seam_index", "inception_score"])
def test_a_metric_that_is_not_computed_is_refused_before_the_first_step(metric, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    with pytest.raises(UserError, match=rf"eval.metric={metric} is not computed here: use one of fd_mean_colour, .*mind"):
        train(small_settings(**RUN, **SCORED, eval__metric=metric), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_better_score_is_the_higher_one_of_those_that_count_hits():
    for name in ("inception_score", "is_efficientnet_lite0", "precision", "recall"):
        assert higher_is_better(name) and higher_is_better(f"eval/{name}")
        before = {"metric": f"eval/{name}", "value": 3.0, "how": "so"}
        assert scoring(f"eval/{name}").best({f"eval/{name}": 2.0}, before) is None
    for name in ("fid", "fd_efficientnet_lite0", "sfid", "kid", "mind", "loss", "loss_t0.11"):
        assert not higher_is_better(f"eval/{name}")


@pytest.mark.parametrize("held_out", [True, False])
def test_all_processes_must_hold_out_the_same_images(held_out, tmp_path, monkeypatch):
    """One without them, or with fewer, would leave the others waiting in a computation that it does not take part in."""
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    folder = draw_dataset(tmp_path / "shapes", image_size=8, per_class=2) / "train"
    compared = []
    monkeypatch.setattr(processes, "require_same", lambda own: compared.append(dict(own)))
    evaluation = dict(eval__held_out=str(folder) if held_out else "", eval__reference=str(folder))
    assert train(small_settings(**SCORED, **{**RUN, "total_steps": 2}, **evaluation), tmp_path / "run") == 0
    found = data_lib.open_dataset(folder, 8).fingerprint if held_out else {"count": 0}
    assert {f"held-out images ({name})": value for name, value in found.items()} in compared


@pytest.mark.parametrize("broken", ["one", "all"])
def test_held_out_images_that_cannot_be_decoded_are_reported(broken, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    folder = draw_dataset(tmp_path / "shapes", image_size=8, per_class=2) / "train"
    files = sorted(folder.rglob("*.png"))
    for file in files if broken == "all" else files[3:4]:
        file.write_bytes(file.read_bytes()[:60])
    other = str(draw_dataset(tmp_path / "other", image_size=8, per_class=2) / "train")
    evaluation = dict(eval__held_out=str(folder), eval__reference=other)
    assert train(small_settings(**SCORED, **{**RUN, "total_steps": 2}, **evaluation), tmp_path / "run") == 0
    (scores,) = [json.loads(line) for line in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    count, first = (len(files), files[0]) if broken == "all" else (1, files[3])
    assert (scores["eval/loss"] is None) == (broken == "all")
    said = " ".join(capsys.readouterr().out.split())
    assert f"eval/loss: {count} held-out images could not be decoded, the first: {first}: " in said
    assert "evaluation: N is 16, not 50000" in said and said.count("not 50000") == 1
    assert cli.main(["status", str(tmp_path / "run")]) == 0 and "last score fd_mean_colour" in capsys.readouterr().out


# ---------------------------------------------------------------- sweep


@pytest.mark.parametrize("best", [1.0, 1.3, 2.2, 3.9, 4.0])
def test_the_search_finds_the_valley_without_the_grid(best):
    asked = []

    def score(point):
        asked.append(point)
        worse = {"a": 0.0, "b": 0.5}[point.which] + (0.2 if point.interval == (0.0, 1.0) else 0.0)
        return abs(point.cfg_scale - best) + worse

    guidance = sweep.scales("1.0:4.0")
    found, value = sweep.search(["b", "a"], guidance, [(0.0, 1.0), (0.1, 1.0)], score)
    assert found.which == "a" and abs(found.cfg_scale - best) < 1e-9
    assert value == pytest.approx(0.0 if best != 1.0 else 0.2)  # at scale 1 there is no interval to choose
    assert len(asked) == len(set(asked)) < 2 * len(guidance) / 2


def test_scales_are_read_in_three_forms():
    assert sweep.scales("1:2:0.6") == [1.0, 1.6]  # never above HIGH
    assert sweep.scales("1:2:0.5") == [1.0, 1.5, 2.0] and sweep.scales("3,1") == [1.0, 3.0] and len(sweep.scales("1:4")) == 31
    for wrong in ("", "a", "2:1", "1:2:0", "nan"):
        with pytest.raises(UserError, match="--cfg_scale="):
            sweep.scales(wrong)


def test_an_interrupted_sweep_continues(scored, tmp_path, capsys):
    """Results on disk are not computed again; another sweep is refused."""
    argv = ["sweep", str(scored), "--reference", str(scored / "shapes/train"), "--num=16", "--cfg_scale=1,2", "--steps=1"]
    argv += ["--which=0.9", f"--extractor={EXTRACTOR}", "--metric=mind", f"--out={tmp_path / 's.jsonl'}"]
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert "again: jitjax evaluate" in first and "best: mind" in first
    assert ("note: that is an end of --cfg_scale=1,2; a better one may lie beyond" in first) == ("guidance 2," in first)
    text = (tmp_path / "s.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (tmp_path / "s.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # torn by a kill
    assert cli.main(argv) == 0
    assert (tmp_path / "s.jsonl").read_text().count('"cfg_scale"') >= 2
    assert capsys.readouterr().out.split("best: ")[1] == first.split("best: ")[1]
    assert cli.main([*argv, "--seed=1"]) == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert cli.main([*argv, "--split=."]) == 2  # another split may have as many images and nearly the same mean
    assert "split: None -> ." in capsys.readouterr().err


def test_a_target_that_cannot_be_written_is_named_with_its_flag(scored, tmp_path, monkeypatch, capsys):
    """By process 0, after the checks of the folder, which /proc passes."""
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    for argv in (
        ["evaluate", "a.npz", "--reference=a.npz", "--json=/proc/x.json"],
        ["evaluate", "stats", "a.npz", "--out=/proc/x.npz"],
        ["sweep", str(scored), "--reference=a.npz", "--num=16", "--cfg_scale=1,2", "--steps=1", "--out=/proc/x.jsonl"],
    ):
        assert cli.main([*argv, f"--extractor={EXTRACTOR}"]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(rf"error: {argv[-1]}:? cannot be written \(No such file or directory\).* name another\n", said)


def test_evaluate_replaces_its_own_scores_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    Path("A.NPZ").write_bytes(before := Path("a.npz").read_bytes())
    argv = ["evaluate", "A.NPZ", "--reference=A.NPZ", f"--extractor={EXTRACTOR}"]
    for _ in range(2):
        assert cli.main([*argv, "--json=scores.json"]) == 0
    Path("notes.json").write_text('{"scores": 1}')
    for name in ("a.npz", "notes.json"):
        assert cli.main([*argv, f"--json={name}"]) == 2
        assert f"--json={name} exists and holds no scores of jitjax" in capsys.readouterr().err
    assert Path("a.npz").read_bytes() == before and Path("notes.json").read_text() == '{"scores": 1}'
    assert cli.main(["evaluate", "stats", "a.npz", "--out=s.npz", "--split=val", f"--extractor={EXTRACTOR}"]) == 2
    assert "--split=val is for a folder of images, and DATA=a.npz is none" in capsys.readouterr().err


def test_a_sweep_goes_on_wherever_its_last_line_was_cut(tmp_path):
    path, points = tmp_path / "s.jsonl", [sweep.Point("model", scale, (0.0, 1.0)) for scale in (1.0, 2.0, 3.0)]
    results = sweep.Results(path, {"seed": 0})
    for point in points[:2]:
        results.add(point, {"mind": point.cfg_scale})
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1]) + 1
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        results = sweep.Results(path, {"seed": 0})
        assert results.get(points[0]) == {"mind": 1.0} and results.get(points[1]) is None
        results.add(points[2], {"mind": 3.0})
        again = sweep.Results(path, {"seed": 0})
        assert again.get(points[2]) == {"mind": 3.0} and again.get(points[0]) == {"mind": 1.0}


def test_a_disk_that_takes_no_score_of_a_sweep_costs_one_line(tmp_path, monkeypatch):
    """/dev/full takes no byte."""
    path, point = tmp_path / "s.jsonl", sweep.Point("model", 1.0, (0.0, 1.0))
    full = r"s\.\w+ cannot be written \(No space left on device\): free space, and the same command continues, or name another"
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_create", lambda partial: partial.symlink_to("/dev/full"))
        with pytest.raises(UserError, match=full):
            sweep.Results(path, {"seed": 0})
    results = sweep.Results(path, {"seed": 0})
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=full):
        results.add(point, {"mind": 1.0})
    (tmp_path / "s.png").symlink_to("/dev/full")
    with pytest.raises(UserError, match=full):
        results.plot(tmp_path / "s.png", "mind")
    path.unlink()
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_create", lambda partial: partial.symlink_to("/dev/full"))
        path.write_bytes(whole + b"torn")
        with pytest.raises(UserError, match=full):
            sweep.Results(path, {"seed": 0})
    assert path.read_bytes() == whole + b"torn"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.txt", b"my notes\nline two\nlast line", "use FILE.jsonl"),
        ("notes.jsonl", b"my notes\nline two\nlast line", "is no file of a sweep"),
        ("list.jsonl", b"[]\nlast line", "is no file of a sweep"),
        ("other.jsonl", b'{"setup": {}}\n{"a": 1}\n', "is no file of a sweep"),
        ("picture.jsonl", b"\x89PNG\r\n\x1a\n\xff", "is no file of a sweep"),
        ("elsewhere.jsonl", b'{"setup": {"seed": 3}}\n{"whic', "seed: 3 -> 0"),
    ],
)
def test_a_sweep_touches_no_file_of_another_kind(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        sweep.Results(tmp_path / name, {"seed": 0})
    assert (tmp_path / name).read_bytes() == content
    (tmp_path / "mine.png").write_bytes(b"a picture")
    with pytest.raises(UserError, match=r"would replace .*mine.png"):
        sweep.Results(tmp_path / "mine.jsonl", {"seed": 0})
    assert not (tmp_path / "mine.jsonl").exists()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="is no file of a sweep"):
        sweep.Results(tmp_path / "folder.jsonl", {"seed": 0})


def test_another_models_scores_are_not_taken(scored, tmp_path, capsys):
    """The same file name and step, with other weights."""
    model = tmp_path / "w.safetensors"
    argv = ["sweep", str(model), "--reference", str(scored / "shapes/train"), "--num=16", "--cfg_scale=1", "--steps=1"]
    argv += ["--labels=1,2", "--which=model", f"--extractor={EXTRACTOR}", "--metric=mind", f"--out={tmp_path / 's.jsonl'}"]
    assert cli.main(["convert", "--from", str(scored), "--to", str(model), "--which", "0.9"]) == 0
    for mistake in ("--steps=0", "--metric=kid_std", "--metric=fiid"):
        assert cli.main([*argv, mistake]) == 2 and not (tmp_path / "s.jsonl").exists()  # a mistake leaves nothing behind
    assert cli.main(argv) == 0
    again = shlex.split(capsys.readouterr().out.split("again: jitjax ")[1])
    assert again[again.index("--labels") + 1] == "1,2" and again[again.index("--extractor") + 1] == str(EXTRACTOR)
    model.unlink()
    assert cli.main(["convert", "--from", str(scored), "--to", str(model), "--which", "model"]) == 0
    assert cli.main(argv) == 2
    assert "weights: {'model': " in capsys.readouterr().err


def test_the_last_step_is_the_best_though_its_first_save_failed(tmp_path, monkeypatch):
    real, calls = manifest.write, []

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(manifest, "write", fails_once)
    assert train(small_settings(**SCORED, **{**RUN, "total_steps": 2}), tmp_path) == 0
    assert len(calls) == 2 and checkpoint.read_best(tmp_path)["step"] == 2
    assert checkpoint.read_meta(tmp_path / "checkpoints" / "2")["scores"]


def test_a_score_that_is_not_finite_is_never_the_best():
    evaluation = scoring("eval/fid")
    for before in (None, {"metric": "eval/fid", "value": 3.0}):
        assert evaluation.best({"eval/fid": math.nan}, before) is None
    assert evaluation.best({"eval/fid": 2.0}, {"metric": "eval/fid", "value": 3.0})["value"] == 2.0


def test_scores_that_were_made_otherwise_are_not_compared():
    evaluation = scoring("eval/fid")
    better, otherwise = {"metric": "eval/fid", "value": 1.0, "how": "so"}, {"metric": "eval/fid", "value": 1.0, "how": "not so"}
    assert evaluation.best({"eval/fid": 2.0}, better) is None
    assert evaluation.best({"eval/fid": 2.0}, otherwise) == {"metric": "eval/fid", "value": 2.0, "how": "so"}


def test_a_run_that_is_continued_with_another_reference_has_a_new_best(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    run = dict(total_steps=4, eval__metric="loss") | {name: value for name, value in SCORED.items() if name != "eval__metric"}
    held_out = draw_dataset(tmp_path / "shapes", image_size=8, per_class=2) / "train"
    arguments = dict(run, eval__held_out=str(held_out), checkpoint__keep_last=1)
    assert train(small_settings(**arguments, stop_after="2steps"), tmp_path / "run") == 0
    first = checkpoint.read_best(tmp_path / "run")
    assert train(small_settings(**arguments | {"eval__num_images": 12}), tmp_path / "run") == 0
    best = checkpoint.read_best(tmp_path / "run")
    assert first["step"] == 2 and best["step"] == 4 and "12 images of" in best["how"]
    said = " ".join(capsys.readouterr().out.split())
    assert "the best checkpoint so far, of step 2, was scored otherwise and is not compared" in said


def test_a_validation_split_that_cannot_be_used_is_named(tmp_path):
    """And classes of the training images are none."""
    data = settings_lib.Data(image_size=8)
    root = draw_dataset(tmp_path / "shapes", image_size=8, per_class=2)
    train_set = data_lib.open_dataset(root / "train", 8)

    def found(conditional=True):
        return live.find_held_out("", str(root / "train"), data, train_set, conditional)

    shutil.copytree(root / "train", root / "val")
    held_out, notes = found()
    assert held_out.path == str(root / "val") and not notes
    one = sorted((root / "val").iterdir())[0]
    shutil.rmtree(one)
    held_out, notes = found()
    assert held_out is None and len(notes) == 1 and "is not used for eval/loss: it has other classes (7) than" in notes[0]
    assert found(conditional=False)[0].path == str(root / "val")
    one.mkdir()
    held_out, notes = found()
    assert held_out is None and "val is not used for eval/loss" in notes[0] and "holds no image" in notes[0]
    shutil.rmtree(root / "val")
    (root / "train" / one.name).rename(root / "train" / "val_dev")
    again = data_lib.open_dataset(root / "train", 8, split=".")
    shutil.copytree(root / "train", root / "held")  # the same classes, one of them called as a split
    assert len(live.find_held_out(str(root / "held"), "", data, again, True)[0].class_names) == 8
    shutil.rmtree(root / "held")
    prepare(str(root / "train"), str(tmp_path / "prepared"), 8, split=".", labels="none")
    unlabelled = data_lib.open_dataset(root / "train", 8, split=".", labels="none")
    assert not unlabelled.class_names
    assert live.find_held_out(str(tmp_path / "prepared"), "", data, unlabelled, False)[0].kind == "prepared"
    assert live.find_held_out("", str(root / "train"), data, again, False) == (None, [])
