"""Where the reference figures are: the small ones in tests/parity, which every clone has, the large ones in ../shared/parity.

`find` takes the small file where there is one. `full=True`, or `USE_FULL = True` for everything, takes the large one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import tempfile
from pathlib import Path

import numpy as np
import pytest

SMALL = Path(__file__).resolve().parent / "parity"
FULL = Path(__file__).resolve().parents[2] / "shared" / "parity"
USE_FULL = False
_unpacked = tempfile.TemporaryDirectory(prefix="jitjax-parity-")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Every `stride`-th value of an array, in C order."""

    values: np.ndarray
    stride: int
    shape: tuple[int, ...]  # of the whole array
    largest: float  # magnitude in the whole array

    def of(self, array: np.ndarray) -> np.ndarray:
        """The same values of another array of that shape."""
        return array.reshape(-1)[:: self.stride]


def find(name: str, *, full: bool = False) -> Path:
    """The file or folder of this name. The test is skipped, with the reason, where only the missing large files have it."""
    small, large = SMALL / name, FULL / name
    if full or USE_FULL:
        order = (large,)
    elif (packed := SMALL / f"{name}.xz").exists():
        return _unpack(packed)
    else:
        order = (small, large)
    for path in order:
        if path.exists():
            return path
    pytest.skip(f"needs the large reference file {large}, which is not on this machine")


@functools.cache
def _unpack(packed: Path) -> Path:
    path = Path(_unpacked.name) / packed.stem
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    return path


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> dict[str, np.ndarray | Sample]:
    """The arrays of an .npz file. Those that its entry "samples" lists ({name: [stride, shape, largest]}) are `Sample`s; files
    name.0.npz, name.1.npz, ... hold further arrays in pieces along the first axis."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    for key, (stride, shape, largest) in json.loads(str(arrays.pop("samples", "{}"))).items():
        arrays[key] = Sample(arrays[key], stride, tuple(shape), largest)
    pieces = [dict(np.load(file)) for file in sorted(path.parent.glob(f"{path.stem}.[0-9].npz"))]
    for key in pieces[0] if pieces else ():
        arrays[key] = np.concatenate([piece[key] for piece in pieces])
    return arrays


def load(name: str, *, full: bool = False) -> dict[str, np.ndarray | Sample]:
    """The arrays of an .npz file by their names."""
    return _load(find(name, full=full))
