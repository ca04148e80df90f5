"""Files that appear whole or not at all. Imports no JAX."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".partial"  # of the hidden file beside a file that is being written


@contextlib.contextmanager
def writing(path: str | os.PathLike, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to, beside `path`; when the block ends without an error, that file takes the place of `path`.

    A reader sees the old file or the new one. After an error `path` is as it was and the partial file is gone; a killed process
    leaves it, and the next one that writes `path` writes over it.

    Args:
      durable: the file is on the disk, not only in its cache, when the block is left.
      shared: other processes may write the same file at the same time; each gets a partial file of its own.

    Raises:
      OSError: no space, no permission, or the disk failed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{'.' + secrets.token_hex(6) if shared else ''}{SUFFIX}")
    try:
        partial.open("wb").close()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # some writers make files that only their owner may read
        if durable:
            sync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str, *, durable: bool = False) -> None:
    """Write a text file in UTF-8, whole or not at all; as `writing`."""
    with writing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


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
