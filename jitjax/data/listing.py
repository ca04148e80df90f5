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
import re
from collections.abc import Iterable, Sequence

import numpy as np

from jitjax.data import rules
from jitjax.data.label_sources import LabelFinder
from jitjax.data.labels import Labels, alike, number_part
from jitjax.data.rules import HERE, Ask, listed
from jitjax.data.tree import Files, Scan, Tree
from jitjax.errors import UserError

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


def list_images(tree: Tree, ask: Ask, *, split: str = "", labels: str = "", settled: bool = False) -> Listing:
    """Lists the images of a tree.

    Args:
      ask: how messages call the tree and the options. split: which split is read, by name or role ("val"); "" for
        training, "." for the top itself with everything below. labels: "" finds them, "folders" and "none" are what they
        say, "cls" and "json" are files beside each image, anything else is a label file (or FILE:COLUMN). settled: the
        tree is of that split already, so none has to be found in it.

    Raises:
      UserError: there is no image, a class folder is empty (leaving it out would renumber the classes after it), or there
        is more than one way to read the tree.
    """
    root, left, chosen = find_root(tree, ask, split, settled)
    role = rules.split_of(chosen).role if chosen else "train"
    settled = settled or chosen is not None
    files = _collect(tree, root, ask, split, settled)
    if not files.pictures:
        kinds = f" but {listed(files.passed_over())}" if files.others else ""
        raise UserError(f"no image in {ask.where}{kinds}; expected .jpg, .png, .webp or others in it or in class folders")
    names = [f"{folder}/{name}" if folder else name for folder, name, _ in files.pictures]
    found = LabelFinder(tree, root, role, names, files, ask).find(labels)
    notes = [*files.notes, *found.notes]
    keep: Sequence[int] = range(len(names))
    if found.by_folder:
        keep, classes, note = _class_folders(files, ask)
        number = {name: k for k, name in enumerate(classes)}
        notes += note
    strays = len(names) - len(keep)
    if found.splits and split != HERE and not (settled and len(set(found.splits)) == 1):
        name = rules.pick_split(set(found.splits), split, ask)
        counts = collections.Counter(found.splits[k] for k in keep)
        left += [f"split {other} ({count:,})" for other, count in sorted(counts.items()) if other != name]
        keep = [k for k in keep if found.splits[k] == name]
    elif split not in ("", HERE) and not settled:
        raise UserError(f"{ask.where} holds no split called {split}; {ask.split} names one of its folders, or . for all of it")
    if found.by_folder:
        tops = [files.pictures[k][0].partition("/")[0] for k in keep]
        answer = Labels(np.array([number[top] for top in tops], np.int32), classes, alike(classes, ask.where))
    elif found.values is not None:
        answer = number_part(found.values, keep, None, f"{ask.where}: {found.source}", names)
    else:
        answer = Labels(np.zeros(len(keep), np.int32), ())
    if answer.note:
        notes.append(answer.note)
    left += [f"{strays} images beside class folders"] * bool(strays) + files.passed_over(found.used)
    return Listing(
        root,
        Names(names[k] for k in keep),
        answer.numbers,
        answer.classes,
        np.array([files.pictures[k][2] for k in keep], np.int64),
        (found.source + f", files by column {found.file_column}" * bool(found.file_column)) if answer.classes else "",
        tuple(left),
        tuple(notes),
    )


def find_root(tree: Tree, ask: Ask, split: str, settled: bool = False) -> tuple[str, list[str], str | None]:
    """Enters wrapper folders and the split that is read. A split is chosen once: the folders in it are classes.

    Returns:
      The root ("" or ending in "/"), what is left alone beside the way to it, and the folder of the split, if there is one.
    """
    root, left, chosen = "", [], None
    role = (rules.split_of(split) or rules.Split("train", True)).role if settled else ""  # of the split that was entered
    for _ in range(_MAX_WRAPPERS):
        here = tree.scan(root)
        folders = sorted(name for name in here.folders if not tree.is_prepared(root + name))
        left_here = [f"{name}/ (prepared)" for name in sorted(here.folders) if name not in folders]
        below = _folder_below(tree, root, here, folders, ask, split, role)
        if not below:
            break
        name, beside = below
        is_split = rules.split_of(name)
        if is_split:
            chosen, role = name, is_split.role
        left += left_here + [f"{root}{other}/{_count(tree, root + other)}" for other in beside]
        read = is_split.role if is_split else "train"
        unread = (file for file in here.others if not rules.is_label_file(file, read))  # those are read, or a note says why not
        others = collections.Counter([*map(rules.ending, unread), *here.system])
        if here.pictures:
            others["images"] = len(here.pictures)
        left += [f"{count:,} {kind} beside {root}{name}/" for kind, count in sorted(others.items())]
        root = f"{root}{name}/"
    return root, left, chosen


