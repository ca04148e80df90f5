"""A data set as it lies on disk: folders, pictures, other files. Archives have a tree of the same form (`archive.Archive`)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Protocol

from jitjax.data import rules
from jitjax.data.files import unreadable
from jitjax.data.rules import Ask

INDEX_FILE = "index.json"  # of a prepared directory
PARTIAL_FOLDER = "partial"  # plan and finished shards of a preparation that is under way
PLAN_FILE = "plan.json"
LOCK_FILE = ".prepare.lock"
# Records of how images were made, by `shapes.draw_dataset` and `jitjax sample`, by what is in them.
_RECORDS = {
    "shapes.json": {"image_size", "per_class", "seed", "classes"},
    "samples.json": {"weights", "which", "labels_by_index"},
}
_LISTING_THREADS = 16  # a network disk answers many questions at once, each slowly


def is_prepared(folder: str) -> bool:
    """Whether `folder` was written by `jitjax prepare`, finished or not; such a one beside images is no
    class.
    """
    if os.path.isfile(os.path.join(folder, INDEX_FILE)):
        return any(name.endswith(".arrayrecord") for name in os.listdir(folder))
    begun = (os.path.join(PARTIAL_FOLDER, PLAN_FILE), LOCK_FILE)
    return any(os.path.isfile(os.path.join(folder, name)) for name in begun)


def is_record(folder: str, name: str) -> bool:
    """Whether a file was written by this program beside images that it drew: it holds no labels and needs no report."""
    if name not in _RECORDS:
        return False
    try:
        with open(os.path.join(folder, name), "rb") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= _RECORDS[name]


_TEXT = (".md", ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".pdf", ".py", ".html")  # never a folder


@contextlib.contextmanager
def reading(ask: Ask) -> Iterator[None]:
    """Turns an error of the disk into one line."""
    try:
        yield
    except OSError as error:
        raise unreadable(error, f"{ask.where} ({error.filename})" if error.filename else ask.where) from None


@dataclasses.dataclass
class Scan:
    """One folder of a tree. pictures: (name, bytes); others: names of the remaining files; system: what systems left
    behind, as it is called in reports. links: the folders that are links. dangling: those of the others that are links to
    what is not there, which may have been folders.
    """

    folders: list[str] = dataclasses.field(default_factory=list)
    pictures: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    system: list[str] = dataclasses.field(default_factory=list)
    links: set[str] = dataclasses.field(default_factory=set)
    dangling: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Files:
    """The pictures below the root in their order, as (folder, name, bytes), and what else lies there.

    doubt: why the folders of the root may be no classes, "" where nothing speaks against it. dangling: links of the root, see
    `Scan`.
    """

    pictures: list[tuple[str, str, int]]
    tops: list[str]
    others: dict[str, list[str]]  # folder -> names
    system: collections.Counter[str]
    notes: list[str]
    doubt: str = ""
    dangling: Sequence[str] = ()

    def passed_over(self, used: frozenset[str] = frozenset()) -> list[str]:
        """Counts by ending; `used` are paths of label files that were read."""
        rest = (n for folder, names in self.others.items() for n in names if (f"{folder}/{n}" if folder else n) not in used)
        endings = collections.Counter(map(rules.ending, rest))
        return [f"{count:,} {name}" for counts in (endings, self.system) for name, count in sorted(counts.items())]


class Tree(Protocol):
    """Folders and files with "/" between the parts of a path; "" is the top."""

    def scan(self, folder: str) -> Scan: ...

    def walk(self, folder: str, sizes: bool = True) -> Iterator[tuple[str, Scan]]:
        """Every folder below, itself included, with its path from there. sizes: False where sizes may be -1."""

    def is_prepared(self, folder: str) -> bool: ...

    def path(self, folder: str) -> str:
        """Where a folder lies on disk; asked of trees with links alone."""

    def read(self, path: str) -> bytes:
        """A label file's content."""


class FolderTree:
    """A tree on disk. Links are followed, but never to a folder above."""

    def __init__(self, top: str, endings: tuple[str, ...]):
        self.top = top
        self._endings = endings
        self._scans: dict[str, Scan] = {}  # of the few folders on the way to the root
        self._prepared: dict[str, bool] = {}

    def scan(self, folder: str) -> Scan:
        path = os.path.join(self.top, folder.rstrip("/"))
        if path not in self._scans:
            self._scans[path] = _scan(path, self._endings, sizes=True)
        return self._scans[path]

    def path(self, folder: str) -> str:
        """Where a folder of the tree lies."""
        return os.path.join(self.top, folder).rstrip("/") or "/"

    def is_prepared(self, folder: str) -> bool:
        if folder not in self._prepared:
            self._prepared[folder] = is_prepared(os.path.join(self.top, folder))
        return self._prepared[folder]

    def read(self, path: str) -> bytes:
        with open(os.path.join(self.top, path), "rb") as file:
            return file.read()

    def walk(self, folder: str, sizes: bool = True) -> Iterator[tuple[str, Scan]]:
        root = os.path.join(self.top, folder.rstrip("/"))

        def scan(path: str) -> Scan:
            return self._scans.get(path) or _scan(path, self._endings, sizes)

        pool = ThreadPoolExecutor(_LISTING_THREADS)
        try:
            pending = {pool.submit(scan, root): ("", frozenset())}
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    inside, above = pending.pop(future)
                    found = future.result()
                    seen = above | {os.path.realpath(os.path.join(root, inside))} if found.folders else above
                    linked = {n for n in found.links if os.path.realpath(os.path.join(root, inside, n)) in seen}
                    found.folders = [name for name in found.folders if name not in linked]
                    yield inside, found
                    for name in found.folders:
                        path = f"{inside}/{name}" if inside else name
                        pending[pool.submit(scan, os.path.join(root, path))] = (path, seen)
        finally:  # also where the caller has seen enough
            pool.shutdown(wait=True, cancel_futures=True)


def _scan(folder: str, endings: tuple[str, ...], sizes: bool) -> Scan:
    """One folder on disk. Links are followed; a picture that is a dangling one counts as size -1."""
    scan = Scan()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if system := rules.system_folder(name):
                    scan.system.append(system)
                else:
                    scan.folders.append(name)
                    if entry.is_symlink():
                        scan.links.add(name)
            elif system := rules.system_file(name):
                scan.system.append(system)
            elif name.lower().endswith(endings):
                try:
                    scan.pictures.append((name, entry.stat().st_size if sizes else -1))
                except OSError:
                    scan.pictures.append((name, -1))
            elif not is_record(folder, name):
                scan.others.append(name)
                text = name.startswith(".") or name.lower().endswith(_TEXT)  # an editor's lock, a file that is not fetched
                if not text and entry.is_symlink() and not os.path.exists(entry.path):
                    scan.dangling.append(name)
    return scan
