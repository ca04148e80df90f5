"""A data set at random access: a folder of images decoded on the fly, or a prepared directory."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from jitjax.data import prepared, readers, rules
from jitjax.data.containers import find_containers
from jitjax.data.files import read_file, require
from jitjax.data.image import HIGH_DEPTH, BadImage, decode, is_constant, is_high_depth
from jitjax.data.listing import Names, list_images, summary
from jitjax.data.rules import Ask
from jitjax.data.tree import FolderTree, reading
from jitjax.errors import UserError

_FLAG = "--config.data.path"
_DEEP_ENDINGS = (".png", ".tif", ".tiff", ".pgm", ".pnm", ".ppm", ".pfm", ".jp2", ".j2k", ".avif")  # may have over 8 bits
_LOOKED_AT = 64  # files, spread over the set, when it is opened
_log = logging.getLogger(__name__)


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
    all_formats: bool = False
    high_depth: str = "clip"

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[tuple[int, str]]:
        failures = []
        for k, index in enumerate(indices.tolist()):
            readers.at(index)
            try:
                images[k] = decode(
                    read_file(self.name(index)),
                    self.image_size,
                    self.exif_rotate,
                    all_formats=self.all_formats,
                    high_depth=self.high_depth,
                )
                labels[k] = self.labels[index]
            except BadImage as error:
                failures.append((k, str(error)))
        return failures


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Images of one size with labels, in a fixed order.

    path: where it was found. kind: "folder", "prepared" or "own" (`of_source`). class_names: in label order, empty for a flat
    folder. fingerprint: {"count", "classes", "checksum"}, JSON-able, to notice a data set that changed under a run. summary:
    one line on what was found and what was left alone.
    """

    path: str
    kind: str
    image_size: int
    class_names: tuple[str, ...]
    fingerprint: dict[str, Any]
    source: Source
    summary: str = ""

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


def open_dataset(
    path: str | os.PathLike,
    image_size: int,
    *,
    exif_rotate: bool = False,
    split: str = "",
    labels: str = "",
    all_formats: bool = False,
    high_depth: str = "clip",
    flag: str = _FLAG,
) -> DataSet:
    """Opens a folder of images or a directory written by `jitjax prepare`; which one is found out here.

    docs/data.md states how a folder is read; `jitjax prepare` reads it alike. What is odd about it is logged.

    Args:
      image_size: edge in pixels. exif_rotate: turn photographs as their EXIF orientation says (the official loader does
        not). split: which split is read, by name or role; "" for training, "." for all below `path`. labels: "" finds them;
        "folders", "none", "cls", "json", a label file's name or FILE:COLUMN. all_formats: JPEG 2000 and other formats that
        the official loader passes over. high_depth: one of `image.HIGH_DEPTH`. flag: what messages call the path.

    Raises:
      UserError: nothing usable at `path`, it was prepared for another size, or there is more than one way to read it.
    """
    path = os.path.expanduser(os.fspath(path))
    where = f"{flag}={path}"
    ask = Ask(where, "--config.data.split" if flag.startswith("--config.") else "--split", "--config.data.labels")
    if not path:
        raise UserError(f"{flag} is not set; give it a folder of images or a prepared directory")
    require(path, where, "a folder of images or a prepared directory")
    if not os.path.isdir(path):
        raise UserError(f"{where} is a file; unpack it, or turn it into a prepared directory with jitjax prepare")
    if high_depth not in HIGH_DEPTH:
        raise UserError(f"--config.data.high_depth={high_depth} must be one of {', '.join(HIGH_DEPTH)}")
    options = {"exif_rotate": exif_rotate, "all_formats": all_formats, "high_depth": high_depth}
    with reading(ask):
        root = prepared.find(path, ask, split)
    if root is not None:
        if labels:
            raise UserError(f"{where} is a prepared directory: its labels are chosen already; leave {ask.labels} unset")
        index = prepared.read_index(root, where)
        prepared.check_usable(index, image_size, where, **options)
        if empty := prepared.empty_classes(index):
            _log.warning("%s: %s", where, empty)
        source = prepared.PreparedSource.from_index(root, index)
        text = summary(index["count"], index["classes"], f"{root} (prepared)", "", ())
        return DataSet(root, "prepared", image_size, tuple(index["classes"]), prepared.fingerprint(index), source, text)
    tree = FolderTree(path, rules.endings(all_formats))
    with reading(ask):
        containers = find_containers(tree, ask)
    if containers:
        raise UserError(
            f"{where} holds its images in {rules.ending(containers[0])} files, which training does not read directly: turn it "
            f"into a prepared directory with jitjax prepare --data_path={path}"
        )
    with reading(ask):
        listing = list_images(tree, ask, split=split, labels=labels)
    root = tree.path(listing.root)
    for note in listing.notes:
        _log.warning("%s", note)
    source = FolderSource(root, listing.names, listing.labels, image_size, **options)
    if high_depth == "clip":
        _look_for_clipped(source, where)
    return DataSet(
        root, "folder", image_size, listing.classes, listing.fingerprint(), source, listing.summary(os.path.abspath(root))
    )


