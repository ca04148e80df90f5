"""Labels from where people save them: tables beside the images, a file beside each image, columns of Parquet files.

Whatever the labels look like, `number_labels` makes class numbers 0..K-1 of them and says so where they were others.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jitjax.data.rules import FILE_COLUMNS, LABEL_COLUMNS, Ask, listed
from jitjax.errors import UserError


class Labels(NamedTuple):
    """numbers: (n,) int32, 0 for an unlabelled set. classes: empty for an unlabelled set. note: what was changed or is
    odd about them, "" where nothing is.
    """

    numbers: np.ndarray
    classes: tuple[str, ...]
    note: str = ""


def number_labels(values: Sequence[Any], names: Sequence[str] | None, where: str) -> Labels:
    """Class numbers of label values.

    Args:
      values: integers, whole floats, booleans or strings, all of one kind. None or -1 everywhere is an unlabelled set.
        names: class names in the order of the numbers where they were declared, else None. where: for messages.

    Raises:
      UserError: a value that is no label, or is missing.
    """
    plain = [_plain(value) for value in values]
    distinct = set(plain)
    if distinct <= {None, -1}:
        return Labels(np.zeros(len(plain), np.int32), ())
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
                raise UserError(f"{where}, row {row}: {values[row]!r} is not a class number{below}")
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
    return Labels(np.array([number[value] for value in plain], np.int32), tuple(classes), note)


def _plain(value: Any) -> Any:
    """int for every kind of whole number, None for a missing value; the value itself otherwise."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple | dict):
        return repr(value).encode()  # several labels an image: no class number, and hashable
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return int(value) if isinstance(value, bool | np.integer) else value


def same_partition(first: Sequence[Hashable], second: Sequence[Hashable]) -> bool:
    """Whether two labellings put the same images together, whatever they call the classes."""
    pairs = set(zip(first, second, strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


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
    known = [name for usual in LABEL_COLUMNS for name in columns if name.lower() == usual]
    for other in known[1:]:
        if not same_partition(*([_plain(value) for value in columns[name]] for name in (known[0], other))):
            raise UserError(f"{where} holds different labels in the columns {listed(known)}; choose one with {ask.labels}")
    return known[0] if known else ""


class Table(NamedTuple):
    """One label file. rows: file name as written there -> label; None where no column is a label. columns: of the file."""

    rows: dict[str, Any] | None
    column: str
    columns: tuple[str, ...]


def read_table(name: str, data: bytes, column: str, where: str, ask: Ask) -> Table:
    """Parses dataset.json (NVlabs), *.csv, *.tsv or *.jsonl. column: the label column, "" to find it.

    Raises:
      UserError: damaged, or which column is meant is not clear.
    """
    try:
        text = data.decode("utf-8-sig")
        if name.lower().endswith(".json"):
            return _read_dataset_json(json.loads(text))
        if name.lower().endswith(".jsonl"):
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            columns = {key: [line.get(key) for line in lines] for key in {key: None for line in lines for key in line}}
        else:
            columns = _read_csv(text, "\t" if name.lower().endswith(".tsv") else None)
    except (ValueError, AttributeError, TypeError, csv.Error) as error:
        raise UserError(f"{where}: {name} cannot be read as a table of labels: {error}; repair it or move it away") from None
    files = next((key for usual in FILE_COLUMNS for key in columns if key.lower() == usual and key != column), "")
    files = files or next(iter(columns), "")
    typed = name.lower().endswith(".jsonl")
    others = {key: values if typed else _typed(values) for key, values in columns.items() if key != files}
    chosen = choose_label_column(others, column, f"{where} in {name}", ask)
    if not chosen and len(others) == 1 and "label" in name.lower():
        (chosen,) = others
    if not chosen:
        return Table(None, "", tuple(columns))
    rows: dict[str, Any] = {}
    for file, value in zip(columns[files], others[chosen], strict=True):
        if rows.setdefault(str(file), value) != value:
            raise UserError(f"{where}: {name} gives {file} two labels, {rows[str(file)]!r} and {value!r}; repair it")
    return Table(rows, chosen, tuple(columns))


def _read_dataset_json(content: Any) -> Table:
    labels = content.get("labels") if isinstance(content, dict) else None
    if not labels:
        return Table(None, "", tuple(content) if isinstance(content, dict) else ())
    return Table({str(file): label for file, label in (labels.items() if isinstance(labels, dict) else labels)}, "labels", ())


def _read_csv(text: str, delimiter: str | None) -> dict[str, list[Any]]:
    header = text.partition("\n")[0]
    if delimiter is None:
        delimiter = max(",;\t", key=header.count)
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    rows = [row for row in rows if row]
    if not rows:
        return {}
    uneven = next((k for k, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if uneven is not None:
        raise ValueError(f"row {uneven} has {len(rows[uneven])} fields, the header {len(rows[0])}")
    return {name.strip(): [row[k] for row in rows[1:]] for k, name in enumerate(rows[0])}


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


def match_rows(rows: dict[str, Any], files: Sequence[str], folder: str, root: str) -> list[Any]:
    """The label of each file, `MISSING` where the table has none.

    Args:
      rows: file name as the table writes it -> label. files: paths relative to `root`. folder: of the table; it and `root`
        are paths in the same tree, "" for its top, else ending in "/".

    A row may give the path from the table's folder or from the images', or the bare name with or without ending, where
    that names one file alone.
    """
    table = {posixpath.normpath(name.replace("\\", "/")): value for name, value in rows.items()}
    best: list[Any] = [MISSING] * len(files)
    for key in (
        lambda name: (root + name)[len(folder) :],
        lambda name: name,
        posixpath.basename,
        lambda name: posixpath.splitext(posixpath.basename(name))[0],
    ):
        keys = [key(name) for name in files]
        if len(set(keys)) < len(keys):
            continue
        found = [table.get(k, MISSING) for k in keys]
        if sum(value is not MISSING for value in found) > sum(value is not MISSING for value in best):
            best = found
    return best


class _Missing:
    def __repr__(self) -> str:
        return "no label"


MISSING = _Missing()


def read_sidecar(name: str, data: bytes, field: str, where: str) -> Any:
    """The label in a file beside one image: the text of x.cls, or the label field of x.json (MISSING without one)."""
    try:
        text = data.decode("utf-8").strip()
        if not name.lower().endswith(".json"):
            return _typed([text])[0]
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: {name} holds no label that can be read: {error}; repair or remove it") from None
    if not isinstance(content, dict):
        return MISSING
    fields = (field,) if field else LABEL_COLUMNS
    return next((content[key] for key in fields if key in content), MISSING)
