"""Images and labels in Parquet files, as the Hugging Face hub stores data sets: `image: {bytes, path}` and an integer
`label`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jitjax.data.image import MAX_FILE_BYTES, BadImage
from jitjax.errors import UserError

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
_MAX_CLASSES = 1_000_000
_ROWS = 64  # rows in memory at once


def import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install 'jitjax[parquet]'") from None
    return pyarrow.parquet


def parquet_files(path: str) -> list[str]:
    """The Parquet files that `path` means: itself, or those of a folder (or its `data/`), the train split alone if
    there is one.
    """
    if os.path.isfile(path):
        return [path] if path.lower().endswith(".parquet") else []
    for folder in (path, os.path.join(path, "data")):
        names = [n for n in os.listdir(folder) if n.lower().endswith(".parquet")] if os.path.isdir(folder) else []
        names = [name for name in names if name.lower().startswith("train")] or names
        if names:
            return [os.path.join(folder, name) for name in sorted(names)]
    return []


class ParquetInput:
    """The rows of some Parquet files in their order. Picklable."""

    def __init__(self, files: list[str], where: str, image_column: str | None, label_column: str | None):
        parquet = import_pyarrow()
        self._files = files
        try:
            opened = [parquet.ParquetFile(file) for file in files]
            schema = opened[0].schema_arrow
            for file, handle in zip(files, opened, strict=True):
                if not handle.schema_arrow.equals(schema):
                    raise UserError(f"{where}: {os.path.basename(file)} has other columns than {os.path.basename(files[0])}")
            self._column = _find_column(schema.names, image_column, _IMAGE_COLUMNS, "--image_column", where)
            self._nested = _is_struct_with_bytes(schema.field(self._column), where)
            label = _find_column(schema.names, label_column, _LABEL_COLUMNS, "--label_column", where, required=False)
            values = [
                handle.read([label]).column(0).to_pylist() if label else [None] * handle.metadata.num_rows for handle in opened
            ]
        except UserError:
            raise
        except Exception as error:  # pyarrow raises its own exception types, OSError among them
            raise UserError(f"{where} holds a damaged Parquet file: {' '.join(str(error).split())[:200]}") from None
        counts = [len(part) for part in values]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        names = _class_names(schema, label)
        self.labels, self.classes = _to_labels([value for part in values for value in part], names, f"{where} column {label!r}")
        if not len(self.labels):
            raise UserError(f"{where} holds no rows")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{os.path.basename(self._files[file])} row {index - int(self._starts[file])}"

    def fingerprint(self) -> dict[str, int | str]:
        digest = hashlib.sha256(self.labels.tobytes() + json.dumps(self.classes).encode())
        for file, start in zip(self._files, self._starts.tolist(), strict=False):
            digest.update(f"{os.path.basename(file)}\0{os.path.getsize(file)}\0{start}\0".encode())
        return {"count": len(self), "classes": len(self.classes), "checksum": digest.hexdigest()}

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The encoded bytes of each image, or why there are none. `indices` must increase."""
        wanted = np.asarray(list(indices), np.int64)
        for number in range(len(self._files)):
            low, high = np.searchsorted(wanted, self._starts[number : number + 2])
            if low < high:
                yield from self._read_file(number, wanted[low:high] - self._starts[number])

    def _read_file(self, number: int, rows: np.ndarray) -> Iterator[bytes | BadImage]:
        handle = import_pyarrow().ParquetFile(self._files[number])
        first = 0
        for group in range(handle.metadata.num_row_groups):
            count = handle.metadata.row_group(group).num_rows
            low, high = np.searchsorted(rows, (first, first + count))
            if low < high:
                yield from self._read_group(handle, group, rows[low:high] - first)
            first += count

    def _read_group(self, handle: Any, group: int, rows: np.ndarray) -> Iterator[bytes | BadImage]:
        done = start = 0
        try:
            for batch in handle.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[self._column]):
                column = batch.column(0)
                while done < len(rows) and rows[done] < start + len(column):
                    value = column[int(rows[done]) - start].as_py()
                    yield _image_bytes(value, self._nested)
                    done += 1
                start += len(column)
                if done == len(rows):
                    return
        except Exception as error:
            reason = f"damaged Parquet row group: {' '.join(str(error).split())[:120]}"
            for _ in range(done, len(rows)):
                yield BadImage(reason)


def _image_bytes(value: Any, nested: bool) -> bytes | BadImage:
    data = value["bytes"] if nested and value is not None else value
    if not data:
        return BadImage("the row holds no image bytes")
    if len(data) > MAX_FILE_BYTES:
        return BadImage(f"the image is larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def _find_column(
    names: list[str], given: str | None, known: tuple[str, ...], flag: str, where: str, required: bool = True
) -> str | None:
    if given is not None:
        if given not in names:
            raise UserError(f"{flag}={given} is not a column of {where}; it has {', '.join(names)}")
        return given
    found = next((name for name in known if name in names), None)
    if found is None and required:
        raise UserError(f"{where} has no column called {' or '.join(known)}; name one of {', '.join(names)} with {flag}")
    return found


def _is_struct_with_bytes(field: Any, where: str) -> bool:
    import pyarrow.types as types

    if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        return True
    if types.is_binary(field.type) or types.is_large_binary(field.type):
        return False
    raise UserError(f"{where}: column {field.name!r} holds {field.type}, not image bytes; name another with --image_column")


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Class names that the Hugging Face `datasets` library left in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _to_labels(values: list[Any], names: list[str] | None, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n,) int32 labels and class names. No label anywhere (absent, null or -1) makes an unlabelled set."""
    if all(value is None or value == -1 for value in values):
        return np.zeros(len(values), np.int32), ()
    if all(isinstance(value, str) for value in values):
        classes = sorted(set(values))
        number = {name: k for k, name in enumerate(classes)}
        return np.array([number[value] for value in values], np.int32), tuple(classes)
    top = len(names) if names else _MAX_CLASSES
    for row, value in enumerate(values):
        if type(value) is not int or not 0 <= value < top:
            raise UserError(f"{where}, row {row}: {value!r} is not a class number below {top}")
    return np.array(values, np.int32), tuple(names or (str(k) for k in range(max(values) + 1)))
