"""The command line: overrides, units, and mistakes that cost one line and exit code 2."""

import subprocess
import sys

import pytest
from conftest import ROOT

SHOW = """
import sys
from absl import app
from jitjax import config_flags
flag = config_flags.define()
def main(_):
    from jitjax.errors import cli
    def show():
        config = flag.value()
        for name in {fields!r}:
            value = config
            for key in name.split("."):
                value = value[key]
            print(repr(value))
    sys.exit(cli(show))
app.run(main, flags_parser=config_flags.parse)
"""


def show(fields, *arguments):
    command = [sys.executable, "-c", SHOW.format(fields=fields), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_kind_of_field_can_be_overridden():
    """Fields that default to "unset", tuples, whole numbers in exponent form, and back to unset."""
    done = show(
        [
            "total_tokens",
            "epochs",
            "model.num_classes",
            "optim.ema_decays",
            "mesh.data",
            "optim.lr",
            "seed",
            "preview.every_epochs",
        ],
        "--config=configs/h200.py:finetune",
        "--config.total_tokens=1e12",
        "--config.model.num_classes=1e3",
        "--config.optim.ema_decays=(0.99,0.9,0.5)",
        "--config.mesh.data=4",
        "--config.optim.lr=1",
        "--config.seed=7",
        "--config.preview.every_epochs=None",
    )
    assert done.stdout.split("\n")[:-1] == ["1000000000000.0", "None", "1000", "(0.99, 0.9, 0.5)", "4", "1.0", "7", "None"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/nope.py"], "--config=configs/nope.py: there is no such file"),
        (["--config=configs/quickstart.py", "--config.sead=1"], 'Did you mean "seed"'),
        (["--config=configs/quickstart.py", "--config.nosuch=None"], "--config has no field nosuch"),
        (["--config=configs/quickstart.py", "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        (["--config=configs/quickstart.py", "--config.seed=a"], "--config.seed=a"),
        (["--config=configs/h200.py:foo"], "configs/h200.py:foo is unknown: use pretrain or finetune"),
        (["--config=configs/quickstart.py", "--config.epochs=1", "--config.total_steps=2"], "two run lengths are set"),
        (["--config=configs/quickstart.py", "stray"], "what is 'stray'?"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(arguments, message):
    done = show(["seed"], *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_main_says_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "jitjax.main", "--config=configs/quickstart.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir is missing")
    done = subprocess.run([*command, f"--workdir={tmp_path}", "--config.mesh.data=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "must be one of 8x1, 4x2, 2x4, 1x8" in done.stderr and done.stderr.count("\n") == 1


def test_workers_never_start_jax():
    """What Grain's worker processes import (the data package and main itself) leaves JAX alone."""
    script = "import sys, jitjax, jitjax.main, jitjax.data; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "config", ["h200.py", "h200.py:finetune", "quickstart.py"] + [f"imagenet.py:{s}{p}" for s in "blhg" for p in (16, 32)]
)
def test_shipped_configs_are_valid(config):
    import importlib.util

    from jitjax.config import validate
    from jitjax.model import geometry_from_config

    file, _, argument = config.partition(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = module.get_config(argument) if argument else module.get_config()
    validate(loaded)
    assert geometry_from_config(loaded, 10).tokens in (64, 256)
