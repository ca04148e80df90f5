"""Which files of a folder (or an archive) are images, in which order, and which class each belongs to.

The rules are those of torchvision's ImageFolder: every sub-folder of the root is a class, classes are sorted by name, a
class holds every image below its folder, files are sorted by folder and then by name. A root that holds images and no
class folders is a flat, unlabelled set. Hidden folders and macOS's `._*` files are passed over.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
import posixpath
from collections.abc import Iterable

import numpy as np

from jitjax.errors import UserError

INDEX_FILE = "index.json"  # of a prepared directory
PARTIAL_FOLDER = "partial"  # plan and finished shards of a preparation that is under way
PLAN_FILE = "plan.json"
LOCK_FILE = ".prepare.lock"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SPLITS = frozenset(("train", "val", "valid", "validation", "test"))
_log = logging.getLogger(__name__)
_LISTING_THREADS = 16  # a network disk answers many questions at once, each slowly


def is_image_name(name: str) -> bool:
    base = posixpath.basename(name)
    return base.lower().endswith(EXTENSIONS) and not base.startswith("._")


def is_prepared(folder: str) -> bool:
    """Whether `folder` was written by `python -m jitjax.prepare`, finished or not; such a one beside images is no
    class.
    """
    if os.path.isfile(os.path.join(folder, INDEX_FILE)):
        return any(name.endswith(".arrayrecord") for name in os.listdir(folder))
    begun = (os.path.join(PARTIAL_FOLDER, PLAN_FILE), LOCK_FILE)
    return any(os.path.isfile(os.path.join(folder, name)) for name in begun)


def is_hidden(path: str) -> bool:
    """True where a folder of the relative path is hidden or macOS's resource fork."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/")[:-1])


class Names:
    """A read-only list of strings in two arrays: a million file names take 40 MB in a worker, not 150."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else int(self._ends[index - 1])
        return os.fsdecode(self._bytes[start : int(self._ends[index])])


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a data set in their fixed order.

    names: paths relative to the root, "/" between parts. labels: (n,) int32, 0 for an unlabelled set. classes: empty
    for an unlabelled set. sizes: (n,) int64 bytes of each file.
    """

    names: Names
    labels: np.ndarray
    classes: tuple[str, ...]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict[str, int | str]:
        """Changes whenever an image is added, removed, renamed or changes its size. JSON-able."""
        digest = hashlib.sha256()
        for name in self.classes:
            digest.update(os.fsencode(name) + b"\0")
        for k in range(len(self)):
            digest.update(os.fsencode(self.names[k]) + b"\0%d\0" % self.sizes[k])
        return {"count": len(self), "classes": len(self.classes), "checksum": digest.hexdigest()}


def arrange(files: Iterable[tuple[str, int]], folders: Iterable[str], where: str) -> Listing:
    """Sorts image files into classes.

    Args:
      files: (path relative to the root, size in bytes) of every image. folders: names of the root's sub-folders, empty
        ones included, so that a class that lost its images is noticed. where: how the root is called in messages.

    Raises:
      UserError: there is no image, or a class folder is empty (leaving it out would renumber the classes behind it).
    """
    nested: list[tuple[tuple[str, str, str], int]] = []
    flat: list[tuple[str, int]] = []
    for path, size in files:
        top, _, rest = path.partition("/")
        if rest:
            folder, _, base = path.rpartition("/")
            nested.append(((top, folder, base), size))
        else:
            flat.append((path, size))
    if not nested:
        if not flat:
            raise UserError(f"no image in {where}; expected {', '.join(EXTENSIONS)} in it or in one folder per class")
        flat.sort()
        names = Names(name for name, _ in flat)
        return Listing(names, np.zeros(len(flat), np.int32), (), np.array([size for _, size in flat], np.int64))
    if len(flat) > len(nested):
        raise UserError(f"{where} holds {len(flat)} images beside class folders; move them into a folder, or the folders away")
    if flat:
        _log.warning("%s holds class folders; %d images beside them are left out, as ImageFolder does", where, len(flat))
    classes = tuple(sorted(set(folders) | {key[0] for key, _ in nested}))
    empty = sorted(set(classes) - {key[0] for key, _ in nested})
    if empty:
        raise UserError(f"class folder {empty[0]!r} in {where} holds no image; remove the folder or fill it")
    nested.sort()
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number[key[0]] for key, _ in nested], np.int32)
    names = Names(f"{folder}/{base}" for (_, folder, base), _ in nested)
    return Listing(names, labels, classes, np.array([size for _, size in nested], np.int64))


def train_folder(folders: Iterable[str], has_images: bool) -> str:
    """The name of the `train` folder where the root is the parent of a train/val split, else an empty string."""
    folders = list(folders)
    train = [name for name in folders if name.lower() == "train"]
    if len(train) == 1 and not has_images and all(name.lower() in SPLITS for name in folders):
        return train[0]
    return ""


def list_folder(root: str, where: str) -> tuple[str, Listing]:
    """Lists the images below `root`, or below its `train/` sub-folder.

    Returns:
      The folder that the listing is relative to, and the listing.

    Raises:
      UserError: not a folder, unreadable, or without images. `where` names the flag and the path.
    """
    try:
        folders, files = _scan_root(root)
        train = train_folder(folders, bool(files))
        if train:
            root = os.path.join(root, train)
            folders, files = _scan_root(root)
        with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
            pending = {pool.submit(_scan, os.path.join(root, name)): (name, frozenset()) for name in folders}
            while pending:
                done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    folder, above = pending.pop(future)
                    below, found = future.result()
                    files.extend((f"{folder}/{name}", size) for name, size in found)
                    seen = above | {os.path.realpath(os.path.join(root, folder))}
                    for name in below:
                        path = os.path.join(root, folder, name)
                        if name.startswith(".") or (os.path.islink(path) and os.path.realpath(path) in seen):
                            continue  # a link back to a folder above would never end
                        pending[pool.submit(_scan, path)] = (f"{folder}/{name}", seen)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}: {error.filename}") from None
    return root, arrange(files, folders, where)


def _scan_root(root: str) -> tuple[list[str], list[tuple[str, int]]]:
    """`_scan`, less the folders that cannot be classes."""
    folders, files = _scan(root)
    named = (name for name in folders if not name.startswith(".") and name != "__MACOSX")
    return [name for name in named if not is_prepared(os.path.join(root, name))], files


def _scan(folder: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Sub-folders, and (name, size) of the image files, of one folder. Links are followed; a dangling one counts as
    size -1.
    """
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image_name(entry.name):
                try:
                    files.append((entry.name, entry.stat().st_size))
                except OSError:
                    files.append((entry.name, -1))
    return folders, files
