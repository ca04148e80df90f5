"""Files that appear whole or not at all."""

import os
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
def test_a_disk_that_is_full(tmp_path, durable):
    """/dev/full takes no byte."""
    atomic.write_text(tmp_path / "a", "old")
    (tmp_path / f".a{atomic.SUFFIX}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "a", "new", durable=durable)
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_what_a_kill_leaves_is_written_over(tmp_path):
    script = """
        import os, signal, sys
        from jitjax import atomic
        with atomic.writing(sys.argv[1]) as partial:
            partial.write_text("a long half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path / "a"], check=False)
    assert os.listdir(tmp_path) == [f".a{atomic.SUFFIX}"]
    atomic.write_text(tmp_path / "a", "whole")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"


def test_others_may_read_what_safetensors_writes(tmp_path):
    with atomic.writing(tmp_path / "a.safetensors") as partial:
        safetensors.numpy.save_file({"x": np.zeros(3)}, partial)
    atomic.write_text(tmp_path / "b", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "b")}
    assert len(modes) == 1 and os.listdir(tmp_path).count("a.safetensors") == 1


def test_many_writers_of_one_file(tmp_path):
    """With `shared` each has a file of its own, and the last one to end wins."""
    file, contents = tmp_path / "a", [str(k) * 100_000 for k in range(8)]

    def write(content):
        for _ in range(20):
            with atomic.writing(file, shared=True) as partial:
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
