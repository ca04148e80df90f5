"""Labels from where people save them: tables beside the images, a file beside each image, columns of Parquet files.

Whatever the labels look like, `number_labels` makes class numbers 0..K-1 of them and says so where they were others.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jitjax.data import rules
from jitjax.data.rules import FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS, Ask, listed, usual
from jitjax.errors import UserError


class Labels(NamedTuple):
    """numbers: (n,) int32, 0 for an unlabelled set. classes: empty for an unlabelled set. note: what was changed or is
    odd about them, "" where nothing is.
    """

    numbers: np.ndarray
    classes: tuple[str, ...]
    note: str = ""


def number_labels(values: Sequence[Any], names: Sequence[str] | None, where: str, rows: Sequence[Any] = ()) -> Labels:
    """Class numbers of label values.

    Args:
      values: integers, whole floats, booleans or strings, all of one kind. None or -1 everywhere is an unlabelled set.
        names: class names in the order of the numbers where they were declared, else None. where: for messages. rows: what
        these call each value, where it is not its number.

    Raises:
      UserError: a value that is no label, or is missing.
    """
    plain = [_plain(value) for value in values]
    distinct = set(plain)
    if distinct <= {None, -1}:
        return Labels(np.zeros(len(plain), np.int32), (), f"{where}: no label, only empty values or -1" if values else "")
    if None in distinct:
        row = plain.index(None)
        raise UserError(f"{where}, row {rows[row] if rows else row}: an empty label is not a class number or name; complete it")
    strings = all(isinstance(value, str) for value in distinct)
    if strings and names and not distinct <= set(names):
        names = None
    if strings:
        classes = list(names) if names else sorted(distinct)
        number = {name: k for k, name in enumerate(classes)}
    else:
        top = len(names) if names else math.inf
        for row, value in enumerate(plain):
            if isinstance(value, str) or not isinstance(value, int) or not 0 <= value < top:
                below = f" below {top}" if names else ""
                raise UserError(f"{where}, row {rows[row] if rows else row}: {values[row]!r} is not a class number{below}")
        used = list(range(len(names))) if names else sorted(distinct)
        number = {value: k for k, value in enumerate(used)}
        classes = list(names) if names else [str(value) for value in used]
    note = ""
    unused = sum(1 for value in number if value not in distinct)
    if unused:
        note = f"{where}: {unused} of {len(classes)} declared classes have no image"
    elif not strings and any(value != k for value, k in number.items()):
        table = listed((f"{value} is class {k}" for value, k in number.items()), most=10)
        note = f"{where}: the labels are not numbered 0..{len(classes) - 1} and were renumbered: {table}"
    note = note or alike(classes, where)
    return Labels(np.array([number[value] for value in plain], np.int32), tuple(classes), note)


def number_part(
    values: Sequence[Any], part: Sequence[int], names: Sequence[str] | None, where: str, rows: Sequence[Any] = ()
) -> Labels:
    """`number_labels` of the rows `part`, with the numbers that all rows have, so that they are those of the other splits."""
    rows = rows or range(len(values))
    if len(part) == len(values):
        return number_labels(values, names, where, rows)
    labelled = [row for row, value in enumerate(values) if _plain(value) not in (None, -1)]  # other splits may have none
    if not set(part) <= set(labelled):
        return number_labels([values[row] for row in part], names, where, [rows[row] for row in part])
    numbers, classes, note = number_labels([values[row] for row in labelled], names, where, [rows[row] for row in labelled])
    place = {row: k for k, row in enumerate(labelled)}
    numbers = numbers[[place[row] for row in part]]
    if unused := len(classes) - len(set(numbers.tolist())):
        note = f"{where}: {unused} of {len(classes)} classes have no image in this split"
    return Labels(numbers, classes, note)


def alike(classes: Sequence[str], where: str) -> str:
    """A note where two classes differ in capital letters, spaces or the form of accents alone; "" where none do."""
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(" ".join(unicodedata.normalize("NFC", name).casefold().split()), name)
        if other is not name:
            return f"{where}: the classes {other!r} and {name!r} have almost the same name; are they one?"
    return ""


def _plain(value: Any) -> Any:
    """int for every kind of whole number, None for a missing or empty value; the value itself otherwise."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple | dict):
        return repr(value).encode()  # several labels an image: no class number, and hashable
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return int(value) if isinstance(value, bool | np.integer) else value


