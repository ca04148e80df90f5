"""The program: verbs, overrides, help, and mistakes that cost one line and exit code 2 before JAX starts."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from unittest import mock

import pytest
from conftest import ROOT

from jitjax import cli, runtime, settings
from jitjax.cli import arguments
from jitjax.errors import UserError


def load(*argv):
    config, rest = arguments.split(list(argv))
    assert rest == []
    return arguments.load(config)


def jitjax(*argv, cwd=ROOT, env=None):
    command = [sys.executable, "-m", "jitjax", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **(env or {})})


def test_every_kind_of_field_can_be_overridden():
    """Fields that default to "unset", tuples, booleans in three spellings, whole numbers in exponent form, and unset again."""
    s = load(
        *("--config", "configs/h200.py:finetune", "--config.total_tokens=1e12", "--config.model.num_classes=1e3"),
        *("--config.optim.ema_decays=(0.99,0.9,0.5)", "--config.mesh.data", "4", "--config.optim.lr=1"),
        *("--config.preview.every_epochs=None", "--noconfig.data.flip", "--config.data.exif_rotate"),
        "--config.wandb.enabled=true",
    ).settings
    assert (s.total_tokens, s.epochs, s.model.num_classes, s.mesh.data) == (1e12, None, 1000, 4)
    assert s.optim.ema_decays == (0.99, 0.9, 0.5) and s.optim.lr == 1.0 and type(s.optim.lr) is float
    assert s.preview.every_epochs is None and (s.data.flip, s.data.exif_rotate, s.wandb.enabled) == (False, True, True)


def test_a_later_flag_beats_an_earlier_one():
    config = "--config=configs/h200.py"
    assert load(config, "--config.optim.lr=1", "--config.optim.lr=2").settings.optim.lr == 2
    assert load(config, "--config.optim.lr=1", "--config.optim.lr=None").settings.optim.lr is None
    assert load(config, "--config.optim.lr=None", "--config.optim.lr=1").settings.optim.lr == 1


def test_a_data_path_replaces_the_drawn_shapes_and_says_so():
    loaded = load("--config=configs/quickstart.py", "--config.data.path=mine")
    assert loaded.settings.data == settings.Data(path="mine", image_size=32, num_workers=0, flip=False)
    assert any("data.path=mine replaces data.synthetic=shapes" in note for note in loaded.notes)
    both = load("--config=configs/quickstart.py", "--config.data.path=mine", "--config.data.synthetic=shapes").settings
    with pytest.raises(UserError, match="are both set"):
        settings.check_data(both.data)


def test_a_flag_is_not_overruled_by_the_files_other_field_for_the_same_thing():
    fast = "--config=configs/h200_fast.py"  # with optim.lr, and 0 epochs and 300 steps of warm-up
    loaded = load(fast, "--config.optim.blr=1e-5", "--config.optim.warmup_epochs=2")
    assert loaded.settings.optim.lr is None and loaded.settings.optim.warmup_steps is None
    assert any("optim.blr=1e-05 replaces optim.lr=" in note for note in loaded.notes)
    assert load(fast, "--config.optim.warmup_epochs=0").settings.optim.warmup_steps is None
    assert load(fast, "--config.optim.warmup_epochs=0", "--config.optim.warmup_steps=5").settings.optim.warmup_steps == 5
    previews = load("--config=configs/quickstart.py", "--config.preview.every_epochs=2").settings.preview
    assert (previews.every_steps, previews.every_epochs) == (None, 2)
    assert load(fast).settings.optim.warmup_steps == 300 and not load(fast, "--config.optim.lr=1e-3").notes


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--config=configs/nope.py"], "--config=configs/nope.py: there is no such file"),
        (["train"], "--config is missing"),
        (["train", "--config=configs/quickstart.py"], "--workdir is missing"),
        (["train", "--config=configs/quickstart.py", "--config.sead=1"], "did you mean seed?"),
        (["train", "--config=configs/quickstart.py", "--config.nosuch=None"], "--config.nosuch: there is no such field"),
        (["train", "--config=configs/quickstart.py", "--wrkdir=x"], "unrecognized arguments: --wrkdir=x"),
        (["train", "--config=configs/quickstart.py", "--config.seed=a"], "--config.seed=a: must be a whole number"),
        (["train", "--config=configs/quickstart.py", "--config.seed"], "--config.seed needs a value"),
        (["train", "--config=configs/h200.py:foo"], "configs/h200.py:foo is unknown: use pretrain or finetune"),
        (
            ["train", "--config=configs/h200_fast.py:foo"],
            "configs/h200_fast.py:foo is unknown: use pretrain, finetune or minutes",
        ),
        (["train", "--config=configs/quickstart.py", "--config.epochs=1", "--config.total_steps=2"], "two run lengths are set"),
        (
            ["train", "--config=configs/h200.py", "--config.optim.lr=1", "--config.optim.blr=2"],
            "--config.optim.blr=2.0 and --config.optim.lr=1.0: give one of the two",
        ),
        (["tune", "--config=configs/quickstart.py", "--config.optim.blr=1e-4"], "use --start"),
        (["train", "--config=configs/quickstart.py", "stray"], "unrecognized arguments: stray"),
        (["train", "--data_path", "x"], "--data_path is the flag of the PyTorch code: here it is --config.data.path"),
        (["train", "--config=configs/h200.py", "--workdir=x"], "--config.data.path is missing"),
        (["bench"], "BENCHMARK"),
        (["evaluate", "stats", "/nowhere", "--out=x.npz", "--image_size=8"], "DATA /nowhere: no such file or folder"),
        (["evaluate", "stats", ".", "--out=x.txt", "--image_size=8"], "--out=x.txt: statistics are written as FILE.npz"),
        (["evaluate", "stats", ".", "--out=x.npz", "--image_size=8", "--num=5", "--labels=1"], "--num, --labels: for drawing"),
        (["evaluate", ".", "--reference=.", "--json=/tmp"], "--json=/tmp is a folder"),
        (["sample", "/nowhere", "--out=x.png"], "/nowhere: no such file or folder"),
        (["prepare", "--config=configs/h200.py"], "takes no configuration"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err


def test_mistakes_are_answered_before_jax_is_imported(tmp_path):
    script = """
