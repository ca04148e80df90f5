"""Files that appear whole or not at all. Imports no JAX."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".partial"  # of the hidden file beside a file that is being written
PATTERN = rf"\..+\.(\d+)-[0-9a-f]{{8}}\{SUFFIX}"  # of its name; the group is the number of the process that writes it


@contextlib.contextmanager
def writing(path: str | os.PathLike, *, durable: bool = False, alone: bool = False) -> Iterator[Path]:
    """Yields a path to write to, beside `path`; when the block ends without an error, that file takes the place of `path`.

    A reader sees the old file or the new one, however many write it at once. After an error `path` is as it was and the partial
    file is gone; a killed process leaves it (`jitjax.leftovers` removes those of a workdir).

    Args:
      durable: the file is on the disk, not only in its cache, when the block is left.
      alone: nobody else writes this file now. Its partial file has always the same name (`partial_of`), so what a kill leaves
        is replaced by the next attempt: for large files that are written outside of a workdir.

    Raises:
      OSError: no space, no permission, or the disk failed.
    """
    path = Path(path)
    partial = partial_of(path) if alone else path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
    try:
        if alone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        _create(partial)
        mode = partial.stat().st_mode
        yield partial
        if partial.stat().st_mode != mode:  # some writers make files that only their owner may read
            partial.chmod(mode)
        if durable:
            sync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Where `writing` with `alone` writes."""
    return path.with_name(f".{path.name}{SUFFIX}")


def write_text(path: str | os.PathLike, text: str, *, durable: bool = False, alone: bool = False) -> None:
    """Write a text file in UTF-8, whole or not at all; as `writing`."""
    with writing(path, durable=durable, alone=alone) as partial:
        partial.write_text(text, encoding="utf-8")


def _create(partial: Path) -> None:
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def sync(path: str | os.PathLike) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: str | os.PathLike) -> None:
    """Make the names in `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
        sync(folder)
