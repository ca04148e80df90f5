"""From the bytes of an image file to the published uint8 crop.

The pixels are those of the official pipeline (spec: torchvision's ImageFolder loader, then ADM's centre crop): first
frame, `convert("RGB")`, halvings with a box filter, bicubic to the size, crop of the centre.
"""

from __future__ import annotations

import io
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from jitjax.data.halve import halve

# Formats that Pillow recognises by a signature and decodes in process. (EPS, for one, would start Ghostscript; TGA has
# no signature.)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
# Pillow's own hard limit, on which the official loader fails too; here it also holds for the enlarged copy of an oblong
# picture.
MAX_PIXELS = 178_956_970
# No honest training image is larger on disk; what is larger is refused unread.
MAX_FILE_BYTES = 512 * 2**20

# "Corrupt EXIF data" and its like, once for each of a million files
warnings.filterwarnings("ignore", module=r"PIL\..*")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """An image that cannot be used. The message is the reason, in one short line."""


def preprocess(picture: Image.Image, size: int) -> np.ndarray:
    """The official centre crop (ADM's `center_crop_arr` after `convert("RGB")`).

    Args:
      picture: any mode, any size. size: edge of the square wanted, in pixels.

    Returns:
      (size, size, 3) uint8, RGB; maybe read-only.

    Raises:
      BadImage: the picture is empty or so oblong that the intermediate image would exceed `MAX_PIXELS`.
    """
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if min(picture.size) == 0:
        raise BadImage(f"the picture is empty ({picture.width}x{picture.height})")
    while min(picture.size) >= 2 * size:
        picture = halve(picture)
    scale = size / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise BadImage(f"too oblong: {picture.width}x{picture.height} would be enlarged to {scaled[0]}x{scaled[1]}")
    if scaled != picture.size:  # Pillow's resize to the same size is a copy
        picture = picture.resize(scaled, resample=Image.Resampling.BICUBIC)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    if scaled != (size, size):
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
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


def _decode_plain_jpeg(data: bytes) -> Image.Image | None:
    """An ordinary RGB JPEG through Pillow's decoder, without parsing metadata in Python (a quarter of a small one's time).

    None wherever the picture is not plain or does not decode; then `open_picture` gives the verdict.
    """
    size = _jpeg_size(data) if data[:2] == b"\xff\xd8" else None
    if size is None or not 0 < size[0] * size[1] <= MAX_PIXELS:
        return None
    try:
        return Image.frombytes("RGB", size, data, "jpeg", "RGB", "")
    except Exception:
        return None


def open_picture(file: BinaryIO | bytes, exif_rotate: bool = False) -> Image.Image:
    """Decodes the first frame of an image file to RGB as the official loader does.

    Args:
      file: the encoded bytes or an open binary file. exif_rotate: turn the picture as its EXIF orientation says (the
        official pipeline does not).

    Raises:
      BadImage: anything that keeps the picture from being decoded completely.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImage(f"{picture.width}x{picture.height} pixels are more than the {MAX_PIXELS} allowed")
            if exif_rotate:
                picture = ImageOps.exif_transpose(picture)
            picture.load()
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more pixels than the {MAX_PIXELS} allowed") from None
    # Pillow answers damage with a dozen exception types, SyntaxError and struct.error among them
    except Exception as error:
        reason = " ".join(f"{error}".split()) or "damaged"
        raise BadImage(reason if isinstance(error, OSError) else f"{type(error).__name__}: {reason}") from None


def decode(data: bytes, size: int, exif_rotate: bool = False) -> np.ndarray:
    """Encoded bytes -> (size, size, 3) uint8 crop. Raises BadImage with the reason."""
    if not data:
        raise BadImage("the file is empty")
    try:
        picture = None if exif_rotate else _decode_plain_jpeg(data)
        return preprocess(picture or open_picture(data, exif_rotate), size)
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
