"""Where the labels of a tree's images come from: class folders, a table, a file beside each image; and whether these agree."""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from jitjax.data import rules
from jitjax.data.labels import (
    MISSING,
    Match,
    agree,
    choose_label_column,
    match_table,
    read_sidecar,
    read_table,
)
from jitjax.data.rules import FROM_FOLDERS, NO_LABELS, Ask, listed
from jitjax.data.tree import Files, Tree
from jitjax.errors import UserError


@dataclasses.dataclass
class Found:
    """Where the labels come from.

    values: one for each picture, or None. splits: the split of each picture, where a table tells. source: for reports.
    choice: the value of the option that asks for this source. used: label files that were read. file_column: of the table,
    which names the images.
    """

    by_folder: bool = False
    values: list[Any] | None = None
    splits: list[str] | None = None
    source: str = ""
    choice: str = ""
    used: frozenset[str] = frozenset()
    file_column: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


class LabelFinder:
    """Finds labels beside the images of one root and weighs them against its class folders."""

    def __init__(self, tree: Tree, root: str, role: str, names: list[str], files: Files, ask: Ask):
        self._tree, self._root, self._role, self._names, self._files, self._ask = tree, root, role, names, files, ask
        self._notes: list[str] = []
        self._splits: list[str] | None = None  # of a table without labels
        self._looked_at: set[str] = set()
        self._unlabelled_buckets = False

    def find(self, wanted: str) -> Found:
        nested = any(folder for folder, _, _ in self._files.pictures)
        where, option = self._ask.where, self._ask.labels
        if wanted == NO_LABELS:
            return Found()
        if wanted == FROM_FOLDERS:
            if not nested:
                raise UserError(f"{option}=folders, but {where} has no class folders; choose other labels or {option}=none")
            return Found(by_folder=True)
        candidates = list(self._candidates(wanted))
        if wanted and not candidates:
            raise UserError(
                f"{option}={wanted} finds no labels in {where}; give folders, none, cls, json or a label file's name"
            )
        for other in candidates[1:]:
            if not agree(candidates[0].values, other.values):
                names = f"{candidates[0].source} and {other.source}"
                raise UserError(f"{where} holds different labels in {names}; choose with {option}=FILE, folders or none")
        doubt = self._files.doubt
        if not candidates:
            by_folder = nested and not self._unlabelled_buckets
            if by_folder and doubt:
                raise UserError(
                    f"{where}: {doubt}; choose {option}=folders if they are classes, {option}=none if not, or give one of them"
                )
            return Found(by_folder=by_folder, splits=self._splits, notes=[*self._notes, *self._unread(by_folder)])
        found = dataclasses.replace(candidates[0], notes=self._notes)
        found.splits = next((c.splits for c in candidates if c.splits), self._splits)
        tops = [folder.partition("/")[0] for folder, _, _ in self._files.pictures]
        if not wanted and len(set(tops)) > 1 and not doubt and not self._are_buckets(found):
            if not agree(tops, found.values):
                raise UserError(
                    f"{where} holds labels in {found.source} that differ from its {len(set(tops))} class folders; choose with "
                    f"{option}=folders or {option}={found.choice}"
                )
            if "" not in tops:  # the folders have the names
                return dataclasses.replace(found, by_folder=True, values=None, source="", file_column="")
        return found

    def _unread(self, by_folder: bool) -> list[str]:
        """A note on files from which no labels were read, where the images have none."""
        if by_folder:
            return []
        stems = {rules.stem(name) for name in self._names}
        files = [name for folder in self._levels() for name in self._tree.scan(folder).others if rules.stem(name) not in stems]
        tables = [name for name in files if rules.may_be_a_table(name, self._role) and name not in self._looked_at]
        for folder in self._side_folders():
            inside = [folder + n for n in self._tree.scan(folder).others if rules.may_be_a_table(n, self._role)]
            tables += inside if len(inside) < 10 else [f"{folder} ({len(inside):,} files)"]
        if not tables:
            return []
        return [
            f"{self._ask.where}: no labels were found; not read: {listed(sorted(tables))}; if one holds them, name it with "
            f"{self._ask.labels}, or save them as labels.csv with the columns file and label"
        ]

    def _are_buckets(self, found: Found | None) -> bool:
        """NVlabs' dataset_tool spreads files over 00000/, 00001/, ... and writes the labels to dataset.json."""
        buckets = all(re.fullmatch(r"\d{5}", name) for name in self._files.tops)
        return buckets and (found is None or found.source.endswith("dataset.json"))

    def _levels(self) -> list[str]:
        """The folders from the top down to the root."""
        return ["", *itertools.accumulate(f"{part}/" for part in self._root.split("/")[:-1])]

    def _same_names_beside(self, folder: str) -> str:
        """A folder beside the way from `folder` to the root that holds images of the same bare names; "" without one."""
        mine = {posixpath.basename(name) for name in self._names}
        levels = self._levels()
        for above, below in zip(levels, levels[1:], strict=False):
            for name in self._tree.scan(above).folders if above.startswith(folder) else ():
                path = f"{above}{name}/"
                if path != below and any(
                    picture in mine for _, scan in self._tree.walk(path, sizes=False) for picture, _ in scan.pictures
                ):
                    return path
        return ""

    def _candidates(self, wanted: str) -> Iterator[Found]:
        kind, _, field = wanted.partition(":")
        for ending in (".cls", ".json"):
            if not wanted or kind == ending[1:]:
                found = self._sidecars(ending, field, required=bool(wanted))
                if found:
                    yield found
        if kind in ("cls", "json"):
            return
        for folder in self._levels():
            for name in sorted(self._tree.scan(folder).others):
                if name == kind or folder + name == kind or (not wanted and rules.is_label_file(name, self._role)):
                    found = self._table(folder, name, field, required=bool(wanted))
                    if found:
                        yield found
        above, _, name = kind.rpartition("/")
        for folder in self._side_folders():
            if above and f"/{folder}".endswith(f"/{above}/") and name in self._tree.scan(folder).others:
                yield from filter(None, [self._table(folder, name, field, required=True)])

    def _side_folders(self) -> Iterator[str]:
        """Folders such as annotations/ beside the way to the root and in it."""
        for folder in self._levels():
            for name in sorted(self._tree.scan(folder).folders):
                if rules.is_side_folder(name) and not self._root.startswith(f"{folder}{name}/"):
                    yield f"{folder}{name}/"

    def _table(self, folder: str, name: str, column: str, required: bool) -> Found | None:
        where, option = self._ask.where, self._ask.labels
        table = read_table(name, self._tree.read(folder + name), column, where, self._ask)
        self._looked_at.add(name)
        if table.labels is None:
            if name.lower() == "dataset.json" and self._are_buckets(None):
                self._unlabelled_buckets = True
            text = f"{where}: {name} has no column that is known to hold labels ({listed(table.columns, 20) or 'it is empty'})"
            if required:
                raise UserError(f"{text}; name it as {option}={name}:COLUMN")
            self._notes.append(f"{text}; if one does, name it as {option}={name}:COLUMN")
            if not table.splits:
                return None
        match = match_table(table, self._names, folder, self._root, f"{where}: {name}")
        found = match.rows
        missing = [k for k, row in enumerate(found) if row is MISSING]
        if len(missing) == len(found):
            if required:
                raise UserError(f"{option}={name}: it names none of the images of {where}")
            self._notes.append(f"{where}: {name} names none of the images, or several at once, and is left alone")
            return None
        if missing:
            raise UserError(
                f"{where}: {name} has no label for {len(missing)} of {len(found)} images (such as {self._names[missing[0]]}); "
                f"complete it, or choose {option}=folders or none"
            )
        used = {table.column, match.column, *(rules.usual(table.columns, rules.SPLIT_COLUMNS) if table.splits else ())}
        told = required or match.with_folders or rules.split_of(rules.stem(name))
        if not told and (other := self._same_names_beside(folder)):
            raise UserError(
                f"{where}: {name} names images without their folder, and {other} holds images of the same names; write "
                f"{self._root}NAME in it, or choose {option}={name} if it is of {self._root}"
            )
        rest = [name for name in table.columns if name not in used]
        if rest and table.labels is not None and not column:
            self._notes.append(f"{where}: of {name}, not read: {listed(rest, 10)}")
        splits = [split for _, split in found] if table.splits else None
        if table.labels is None:
            self._splits = self._splits or splits
            return None
        values = [label for label, _ in found]
        if match.rest:
            rows = f"{len(match.rest):,} of {len(table.labels):,} rows"
            self._notes.append(f"{where}: {rows} of {name} name no image that is read{_without_image(match)}")
        source, file_column = f"{name}, column {table.column}", match.column
        if name.lower() == "dataset.json":
            source, file_column = name, ""
        read = frozenset([name] if folder == self._root else ())  # those above the root are not counted as passed over anyway
        return Found(values=values, splits=splits, source=source, choice=name, used=read, file_column=file_column)

    def _sidecars(self, ending: str, field: str, required: bool) -> Found | None:
        """Labels in a file beside each image, named as the image up to its first dot (WebDataset's rule) or its last."""
        sidecars = [
            (folder, name)
            for folder, names in self._files.others.items()
            for name in names
            if name.lower().endswith(ending) and not (not folder and rules.is_label_file(name, self._role))
        ]
        if not sidecars:
            return None
        where, option = self._ask.where, self._ask.labels
        for base in (lambda name: name.partition(".")[0], lambda name: posixpath.splitext(name)[0]):
            keys = [posixpath.join(folder, base(name)) for folder, name, _ in self._files.pictures]
            if len(set(keys)) == len(keys):
                break
        files = {posixpath.join(folder, base(name)): posixpath.join(folder, name) for folder, name in sidecars}
        present = [key for key in keys if key in files]
        if not present:
            return None
        fields: list[str] = []
        values: dict[str, tuple] = {}
        for number, key in enumerate(present):
            content = read_sidecar(files[key], self._tree.read(self._root + files[key]), where)
            if number == 0:
                fields = [field] if field else rules.usual(content, rules.LABEL_COLUMNS)
                if not fields:
                    text = f"{where}: {len(sidecars):,} {ending} files hold no field known for labels ({listed(content, 20)})"
                    if required:
                        raise UserError(f"{text}; name it as {option}=json:FIELD")
                    self._notes.append(f"{text}; if one does, name it as {option}=json:FIELD")
                    return None
            values[key] = tuple(content.get(name, MISSING) for name in fields)
        columns = {name: [values[key][k] for key in present] for k, name in enumerate(fields)}
        column = fields.index(choose_label_column(columns, field, f"{where} in its {ending} files", self._ask))
        absent = (MISSING,) * len(fields)
        missing = [k for k, key in enumerate(keys) if values.get(key, absent)[column] is MISSING]
        if missing or len(set(keys)) < len(keys):
            what = f"{len(missing)} of {len(keys)} images have no label in a {ending} file (such as {self._names[missing[0]]})"
            if not missing:
                what = f"several images share one {ending} file"
            raise UserError(f"{where}: {what}; complete them, or choose {option}=folders or none")
        used = frozenset(files[key] for key in present)
        source = f"{ending} files" if ending == ".cls" else f"{ending} files, field {fields[column]}"
        return Found(values=[values[key][column] for key in keys], source=source, choice=ending[1:], used=used)


def _without_image(match: Match) -> str:
    """Names the classes that rows of a table hold, but none of its images. They get no number."""
    labels = {str(label) for label, _ in match.rest if label not in (None, -1, "")}
    absent = sorted(labels - {str(label) for label, _ in match.rows})
    return f"; no image is of {'class' if len(absent) == 1 else 'the classes'} {listed(absent, 10)}" if absent else ""
