"""Pillow's `resize` to the centre square, bit for bit, in a quarter of the time: compiled by Numba, for that square alone.

Pillow resizes one axis after the other, horizontally first. Each output is a sum of uint8 samples times weights rounded
to 22 bits after the point, itself rounded to uint8. Here that is done in the same integers, 64 rows transposed
at a time so that a whole vector of samples meets each weight, and without the part of an oblong picture that the crop
cuts off. What this relies on is tried out on noise with the Pillow that is installed; where it does not hold, or without
Numba, `centre_square` is None and Pillow does the work.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

try:
    import numba
except Exception:  # not installed, or not made for this Python or NumPy
    numba = None

_BOX, _BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC
_BITS = 22  # of a weight, after the point
_ROWS = 64  # transposed at a time; their samples stay in the cache
# Pillow decides by the shape which axis comes first; within this ratio, either way, it is the horizontal one.
_MAX_ASPECT = 1.8
_lock = threading.Lock()  # one thread compiles, the others wait


class _Window(NamedTuple):
    """Which samples make each output along one axis, and by which weights.

    first, count: (n,) int64, the first source sample of each output and their number. weights: (n, most) int32.
    """

    first: np.ndarray
    count: np.ndarray
    weights: np.ndarray


def centre_square(pixels: np.ndarray, sizes: list[tuple[int, int]], size: int) -> np.ndarray | None:
    """The crop of the centre of a picture that is resized several times.

    Args:
      pixels: (H, W, 3) uint8, C-contiguous. sizes: (width, height) after each step, of which all but the last halve
        (rounded down, box filter) and the last is bicubic; none smaller than the square. size: edge of the square.

    Returns:
      (size, size, 3) uint8, or None where it takes Pillow to give Pillow's pixels.
    """
    steps = _steps((pixels.shape[1], pixels.shape[0]), tuple(sizes), size) if _works() else None
    if steps is None:
        return None
    for across, down in steps[:-1]:
        pixels = _run(_halve, pixels, across, down)
    return _run(_resize, pixels, *steps[-1])


def _run(kernel: Callable, pixels: np.ndarray, across: _Window, down: _Window) -> np.ndarray:
    pixels = pixels.view()
    pixels.flags.writeable = False  # so Numba compiles once, for whatever array comes
    out = np.empty((len(down.first), len(across.first), 3), np.uint8)
    kernel(pixels, *across, *down, out)
    return out


@functools.lru_cache(256)  # up to 40 kB each
def _steps(start: tuple[int, int], sizes: tuple[tuple[int, int], ...], size: int) -> list[tuple[_Window, _Window]] | None:
    """(across, down) of each step, cut to what the steps after it need; None where a table is not Pillow's."""
    if any(max(edges) > _MAX_ASPECT * min(edges) for edges in (start, *sizes)):
        return None
    before = (start, *sizes[:-1])
    filters = [_BOX] * (len(sizes) - 1) + [_BICUBIC]
    wanted = [((edge - size) // 2, (edge - size) // 2 + size) for edge in sizes[-1]]
    steps: list[tuple[_Window, _Window]] = []
    for old, new, kind in reversed(list(zip(before, sizes, filters, strict=True))):
        step = []
        for axis in (0, 1):
            window = _window(old[axis], new[axis], kind)
            if window is None:
                return None
            first, last = wanted[axis]
            step.append(_Window(*(np.ascontiguousarray(part[first:last]) for part in window)))
            wanted[axis] = (int(window.first[first]), int(window.first[last - 1] + window.count[last - 1]))
        steps.append((step[0], step[1]))
    # each step but the first gets only the part of the picture that the step before it made
    for k in range(len(steps) - 1):
        steps[k] = tuple(w._replace(first=w.first - w.first[0]) for w in steps[k])
    return steps[::-1]


@functools.lru_cache(1024)
def _window(old: int, new: int, kind: Image.Resampling) -> _Window | None:
    """The whole of one axis, or None where Pillow's pixels are others; tried on a strip of noise."""
    window = _pillows_window(old, new, kind)
    if kind == _BOX and window.count.max() > 3:  # `_halve` has buffers for three
        return None
    return window if _equals_pillow((8, old), (4, new), kind, one_by_one=True) else None


def _pillows_window(old: int, new: int, kind: Image.Resampling) -> _Window:
    """`precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c, in the same order of operations."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = (2.0 if kind == _BICUBIC else 0.5) * stretch
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), old) - first
    tap = np.arange(count.max())
    x = (tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)
    weights = _bicubic(np.abs(x)) if kind == _BICUBIC else ((x > -0.5) & (x <= 0.5)).astype(np.float64)
    weights[tap >= count[:, None]] = 0
    total = np.zeros(new)
    for column in weights.T:  # one after the other, as Pillow adds
        total = total + column
    weights = weights / total[:, None] * (1 << _BITS)
    return _Window(first, count, np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int32))


def _bicubic(x: np.ndarray) -> np.ndarray:
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.cache
def _works() -> bool:
    """Whether Numba is here and this Pillow's passes have the order and the rounding that the kernel relies on."""
    if numba is None:
        return False
    try:
        with _lock:
            for width, height in ((50, 89), (89, 50), (90, 90), (91, 61), (61, 91)):
                old = (width, height)
                for new, kind in (
                    ((width // 2, height // 2), _BOX),
                    ((round(width * 0.6), round(height * 0.6)), _BICUBIC),
                    ((round(width * 1.3), round(height * 1.3)), _BICUBIC),
                ):
                    if not _equals_pillow(old, new, kind, one_by_one=False):
                        return False
            return True
    except Exception:  # Numba came but cannot compile here
        return False


def _equals_pillow(old: tuple[int, int], new: tuple[int, int], kind: Image.Resampling, one_by_one: bool) -> bool:
    """Whether noise comes out as from Pillow, with the order of the axes that it takes or `one_by_one`, across first."""
    noise = _noise(*old)
    got = _run(
        _halve if kind == _BOX else _resize,
        noise,
        _pillows_window(old[0], new[0], kind),
        _pillows_window(old[1], new[1], kind),
    )
    wanted = Image.fromarray(noise)
    if one_by_one:
        wanted = wanted.resize((new[0], old[1]), resample=kind)
    return np.array_equal(got, np.asarray(wanted.resize(new, resample=kind)))


def _noise(width: int, height: int) -> np.ndarray:
    values = np.arange(width * height * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    return values.astype(np.uint8).reshape(height, width, 3)


def _compiled(function: Callable) -> Callable:
    if numba is None:
        return function
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder to keep the machine code in; two seconds in each process
        return numba.njit(nogil=True, error_model="numpy")(function)


@_compiled
def _weigh(source, offset, first, count, weights, total, out):
    """out[k] = round(sum of weights[k, t] * source[first[k] - offset + t] over t < count[k]), rows as vectors."""
    length = out.shape[1]
    for k in range(first.shape[0]):
        for i in range(length):
            total[i] = 1 << (_BITS - 1)
        for t in range(count[k]):
            weight = weights[k, t]
            row = source[first[k] - offset + t]
            for i in range(length):
                total[i] += np.int32(np.int32(row[i]) * weight)
        line = out[k]
        for i in range(length):
            line[i] = min(max(total[i] >> np.int32(_BITS), np.int32(0)), np.int32(255))


@_compiled
def _resize(source, x_first, x_count, x_weights, y_first, y_count, y_weights, out):
    """(H, W, 3) uint8 -> out (h, w, 3) uint8: across, then down, each by a table."""
    left, right = x_first[0], x_first[-1] + x_count[-1]
    top, bottom = y_first[0], y_first[-1] + y_count[-1]
    width = x_first.shape[0]
    transposed = np.empty((right - left, _ROWS * 3), np.uint8)
    narrow = np.empty((width, _ROWS * 3), np.uint8)
    middle = np.empty((bottom - top, width * 3), np.uint8)
    total = np.empty(max(_ROWS, width) * 3, np.int32)
    for start in range(top, bottom, _ROWS):
        rows = min(_ROWS, bottom - start)
        for y in range(rows):
            line = source[start + y]
            for x in range(right - left):
                for c in range(3):
                    transposed[x, y * 3 + c] = line[left + x, c]
        _weigh(transposed, left, x_first, x_count, x_weights, total, narrow)
        for y in range(rows):
            line = middle[start - top + y]
            for x in range(width):
                for c in range(3):
                    line[x * 3 + c] = narrow[x, y * 3 + c]
    _weigh(middle, top, y_first, y_count, y_weights, total, out.reshape(out.shape[0], width * 3))


@_compiled
def _halve(source, x_first, x_count, x_weights, y_first, y_count, y_weights, out):
    """`_resize` for a table of pairs, with three weights here and there. A pair's rounded mean needs no table."""
    width = x_first.shape[0]
    half = np.int32(1 << (_BITS - 1))
    narrow = np.empty((3, width * 3), np.uint8)
    for y in range(out.shape[0]):
        rows = y_count[y]
        for k in range(rows):
            row, line = source[y_first[y] + k], narrow[k]
            for x in range(width):
                first = x_first[x]
                if x_count[x] == 2:
                    for c in range(3):
                        line[x * 3 + c] = (np.int32(row[first, c]) + np.int32(row[first + 1, c]) + 1) >> 1
                else:
                    for c in range(3):
                        total = half
                        for t in range(x_count[x]):
                            total = np.int32(total + np.int32(row[first + t, c]) * x_weights[x, t])
                        line[x * 3 + c] = total >> np.int32(_BITS)
        line = out[y].reshape(width * 3)
        if rows == 2:
            for i in range(width * 3):
                line[i] = (np.int32(narrow[0, i]) + np.int32(narrow[1, i]) + 1) >> 1
        else:
            for i in range(width * 3):
                total = half
                for k in range(rows):
                    total = np.int32(total + np.int32(narrow[k, i]) * y_weights[y, k])
                line[i] = total >> np.int32(_BITS)
