"""Writing and checking one shard of a prepared directory; runs in the worker processes of `python -m
jitjax.prepare`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from jitjax import atomic
from jitjax.data.files import unreadable
from jitjax.data.image import BadImage, decode, is_constant
from jitjax.data.inputs import Input
from jitjax.data.prepared import LABEL_BYTES, WRITER_OPTIONS, PreparedSource
from jitjax.errors import UserError

_PIECE = 2**22
_CHECK_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """What, beside the input, decides the bytes of a prepared directory."""

    image_size: int
    encoding: str
    quality: int
    exif_rotate: bool
    limit: int | None
    shards: int
    all_formats: bool = False
    high_depth: str = "clip"


def shard_name(number: int, total: int) -> str:
    """The file name of shard `number`, from 0, of `total`."""
    return f"shard-{number:05d}-of-{total:05d}.arrayrecord"


def encode(image: np.ndarray, encoding: str, quality: int) -> bytes:
    """(H, W, 3) uint8 -> the payload of a record. PNG and WebP are lossless; JPEG keeps full colour resolution."""
    if encoding == "raw":
        return image.tobytes()
    file = io.BytesIO()
    picture = Image.fromarray(image)
    if encoding == "png":
        picture.save(file, "PNG", compress_level=6)
    elif encoding == "webp":
        picture.save(file, "WEBP", lossless=True, quality=50, method=4)
    else:
        picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def write_shard(
    source: Input, indices: np.ndarray, path: str, settings: Settings, fail_on_bad: bool, step: Callable[[], None]
) -> dict[str, Any]:
    """Writes one shard under a temporary name, then renames it: a file of the final name is complete.

    Args:
      indices: (n,) which images, increasing. step: called after every image; may raise `pool.Stopped`.

    Returns:
      The shard's entry for the index ("file", "count", "bytes", "sha256", "class_counts"), "skipped": [{"name", "reason"}]
      and "constant", the number of images of one colour.

    Raises:
      UserError: the disk is full, or `fail_on_bad` and an image cannot be decoded.
    """
    from array_record.python import array_record_module

    skipped: list[dict[str, str]] = []
    class_counts = np.zeros(max(1, len(source.classes)), np.int64)
    constant = 0
    try:
        with atomic.writing(path, durable=True, alone=True) as partial:
            writer = array_record_module.ArrayRecordWriter(str(partial), WRITER_OPTIONS)
            for index, data in zip(indices.tolist(), _read(source, indices), strict=True):
                try:
                    image = _pixels(data, settings)
                except BadImage as error:
                    name = source.name(index)
                    if fail_on_bad:
                        raise UserError(f"{name} cannot be used: {error}; repair it or use --on_bad skip") from None
                    skipped.append({"name": name, "reason": str(error)})
                else:
                    label = int(source.labels[index])
                    class_counts[label] += 1
                    constant += is_constant(image)
                    head = label.to_bytes(LABEL_BYTES, "little", signed=True)
                    writer.write(head + encode(image, settings.encoding, settings.quality))
                step()
            writer.close()
            count, size, digest = int(class_counts.sum()), os.path.getsize(partial), sha256(partial)
    except (OSError, RuntimeError, ValueError) as error:  # ArrayRecord turns a failed write into one of the latter two
        raise UserError(_unwritable(path, " ".join(str(error).split())[:200])) from None
    entry = {"file": os.path.basename(path), "count": count, "bytes": size, "sha256": digest}
    return {**entry, "class_counts": class_counts.tolist(), "skipped": skipped, "constant": constant}


def _pixels(data: bytes | BadImage, settings: Settings) -> np.ndarray:
    """(S, S, 3) uint8 from what `_read` gave. Raises BadImage."""
    if isinstance(data, BadImage):
        raise data
    return decode(
        data,
        settings.image_size,
        settings.exif_rotate,
        all_formats=settings.all_formats,
        high_depth=settings.high_depth,
    )


def _read(source: Input, indices: np.ndarray) -> Iterator[bytes | BadImage]:
    """`source.read`; an error of the system there is not one of the disk that is written to."""
    try:
        yield from source.read(indices)
    except OSError as error:
        raise unreadable(error, error.filename or "the input") from None


def check_shard(root: str, shard: dict[str, Any], index: dict[str, Any], step: Callable[[int], None]) -> str | None:
    """Verifies checksum, count, labels and that every record decodes. Returns what is wrong, or None."""
    path = os.path.join(root, shard["file"])
    try:
        if sha256(path) != shard["sha256"]:
            return f"{shard['file']} has another checksum than when it was written"
        source = PreparedSource([path], [shard["count"]], index["image_size"], index["encoding"])
        size, count = index["image_size"], shard["count"]
        if source.stored_records(0) != count:
            return f"{shard['file']} holds {source.stored_records(0)} records instead of {count}"
        for start in range(0, count, _CHECK_BATCH):
            rows = np.arange(start, min(start + _CHECK_BATCH, count))
            images, labels = np.empty((len(rows), size, size, 3), np.uint8), np.empty(len(rows), np.int32)
            failures = source.read(rows, images, labels)
            if failures:
                return f"{shard['file']} record {rows[failures[0][0]]}: {failures[0][1]}"
            if labels.min() < 0 or labels.max() >= max(1, len(index["classes"])):
                return f"{shard['file']} holds a label outside the {len(index['classes'])} classes"
            step(len(rows))
    except (OSError, RuntimeError, ValueError) as error:
        return f"{shard['file']} cannot be read: {' '.join(str(error).split())[:200]}"
    return None


def sha256(path: str) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file so that it is there completely or not at all, even if the power goes. UserError: disk full."""
    try:
        atomic.write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n", durable=True, alone=True)
    except OSError as error:
        raise UserError(_unwritable(path, error.strerror)) from None


def _unwritable(path: str, problem: str) -> str:
    return f"--output: {path} cannot be written ({problem}): free space, and the same command continues, or name another"