def agree(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two labellings say the same: they put the same images together and, as far as they use the same names for
    classes, do not exchange them. Numbers may count from another start.
    """
    pairs = set(zip(map(_plain, first), map(_plain, second), strict=True))
    left, right = {str(a) for a, _ in pairs}, {str(b) for _, b in pairs}
    if not len(pairs) == len(left) == len(right):
        return False
    crossed = [a for a, b in pairs if str(a) != str(b) and str(a) in right]
    return not crossed or (left != right and all(str(a).isdigit() for a in crossed))


def choose_label_column(columns: dict[str, Sequence[Any]], given: str, where: str, ask: Ask) -> str:
    """The column that holds the labels, "" where none has a usual name.

    Args:
      columns: name -> values of those that may hold labels. given: the user's choice, "" for none.

    Raises:
      UserError: the given one is not there, or two usual names disagree.
    """
    if given:
        if given not in columns:
            raise UserError(f"{ask.labels}={given} is not a column of {where}; it has {listed(columns, 20)}")
        return given
    known = usual(columns, LABEL_COLUMNS)
    if "x" in map(str.lower, columns):  # the corner of a box
        known = [name for name in known if name.lower() != "y"]
    for other in known[1:]:
        if not agree(columns[known[0]], columns[other]):
            raise UserError(f"{where} holds different labels in the columns {listed(known)}; choose one with {ask.labels}")
    return known[0] if known else ""


class Table(NamedTuple):
    """One label file.

    files: (column, its values) of those that may name the images, the most probable first. labels: of each row, None where
    no column is a label. column: the labels'. splits: the split of each row, None where no column tells. columns: of the file.
    """

    files: list[tuple[str, list[str]]]
    labels: list[Any] | None
    column: str
    splits: list[str] | None
    columns: tuple[str, ...]


def read_table(name: str, data: bytes, column: str, where: str, ask: Ask) -> Table:
    """Parses *.csv, *.tsv, *.jsonl, dataset.json (NVlabs) or another JSON of rows or of {file: label}.

    column: the label column, "" to find it.

    Raises:
      UserError: damaged, or which column is meant is not clear.
    """
    lower, known = name.lower(), ()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if lower.endswith(".json"):
            content = json.loads(text, object_pairs_hook=_without_doubles)
            columns, known = _read_json(content), tuple(content) if isinstance(content, dict) else ()
        elif lower.endswith(".jsonl"):
            columns = _by_column([json.loads(line) for line in text.split("\n") if line.strip()])
        else:
            columns = _read_csv(text, "\t" if lower.endswith(".tsv") else None)
    except (ValueError, AttributeError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"{where}: {name} cannot be read as a table of labels: {error}; repair it or move it away") from None
    typed = columns if ".json" in lower else {key: _typed(values) for key, values in columns.items()}
    named = dict.fromkeys((*usual(columns, FILE_COLUMNS), *columns))
    chosen = choose_label_column(typed, column, f"{where} in {name}", ask)
    if not chosen and len(columns) == 2 and "label" in lower:
        _, chosen = named
    splits = next((columns[key] for key in usual(columns, SPLIT_COLUMNS) if are_splits(columns[key])), None)
    files = [(key, list(map(str, columns[key]))) for key in _file_columns(columns, chosen)]
    return Table(files, typed[chosen] if chosen else None, chosen, splits, tuple(columns) or known)


def _file_columns(columns: dict[str, list[Any]], label: str) -> list[str]:
    """The columns that may name the images, the likeliest first: those known as file names by their name and by the endings in
    them, else by either. Any numbers fit images that are numbered, so columns of numbers count only where none is known.
    """
    known = [name for name in usual(columns, FILE_COLUMNS) if name != label]
    endings = rules.endings(all_formats=True)
    ends = [n for n in columns if n != label and columns[n] and all(str(v).lower().endswith(endings) for v in columns[n])]
    likely = [name for name in known if name in ends] or [*ends, *known]
    rest = [name for name in columns if name not in (label, *likely)]
    return [*likely, *(name for name in rest if not likely or not all(map(_is_number, columns[name])))]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def are_splits(values: Iterable[Any]) -> bool:
    """Whether the values of a column tell which split each row belongs to."""
    distinct = set()
    for value in values:
        if value not in distinct:
            split = rules.split_of(value) if isinstance(value, str) else None
            if not split or not split.sure:
                return False
            distinct.add(value)
    return bool(distinct)


def _read_json(content: Any) -> dict[str, list[Any]]:
    labels = content.get("labels") if isinstance(content, dict) and "labels" in content else content
    if isinstance(labels, dict) and not any(isinstance(value, dict | list) for value in labels.values()):
        labels = list(labels.items())
    if not isinstance(labels, list) or not labels:
        return {}
    if isinstance(labels[0], dict):
        return _by_column(labels)
    return {"file": [str(file) for file, _ in labels], "label": [label for _, label in labels]}


def _by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row.get(key) for row in rows] for key in {key: None for row in rows for key in row}}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key has two values, of which Python would take the last."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if made.setdefault(key, value) != value:
            raise ValueError(f"it gives {key} two values, {made[key]!r} and {value!r}")
    return made


def _read_csv(text: str, delimiter: str | None) -> dict[str, list[Any]]:
    header = re.sub(r'"[^"\n]*"', "", text.replace("\r", "\n").partition("\n")[0])
    if delimiter is None:
        delimiter = max(",;\t", key=header.count)
    spaced = f'{delimiter} "' in text  # file, "label": else the quotes would be part of the name
    lines = io.StringIO(text, newline=None)  # old Macintosh programs end lines with a carriage return
    rows = list(csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced))
    rows = [row for row in rows if row]
    if not rows:
        return {}
    uneven = next((k for k, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if uneven is not None:
        raise ValueError(f"row {uneven} has {len(rows[uneven])} fields, the header {len(rows[0])}")
    header = [name.strip() for name in rows[0]]
    if any(name.lower().endswith(rules.endings(all_formats=True)) for name in header):
        raise ValueError("the first line is no header, such as file,label")
    if len(set(header)) < len(header):
        raise ValueError(f"two columns are called {next(name for name in header if header.count(name) > 1)!r}")
    return {name: [row[k] for row in rows[1:]] for k, name in enumerate(header)}


def _typed(values: list[str]) -> list[Any]:
    """Numbers where all of a CSV column's values are numbers; None for empty fields."""
    stripped = [value.strip() for value in values]
    for kind in (int, float):
        try:
            numbers = [kind(value) if value else None for value in stripped]
        except ValueError:
            continue
        # "007" is a name: as a number it would be another file's
        if kind is float or all(str(n) == value for n, value in zip(numbers, stripped, strict=True) if value):
            return numbers
        return stripped
    return [value or None for value in stripped]


class Match(NamedTuple):
    """What a table says of each file.

    rows: (label, split) of each file, `MISSING` where the table has none; None or "" where it has no such column. column: the
    one that names the files. with_folders: whether it does so with their folders. rest: (label, split) of each row that names
    none of the files.
    """

    rows: list[Any]
    column: str = ""
    with_folders: bool = False
    rest: Sequence[tuple[Any, str]] = ()


def match_table(table: Table, files: Sequence[str], folder: str, root: str, where: str) -> Match:
    """Finds the row of each file, by the first column that names all of them, else by the one that names most.

    Args:
      files: paths relative to `root`. folder: of the table; it and `root` are paths in the same tree, "" for its top, else
        ending in "/". where: for messages.

    Raises:
      UserError: two rows for one file differ.
    """
    count = len(table.labels or table.splits or (table.files[0][1] if table.files else ()))
    rows = list(zip(table.labels or [None] * count, table.splits or [""] * count, strict=True))
    best, most, clash = Match([MISSING] * len(files)), 0, ""
    for column, names in table.files:
        entries: dict[str, tuple[Any, str]] = {}
        twice = ""
        for name, row in zip(names, rows, strict=True):
            entry = entries.setdefault(_path(name), row)
            if entry != row:
                labels = (entry[0], row[0]) if entry[0] != row[0] else (entry[1], row[1])
                twice = twice or f"{where} gives {name} two labels, {labels[0]!r} and {labels[1]!r}; repair it"
        found = _match_rows(entries, files, folder, root)
        named = sum(value is not MISSING for value in found.rows)
        if named > most:
            best, most, clash = found._replace(column=column), named, twice
        if named == len(files):
            break
    if clash:
        raise UserError(clash)
    return best


def _match_rows(table: dict[str, Any], files: Sequence[str], folder: str, root: str) -> Match:
    """`match_table` by the rows of one column, path -> row.

    A row may give the path from the table's folder, else from the images' folder, or the bare name, where that names one file
    alone; else the same without the ending, which changes where pictures are converted.
    """
    best, most = Match([MISSING] * len(files)), 0
    for form in (_path, _stem):
        rows: dict[str, Any] = {}
        for name, row in table.items():
            key = form(name)
            rows[key] = row if rows.get(key, row) == row else MISSING  # 0.png and 0.jpg with two labels
        for number, part in enumerate((
            lambda name: (root + name).removeprefix(folder),
            lambda name: name,
            posixpath.basename,
        )):  # fmt: skip
            keys = [form(part(name)) for name in files]
            used = set(keys)
            if len(used) < len(keys):
                continue
            found = [rows.get(k, MISSING) for k in keys]
            named = sum(value is not MISSING for value in found)
            if named > most:
                rest = [row for name, row in table.items() if form(name) not in used]
                best, most = Match(found, "", number == 0, rest), named
            if named == len(files):
                return best
    return best


def _path(name: str) -> str:
    """One form for the ways to write a path; macOS takes accents apart in the names of files."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _stem(name: str) -> str:
    """`_path` without a picture's ending."""
    start, ending = posixpath.splitext(_path(name))
    return start if ending.lower() in rules.endings(all_formats=True) else start + ending


class _Missing:
    def __repr__(self) -> str:
        return "no label"


MISSING = _Missing()


def read_sidecar(name: str, data: bytes, where: str) -> dict[str, Any]:
    """What a file beside one image says, by field: the fields of x.json, or "label" with the text of x.cls."""
    try:
        text = data.decode("utf-8-sig").strip()
        if not name.lower().endswith(".json"):
            return {"label": _typed([text])[0]}
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name} holds no label that can be read: {error}; repair or remove it") from None
    return content if isinstance(content, dict) else {}
