"""Which files of a tree (a folder, an archive) are the images of a data set, in which order, and of which class.

The rules are those of docs/data.md: wrapper folders are entered and the training split is chosen (`find_root`); below
that, torchvision's ImageFolder holds: every sub-folder of the root is a class, classes are sorted by name, a class holds
every picture below its folder, files are sorted by folder and then by name. Labels that lie beside the images replace the
folders', or agree with them. What is left alone is counted.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jitjax.data import rules
from jitjax.data.labels import MISSING, Labels, match_rows, number_labels, read_sidecar, read_table, same_partition
from jitjax.data.rules import Ask, listed
from jitjax.data.tree import Scan, Tree
from jitjax.errors import UserError

HERE = "."  # as a split: the folder itself, as it is
FROM_FOLDERS, NO_LABELS = "folders", "none"  # as labels
_MAX_WRAPPERS = 20


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


# --- the listing ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a data set in their fixed order.

    root: path in the tree, "" or ending in "/". names: paths relative to the root. labels: (n,) int32, 0 for an unlabelled
    set. classes: empty for an unlabelled set. sizes: (n,) int64 bytes of each file. label_source: where the labels come
    from, "" for class folders or none. left_alone: what is not part of the set, counted. notes: what a reader should know.
    """

    root: str
    names: Names
    labels: np.ndarray
    classes: tuple[str, ...]
    sizes: np.ndarray
    label_source: str = ""
    left_alone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict[str, int | str]:
        """Changes whenever an image is added, removed, renamed, relabelled or changes its size. JSON-able."""
        digest = hashlib.sha256()
        for name in self.classes:
            digest.update(os.fsencode(name) + b"\0")
        for k in range(len(self)):
            digest.update(os.fsencode(self.names[k]) + b"\0%d\0" % self.sizes[k])
        if self.label_source:
            digest.update(self.labels.tobytes())
        return {"count": len(self), "classes": len(self.classes), "checksum": digest.hexdigest()}

    def summary(self, origin: str) -> str:
        return summary(len(self), self.classes, origin, self.label_source, self.left_alone)


def summary(count: int, classes: Sequence[str], origin: str, label_source: str, left_alone: Sequence[str]) -> str:
    """ "18,000 images of 40 classes from .../train; left alone: val/ (2,000), 6 .txt"."""
    labels = f"{count:,} images of {len(classes):,} class{'' if len(classes) == 1 else 'es'}" if classes else ""
    labels = labels or f"{count:,} images without labels"
    source = f"; labels: {label_source}" if label_source and classes else ""
    left = f"; left alone: {', '.join(left_alone)}" if left_alone else ""
    return f"{labels} from {origin}{source}{left}"


def list_images(tree: Tree, ask: Ask, *, split: str = "", labels: str = "") -> Listing:
    """Lists the images of a tree.

    Args:
      ask: how messages call the tree and the options. split: which split is read, by name or role ("val"); "" for
        training, "." for the top itself with everything below. labels: "" finds them, "folders" and "none" are what they
        say, "cls" and "json" are files beside each image, anything else is a label file (or FILE:COLUMN).

    Raises:
      UserError: there is no image, a class folder is empty (leaving it out would renumber the classes after it), or there
        is more than one way to read the tree.
    """
    root, left, role = find_root(tree, ask, split)
    files = _collect(tree, root, ask, split)
    if not files.pictures:
        kinds = f" but {listed(files.passed_over())}" if files.others else ""
        raise UserError(f"no image in {ask.where}{kinds}; expected .jpg, .png, .webp or others in it or in class folders")
    names = [f"{folder}/{name}" if folder else name for folder, name, _ in files.pictures]
    found = _Finder(tree, root, role, names, files, ask).find(labels)
    notes = [*files.notes, *found.notes]
    keep = range(len(names))
    if found.by_folder:
        keep, classes, note = _class_folders(files, ask)
        number = {name: k for k, name in enumerate(classes)}
        answer = Labels(np.array([number[files.pictures[k][0].partition("/")[0]] for k in keep], np.int32), classes)
        notes += note
    elif found.values is not None:
        answer = number_labels(found.values, None, f"{ask.where}: {found.source}")
    else:
        answer = Labels(np.zeros(len(names), np.int32), ())
    if answer.note:
        notes.append(answer.note)
    strays = len(names) - len(keep)
    left += [f"{strays} images beside class folders"] * bool(strays) + files.passed_over(found.used)
    return Listing(
        root,
        Names(names[k] for k in keep),
        answer.numbers,
        answer.classes,
        np.array([files.pictures[k][2] for k in keep], np.int64),
        found.source if answer.classes else "",
        tuple(left),
        tuple(notes),
    )


