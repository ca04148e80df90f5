"""The prepared directory: ArrayRecord shards and `index.json`. Format, and reading at random. Writing is in
jitjax/prepare.py.

A record is the label (4 bytes, little-endian int32) followed by the image: raw uint8 (H, W, 3), or a PNG, WebP or JPEG
file. Records are uncompressed, one per ArrayRecord chunk. `index.json` is written last: a directory without it is not
finished.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from typing import Any

import numpy as np

from jitjax.data import readers, rules
from jitjax.data.image import BadImage, decode
from jitjax.data.rules import Ask
from jitjax.data.tree import INDEX_FILE, is_prepared
from jitjax.errors import UserError

FORMAT = "jitjax-prepared"
VERSION = 1
ENCODINGS = ("raw", "png", "webp", "jpeg")
WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"
_READER_BUFFER = 32768
LABEL_BYTES = 4


def find(path: str, ask: Ask, split: str) -> str | None:
    """The prepared directory at `path`, or the one of a split below it; None where there is none.

    Of prepared directories beside folders or images, the one of the split asked for is taken, without `split` the one for
    training; where none is, the folder is to be read as it is.

    Raises:
      UserError: there is one, but its preparation was interrupted; there are several, or none but one of another split.
    """
    found = path if is_prepared(path) else None
    if found is None and os.access(path, os.R_OK | os.X_OK):
        entries = (entry.name for entry in os.scandir(path) if entry.is_dir())
        folders = [name for name in entries if not rules.system_folder(name)]
        ready = [name for name in folders if is_prepared(os.path.join(path, name))]
        wanted = (rules.split_of(split) or rules.Split("", True)).role if split else "train"
        raw = [name for name in folders if name not in ready and (s := rules.split_of(name)) and s.role == wanted]
        pictures = any(map(rules.split_of, ready)) and _holds_pictures(path)  # beside a set of no split they are strays
        alone = bool(ready) and len(ready) == len(folders) and not pictures
        asked = split not in ("", rules.HERE) or any((s := rules.split_of(name)) and s.role == wanted for name in ready)
        if alone and len(ready) == 1 and not split and not rules.split_of(ready[0]):
            found = os.path.join(path, ready[0])
        elif ready and not raw and (alone or (asked and rules.is_split_layout(ready))):
            found = os.path.join(path, rules.pick_split(ready, split, ask))
    elif found and split:
        raise UserError(f"{ask.where} is a prepared directory: its split is chosen already; leave {ask.split} unset")
    if found is not None and not os.path.isfile(os.path.join(found, INDEX_FILE)):
        raise UserError(f"{ask.where} is not completely prepared; run the same jitjax prepare command again")
    return found


def _holds_pictures(path: str) -> bool:
    return any(name.lower().endswith(rules.ENDINGS) and not rules.system_file(name) for name in os.listdir(path))


def read_index(root: str, where: str) -> dict[str, Any]:
    """Reads and validates `index.json`. Raises UserError for a damaged, foreign or newer one."""
    try:
        with open(os.path.join(root, INDEX_FILE), encoding="utf-8") as file:
            index = json.load(file)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}: {error.filename}") from None
    except ValueError:
        raise UserError(f"{where}: {INDEX_FILE} is damaged; prepare the data set again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{where}: {INDEX_FILE} was not written by jitjax prepare")
    if index.get("version") != VERSION:
        raise UserError(f"{where} has format version {index.get('version')}, this program reads {VERSION}; prepare it again")
    if index.get("checksum") != index_checksum(index):
        raise UserError(f"{where}: {INDEX_FILE} was changed after it was written; prepare the data set again")
    for shard in index["shards"]:
        file = os.path.join(root, shard["file"])
        size = os.path.getsize(file) if os.path.isfile(file) else None
        if size != shard["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise UserError(f"{where}: {shard['file']} {state}; restore it or prepare the data set again")
    return index


def index_checksum(index: dict[str, Any]) -> str:
    """SHA-256 over everything else in the index, the checksums of the shards included."""
    content = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(index: dict[str, Any]) -> dict[str, int | str]:
    """Of the images alone: the same for a set that was prepared from a copy of the files, whose modification times differ."""
    plan = index.get("plan", {})
    if "modified" in plan.get("input", {}):
        plan = {**plan, "input": {key: value for key, value in plan["input"].items() if key != "modified"}}
        index = {**index, "plan": plan}
    return {"count": index["count"], "classes": len(index["classes"]), "checksum": index_checksum(index)}


def empty_classes(index: dict[str, Any]) -> str:
    """Names the classes of which the set has no image, all skipped or none taken by `--limit`; "" where there is none."""
    names = [name for name, count in zip(index["classes"], index["class_counts"], strict=True) if not count]
    if not names:
        return ""
    shown = rules.listed(names).encode(errors="backslashreplace").decode()
    return f"no image of {len(names):,} of the {len(index['classes']):,} classes: {shown}"


def check_usable(
    index: dict[str, Any], image_size: int, where: str, *, exif_rotate: bool, all_formats: bool, high_depth: str
) -> None:
    """Raises UserError where the prepared pixels are not those that the configuration asks for."""
    if index["image_size"] != image_size:
        if not where.startswith("--config.data."):
            raise UserError(
                f"{where} was prepared at {index['image_size']} px, and {image_size} px are needed: prepare with "
                f"--image_size {image_size}"
            )
        raise UserError(
            f"{where} was prepared at {index['image_size']} px, not at --config.data.image_size={image_size}; set "
            f"the flag to {index['image_size']} or prepare with --image_size {image_size}"
        )
    if exif_rotate and not index["exif_rotate"]:
        raise UserError(
            f"{where} was prepared without EXIF rotation; prepare it with --exif_rotate or leave --config.data.exif_rotate"
        )
    settings = index.get("plan", {}).get("settings", {})
    if settings.get("high_depth", "clip") != high_depth:
        raise UserError(
            f"{where} was prepared with --high_depth={settings.get('high_depth', 'clip')}, not {high_depth}; prepare it "
            "again or change --config.data.high_depth"
        )
    if all_formats and not settings.get("all_formats", False):
        raise UserError(f"{where} was prepared without --all_formats; prepare it again or leave --config.data.all_formats")
    if index["count"] == 0:
        raise UserError(f"{where} holds no image")


class PreparedSource:
    """Random access to a prepared directory. Readers are opened on first use, per process."""

    def __init__(self, files: list[str], counts: list[int], image_size: int, encoding: str):
        self._files = files
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._image_size = image_size
        self._encoding = encoding
        self._open()

    @classmethod
    def from_index(cls, root: str, index: dict[str, Any]) -> PreparedSource:
        files = [os.path.join(root, shard["file"]) for shard in index["shards"]]
        return cls(files, [shard["count"] for shard in index["shards"]], index["image_size"], index["encoding"])

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._reader = functools.cache(self._open_reader)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_reader")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open_reader(self, shard: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            return array_record_module.ArrayRecordReader(
                self._files[shard], options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
            )

    def stored_records(self, shard: int) -> int:
        """Records that the shard's file really holds."""
        return self._reader(shard).num_records()

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._files[shard]} record {index - int(self._starts[shard])}"

    def read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[tuple[int, str]]:
        failures: list[tuple[int, str]] = []
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards).tolist():
            rows = np.nonzero(shards == shard)[0]
            positions = (indices[rows] - self._starts[shard]).tolist()
            readers.at(int(indices[rows[0]]))
            for row, record in zip(rows.tolist(), self._records(shard, positions), strict=True):
                try:
                    if isinstance(record, Exception):
                        raise BadImage(f"unreadable record: {' '.join(str(record).split())}")
                    images[row] = self._decode(record)
                    labels[row] = int.from_bytes(record[:LABEL_BYTES], "little", signed=True)
                except BadImage as error:
                    failures.append((row, str(error)))
        return failures

    def _records(self, shard: int, positions: list[int]) -> list[bytes | Exception]:
        """The records at `positions`, read together; one by one where that fails, to find the damaged one."""
        try:
            return self._reader(shard).read(positions)
        except Exception:
            return [self._one_record(shard, position) for position in positions]

    def _one_record(self, shard: int, position: int) -> bytes | Exception:
        try:
            return self._reader(shard).read([position])[0]
        except Exception as error:  # the reader raises whatever its C++ status turns into
            return error

    def _decode(self, record: bytes) -> np.ndarray:
        size = self._image_size
        if self._encoding != "raw":
            return decode(record[LABEL_BYTES:], size)
        if len(record) != LABEL_BYTES + size * size * 3:
            raise BadImage(f"record of {len(record)} bytes instead of {LABEL_BYTES + size * size * 3}")
        return np.frombuffer(record, np.uint8, offset=LABEL_BYTES).reshape(size, size, 3)
