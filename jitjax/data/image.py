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
from PIL.TiffImagePlugin import BITSPERSAMPLE

from jitjax.data.jpeg import decode_plain_jpeg
from jitjax.data.resample import centre_square
from jitjax.data.rules import FORMATS, MORE_FORMATS

# What becomes of grey 16-bit, 32-bit and float pictures. "clip": every value above 255 is white, as in the official loader;
# "range": 0..65535 of integers and 0..1 of floats become 0..255; "picture": each picture's own least and greatest value do.
# Of 16 bits with colour or alpha Pillow gives the upper 8 alone: that is "range" within 1, and "picture" is refused.
HIGH_DEPTH = ("clip", "range", "picture")
# Pillow's own hard limit, on which the official loader fails too; here it also holds for the enlarged copy of an oblong
# picture.
MAX_PIXELS = 178_956_970
# No honest training image is larger on disk; what is larger is refused unread.
MAX_FILE_BYTES = 512 * 2**20

# Beyond this, memory counts for more than speed.
_MAX_COPIED_PIXELS = 2**24

# "Corrupt EXIF data" and its like, once for each of a million files
warnings.filterwarnings("ignore", module=r"PIL\..*")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """An image that cannot be used. The message is the reason, in one short line."""


def preprocess(picture: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """The official centre crop (ADM's `center_crop_arr` after `convert("RGB")`).

    Args:
      picture: any mode, any size; or its pixels, (H, W, 3) uint8, RGB. size: edge of the square wanted, in pixels.

    Returns:
      (size, size, 3) uint8, RGB; maybe read-only.

    Raises:
      BadImage: the picture is empty, or so oblong that the intermediate image, or the square, would exceed `MAX_PIXELS`.
    """
    if isinstance(picture, Image.Image) and picture.mode != "RGB":
        picture = picture.convert("RGB")
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
    if min(width, height) == 0:
        raise BadImage(f"the picture is empty ({width}x{height})")
    steps = _sizes((width, height), size)
    (before, scaled) = ((width, height), *steps)[-2:]
    if size * size > MAX_PIXELS:
        raise BadImage(f"squares of {size} px have more than the {MAX_PIXELS} pixels that an image may have")
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise BadImage(f"too oblong: {before[0]}x{before[1]} would be enlarged to {scaled[0]}x{scaled[1]}")
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    if scaled == (width, height):  # Pillow's resize to the same size is a copy
        return np.asarray(picture)[top : top + size, left : left + size]
    if width * height <= _MAX_COPIED_PIXELS:
        square = centre_square(np.asarray(picture), steps, size)
        if square is not None:
            return square
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    for _ in steps[:-1]:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    if scaled != picture.size:
        picture = picture.resize(scaled, resample=Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _sizes(edges: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """(width, height) after each of the official resizes: halvings down to less than twice the square, then to it."""
    sizes = []
    while min(edges) >= 2 * size:
        edges = (edges[0] // 2, edges[1] // 2)
        sizes.append(edges)
    scale = size / min(edges)
    return [*sizes, (round(edges[0] * scale), round(edges[1] * scale))]


def open_picture(
    file: BinaryIO | bytes, exif_rotate: bool = False, *, all_formats: bool = False, high_depth: str = "clip"
) -> Image.Image:
    """Decodes the first frame of an image file to RGB as the official loader does.

    Args:
      file: the encoded bytes or an open binary file. exif_rotate: turn the picture as its EXIF orientation says (the
        official pipeline does not). all_formats: JPEG 2000 and the other `rules.MORE_FORMATS` too. high_depth: one of
        `HIGH_DEPTH`.

    Raises:
      BadImage: anything that keeps the picture from being decoded completely.
    """
    try:
        formats = (*FORMATS, *MORE_FORMATS) if all_formats else tuple(FORMATS)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImage(f"{picture.width}x{picture.height} pixels are more than the {MAX_PIXELS} allowed")
            if high_depth == "picture" and _loses_bits(picture):
                raise BadImage("16 bits with colour or alpha, of which Pillow gives 8: use high_depth=range or scale the files")
            if exif_rotate:
                picture = ImageOps.exif_transpose(picture)
            picture.load()
            if high_depth != "clip" and is_high_depth(picture):
                picture = _scaled(picture, high_depth)
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


def is_high_depth(picture: Image.Image) -> bool:
    """Whether a picture has more than 8 bits a channel, which `convert("RGB")` clips at 255."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def _loses_bits(picture: Image.Image) -> bool:
    """Whether an opened PNG or TIFF has more than 8 bits a channel, of which `load` will give the upper 8 alone."""
    if is_high_depth(picture):
        return False
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(BITSPERSAMPLE, (8,))) > 8
    return picture.format == "PNG" and any(";16" in str(tile[3]) for tile in picture.tile)


def _scaled(picture: Image.Image, high_depth: str) -> Image.Image:
    """An 8-bit grey picture of a high-depth one, by "range" or "picture"."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadImage("it holds values that are not finite")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if high_depth == "range":
        top = 1.0 if picture.mode == "F" else 65535.0  # one for all files: 32-bit integers are mostly 16-bit values
        if low < 0 or high > top:
            raise BadImage(
                f"values from {low:.9g} to {high:.9g} are outside 0..{top:g}; use high_depth=picture or scale the files"
            )
        low, high = 0.0, top
    return Image.fromarray(np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))


def is_constant(pixels: np.ndarray) -> bool:
    """Whether all pixels of (H, W, 3) uint8 are of one colour, within 1: what clipping leaves of 16-bit and float pictures.

    Five pixels are enough to rule out most pictures.
    """
    height, width = pixels.shape[:2]
    first = int(pixels[0, 0, 0])
    for y, x in ((height // 2, width // 2), (0, -1), (-1, 0), (-1, -1)):
        if abs(int(pixels[y, x, 0]) - first) > 1:
            return False
    return bool((np.abs(pixels - pixels[0, 0].astype(np.int16)) <= 1).all())


def decode(
    data: bytes, size: int, exif_rotate: bool = False, *, all_formats: bool = False, high_depth: str = "clip"
) -> np.ndarray:
    """Encoded bytes -> (size, size, 3) uint8 crop. Options as for `open_picture`. Raises BadImage with the reason."""
    if not data:
        raise BadImage("the file is empty")
    try:
        pixels = None if exif_rotate else decode_plain_jpeg(data, MAX_PIXELS)
        if pixels is None:
            return preprocess(open_picture(data, exif_rotate, all_formats=all_formats, high_depth=high_depth), size)
        return preprocess(pixels, size)
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
