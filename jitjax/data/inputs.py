"""What `python -m jitjax.prepare` reads: an image folder, a zip or tar of one, or Parquet files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from jitjax.data import archive, parquet
from jitjax.data.dataset import read_file
from jitjax.data.image import BadImage
from jitjax.data.listing import list_folder
from jitjax.errors import UserError


class Input(Protocol):
    """Encoded images in a fixed order. Picklable."""

    labels: np.ndarray  # (n,) int32, 0 for an unlabelled set
    classes: tuple[str, ...]  # empty for an unlabelled set

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How the image is called in the list of skipped ones."""

    def fingerprint(self) -> dict[str, int | str]:
        """Changes with the set. To be called before the input is pickled."""

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The encoded bytes of each image, or why there are none; `indices` must increase."""


class FolderInput:
    """The images of a folder, one sub-folder per class, or flat."""

    def __init__(self, path: str, where: str):
        self._root, listing = list_folder(path, where)
        self._names, self._fingerprint = listing.names, listing.fingerprint()
        self.labels, self.classes = listing.labels, listing.classes

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> dict[str, int | str]:
        return self._fingerprint

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        for index in indices:
            try:
                yield read_file(os.path.join(self._root, self._names[index]))
            except BadImage as error:
                yield error


def open_input(path: str, scratch: str, *, image_column: str | None = None, label_column: str | None = None) -> Input:
    """Finds out what `path` is and lists it.

    Args:
      scratch: folder for the uncompressed copy of a compressed tar, which must stay until the input has been read.

    Raises:
      UserError: missing, unreadable, unsafe, damaged, without images, or of an unknown kind.
    """
    where = f"--data_path={path}"
    if not os.path.exists(path):
        raise UserError(f"{where} does not exist; give it an image folder, a zip or tar of one, or Parquet files")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where} cannot be read: Permission denied")
    files = parquet.parquet_files(path)
    if files:
        return parquet.ParquetInput(files, where, image_column, label_column)
    if os.path.isdir(path):
        return FolderInput(path, where)
    if zipfile.is_zipfile(path):
        return archive.open_zip(path, where)
    if archive.outer_compression(path) is not None:
        os.makedirs(scratch, exist_ok=True)
        plain = os.path.join(scratch, "input.tar")
        archive.decompress(path, plain, where)
        return archive.open_tar(plain, where)
    if path.lower().endswith(".tar"):
        return archive.open_tar(path, where)
    raise UserError(f"{where} is neither a folder nor a zip, tar (plain, gz, bz2, xz) or Parquet file")
