"""What `jitjax prepare` reads: folders of images, zip, tar, Parquet, Arrow and .npz files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from jitjax.data import archive, rules
from jitjax.data.arrays import ArrayInput
from jitjax.data.containers import choose_files, find_containers
from jitjax.data.files import read_file
from jitjax.data.image import BadImage
from jitjax.data.listing import list_images
from jitjax.data.rules import Ask
from jitjax.data.tables import TableInput
from jitjax.data.tree import FolderTree, reading
from jitjax.errors import UserError


class Input(Protocol):
    """Encoded images in a fixed order. Picklable."""

    labels: np.ndarray  # (n,) int32, 0 for an unlabelled set
    classes: tuple[str, ...]  # empty for an unlabelled set
    summary: str  # what was found, and what was left alone
    notes: tuple[str, ...]  # what a user should know about the labels and names

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How the image is called in the list of skipped ones."""

    def fingerprint(self) -> dict[str, int | str]:
        """Changes with the set. To be called before the input is pickled."""

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The encoded bytes of each image, or why there are none; `indices` must increase."""


class FolderInput:
    """The images of a folder, listed by the rules of docs/data.md."""

    def __init__(self, tree: FolderTree, ask: Ask, split: str, labels: str):
        with reading(ask):
            listing = list_images(tree, ask, split=split, labels=labels)
        self._root = tree.path(listing.root)
        self._names, self._fingerprint = listing.names, listing.fingerprint()
        self.labels, self.classes = listing.labels, listing.classes
        self.notes, self.summary = listing.notes, listing.summary(self._root)

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


def open_input(
    path: str,
    scratch: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str = "",
    labels: str = "",
    all_formats: bool = False,
    zip_names: str | None = None,
) -> Input:
    """Finds out what `path` is and lists it.

    Args:
      scratch: folder for the uncompressed copies of compressed tars, which must stay until the input has been read.
        image_column, label_column: of Parquet and Arrow files, None to find them. split, labels: as for
        `listing.list_images`; for tables `labels` is a column. all_formats: JPEG 2000 and others count as pictures.
        zip_names: encoding of file names in an old zip.

    Raises:
      UserError: missing, unreadable, unsafe, damaged, without images, of an unknown kind, or with more than one reading.
    """
    ask = Ask(f"--data_path={path}", "--split", "--labels")
    path = os.path.expanduser(path)
    endings = rules.endings(all_formats)
    if not os.path.exists(path):
        raise UserError(f"{ask.where} does not exist; give it an image folder, a zip or tar of one, or Parquet files")
    if not os.access(path, os.R_OK):
        raise UserError(f"{ask.where} cannot be read: Permission denied")

    def table(files: Sequence[str], left: Sequence[str] = ()) -> TableInput:
        named = ask._replace(labels="--label_column") if label_column else ask
        return TableInput(files, named, image_column=image_column, labels=label_column or labels, left_alone=left)

    def tars(files: Sequence[str], prefixes: Sequence[str] = (), left: Sequence[str] = ()) -> archive.ArchiveInput:
        plain = [_plain_tar(file, scratch, k, ask.where) for k, file in enumerate(files)]
        tree = archive.open_tars(plain, ask, endings, labels, prefixes)
        # which of the tars are read is settled; a split in a single one is not
        return archive.ArchiveInput(tree, ask, split if not prefixes else "", labels, path, left)

    if os.path.isdir(path):
        tree = FolderTree(path, endings)
        with reading(ask):
            containers = find_containers(tree, ask)
        if not containers:
            return FolderInput(tree, ask, split, labels)
        chosen, left = choose_files(containers, ask, split)
        files = [os.path.join(path, name) for name in chosen]
        if chosen[0].lower().endswith(rules.TABLE_ENDINGS):
            return table(files, left)
        return tars(files, [rules.stem(name) for name in chosen] if len(files) > 1 else (), left)
    if path.lower().endswith(rules.TABLE_ENDINGS):
        return table([path])
    if path.lower().endswith(".npz"):
        return ArrayInput(path, ask, label_column or labels)
    if zipfile.is_zipfile(path):
        return archive.ArchiveInput(archive.open_zip(path, ask, endings, zip_names), ask, split, labels, path)
    if path.lower().endswith(rules.TAR_ENDINGS) or archive.outer_compression(path) is not None:
        return tars([path])
    raise UserError(f"{ask.where} is neither a folder nor a zip, tar (plain, gz, bz2, xz), Parquet, Arrow or .npz file")


def _plain_tar(path: str, scratch: str, number: int, where: str) -> str:
    if archive.outer_compression(path) is None:
        return path
    os.makedirs(scratch, exist_ok=True)
    plain = os.path.join(scratch, f"input-{number}.tar")
    archive.decompress(path, plain, where)
    return plain