def find_root(tree: Tree, ask: Ask, split: str) -> tuple[str, list[str], str]:
    """Enters wrapper folders and the split that is read.

    Returns:
      The root ("" or ending in "/"), what is left alone beside the way to it, and the role of the split.
    """
    root, left, chosen = "", [], None
    for _ in range(_MAX_WRAPPERS if split != HERE else 0):
        here = tree.scan(root)
        folders = sorted(name for name in here.folders if not tree.is_prepared(root + name))
        left_here = [f"{name}/ (prepared)" for name in sorted(here.folders) if name not in folders]
        below = _folder_below(tree, root, here, folders, ask, split)
        if not below:
            break
        name, beside = below
        is_split = rules.split_of(name)
        chosen = name if is_split else chosen
        left += left_here + [f"{root}{other}/{_count(tree, root + other)}" for other in beside]
        role = is_split.role if is_split else "train"
        unread = (file for file in here.others if not rules.is_label_file(file, role))  # those are read, or a note says why not
        others = collections.Counter([*map(rules.ending, unread), *here.system])
        if here.pictures:
            others["images"] = len(here.pictures)
        left += [f"{count:,} {kind} beside {root}{name}/" for kind, count in sorted(others.items())]
        root = f"{root}{name}/"
    if split not in ("", HERE) and chosen is None:
        raise UserError(f"{ask.where} holds no split called {split}; {ask.split} names one of its folders, or . for all of it")
    role = rules.split_of(chosen) if chosen else None
    return root, left, role.role if role else "train"


def _count(tree: Tree, folder: str) -> str:
    count = sum(len(scan.pictures) for _, scan in tree.walk(folder, sizes=False))
    return f" ({count:,})" if count else " (no image)"


def _has_pictures(tree: Tree, folder: str) -> bool:
    return any(scan.pictures for _, scan in tree.walk(folder, sizes=False))


def _folder_below(tree: Tree, root: str, here: Scan, folders: list[str], ask: Ask, split: str) -> tuple[str, list[str]] | None:
    """The split or the content of the wrapper `root`, and the folders beside it that are left alone; None where `root` is
    the data set.
    """
    splits = [name for name in folders if rules.split_of(name)]
    others = [name for name in folders if name not in splits]
    if splits and rules.is_split_layout(splits):
        filled = [name for name in others if _has_pictures(tree, root + name)]
        if filled and (not split or not _names_one(split, splits)):
            raise UserError(
                f"{ask.where} holds {listed(f'{root}{n}/' for n in splits)} beside {listed(f'{root}{n}/' for n in filled)}, so "
                f"which are splits is not clear; choose with {ask.split}=NAME, or {ask.split}=. if every folder is a class"
            )
        name = rules.pick_split(splits, split, ask)
        return name, [other for other in folders if other != name]
    if splits and split and _names_one(split, splits):
        name = rules.pick_split(splits, split, ask)
        return name, [other for other in folders if other != name]
    if splits:  # bullet_train, test_tube: a class among classes, unless it looks like a split
        nested = [name for name in splits if (scan := tree.scan(root + name)).folders and not scan.pictures]
        if len(others) < 2 or nested:
            raise UserError(
                f"{ask.where} holds {listed(f'{root}{n}/' for n in splits)}, which may be a split or a class; choose with "
                f"{ask.split}=NAME, or {ask.split}=. if every folder is a class"
            )
        return None
    side = [name for name in others if rules.is_side_folder(name)]
    drawn = [name for name in side if _has_pictures(tree, root + name)]
    side = [name for name in side if name not in drawn]
    if drawn and any(rules.is_plain_name(name) for name in others if name not in drawn):
        raise UserError(
            f"{ask.where} holds {listed(f'{root}{n}/' for n in drawn)}, which may be masks or a class; give the folder of the "
            f"images itself, or {ask.split}=. if every folder is a class"
        )
    content = [name for name in others if name not in side]
    if here.pictures or len(content) != 1:
        return None
    inside = tree.scan(root + content[0])
    if inside.pictures and not rules.is_plain_name(content[0]):
        if any(_has_pictures(tree, f"{root}{content[0]}/{name}") for name in inside.folders):
            raise UserError(
                f"{ask.where} holds one folder, {root}{content[0]}/, with both images and folders of images in it: give that "
                f"folder if its folders are classes, or {ask.split}=. if it is the one class"
            )
        return None
    return (content[0], side) if inside.pictures or inside.folders else None


def _names_one(split: str, splits: list[str]) -> bool:
    known = rules.split_of(split)
    return any(n.lower() == split.lower() or (known and rules.split_of(n).role == known.role) for n in splits)