def _count(tree: Tree, folder: str) -> str:
    count = sum(len(scan.pictures) for _, scan in tree.walk(folder, sizes=False))
    return f" ({count:,})" if count else " (no image)"


def _has_pictures(tree: Tree, folder: str) -> bool:
    return any(scan.pictures for _, scan in tree.walk(folder, sizes=False))


def _folder_below(
    tree: Tree, root: str, here: Scan, folders: list[str], ask: Ask, split: str, inside: str
) -> tuple[str, list[str]] | None:
    """The split or the content of the wrapper `root`, and the folders beside it that are left alone; None where `root` is
    the data set.

    inside: the role of the split that was entered, "" for none.
    """
    splits = [name for name in folders if rules.split_of(name)]
    if splits and split != HERE:
        find = _class_or_split if inside else _split
        name = find(tree, root, folders, ask, split, inside)
        return (name, [other for other in folders if other != name]) if name else None
    side = [name for name in folders if rules.is_side_folder(name)]
    drawn = [name for name in side if _has_pictures(tree, root + name)]
    side = [name for name in side if name not in drawn]
    if drawn and split != HERE and any(rules.is_plain_name(name) for name in folders if name not in drawn):
        raise UserError(
            f"{ask.where} holds {listed(f'{root}{n}/' for n in drawn)}, which may be masks or a class; give the folder of the "
            f"images itself, or {_all_classes(root, ask, bool(inside))} if every folder is a class"
        )
    content = [name for name in folders if name not in side]
    if here.pictures or here.dangling or len(content) != 1:
        return None
    below = tree.scan(root + content[0])
    if split == HERE:  # a wrapper alone; what it holds is read as it is
        return (content[0], side) if below.folders and not below.pictures and not splits else None
    if below.pictures and not rules.is_plain_name(content[0]):
        if any(_has_pictures(tree, f"{root}{content[0]}/{name}") for name in below.folders):
            raise UserError(
                f"{ask.where} holds one folder, {root}{content[0]}/, with both images and folders of images in it: give that "
                f"folder if its folders are classes, or {_all_classes(root, ask, bool(inside))} if it is the one class"
            )
        return None
    return (content[0], side) if below.pictures or below.folders else None


def _split(tree: Tree, root: str, folders: list[str], ask: Ask, split: str, inside: str) -> str | None:
    """The folder of the split that is read, None where the folders with a split's name are classes."""
    splits = [name for name in folders if rules.split_of(name)]
    others = [name for name in folders if name not in splits]
    filled = [name for name in others if _has_pictures(tree, root + name)]
    named = split and _names_one(split, splits, filled)
    if rules.is_split_layout(splits):
        if filled and not named:
            raise UserError(
                f"{ask.where} holds {listed(f'{root}{n}/' for n in splits)} beside {listed(f'{root}{n}/' for n in filled)}, so "
                f"which are splits is not clear; choose with {ask.split}=NAME, or {ask.split}=. if every folder is a class"
            )
        return rules.pick_split(splits, split, ask)
    if named:
        return rules.pick_split(splits, split, ask)
    if len(others) < 2 or _nested(tree, root, splits):
        raise UserError(
            f"{ask.where} holds {listed(f'{root}{n}/' for n in splits)}, which may be a split or a class; choose with "
            f"{ask.split}=NAME, or {ask.split}=. if every folder is a class"
        )
    return None  # bullet_train, test_tube: a class among classes


def _class_or_split(tree: Tree, root: str, folders: list[str], ask: Ask, split: str, inside: str) -> str | None:
    """As `_split` in a split that was entered: train/train/ is a wrapper, trainval/ holds two, a folder beside others is a
    class."""
    splits = [name for name in folders if rules.split_of(name)]
    filled = [name for name in folders if name not in splits and _has_pictures(tree, root + name)]
    if not filled and len(splits) == 1 and rules.split_of(splits[0]).role == inside:
        return splits[0]
    if not filled and "trainval" in root.lower() and rules.is_split_layout(splits):
        return rules.pick_split(splits, split if split and _names_one(split, splits, []) else "", ask)
    nested = _nested(tree, root, splits) if filled else splits
    if nested:
        raise UserError(
            f"{ask.where} holds {listed(f'{root}{n}/' for n in nested)}, which may be a split within a split or a class; give "
            f"the folder to be read itself, or {_all_classes(root, ask, True)} if every folder is a class"
        )
    return None


def _nested(tree: Tree, root: str, names: list[str]) -> list[str]:
    """Those that hold folders alone, as a split does and a class seldom."""
    return [name for name in names if (scan := tree.scan(root + name)).folders and not scan.pictures]


