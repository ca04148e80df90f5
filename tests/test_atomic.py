"""Files that appear whole or not at all."""

import os
import re
import stat
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import safetensors.numpy

from jitjax import atomic


def test_the_old_file_or_the_new_one_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a.json"
    atomic.write_text(file, "old")
    with pytest.raises(KeyError), atomic.writing(file) as partial:
        partial.write_text("half")
        assert file.read_text() == "old" and partial.parent == tmp_path
        raise KeyError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    atomic.write_text(file, "neu: ü", durable=True)
    assert file.read_text(encoding="utf-8") == "neu: ü" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_disk_that_is_full(tmp_path, durable, monkeypatch):
    """/dev/full takes no byte."""
    atomic.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(atomic, "_create", lambda partial: partial.symlink_to("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "a", "new", durable=durable)
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("alone", [False, True])
def test_what_a_kill_leaves(tmp_path, alone):
    """Written over by the next attempt, or known by the number of the process that is gone; its permissions do not last."""
    script = """
        import os, signal, sys
        from jitjax import atomic
        with atomic.writing(sys.argv[1], alone=bool(sys.argv[2])) as partial:
            partial.write_text("a long half of a file")
            partial.chmod(0o600)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path / "a", "1" * alone], check=False)
    (left,) = os.listdir(tmp_path)
    assert left == atomic.partial_of(tmp_path / "a").name if alone else re.fullmatch(atomic.PATTERN, left)
    atomic.write_text(tmp_path / "a", "whole", alone=alone)
    assert (tmp_path / "a").read_text() == "whole" and stat.S_IMODE((tmp_path / "a").stat().st_mode) != 0o600
    assert sorted(os.listdir(tmp_path)) == (["a"] if alone else [left, "a"])


def test_others_may_read_what_safetensors_writes(tmp_path):
    with atomic.writing(tmp_path / "a.safetensors") as partial:
        safetensors.numpy.save_file({"x": np.zeros(3)}, partial)
    atomic.write_text(tmp_path / "b", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "b")}
    assert len(modes) == 1 and os.listdir(tmp_path).count("a.safetensors") == 1


def test_many_writers_of_one_file(tmp_path):
    """Each has a partial file of its own, and the last one to end wins."""
    file, contents = tmp_path / "a", [str(k) * 100_000 for k in range(8)]

    def write(content):
        for _ in range(20):
            with atomic.writing(file) as partial:
                partial.write_text(content)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if file.exists():
            assert file.read_text() in contents
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["a"]
