"""Images and labels in Parquet and Arrow files, as the Hugging Face hub and `datasets.save_to_disk` store them: a column of
`{bytes, path}` or of bytes, and a column of labels. Files may differ in types and in the order of columns.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jitjax.data.files import failure, unreadable
from jitjax.data.image import MAX_FILE_BYTES, BadImage
from jitjax.data.labels import Labels, are_splits, choose_label_column, number_part
from jitjax.data.listing import summary
from jitjax.data.rules import HERE, LABEL_COLUMNS, NO_LABELS, SPLIT_COLUMNS, Ask, listed, pick_split, usual
from jitjax.errors import UserError

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixel_values", "jpeg", "webp", "picture", "photo", "image_bytes", "bytes")
_ROWS = 64  # rows in memory at once


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet and Arrow files need pyarrow: pip install -e '.[parquet]' in jitjax's folder") from None
    return pyarrow


class _File:
    """One Parquet or Arrow file as a sequence of row groups."""

    def __init__(self, path: str):
        pyarrow, self.path = _import_pyarrow(), path
        if path.lower().endswith(".parquet"):
            self._parquet = pyarrow.parquet.ParquetFile(path)
            self.schema = self._parquet.schema_arrow
            meta = self._parquet.metadata
            self.groups = [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]
        else:
            self._parquet = None
            source = pyarrow.memory_map(path)
            try:
                self._table = pyarrow.ipc.open_stream(source).read_all()  # maps the file, copies nothing
            except pyarrow.ArrowInvalid:
                self._table = pyarrow.ipc.open_file(source).read_all()  # Feather
            self.schema = self._table.schema
            self.groups = [len(self._table)]

    def column(self, name: str) -> list[Any]:
        table = self._parquet.read([name]) if self._parquet else self._table.select([name])
        return table.column(0).to_pylist()

    def batches(self, group: int, name: str) -> Iterator[Any]:
        """Arrays of at most `_ROWS` rows (Arrow: as they were written)."""
        if self._parquet:
            for batch in self._parquet.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[name]):
                yield batch.column(0)
        else:
            yield from self._table.column(name).chunks


class TableInput:
    """The rows of some Parquet or Arrow files in their order. Picklable."""

    def __init__(
        self,
        files: Sequence[str],
        ask: Ask,
        *,
        image_column: str | None = None,
        split: str = "",
        settled: bool = False,
        labels: str = "",
        left_alone: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        """split, settled: as for `listing.list_images`; rows are chosen where a column tells which split they are."""
        where = ask.where
        self._files = list(files)
        _import_pyarrow()
        opened: list[_File] = []
        try:
            opened += [_File(file) for file in files]
            columns = [name for name in opened[0].schema.names if all(name in f.schema.names for f in opened)]
            self._column, image_note = _find_image_column([f.schema for f in opened], columns, image_column, where)
            self._nested = [_holds_images(f.schema.field(self._column).type) == "struct" for f in opened]
            split_column, splits = _find_splits(opened, columns, labels)
            label, values, note = self._find_labels(opened, [n for n in columns if n != split_column], labels, ask)
            rows = [sum(file.groups) for file in opened]
        except UserError:
            raise
        except Exception as error:  # pyarrow raises its own exception types, OSError among them
            if isinstance(error, OSError) and error.errno:
                raise unreadable(error, where) from None
            doubled = [(name, f.path) for f in opened for name in f.schema.names if f.schema.names.count(name) > 1]
            if doubled:
                name, path = doubled[0]
                raise UserError(f"{where}: {path} has several columns called {name}: rename or drop all but one") from None
            raise UserError(f"{where} holds a damaged Parquet or Arrow file: {' '.join(str(error).split())[:200]}") from None
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        if not self._starts[-1]:
            raise UserError(f"{where} holds no rows")
        self._rows, left = _rows_of_split(splits, int(self._starts[-1]), split, settled, ask)
        numbered = Labels(np.zeros(len(self._rows), np.int32), ())
        if label:
            names = _class_names([file.schema for file in opened], label, where)
            numbered = number_part(values, self._rows.tolist(), names, f"{where} column {label!r}")
        self.labels, self.classes = numbered.numbers, numbered.classes
        self.notes = tuple(text for text in (*notes, image_note, note, numbered.note) if text)
        folder = os.path.commonpath([os.path.abspath(file) for file in files])
        self.summary = summary(len(self), self.classes, folder, f"column {label}", (*left_alone, *left))

    def _find_labels(self, files: list[_File], columns: list[str], wanted: str, ask: Ask) -> tuple[str, list[Any], str]:
        """(column, a label for each row, note); ("", [], note) without labels."""
        if wanted == NO_LABELS:
            return "", [], ""
        some = [(file.schema, name) for file in files for name in file.schema.names if name not in columns]
        partly = [n for schema, n in some if usual([n], LABEL_COLUMNS) or _feature(schema, n).get("_type") == "ClassLabel"]
        if partly and not wanted:
            raise UserError(
                f"{ask.where}: only some of its files have the column {partly[0]!r}; give files that all have it, or choose "
                f"another column with {ask.labels} or {ask.labels}=none"
            )
        if wanted and wanted not in columns:
            raise UserError(f"{ask.labels}={wanted} is not a column of {ask.where}; it has {listed(columns, 20)}")
        declared = [n for n in columns if any(_feature(f.schema, n).get("_type") == "ClassLabel" for f in files)]
        usable = [n for n in columns if n != self._column and _may_hold_labels(files[0].schema.field(n).type)]
        known = usual(usable, LABEL_COLUMNS) if not wanted else [wanted]
        read = {name: [value for file in files for value in file.column(name)] for name in known or declared[:1]}
        label = choose_label_column(read, wanted, f"{ask.where}", ask)
        if not label and len(declared) == 1:
            (label,) = declared
        if label:
            only = f"; the labels are column {label!r}" if len(usable) > 1 or label != "label" else ""
            rest = [name for name in usable if name != label]
            return label, read[label], f"{ask.where}{only}; not read: {listed(rest, 10)}" if rest and not wanted else ""
        rest = [name for name in columns if name != self._column]
        if not rest:
            return "", [], ""
        text = f"{ask.where}: no column is known to hold labels ({listed(rest, 20)}); if one does, name it with {ask.labels}"
        return "", [], text

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        index = int(self._rows[index])
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{os.path.basename(self._files[file])} row {index - int(self._starts[file])}"

    def fingerprint(self) -> dict[str, int | str]:
        digest = hashlib.sha256(self.labels.tobytes() + json.dumps(self.classes).encode())
        if len(self) < self._starts[-1]:
            digest.update(self._rows.tobytes())
        for file, start in zip(self._files, self._starts.tolist(), strict=False):
            digest.update(f"{os.path.basename(file)}\0{os.path.getsize(file)}\0{start}\0".encode())
        return {"count": len(self), "classes": len(self.classes), "checksum": digest.hexdigest()}

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The encoded bytes of each image, or why there are none. `indices` must increase."""
        wanted = self._rows[np.asarray(list(indices), np.int64)]
        for number in range(len(self._files)):
            low, high = np.searchsorted(wanted, self._starts[number : number + 2])
            if low < high:
                yield from self._read_file(number, wanted[low:high] - self._starts[number])

    def _read_file(self, number: int, rows: np.ndarray) -> Iterator[bytes | BadImage]:
        try:
            file = _File(self._files[number])
        except Exception as error:
            raise unreadable(error, self._files[number]) from None
        first = 0
        for group, count in enumerate(file.groups):
            low, high = np.searchsorted(rows, (first, first + count))
            if low < high:
                yield from self._read_group(file, group, rows[low:high] - first, self._nested[number])
            first += count

    def _read_group(self, file: _File, group: int, rows: np.ndarray, nested: bool) -> Iterator[bytes | BadImage]:
        done = start = 0
        try:
            for column in file.batches(group, self._column):
                while done < len(rows) and rows[done] < start + len(column):
                    yield _image_bytes(column[int(rows[done]) - start].as_py(), nested)
                    done += 1
                start += len(column)
                if done == len(rows):
                    return
        except Exception as error:
            if isinstance(error, OSError) and isinstance(fault := failure(error, file.path), UserError):
                raise fault from None  # the rest of the file would not do better
            reason = f"damaged Parquet row group: {' '.join(str(error).split())[:120]}"
            for _ in range(done, len(rows)):
                yield BadImage(reason)


