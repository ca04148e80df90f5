"""Images in a NumPy `.npz` file, as ADM's and its successors' sampling and evaluation scripts write them: `arr_0` holds (n, H,
W, 3) uint8 pixels, `arr_1`, where it is there, class numbers or one-hot rows. Splits are arrays with a split's name
(`x_train`, `y_train`).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from jitjax.data.files import unreadable
from jitjax.data.image import BadImage
from jitjax.data.labels import Labels, number_labels
from jitjax.data.listing import summary
from jitjax.data.rules import HERE, NO_LABELS, Ask, listed, pick_split, split_of, words_of
from jitjax.errors import UserError

_LABEL_WORDS = frozenset(("label", "labels", "y", "class", "classes", "target", "targets"))


class ArrayInput:
    """The images of one .npz file. Picklable; read in order, never as a whole."""

    def __init__(self, path: str, ask: Ask, split: str, labels: str):
        self._path = path
        where = ask.where
        try:
            with np.load(path, allow_pickle=False) as file, zipfile.ZipFile(path) as archive:
                names = list(file.files)
                headers = {name: _header(archive, name) for name in names}
                shapes = {name: (shape, kind) for name, (shape, _, kind) in headers.items()}
                images = [n for n, (shape, kind) in shapes.items() if len(shape) == 4 and shape[3] == 3 and kind == np.uint8]
                if len(images) > 1 and all(map(split_of, images)):  # x_train and x_test
                    images, split = [pick_split(images, split, ask)], ""
                if split not in ("", HERE):
                    raise UserError(f"{where} holds no split called {split}; it has the arrays {listed(names)}")
                if len(images) != 1:
                    found = listed(f"{name} {shape} {kind}" for name, (shape, kind) in shapes.items())
                    raise UserError(f"{where} holds no single array of (n, H, W, 3) uint8 images, but {found}")
                self._images, (self._shape, column_major, _) = images[0], headers[images[0]]
                if column_major:  # an image's bytes do not lie together
                    raise UserError(f"{where}: array {self._images} is in column-major order: save numpy.ascontiguousarray(it)")
                count = self._shape[0]
                vectors = [n for n, (shape, _) in shapes.items() if shape in ((count,), (count, 1))]
                rows = [n for n, (shape, kind) in shapes.items() if _may_be_one_hot(shape, kind, count)]
                called = [n for n in names if n == "arr_1" or _LABEL_WORDS.intersection(words_of(n))]
                usual = [n for n in [*vectors, *rows] if n in called]
                usual = [n for n in usual if not split_of(n) or split_of(n) == split_of(self._images)]
                usual = [n for n in usual if n in vectors] or [n for n in usual if _is_one_hot(file[n])]
                wanted = [labels] if labels not in ("", NO_LABELS) else usual if not labels else []
                if len(wanted) == 1 and wanted[0] in names and wanted[0] not in vectors:
                    if wanted[0] not in rows or not _is_one_hot(file[wanted[0]]):
                        raise UserError(
                            f"{where}: array {wanted[0]} has the shape {shapes[wanted[0]][0]}; labels are ({count},) numbers, "
                            f"or ({count}, K) with a single 1 in each row and 0 elsewhere"
                        )
                elif len(wanted) > 1 or (wanted and wanted[0] not in vectors):
                    raise UserError(f"{where} holds the arrays {listed(names)}; name the labels with {ask.labels}=NAME")
                if wanted and shapes[wanted[0]][1].hasobject:
                    raise UserError(f"{where}: array {wanted[0]} holds Python objects: save {wanted[0]}.astype(str) instead")
                array = file[wanted[0]] if wanted else np.zeros(0)
                values = (array.argmax(1) if set(wanted) & set(rows) else array.reshape(-1)).tolist()
        except OSError as error:
            raise unreadable(error, where) from None
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{where} is a damaged .npz file: {' '.join(str(error).split())}") from None
        if not self._shape[0]:
            raise UserError(f"{where} holds no image")
        numbered = Labels(np.zeros(count, np.int32), ())
        if wanted:
            numbered = number_labels(values, None, f"{where} array {wanted[0]}")
        self.labels, self.classes = numbered.numbers, numbered.classes
        rest = [n for n, (shape, _) in shapes.items() if shape[:1] == (count,) or (n in called and not wanted)]
        rest = [n for n in rest if n not in (self._images, *wanted)] if not labels else []
        unread = [n if n in vectors else f"{n} {shapes[n][0]}" for n in rest]
        text = f"{where}: not read: {listed(unread)}; if one is the labels, name it with {ask.labels}" if unread else ""
        self.notes = tuple(note for note in (text, numbered.note) if note)
        left = [name for name in names if name not in (self._images, *wanted)]
        self.summary = summary(len(self), self.classes, path, f"array {wanted[0]}" if wanted else "", left)

    def __len__(self) -> int:
        return self._shape[0]

    def name(self, index: int) -> str:
        return f"{os.path.basename(self._path)} image {index}"

    def fingerprint(self) -> dict[str, int | str]:
        with zipfile.ZipFile(self._path) as archive:
            checksums = [f"{info.filename}\0{info.CRC}\0" for info in archive.infolist()]
        digest = hashlib.sha256(self.labels.tobytes() + "".join(checksums).encode())
        return {"count": len(self), "classes": len(self.classes), "checksum": digest.hexdigest()}

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """Each image as a PPM file; `indices` must increase."""
        height, width = self._shape[1:3]
        size = height * width * 3
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{self._images}.npy") as file:
            _read_header(file)
            start = file.tell()
            for index in indices:
                try:
                    file.seek(start + index * size)
                    pixels = file.read(size)
                except OSError as error:
                    raise unreadable(error, self._path) from None
                except (zipfile.BadZipFile, EOFError, zlib.error) as error:
                    yield BadImage(f"damaged .npz: {error}")
                    continue
                yield b"P6 %d %d 255\n" % (width, height) + pixels if len(pixels) == size else BadImage("damaged .npz")


def _may_be_one_hot(shape: tuple[int, ...], kind: np.dtype, count: int) -> bool:
    return len(shape) == 2 and shape[0] == count and shape[1] > 1 and kind.kind in "biuf"


def _is_one_hot(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array == 1)).all() and ((array == 1).sum(axis=1) == 1).all())


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(f"{name}.npy") as file:
        return _read_header(file)


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in column-major order, type."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
