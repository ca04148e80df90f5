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
    """(H, W, 3) uint8, RGB, of a flawless YCbCr JPEG of at most `max_pixels`; maybe read-only.

    None for anything else: Pillow decides about every file with the least oddity.
    """
    if data[:2] != b"\xff\xd8" or not _simplejpeg_is_pillow():
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or not 0 < height * width <= max_pixels:
            return None
        return _decode(data)
    except Exception:
        return None


def _decode(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)


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