@dataclasses.dataclass
class _Files:
    """The pictures below the root in their order, as (folder, name, bytes), and what else lies there."""

    pictures: list[tuple[str, str, int]]
    tops: list[str]
    others: dict[str, list[str]]  # folder -> names
    system: collections.Counter
    notes: list[str]

    def passed_over(self, used: frozenset[str] = frozenset()) -> list[str]:
        """Counts by ending; `used` are paths of label files that were read."""
        rest = (n for folder, names in self.others.items() for n in names if (f"{folder}/{n}" if folder else n) not in used)
        endings = collections.Counter(map(rules.ending, rest))
        return [f"{count:,} {name}" for counts in (endings, self.system) for name, count in sorted(counts.items())]


def _collect(tree: Tree, root: str, ask: Ask, split: str) -> _Files:
    pictures, others, system, notes = [], {}, collections.Counter(), []
    scans = dict(tree.walk(root))
    prepared = [name for name in scans[""].folders if tree.is_prepared(root + name)]
    tops = sorted(name for name in scans[""].folders if name not in prepared)
    hidden = tuple(f"{name}/" for name in prepared)
    system.update(f"{name}/ (prepared)" for name in prepared)
    doubtful = [name for name in tops if rules.split_of(name)]
    if doubtful and split != HERE:
        notes.append(f"{ask.where}: {listed(doubtful)} read as a class; if it is a split choose it with {ask.split}")
    for folder in sorted(scans, key=lambda path: (path.partition("/")[0], path)):
        scan = scans[folder]
        if f"{folder}/".startswith(hidden):
            continue
        if folder and split != HERE and scan.folders and all(map(rules.split_of, scan.folders)):
            if rules.is_split_layout(scan.folders):
                raise UserError(
                    f"{ask.where}: {root}{folder}/ holds the splits {listed(sorted(scan.folders))} below a class folder; "
                    f"sort them as SPLIT/CLASS/image, or give {ask.split}=. to read all of them"
                )
        scan.pictures.sort()
        pictures += [(folder, name, size) for name, size in scan.pictures]
        if scan.others:
            others[folder] = scan.others
        system.update(scan.system)
    return _Files(pictures, tops, others, system, notes)


def _class_folders(files: _Files, ask: Ask) -> tuple[Sequence[int], tuple[str, ...], list[str]]:
    """Indices of the pictures in class folders, the classes, and a note on those beside."""
    flat = next((k for k, (folder, _, _) in enumerate(files.pictures) if folder), 0)
    count = len(files.pictures)
    if flat > count - flat:
        raise UserError(
            f"{ask.where} holds {flat} images beside class folders; move them into a folder, or the folders away, or give "
            f"{ask.labels}=none to read all without labels"
        )
    filled = {folder.partition("/")[0] for folder, _, _ in files.pictures[flat:]}
    holding = {folder.partition("/")[0] for folder in files.others}
    beside = {name for name in files.tops if name not in filled and rules.is_side_folder(name) and name in holding}
    files.system.update(f"{name}/ (no image)" for name in beside)
    classes = tuple(sorted(set(files.tops) - beside))
    empty = sorted(set(classes) - filled)
    if empty:
        raise UserError(f"class folder {empty[0]!r} in {ask.where} holds no image; remove the folder or fill it")
    notes = []
    if flat:
        notes.append(f"{ask.where} holds class folders; {flat} images beside them are left out, as ImageFolder does")
    return range(flat, count), classes, notes


@dataclasses.dataclass
class _Found:
    """Where the labels come from. values: one for each picture, or None. used: label files that were read."""

    by_folder: bool = False
    values: list[Any] | None = None
    source: str = ""
    used: frozenset[str] = frozenset()
    notes: list[str] = dataclasses.field(default_factory=list)


