"""Pillow's `resize((width // 2, height // 2), BOX)`, bit for bit, in half the time.

For the pictures that `resample` leaves to Pillow: oblong or huge ones, or all of them without Numba. Pillow resizes one
axis after the other, horizontally first, rounding to uint8 in between. Along an even edge each pass is the rounded mean of
two pixels, which Pillow's own `reduce` computes without a filter table. Along an odd edge one output in the middle is the
mean of three pixels, and to both sides of it stand pairs again. What this relies on is tried out on noise with the Pillow
that is installed; where it does not hold, the plain resize is used.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

_BOX = Image.Resampling.BOX


def halve(picture: Image.Image) -> Image.Image:
    """Half the size, rounded down, of a picture with edges of at least 2 pixels; the pixels of Pillow's box filter."""
    size = (picture.width // 2, picture.height // 2)
    if picture.height > 1.9 * picture.width or not _horizontal_first():  # Pillow takes tall pictures vertically first
        return picture.resize(size, resample=_BOX)
    return _halve_edge(_halve_edge(picture, 0), 1)


def _halve_edge(picture: Image.Image, axis: int) -> Image.Image:
    """Halves the width (axis 0) or the height (axis 1)."""
    edge = picture.size[axis]
    if edge % 2 == 0:
        return picture.reduce((2, 1) if axis == 0 else (1, 2))
    middle = _middle(edge)
    if middle is None:
        return picture.resize(_with_edge(picture.size, axis, edge // 2), resample=_BOX)
    return _halve_odd_edge(picture, axis, middle)


def _halve_odd_edge(picture: Image.Image, axis: int, middle: int) -> Image.Image:
    """Pairs, the three pixels that make output number `middle`, and pairs again."""
    edge = picture.size[axis]
    factor = (2, 1) if axis == 0 else (1, 2)
    first, last = 2 * middle, 2 * middle + 3

    def part(start: int, end: int) -> tuple[int, int, int, int]:
        return (start, 0, end, picture.height) if axis == 0 else (0, start, picture.width, end)

    def put(half: Image.Image, place: int) -> None:
        result.paste(half, (place, 0) if axis == 0 else (0, place))

    result = Image.new(picture.mode, _with_edge(picture.size, axis, edge // 2))
    if first > 0:
        put(picture.reduce(factor, box=part(0, first)), 0)
    put(picture.resize(_with_edge(picture.size, axis, 1), resample=_BOX, box=part(first, last)), middle)
    if last < edge:
        put(picture.reduce(factor, box=part(last, edge)), middle + 1)
    return result


def _with_edge(size: tuple[int, int], axis: int, edge: int) -> tuple[int, int]:
    return (edge, size[1]) if axis == 0 else (size[0], edge)


@functools.cache
def _middle(edge: int) -> int | None:
    """Which output of an odd edge takes three pixels. None where rounding makes Pillow's windows irregular."""
    column = _noise(1, edge)
    wanted = column.resize((1, edge // 2), resample=_BOX).tobytes()
    for middle in sorted({(edge // 2 - 1) // 2, max(0, edge // 4 - 1), min(edge // 4, edge // 2 - 1)}):
        if _halve_odd_edge(column, 1, middle).tobytes() == wanted:
            return middle
    return None


@functools.cache
def _horizontal_first() -> bool:
    """Whether this Pillow's passes have the order and the rounding that `halve` relies on."""
    for width, height in ((32, 32), (32, 33), (33, 32), (32, 60), (60, 32), (31, 58)):
        picture = _noise(width, height)
        wanted = picture.resize((width // 2, height // 2), resample=_BOX).tobytes()
        if _halve_edge(_halve_edge(picture, 0), 1).tobytes() != wanted:
            return False
    return True


def _noise(width: int, height: int) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))