def _look_for_clipped(source: FolderSource, where: str) -> None:
    """Warns where some of the pictures are of 16 bits or floats and come out of one colour."""
    count = len(source.names)
    spread = {k * count // _LOOKED_AT for k in range(_LOOKED_AT)} if count > _LOOKED_AT else range(count)
    chosen = [k for k in spread if source.names[k].lower().endswith(_DEEP_ENDINGS)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clipped = sum(pool.map(lambda index: _is_clipped(source, index), chosen))
    if clipped:
        _log.warning(
            "%s: %d of the %d pictures looked at come out constant: their 16-bit or float values are clipped to 8 bits, as the "
            "official loader does; %s",
            where,
            clipped,
            len(chosen),
            "scale them with --config.data.high_depth=range or picture" if where.startswith("--config.") else "scale the files",
        )


def _is_clipped(source: FolderSource, index: int) -> bool:
    try:
        with Image.open(source.name(index), formats=tuple(rules.FORMATS)) as picture:
            if not is_high_depth(picture):
                return False
        return is_constant(decode(read_file(source.name(index)), source.image_size))
    except Exception:  # a damaged file is reported when it is its turn
        return False


def of_source(
    source: Source, count: int, *, image_size: int, checksum: str, class_names: Sequence[str] = (), name: str = "own data"
) -> DataSet:
    """A data set of one's own, for `jitjax.train` and everything else that takes a `DataSet`.

    Args:
      source: reads images by their number in [0, count) and calls them by name, see `Source`.
      checksum: changes when the images or labels do, e.g. a hash or a version. A run that continues with another one is
        refused, and statistics for scores are cached under it.
      class_names: in label order; empty for a set without labels. Reading a label that has none raises a UserError.
      name: how the set is called in messages.
    """
    if twice := [label for label, number in collections.Counter(class_names).items() if number > 1]:
        raise UserError(f"class_names: {twice[0]!r} is there twice; a class has a name of its own")
    fingerprint = {"count": count, "classes": len(class_names), "checksum": checksum}
    text = summary(count, class_names, name, "", ())
    checked = _Checked(source, len(class_names), name)
    return DataSet(name, "own", image_size, tuple(class_names), fingerprint, checked, text)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A source of one's own; a label that has no name ends the run instead of being taken for another one."""

    source: Source
    classes: int
    where: str

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[tuple[int, str]]:
        failures = self.source.read(indices, images, labels)
        if failures is None:
            raise UserError(f"{self.where}: read() returned None: a list of (k, reason) is needed, [] where all were read")
        if self.classes:
            failed = [place for place, _ in failures]
            for place in np.setdiff1d(np.flatnonzero((labels < 0) | (labels >= self.classes)), failed):
                name = self.name(int(indices[place]))
                raise UserError(f"{self.where}: {name} has label {labels[place]}, and class_names has {self.classes} names")
        return failures


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory: (n, S, S, 3) uint8 and their labels, (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[tuple[int, str]]:
        images[:], labels[:] = self.images[indices], self.labels[indices]
        return []


def of_arrays(images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()) -> DataSet:
    """A data set from arrays: (n, S, S, 3) uint8 images and, with `class_names`, a class number for each.

    Raises:
      UserError: arrays of another shape or type, or a label without a name.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (images.shape[1], images.shape[1], 3) or images.dtype != np.uint8:
        raise UserError(f"images: (n, S, S, 3) uint8 is needed, these are {images.shape} {images.dtype}")
    numbers = np.zeros(len(images), np.int32)
    if labels is not None or class_names:
        numbers = np.asarray([] if labels is None else labels)
        if numbers.shape != images.shape[:1] or numbers.dtype.kind not in "iu":
            found = f"these are {numbers.shape} {numbers.dtype}"
            raise UserError(f"labels: one whole number for each of {len(images)} images is needed, {found}")
        if not np.isin(numbers, np.arange(len(class_names))).all():
            raise UserError(f"labels: each must have a name in class_names, in [0, {len(class_names)})")
    numbers = numbers.astype(np.int32)
    checksum = hashlib.sha256(images.tobytes() + numbers.tobytes()).hexdigest()
    source = ArraySource(images, numbers)
    return of_source(source, len(images), image_size=images.shape[1], checksum=checksum, class_names=class_names, name="arrays")


def check_fingerprint(
    saved: dict[str, Any], dataset: DataSet, *, allow_changed: bool = False, class_names: Sequence[str] = ()
) -> list[str]:
    """Refuses to go on with a data set other than the one a checkpoint was trained on.

    Args:
      class_names: of the checkpoint's labels, where it was trained with labels.

    Returns:
      Lines about changes that `allow_changed` (--config.data.allow_changed) accepts.

    Raises:
      UserError: count, classes or checksum differ and `allow_changed` is not set.
    """
    differing = [name for name in ("count", "classes", "checksum") if saved.get(name) != dataset.fingerprint[name]]
    if not differing:
        return []
    changes = ", ".join(f"{k} {_short(saved.get(k))} -> {_short(dataset.fingerprint[k])}" for k in differing)
    if not allow_changed:
        raise UserError(
            f"the data set in {_FLAG}={dataset.path} changed since the checkpoint ({changes}); restore it, start a new "
            "workdir, or go on with --config.data.allow_changed=True"
        )
    lines = [f"accepted: the data set changed since the checkpoint ({changes})"]
    pairs = enumerate(zip(class_names, dataset.class_names, strict=False))  # another number of them is another model
    if renamed := [f"{label} was {old}, is {new}" for label, (old, new) in pairs if old != new]:
        lines.append(
            f"warning: {len(renamed)} of {len(class_names)} labels stand for other classes than they were trained on (first: "
            f"{renamed[0]}): where that is more than a new name, put the class folders back"
        )
    return lines


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
