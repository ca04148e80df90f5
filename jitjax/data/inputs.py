"""What `jitjax prepare` reads: folders of images, zip, tar, Parquet, Arrow and .npz files."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from jitjax.data import archive, rules
from jitjax.data.arrays import ArrayInput
from jitjax.data.containers import beside, choose_files, find_containers, refuse_missing
from jitjax.data.files import read_file, require
from jitjax.data.image import BadImage
from jitjax.data.listing import list_images
from jitjax.data.rules import Ask
from jitjax.data.tables import TableInput
from jitjax.data.tree import FolderTree, reading
from jitjax.errors import UserError

_THREADS = 16  # a network disk answers many questions at once, each slowly


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
        listing = list_images(tree, ask, split=split, labels=labels)
        self._root = tree.path(listing.root)
        self._names, self._listed = listing.names, listing.fingerprint()
        self.labels, self.classes = listing.labels, listing.classes
        self.notes, self.summary = listing.notes, listing.summary(self._root)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> dict[str, int | str]:
        """That of the listing, which has names and sizes only, and one of when each file was last written ("modified")."""
        with ThreadPoolExecutor(_THREADS) as pool:
            times = pool.map(self._modified, np.array_split(np.arange(len(self)), _THREADS))
            return {**self._listed, "modified": hashlib.sha256(np.concatenate(list(times)).tobytes()).hexdigest()}

    def _modified(self, indices: np.ndarray) -> np.ndarray:
        """(n,) int64 nanoseconds; -1 for a file that is not there."""
        times = np.full(len(indices), -1, np.int64)
        for k, index in enumerate(indices.tolist()):
            with contextlib.suppress(OSError):
                times[k] = os.stat(self._path(index)).st_mtime_ns
        return times

    def _path(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        for index in indices:
            try:
                yield read_file(self._path(index))
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
    require(path, ask.where, "an image folder, a zip or tar of one, or Parquet files")
    endings, label_column = rules.endings(all_formats), label_column or ""
    if label_column and labels not in ("", label_column):
        raise UserError(f"--labels={labels} and --label_column={label_column}: give one of the two")
    with reading(ask):
        files, left, notes, settled, prefixes = [path], [], [], False, []
        if os.path.isdir(path):
            folder = FolderTree(path, endings)
            containers = find_containers(folder, ask)
            if not containers:
                columns = {"label_column": label_column, "image_column": image_column}
                _refuse(ask, "is a folder of images", **columns, zip_names=zip_names)
                return FolderInput(folder, ask, split, labels)
            chosen, left, settled = choose_files(containers, ask, split)
            if split != rules.HERE:
                refuse_missing(chosen, ask)
            others, notes = beside(folder, ask)
            files, left = [os.path.join(path, name) for name in chosen], [*left, *others]
            prefixes = [rules.stem(name) for name in chosen] if len(files) > 1 else []
        if files[0].lower().endswith(rules.TABLE_ENDINGS):
            _refuse(ask, "is read as a table", zip_names=zip_names)
            return TableInput(
                files,
                ask._replace(labels="--label_column") if label_column else ask,
                image_column=image_column,
                split=split,
                settled=settled,
                labels=label_column or labels,
                left_alone=left,
                notes=notes,
            )
        if path.lower().endswith(".npz"):
            _refuse(ask, "is an .npz file", image_column=image_column, zip_names=zip_names)
            return ArrayInput(path, ask, split, label_column or labels)
        if archive.is_zip(files[0]):
            _refuse(ask, "is a zip", label_column=label_column, image_column=image_column)
            return archive.ArchiveInput(archive.open_zip(path, ask, endings, zip_names), ask, split, labels, path)
        if files[0].lower().endswith(rules.TAR_ENDINGS) or archive.outer_compression(path) is not None:
            _refuse(ask, "is read as a tar", label_column=label_column, image_column=image_column, zip_names=zip_names)
            plain = [_plain_tar(file, scratch, k, ask.where) for k, file in enumerate(files)]
            tree = archive.open_tars(plain, ask, endings, labels, prefixes)
            tree.notes += notes
            return archive.ArchiveInput(tree, ask, split, labels, path, left, settled=settled)
    raise UserError(f"{ask.where} is neither a folder nor a zip, tar (plain, gz, bz2, xz), Parquet, Arrow or .npz file")


def _refuse(ask: Ask, what: str, **flags: str | None) -> None:
    """Refuses flags that have no meaning for this kind of input."""
    remedies = {
        "label_column": f"is for Parquet and Arrow files; choose labels with {ask.labels}, or leave it out",
        "image_column": "is for Parquet and Arrow files; leave it out",
        "zip_names": "is for zips; leave it out",
    }
    for name, value in flags.items():
        if value:
            raise UserError(f"--{name}={value}: {ask.where} {what}, and --{name} {remedies[name]}")


def _plain_tar(path: str, scratch: str, number: int, where: str) -> str:
    if archive.outer_compression(path) is None:
        return path
    os.makedirs(scratch, exist_ok=True)
    plain = os.path.join(scratch, f"input-{number}.tar")
    archive.decompress(path, plain, where)
    return plain
