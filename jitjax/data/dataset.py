"""A data set at random access: a folder of images decoded on the fly, or a prepared directory."""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from typing import Any, Protocol

import numpy as np

from jitjax.data import prepared
from jitjax.data.image import MAX_FILE_BYTES, BadImage, decode
from jitjax.data.listing import Names, list_folder
from jitjax.errors import UserError

_FLAG = "--config.data.path"
_READ_ATTEMPTS = 3  # a network disk may fail once; a file that is missing or forbidden fails at once


class Source(Protocol):
    """What a worker needs of a data set. Picklable, safe to use from many threads."""

    def read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[tuple[int, str]]:
        """Fills images[k] (n, H, W, 3 uint8) and labels[k] (n, int32) with the data set's `indices[k]`.

        Returns:
          (k, reason) for each one that could not be decoded; its rows are left as they were.
        """

    def name(self, index: int) -> str:
        """How image `index` is called in messages."""


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, decoded and cropped on the fly."""

    root: str
    names: Names
    labels: np.ndarray
    image_size: int
    exif_rotate: bool

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[tuple[int, str]]:
        failures = []
        for k, index in enumerate(indices.tolist()):
            try:
                images[k] = decode(read_file(self.name(index)), self.image_size, self.exif_rotate)
                labels[k] = self.labels[index]
            except BadImage as error:
                failures.append((k, str(error)))
        return failures


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises BadImage with the reason where there are none."""
    for attempt in range(_READ_ATTEMPTS):
        try:
            return _read_once(path)
        except OSError as error:
            lasting = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            if lasting or attempt == _READ_ATTEMPTS - 1:
                raise BadImage(error.strerror or type(error).__name__) from None
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def _read_once(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe must not wait for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Images of one size with labels, in a fixed order.

    path: where it was found. kind: "folder" or "prepared". class_names: in label order, empty for a flat folder.
    fingerprint: {"count", "classes", "checksum"}, JSON-able, to notice a data set that changed under a run.
    """

    path: str
    kind: str
    image_size: int
    class_names: tuple[str, ...]
    fingerprint: dict[str, Any]
    source: Source

    def __len__(self) -> int:
        return self.fingerprint["count"]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labelled(self) -> bool:
        return bool(self.class_names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image": (H, W, 3) uint8, "label": () int32}. Raises BadImage for an image that cannot be decoded."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        images = np.empty((1, self.image_size, self.image_size, 3), np.uint8)
        labels = np.empty(1, np.int32)
        failures = self.source.read(np.array([index]), images, labels)
        if failures:
            raise BadImage(failures[0][1])
        return {"image": images[0], "label": labels[0]}


def open_dataset(path: str | os.PathLike, image_size: int, *, exif_rotate: bool = False) -> DataSet:
    """Opens a folder of images or a directory written by `python -m jitjax.prepare`; which one is found out here.

    A folder holds one sub-folder per class (sorted as ImageFolder does), or images directly (unlabelled). Where `path`
    is the parent of `train/`, that is taken.

    Args:
      image_size: edge in pixels. exif_rotate: turn photographs as their EXIF orientation says (the official loader does
        not).

    Raises:
      UserError: nothing usable at `path`, or it was prepared for another size.
    """
    path = os.fspath(path)
    where = f"{_FLAG}={path}"
    if not path:
        raise UserError(f"{_FLAG} is not set; give it a folder of images or a prepared directory")
    if not os.path.exists(path):
        raise UserError(f"{where} does not exist; give it a folder of images or a prepared directory")
    if not os.path.isdir(path):
        raise UserError(f"{where} is a file; unpack it, or turn it into a prepared directory with python -m jitjax.prepare")
    root = prepared.find(path, where)
    if root is not None:
        index = prepared.read_index(root, where)
        prepared.check_usable(index, image_size, exif_rotate, where)
        source = prepared.PreparedSource.from_index(root, index)
        return DataSet(root, "prepared", image_size, tuple(index["classes"]), prepared.fingerprint(index), source)
    root, listing = list_folder(path, where)
    source = FolderSource(root, listing.names, listing.labels, image_size, exif_rotate)
    return DataSet(root, "folder", image_size, listing.classes, listing.fingerprint(), source)


def check_fingerprint(saved: dict[str, Any], dataset: DataSet, *, allow_changed: bool = False) -> None:
    """Refuses to go on with a data set other than the one a checkpoint was trained on.

    Raises:
      UserError: count, classes or checksum differ and `allow_changed` (--config.data.allow_changed) is not set.
    """
    differing = [name for name in ("count", "classes", "checksum") if saved.get(name) != dataset.fingerprint[name]]
    if differing and not allow_changed:
        changes = ", ".join(f"{k} {_short(saved.get(k))} -> {_short(dataset.fingerprint[k])}" for k in differing)
        raise UserError(
            f"the data set in {_FLAG}={dataset.path} changed since the checkpoint ({changes}); restore it, start a new "
            "workdir, or go on with --config.data.allow_changed=True"
        )


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