class _Finder:
    """Finds labels beside the images of one root and weighs them against its class folders."""

    def __init__(self, tree: Tree, root: str, role: str, names: list[str], files: _Files, ask: Ask):
        self._tree, self._root, self._role, self._names, self._files, self._ask = tree, root, role, names, files, ask
        self._notes: list[str] = []
        self._unlabelled_buckets = False

    def find(self, wanted: str) -> _Found:
        nested = any(folder for folder, _, _ in self._files.pictures)
        where, option = self._ask.where, self._ask.labels
        if wanted == NO_LABELS:
            return _Found()
        if wanted == FROM_FOLDERS:
            if not nested:
                raise UserError(f"{option}=folders, but {where} has no class folders; choose other labels or {option}=none")
            return _Found(by_folder=True)
        candidates = list(self._candidates(wanted))
        if wanted and not candidates:
            raise UserError(
                f"{option}={wanted} finds no labels in {where}; give folders, none, cls, json or a label file's name"
            )
        for other in candidates[1:]:
            if not same_partition(*([repr(v) for v in c.values] for c in (candidates[0], other))):
                names = f"{candidates[0].source} and {other.source}"
                raise UserError(f"{where} holds different labels in {names}; choose with {option}=FILE, folders or none")
        if not candidates:
            return _Found(by_folder=nested and not self._unlabelled_buckets, notes=self._notes)
        found = candidates[0]
        tops = [folder.partition("/")[0] for folder, _, _ in self._files.pictures]
        if not wanted and len(set(tops)) > 1 and not self._are_buckets(found):
            if not same_partition(tops, [repr(value) for value in found.values]):
                raise UserError(
                    f"{where} holds labels in {found.source} that differ from its {len(set(tops))} class folders; choose with "
                    f"{option}=folders or {option}={found.source.partition(',')[0]}"
                )
            if "" not in tops:  # the folders have the names
                return _Found(by_folder=True, used=found.used, notes=self._notes)
        return dataclasses.replace(found, notes=self._notes)

    def _are_buckets(self, found: _Found | None) -> bool:
        """NVlabs' dataset_tool spreads files over 00000/, 00001/, ... and writes the labels to dataset.json."""
        buckets = all(re.fullmatch(r"\d{5}", name) for name in self._files.tops)
        return buckets and (found is None or found.source.endswith("dataset.json"))

    def _candidates(self, wanted: str) -> Iterator[_Found]:
        kind, _, field = wanted.partition(":")
        for ending in (".cls", ".json"):
            if not wanted or kind == ending[1:]:
                found = self._sidecars(ending, field, required=bool(wanted))
                if found:
                    yield found
                    break
        if kind in ("cls", "json"):
            return
        folder = ""
        for part in ["", *self._root.split("/")[:-1]]:  # from the top down to the root
            folder = f"{folder}{part}/" if part else folder
            for name in sorted(self._tree.scan(folder).others):
                if name == kind or folder + name == kind or (not wanted and rules.is_label_file(name, self._role)):
                    found = self._table(folder, name, field, required=bool(wanted))
                    if found:
                        yield found

    def _table(self, folder: str, name: str, column: str, required: bool) -> _Found | None:
        where, option = self._ask.where, self._ask.labels
        table = read_table(name, self._tree.read(folder + name), column, where, self._ask)
        if table.rows is None:
            if name.lower() == "dataset.json" and self._are_buckets(None):
                self._unlabelled_buckets = True
            if required or table.columns:
                text = f"{where}: {name} has no column that is known to hold labels ({listed(table.columns, 20)})"
                if required:
                    raise UserError(f"{text}; name it as {option}={name}:COLUMN")
                self._notes.append(f"{text}; if one does, name it as {option}={name}:COLUMN")
            return None
        values = match_rows(table.rows, self._names, folder, self._root)
        missing = [k for k, value in enumerate(values) if value is MISSING]
        if len(missing) == len(values):
            if required:
                raise UserError(f"{option}={name}: it names none of the images of {where}")
            self._notes.append(f"{where}: {name} names none of the images and is left alone")
            return None
        if missing:
            raise UserError(
                f"{where}: {name} has no label for {len(missing)} of {len(values)} images (such as {self._names[missing[0]]}); "
                f"complete it, or choose {option}=folders or none"
            )
        inside = (folder + name)[len(self._root) :]
        source = f"{name}, column {table.column}" if table.column and name.lower() != "dataset.json" else name
        return _Found(values=values, source=source, used=frozenset([inside]))

    def _sidecars(self, ending: str, field: str, required: bool) -> _Found | None:
        """Labels in a file beside each image, named as the image up to its first dot (WebDataset's rule)."""
        files = {
            posixpath.join(folder, name.partition(".")[0]): posixpath.join(folder, name)
            for folder, names in self._files.others.items()
            for name in names
            if name.lower().endswith(ending) and not (not folder and rules.is_label_file(name, self._role))
        }
        if not files:
            return None
        where, option = self._ask.where, self._ask.labels
        keys = [posixpath.join(folder, name.partition(".")[0]) for folder, name, _ in self._files.pictures]
        present = [key for key in keys if key in files]
        if not present:
            return None
        values = {}
        for number, key in enumerate(present):
            values[key] = read_sidecar(files[key], self._tree.read(self._root + files[key]), field, where)
            if number == 0 and values[key] is MISSING and not required:
                self._notes.append(
                    f"{where}: {len(files)} {ending} files hold no field that is known for labels; if one does, name it as "
                    f"{option}=json:FIELD"
                )
                return None
        missing = [k for k, key in enumerate(keys) if values.get(key, MISSING) is MISSING]
        if missing or len(set(keys)) < len(keys):
            what = f"{len(missing)} of {len(keys)} images have no label in a {ending} file (such as {self._names[missing[0]]})"
            if not missing:
                what = f"several images share one {ending} file"
            raise UserError(f"{where}: {what}; complete them, or choose {option}=folders or none")
        used = frozenset(files[key] for key in present)
        return _Found(values=[values[key] for key in keys], source=f"{ending} files", used=used)
