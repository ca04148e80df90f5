"""Two processes write one checkpoint: whole or not at all, read by any number of processes, the highest common step taken."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from jitjax import checkpoint

SAVE = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="4")
from pathlib import Path
rank, count, address, workdir, first, last = *map(int, sys.argv[1:3]), *sys.argv[3:5], *map(int, sys.argv[5:7])
os.environ.update(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(rank))
from jitjax import distributed, signals
peers = distributed.start()
sys.path.insert(0, "tests")
import jax
from jitjax import checkpoint, errors, saving
checkpoint.quiet()
from test_checkpoint import LIKE, META, a_state  # eight devices in all, as there
try:
    saved = saving.Checkpoints(Path(workdir), keep_last=9)
    found = saved.resume(LIKE)
    print("resumed", found[1] if found else 0, flush=True)
    for step in range(first, last + 1):
        saved.save(a_state(step), step, META)
        saved.retry_due()
    saved.close()
    peers.close()
    print("complete", flush=True)
    signals.end(0)
except errors.UserError as error:
    peers.failed(str(error), 2)
"""


def run(workdir: Path, first: int, last: int, other: Path | None = None) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of both processes, which resume and then save `first` to `last`; `other`: where the second
    one looks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(rank), "2", address, str(folder), str(first), str(last)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate((workdir, other or workdir))
    ]
    try:
        return [(p.wait(200), *p.communicate()) for p in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_save_and_resume(tmp_path):
    """Both resume from the same step; a damaged newest one costs both one step; one process reads what two wrote; where their
    folders disagree both take the highest step that both have."""
    for code, out, err in run(tmp_path, 1, 3):
        assert code == 0 and "resumed 0" in out and "complete" in out, err[-3000:]
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [1, 2, 3]
    (tmp_path / "checkpoints" / "3" / "meta" / "metadata").write_text("")
    for code, out, err in run(tmp_path, 3, 3):
        assert code == 0 and "resumed 2" in out, err[-3000:]
    from test_checkpoint import resumed

    assert resumed(tmp_path) == 3
    shutil.copytree(tmp_path, tmp_path / "other", ignore=shutil.ignore_patterns("3"))
    assert checkpoint.steps_in(tmp_path / "other" / "checkpoints") == [1, 2]
    for code, out, err in run(tmp_path, 9, 8, other=tmp_path / "other"):
        assert code == 0 and "resumed 2" in out, err[-3000:]
        assert "checkpoints 3 are not visible to every process" in err


def test_a_folder_that_cannot_be_written_stops_both(tmp_path):
    """0.1.0: no error line, and both still there after 150 s."""
    (tmp_path / "checkpoints").write_text("in the way")
    results = run(tmp_path, 1, 1)
    assert all(code not in (0, None) for code, _, _ in results), results
    assert all(err.splitlines()[-1].startswith("error: ") for _, _, err in results), results
