"""Ordinary JPEG files straight to an array, by the decoder with the least on top of libjpeg-turbo that is installed.

Pillow's own JPEG decoder is libjpeg-turbo too, so simplejpeg gives its pixels, without parsing metadata in Python and
without a copy from Pillow's four bytes per pixel to three. That is tried out once on generated files; where it does not
hold, or without simplejpeg, Pillow decodes.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

try:
    import simplejpeg
except Exception:  # not installed, or not made for this Python or NumPy
    simplejpeg = None


def decode_plain_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """(H, W, 3) uint8, RGB, of a flawless 8-bit JPEG of three channels and at most `max_pixels`; maybe read-only.

    None for anything else. A file with the least oddity is left to the caller, who asks Pillow for the verdict.
    """
    size = _frame_size(data) if data[:2] == b"\xff\xd8" else None
    if size is None or not 0 < size[0] * size[1] <= max_pixels:
        return None
    try:
        if _simplejpeg_is_pillow():
            pixels = _decode(data)
            return pixels if pixels.shape == (size[1], size[0], 3) else None
        return np.asarray(Image.frombytes("RGB", size, data, "jpeg", "RGB", ""))
    except Exception:
        return None


def _decode(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)


def _frame_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an 8-bit three-channel JPEG, from its frame header; None for anything else or unusual."""
    place, end = 2, len(data)
    while place + 10 <= end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1, 0xC2):
            if data[place + 4] != 8 or data[place + 9] != 3:
                return None
            return int.from_bytes(data[place + 7 : place + 9], "big"), int.from_bytes(data[place + 5 : place + 7], "big")
        if not (0xE0 <= marker <= 0xEF or marker in (0xDB, 0xC4, 0xDD, 0xFE)):
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


@functools.cache
def _simplejpeg_is_pillow() -> bool:
    """Whether simplejpeg is here and gives this Pillow's pixels."""
    if simplejpeg is None:
        return False
    noise = np.random.default_rng(0).integers(0, 256, (61, 77, 3), dtype=np.uint8)
    for quality in (40, 95):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            file = io.BytesIO()
            Image.fromarray(noise).save(file, "JPEG", quality=quality, subsampling=subsampling)
            try:
                if not np.array_equal(_decode(file.getvalue()), np.asarray(Image.open(file))):
                    return False
            except Exception:
                return False
    return True