import sys
from jitjax import cli
for argv in (["train", "--config=configs/quickstart.py", "--config.seed=a"], ["train", "--help"], ["sample"], ["bench", "x"]):
    cli.main(argv)
assert "jax" not in sys.modules, "jax was imported"
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("verb", [[], *([verb] for verb in cli.VERBS), ["bench", "step"]])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_exits_with_0(verb, flag, capsys):
    assert cli.main([*verb, flag]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: jitjax")
    if verb == ["train"]:
        assert all(f"--config.{name}=" in text and field.rule.help in text for name, field in settings.fields().items())


def test_the_doors_lead_to_the_same_program(tmp_path):
    """`python -m jitjax train` and `python -m jitjax.main`."""
    arguments_ = ["--config=configs/quickstart.py", "--config.mesh.data=3", f"--workdir={tmp_path}"]
    for door in (["jitjax", "train"], ["jitjax.main"]):
        command = [sys.executable, "-m", *door, *arguments_]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "each one of 1, 2, 4, 8" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_print_config_shows_what_follows(tmp_path):
    done = jitjax("train", "--config=configs/quickstart.py", "--print_config", "--config.batch_size=4")
    assert done.returncode == 0, done.stderr
    assert (
        '"batch_size": 4' in done.stdout and "1,500 = 93.8 epochs" in done.stdout and "512 images of 8 classes" in done.stdout
    )


@pytest.mark.parametrize(
    ("jaxlib", "known"),
    [("0.10.2", False), ("0.11.0", True), ("0.11rc1", True), ("0.11+cuda13", True), ("0.12.1.dev20261101", True), ("1", True)],
)
def test_the_allocators_flag_is_set_where_xla_knows_it(jaxlib, known, monkeypatch):
    """An unknown flag ends the process."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"jaxlib": jaxlib}[name])
    flag = "--xla_gpu_enable_allocator_spatial_partitioning"
    default = f"{flag}=false" if known else ""
    for mine, expected in (
        ("", default),
        (f"{flag}=true", f"{flag}=true"),
        (flag, flag),
        (f"{flag}_too=1", f"{default} {flag}_too=1".strip()),
    ):
        with mock.patch.dict(os.environ, XLA_FLAGS=mine):
            runtime.set_environment()
            assert " ".join(given for given in os.environ["XLA_FLAGS"].split() if given.startswith(flag)) == expected


def test_a_file_of_xla_flags_is_read(tmp_path):
    """XLA takes the name of a file for one only where it stands alone."""
    (tmp_path / "flags").write_text("--xla_gpu_enable_triton_gemm=true\n--xla_dump_to=/tmp/x\n")
    with mock.patch.dict(os.environ, XLA_FLAGS=str(tmp_path / "flags")):
        runtime.set_environment()
        *_, gemm, dump = given = os.environ["XLA_FLAGS"].split()
    assert (gemm, dump) == ("--xla_gpu_enable_triton_gemm=true", "--xla_dump_to=/tmp/x")
    assert "--xla_gpu_use_memcpy_local_p2p=true" in given and "--xla_gpu_enable_triton_gemm=false" not in given


def test_workers_never_start_jax():
    """What Grain's worker processes import (the data package and the main modules) leaves JAX alone."""
    script = (
        "import sys, jitjax, jitjax.main, jitjax.__main__, jitjax.data; assert 'jax' not in sys.modules, 'jax was imported'"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


H200 = ["h200.py", "h200.py:finetune", "h200_fast.py", "h200_fast.py:finetune", "h200_fast.py:minutes"]


@pytest.mark.parametrize("config", [*H200, "quickstart.py", *(f"imagenet.py:{s}{p}" for s in "blhg" for p in (16, 32))])
def test_shipped_configs_are_valid(config, monkeypatch):
    from jitjax.geometry import geometry_of

    monkeypatch.chdir(ROOT)
    loaded = load(f"--config=configs/{config}").settings
    assert geometry_of(loaded.model, loaded.data.image_size, 10).tokens in (64, 256)


def test_the_fast_recipe_differs_in_what_it_says(monkeypatch):
    """`configs/h200_fast.py` is `h200.py` but for the fields that its docstring and docs/fast.md name."""
    monkeypatch.chdir(ROOT)
    recipe = {
        "optim.name": "muon",
        "optim.lr": 7e-4,
        "optim.warmup_epochs": 0.0,
        "optim.warmup_steps": 300,
        "optim.power_emas": (0.1, 0.05),
        "diffusion.p_mean": 0.6,
        "preview.t_eps": 0.005,
        "eval.t_eps": 0.005,
    }
    measured = {
        "batch_size": 256,
        "optim.accumulation_steps": 1,
        "epochs": None,
        "total_steps": 7320,
        "checkpoint.every_epochs": None,
        "checkpoint.every_steps": 732,
        "preview.every_epochs": None,
        "preview.every_steps": 732,
    }
    for stage, like, more in (("pretrain", "pretrain", {}), ("finetune", "finetune", {}), ("minutes", "finetune", measured)):
        fast, slow = (
            dict(settings.flatten(dataclasses.asdict(load(f"--config=configs/{name}").settings)))
            for name in (f"h200_fast.py:{stage}", f"h200.py:{like}")
        )
        assert {name: value for name, value in fast.items() if value != slow[name]} == {**recipe, **more}
