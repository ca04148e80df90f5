"""Images to be scored or scored against: a folder, a data set, an .npz. All iterate over uint8 batches in a fixed order."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from jitjax.data.dataset import DataSet, open_dataset
from jitjax.data.image import BadImage
from jitjax.data.rules import HERE, NO_LABELS
from jitjax.data.tree import is_prepared
from jitjax.errors import UserError
from jitjax.evaluation.statistics import NpzImages, is_npz, npz_images

_BATCH = 64  # images a thread reads at a time
_THREADS = min(16, os.cpu_count() or 1)


@dataclasses.dataclass
class DataImages:
    """A data set's images in order, as training sees them: centre crop to its size, no flip.

    skipped: filled while iterating with one line for each image that could not be decoded.
    """

    dataset: DataSet
    skipped: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def image_size(self) -> int:
        return self.dataset.image_size

    def __iter__(self) -> Iterator[np.ndarray]:
        def read(index: int) -> np.ndarray | None:
            try:
                return self.dataset[index]["image"]
            except BadImage as error:
                self.skipped.append(f"{self.dataset.source.name(index)}: {error}")
                return None

        return _read_in_threads(read, len(self.dataset))


@dataclasses.dataclass(frozen=True)
class FileImages:
    """Image files as they are: nothing is cropped or resized, so all must be squares of one size."""

    paths: tuple[str, ...]
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return _read_in_threads(lambda index: _read_square(self.paths[index], self.image_size), len(self.paths))


def _read_square(path: str, size: int | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image: {error}") from None
    wanted = size or pixels.shape[0]
    if pixels.shape[:2] != (wanted, wanted):
        raise UserError(
            f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} px, expected {wanted} x {wanted}: scored images are taken as "
            "they are, all of one size"
        )
    return pixels


def _read_in_threads(read: Callable[[int], np.ndarray | None], count: int) -> Iterator[np.ndarray]:
    """Batches in order of the images 0 to count - 1, without those for which `read` gives None."""

    def batch(start: int) -> list[np.ndarray]:
        found = (read(index) for index in range(start, min(start + _BATCH, count)))
        return [image for image in found if image is not None]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        starts = iter(range(0, count, _BATCH))
        ahead = collections.deque(pool.submit(batch, start) for start in itertools.islice(starts, 2 * _THREADS))
        try:
            while ahead:
                images = ahead.popleft().result()
                ahead.extend(pool.submit(batch, start) for start in [next(starts, None)] if start is not None)
                if images:
                    yield np.stack(images)
        finally:
            for future in ahead:
                future.cancel()


def open_images(path: str | os.PathLike) -> NpzImages | FileImages:
    """Images to be scored, as they are: an .npz with `arr_0` (uint8 NHWC), or a folder of image files of one size.

    Raises:
      UserError: nothing usable there, images that are no squares. While iterating: a file of another size, or no image.
    """
    path = Path(path).expanduser()
    if path.is_file() and is_npz(path):
        return npz_images(path)
    if not path.is_dir():
        state = "is neither a folder nor an .npz" if path.exists() else "does not exist"
        raise UserError(f"{path}: {state}; images to score are a folder of image files, or an .npz with arr_0")
    if is_prepared(path):
        raise UserError(f"{path}: a prepared directory is a reference; images to score are a folder of files, or an .npz")
    dataset = open_dataset(path, 8, split=HERE, labels=NO_LABELS, flag="TARGET")  # for its list of files only
    paths = tuple(dataset.source.name(index) for index in range(len(dataset)))
    return FileImages(paths, len(_read_square(paths[0], None)))
