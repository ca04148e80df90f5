"""What killed runs leave behind, named so that the next start can tell it from what is in use. Imports no JAX."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from multiprocessing import shared_memory
from pathlib import Path

from jitjax import atomic

_SHARED = Path("/dev/shm")
_PREFIX = "jj"
_PARTIAL = (".shapes.*.partial", "ema/.tmp*")  # in a workdir: by `draw_dataset` and, in `ema.write_snapshot`, by safetensors
_WRITTEN = ("", "ema", "samples")  # folders of a workdir in which `atomic.writing` writes


def name_segments(owner: int) -> None:
    """Let shared memory that this process makes carry the number of the run's main process, `owner`.

    For input workers: Python's own names say nothing, and when the whole process group is killed the segments stay for ever.
    """
    name = f"/{_PREFIX}{owner:x}_"
    # A private constant of the standard library: names of 14 characters, of which the rest is random.
    if hasattr(shared_memory, "_SHM_NAME_PREFIX") and len(name) <= 10:
        shared_memory._SHM_NAME_PREFIX = name


def new_segment(size: int) -> shared_memory.SharedMemory:
    """Shared memory of this process, which is the run's main one, with its number in the name.

    Raises:
      OSError: no space for it.
    """
    return shared_memory.SharedMemory(f"{_PREFIX}{os.getpid():x}_{secrets.token_hex(4)}", create=True, size=size)


def remove_segments(folder: Path = _SHARED) -> int:
    """Remove this user's shared memory of runs whose main process is gone. Returns how many segments."""
    removed = 0
    for path in folder.glob(f"{_PREFIX}*_*"):
        match = re.fullmatch(rf"{_PREFIX}([0-9a-f]+)_[0-9a-f]+", path.name)
        with contextlib.suppress(OSError):  # another start may be faster
            if match and path.stat().st_uid == os.getuid() and not _alive(int(match[1], 16)):
                path.unlink()
                removed += 1
    return removed


def remove_partial(workdir: Path) -> list[str]:
    """Remove files and folders that were half written when a process was killed. Call with the workdir's lock held: then no
    other run writes them. What another command is writing there at the moment (`jitjax sample`) stays.

    Returns:
      Their names.
    """
    hidden = [path for folder in _WRITTEN for path in (workdir / folder).glob(f".*{atomic.SUFFIX}")]
    written = [(path, re.fullmatch(atomic.PATTERN, path.name)) for path in hidden]
    dead = [path for path, found in written if found and (int(found[1]) == os.getpid() or not _alive(int(found[1])))]
    names = []
    for path in [*dead, *(path for pattern in _PARTIAL for path in workdir.glob(pattern))]:
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            names.append(path.name)
    return names


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