def _all_classes(root: str, ask: Ask, settled: bool) -> str:
    """How to have every folder of `root` read as a class. settled: it lies in a split, which the option would not enter."""
    itself = f"the folder {root} itself" if root else "a folder of the archives of that split alone"
    return f"{itself} with {ask.split}=." if settled else f"{ask.split}=."


def _names_one(split: str, splits: list[str], others: list[str]) -> bool:
    """Whether the option chooses one of `splits`: by name, or by role where they can hardly be classes among `others`."""
    known, found = rules.split_of(split), list(map(rules.split_of, splits))
    if others:
        found = [other for other in found if other.sure]
    roles = {other.role for other in found}
    by_role = known and known.role in roles and (not others or len(roles) > 1)
    return bool(by_role) or any(name.lower() == split.lower() for name in splits)


def _collect(tree: Tree, root: str, ask: Ask, split: str, settled: bool) -> Files:
    pictures, others, system, notes = [], {}, collections.Counter(), []
    scans = dict(tree.walk(root))
    prepared = [name for name in scans[""].folders if tree.is_prepared(root + name)]
    tops = sorted(name for name in scans[""].folders if name not in prepared)
    hidden = tuple(f"{name}/" for name in prepared)
    system.update(f"{name}/ (prepared)" for name in prepared)
    doubtful = [name for name in tops if rules.split_of(name)]
    if doubtful and split != HERE:
        choose = "give that folder itself" if settled else f"choose it with {ask.split}"
        notes.append(f"{ask.where}: {listed(doubtful)} read as a class; if it is a split {choose}")
    for folder in sorted(scans, key=lambda path: (path.partition("/")[0], path)):
        scan = scans[folder]
        if f"{folder}/".startswith(hidden):
            continue
        if folder and split != HERE and scan.folders and all(map(rules.split_of, scan.folders)):
            if rules.is_split_layout(scan.folders):
                raise UserError(
                    f"{ask.where}: {root}{folder}/ holds the splits {listed(sorted(scan.folders))} below a class folder; "
                    f"sort them as SPLIT/CLASS/image, or give {_all_classes(root, ask, settled)} to read all of them"
                )
        scan.pictures.sort()
        pictures += [(folder, name, size) for name, size in scan.pictures]
        if scan.others:
            others[folder] = scan.others
        system.update(scan.system)
    doubt = _doubt({name: scans[name] for name in tops}, pictures) if split != HERE else ""
    return Files(pictures, tops, others, system, notes, doubt, sorted(scans[""].dangling))


def _doubt(tops: dict[str, Scan], pictures: list[tuple[str, str, int]]) -> str:
    """Why the folders at the top may be something else than classes; "" where nothing speaks against it."""
    filled = {name: set(scan.folders) for name, scan in tops.items() if scan.folders or scan.pictures}
    if rules.are_parts(list(filled)):
        return f"{listed(sorted(filled))} look like numbered parts of one set"
    general = sorted(name for name in filled if name.lower() in ("images", "image", "imgs", "img", "data", "dataset"))
    if general and len(filled) > 1:
        return f"{general[0]}/ beside {listed(sorted(filled.keys() - {general[0]}))} has no name of a class"
    inner = list(filled.values())
    shared = set.intersection(*inner) if len(inner) > 1 and not any(scan.pictures for scan in tops.values()) else set()
    if len(shared) > 1 and 2 * len(shared) >= len(set.union(*inner)):
        return f"each of {listed(sorted(filled))} holds the same folders ({listed(sorted(shared))})"
    if filled and all(map(re.compile(r"\d{5}").fullmatch, filled)):
        numbers = ((folder, re.fullmatch(r"img(\d{5})\d{3}\.\w+", name)) for folder, name, _ in pictures)
        if all(match and match[1] == folder for folder, match in numbers):
            return f"{listed(sorted(filled))} are named as by NVlabs' dataset_tool, but its dataset.json is not there"
    return ""


def _class_folders(files: Files, ask: Ask) -> tuple[Sequence[int], tuple[str, ...], list[str]]:
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
        inside = [n for f, found in files.others.items() if f.partition("/")[0] == empty[0] for n in found]
        kinds = collections.Counter(map(rules.ending, inside))
        but = f" but {listed(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}" if kinds else ""
        raise UserError(f"class folder {empty[0]!r} in {ask.where} holds no image{but}; remove the folder or fill it")
    if files.dangling:  # without its folder, the classes after it would be renumbered
        raise UserError(
            f"{files.dangling[0]!r} beside the class folders of {ask.where} is a link to what is not there; mend the link, "
            "mount the disk that it leads to, or remove it if it is no class"
        )
    notes = []
    if flat:
        notes.append(f"{ask.where} holds class folders; {flat} images beside them are left out, as ImageFolder does")
    return range(flat, count), classes, notes
