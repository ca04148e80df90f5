"""Paths mean what they say, or are refused by name."""

from pathlib import Path

import pytest

from jitjax import paths
from jitjax.errors import UserError


@pytest.mark.parametrize("text", ["gs://bucket/run", "s3://bucket", "hdfs://a/b", Path("gs://bucket/run"), "file:///tmp/x"])
def test_addresses_are_refused(text):
    with pytest.raises(UserError, match=r"--workdir=.* cannot be read or written; mount it"):
        paths.workdir(text)


def test_home_and_plain_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert paths.workdir("~/runs/a") == tmp_path / "runs" / "a"
    assert paths.workdir("runs/a~b") == tmp_path / "runs" / "a~b"
    with pytest.raises(UserError, match="there is no such home folder"):
        paths.workdir("~nobody-of-that-name/runs")


def test_inside_a_checkpoint_is_refused(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "40"
    (step / "params").mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    for inside in (step.parent, step, step / "params", step / "params" / "new"):
        with pytest.raises(UserError, match=rf"give its workdir, --workdir={tmp_path / 'run'}$"):
            paths.workdir(inside)
    assert paths.workdir(tmp_path / "run") == tmp_path / "run"
    assert paths.workdir(tmp_path / "checkpoints" / "run7")  # a folder of runs that somebody called so
