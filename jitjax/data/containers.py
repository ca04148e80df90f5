"""Folders whose images lie in Parquet, Arrow or tar files: which files, and of which split."""

from __future__ import annotations

import collections
import os
import posixpath
import re
from collections.abc import Sequence

from jitjax.data import rules
from jitjax.data.rules import HERE, Ask, listed
from jitjax.data.tree import Tree
from jitjax.errors import UserError


def find_containers(tree: Tree, ask: Ask) -> list[str]:
    """The paths of a tree's Parquet, Arrow or tar files where those hold its images; empty where it holds pictures.

    Raises:
      UserError: the tree holds images in more than one of these ways.
    """
    level, seen = [""], set()
    while level:
        for folder in level:
            scan = tree.scan(folder)
            if any(map(_container_kind, scan.others)):
                return _all_containers(tree, ask)
            if scan.pictures:
                return []
        below = []
        for folder in level:
            scan = tree.scan(folder)
            for name in sorted(scan.folders):
                path = f"{folder}/{name}" if folder else name
                if name in scan.links:  # each target once: links may lead in circles
                    target = os.path.realpath(tree.path(path))
                    if target in seen:
                        continue
                    seen.add(target)
                below.append(path)
        level = below
    return []


def _all_containers(tree: Tree, ask: Ask) -> list[str]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for folder, scan in tree.walk("", sizes=False):
        for name in scan.others:
            if kind := _container_kind(name):
                found[kind].append(posixpath.join(folder, name))
        found["image"] += [posixpath.join(folder, name) for name, _ in scan.pictures]
    found = {kind: paths for kind, paths in found.items() if paths}
    if len(found) > 1:
        kinds = listed(f"{len(paths):,} {kind} files (such as {min(paths)})" for kind, paths in sorted(found.items()))
        raise UserError(f"{ask.where} holds {kinds}; give the folder or file of one kind")
    return sorted(next(iter(found.values())))


def _container_kind(name: str) -> str:
    lower = name.lower()
    if lower.endswith(".arrow"):  # `datasets` leaves the results of map() and filter() beside the data
        return "" if lower.startswith("cache-") else ".arrow"
    return ".parquet" if lower.endswith(".parquet") else ".tar" if lower.endswith(rules.TAR_ENDINGS) else ""


def beside(tree: Tree, ask: Ask) -> tuple[list[str], list[str]]:
    """The files of other kinds beside containers, counted by ending, and a note on those that may hold labels."""
    names = [name for _, scan in tree.walk("", sizes=False) for name in scan.others if not _container_kind(name)]
    counts = collections.Counter(map(rules.ending, names))
    labels = sorted(name for name in names if rules.is_label_file(name, "train"))
    note = f"{ask.where}: {listed(labels)} beside the data files is not read; labels must be in them, or unpack them"
    return [f"{count:,} {ending}" for ending, count in sorted(counts.items())], [note] if labels else []


def choose_files(paths: Sequence[str], ask: Ask, split: str) -> tuple[list[str], list[str], bool]:
    """The container files of the split that is read, found by the names of files and folders.

    Returns:
      The chosen paths; what is left alone, counted; and whether the names have told which split they are.
    """
    if split == HERE:
        return list(paths), [], False
    groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for path in paths:
        *folders, _ = path.split("/")
        parts = [*folders, re.sub(r"[-_.]?\d+(-of-\d+(-[0-9a-f]+)?)?$", "", rules.stem(path))]
        at = max((k for k, part in enumerate(parts) if rules.split_of(part)), default=None)
        groups[("/".join(folders), "") if at is None else ("/".join(parts[:at]), parts[at])].append(path)
    names = {name for _, name in groups if name}
    if not names or (not rules.is_split_layout(names) and not split):
        folders = sorted({os.path.dirname(path) for path in paths})
        if len(folders) > 1:
            raise UserError(f"{ask.where} holds data files in folders ({listed(folders)}); give one of them, or {ask.split}=.")
        return list(paths), [], False
    unnamed = [path for (_, name), found in groups.items() if not name for path in found]
    if unnamed and not split:
        raise UserError(
            f"{ask.where} holds files of the splits {listed(sorted(names))} beside others ({listed(unnamed, 3)}); choose with "
            f"{ask.split}=NAME, or {ask.split}=. for all"
        )
    name = rules.pick_split(names, split, ask)
    chosen = {key: found for key, found in groups.items() if key[1] == name}
    if len(chosen) > 1:
        folders = listed(sorted(above or "." for above, _ in chosen))
        raise UserError(f"{ask.where} holds several data sets ({folders}); give one of them")
    (found,) = chosen.values()
    rest = {other: files for (_, other), files in sorted(groups.items()) if other != name}
    left = [f"{other or 'others'} ({len(files)} file{'s' * (len(files) > 1)})" for other, files in rest.items()]
    return found, left, True


def refuse_missing(paths: Sequence[str], ask: Ask) -> None:
    """Refuses files whose names say that there are more of them: train-00000-of-00005.parquet without the other four."""
    sets: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)-of-(\d+)(-[0-9a-f]+)?", rules.stem(path)):
            sets[posixpath.join(posixpath.dirname(path), match[1]), match[3]].add(match[2])
    for (name, total), found in sorted(sets.items()):
        present, count, width = set(map(int, found)), int(total), len(min(found))
        first = 1 if count in present and 0 not in present else 0
        missing = [number for number in range(first, first + count) if number not in present]
        if missing:
            parts = listed(f"{name}{number:0{width}}-of-{total}" for number in missing)
            raise UserError(
                f"{ask.where} holds {len(present)} of the {count} files {name}*-of-{total}; missing: {parts}; complete the "
                f"download, or put those that are to be read into a folder of their own and give it with {ask.split}=."
            )