def _find_splits(files: list[_File], columns: list[str], label: str) -> tuple[str, list[str]]:
    """The column that tells the split of each row, and its values; ("", []) where none does. label: not this one."""
    for name in usual(columns, SPLIT_COLUMNS):
        if name != label and _may_hold_labels(files[0].schema.field(name).type):
            values = [value for file in files for value in file.column(name)]
            if are_splits(values):
                return name, values
    return "", []


def _rows_of_split(splits: list[str], count: int, split: str, settled: bool, ask: Ask) -> tuple[np.ndarray, list[str]]:
    """The rows that are read, increasing, and what is left alone."""
    if split == HERE or (settled and len(set(splits)) < 2) or not (splits or split):
        return np.arange(count), []
    if not splits:
        raise UserError(f"{ask.where} holds no split called {split}: neither its files nor a column of it name one")
    name = pick_split(set(splits), split, ask)
    counts = collections.Counter(splits)
    left = [f"split {other} ({number:,})" for other, number in sorted(counts.items()) if other != name]
    return np.array([row for row, value in enumerate(splits) if value == name], np.int64), left


def _image_bytes(value: Any, nested: bool) -> bytes | BadImage:
    data = value["bytes"] if nested and value is not None else value
    if not data:
        path = value.get("path") if nested and value is not None else None
        return BadImage(f"the row holds no image bytes{f', only the path {path}' if path else ''}")
    if len(data) > MAX_FILE_BYTES:
        return BadImage(f"the image is larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def _holds_images(kind: Any) -> str:
    """ "struct" or "bytes" for a column that can hold encoded images, else ""."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return "struct" if kind.get_field_index("bytes") >= 0 else ""
    return "bytes" if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) else ""


def _may_hold_labels(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return strings or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_list(kind)


def _find_image_column(schemas: list[Any], columns: list[str], given: str | None, where: str) -> tuple[str, str]:
    """The column with the images, and a note where its name did not tell."""
    if given is not None:
        if given not in columns:
            raise UserError(f"--image_column={given} is not a column of {where}; it has {', '.join(columns)}")
        fitting = [given]
    else:
        fitting = [name for usual in _IMAGE_COLUMNS for name in columns if name.lower() == usual][:1]
    holding = [name for name in columns if all(_holds_images(schema.field(name).type) for schema in schemas)]
    note = ""
    if not fitting:
        declared = [n for n in holding if all(_feature(schema, n).get("_type") == "Image" for schema in schemas)]
        fitting = declared or holding
        if len(fitting) != 1:
            raise UserError(
                f"{where} has no column called {', '.join(_IMAGE_COLUMNS[:4])} ...; name one of {listed(columns, 20)} with "
                "--image_column"
            )
        note = f"{where}: the images are column {fitting[0]!r}, the only one that holds bytes"
    if fitting[0] not in holding:
        kind = next(schema.field(fitting[0]).type for schema in schemas if not _holds_images(schema.field(fitting[0]).type))
        raise UserError(f"{where}: column {fitting[0]!r} holds {kind}, not image bytes; name another with --image_column")
    return fitting[0], note


def _feature(schema: Any, column: str) -> dict[str, Any]:
    """What the Hugging Face `datasets` library left in the schema's metadata about a column."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return feature if isinstance(feature, dict) else {}
    except (KeyError, TypeError, ValueError):
        return {}


def _class_names(schemas: list[Any], label: str, where: str) -> list[str] | None:
    found = {tuple(map(str, names)) for schema in schemas if isinstance(names := _feature(schema, label).get("names"), list)}
    if len(found) > 1:
        raise UserError(f"{where}: its files name the classes of {label!r} differently; prepare them one by one")
    return list(found.pop()) if found else None
