"""The checksums of one checkpoint: how it knows whether it is whole, and whose it is.

`checksums.json` lies in a checkpoint's folder and names every file there with its size and XXH3-128 digest, the optimizer step,
and the run that wrote it. It is written before Orbax renames the finished folder into place, so a committed checkpoint always
has one. Checkpoints of jitjax 0.1.0 have none: they are read, with a note that their bytes cannot be verified.

Imports no JAX.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from jitjax import atomic

FILE = "checksums.json"
FORMAT = 1
# Orbax finishes these two after the checksums are taken. Neither affects what is read back: times, and a marker.
UNCOVERED = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})
_BLOCK = 1 << 22
_THREADS = 8  # XXH3 reads 10 GB/s on one core: the threads are for disks that answer slowly


def write(folder: Path, *, step: int, run: str) -> None:
    """Take the checksums of all files in `folder`, make them durable, and write `checksums.json` there.

    Raises:
      OSError: no space, no permission, or the disk failed.
    """
    files = _listed(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, durable=True), files))
    content = {"format": FORMAT, "run": run, "step": step, "files": dict(zip(files, digests, strict=True))}
    atomic.write_text(folder / FILE, _text(content), durable=True)


def read(folder: Path) -> dict[str, Any] | None:
    """What `checksums.json` in `folder` says: format, run, step, files. None where there is no such file.

    Raises:
      ValueError: the file itself is damaged; the message says how, in a few words.
      OSError: it cannot be read.
    """
    try:
        text = (folder / FILE).read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{FILE} is damaged") from None
    try:
        content = json.loads(text)
        content.pop("self")  # part of the text that is compared below
        known = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{FILE} is damaged") from None
    if text != _text(content):
        raise ValueError(f"{FILE} is damaged")
    if known != FORMAT:
        raise ValueError(f"{FILE} has format {known!r}, this version of jitjax reads {FORMAT}: use the version that wrote it")
    return content


def defect(folder: Path, content: dict[str, Any]) -> str | None:
    """What is wrong with the files in `folder` according to `content` (from `read`), in a few words; None if they are whole.

    Every byte is read. Files whose names begin with a dot (left by rsync or a file browser) are not looked at.
    """
    files: dict[str, list[Any]] = content["files"]
    try:
        present = set(_listed(folder))
        if missing := sorted(set(files) - present):
            return f"{missing[0]} is missing" + (f" ({len(missing)} files are)" if len(missing) > 1 else "")
        if extra := sorted(present - set(files)):
            return f"{extra[0]} does not belong to it"
        for name, (size, _) in files.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, found in zip(files, pool.map(lambda name: _digest(folder / name), files), strict=True):
                if found != files[name]:
                    return f"{name} has other bytes than were saved"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    return None


def _listed(folder: Path) -> list[str]:
    """Relative paths of the files that count, sorted."""
    names = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.relpath(os.path.join(root, name), folder) for name in files if not name.startswith(".")]
    return sorted(set(names) - UNCOVERED - {FILE})


def _raise(error: OSError) -> None:
    raise error


def _digest(path: Path, *, durable: bool = False) -> list[Any]:
    """[size in bytes, hexadecimal digest]."""
    state, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            size += count
        if durable:
            os.fsync(file.fileno())
    return [size, state.hexdigest()]


def _text(content: dict[str, Any]) -> str:
    """The one way to write `content`, with a digest of itself: any other text is a damaged one."""
    body = json.dumps(content, indent=0, sort_keys=True)
    return json.dumps({**content, "self": xxhash.xxh3_128(body.encode()).hexdigest()}, indent=0, sort_keys=True) + "\n"
