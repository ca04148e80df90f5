"""Grids of images as PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SEPARATOR = 2  # pixels between images
CAPTION = 12  # pixels above an image for its label
PAPER, INK = (255, 255, 255), (0, 0, 0)


def save_grid(
    path: str | os.PathLike,
    images: np.ndarray,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Writes images side by side, row by row, with 2 px of white between them. A reader never sees half a file.

    Args:
      path: the PNG file; its folder is made when absent.
      images: (N, H, W, 3) uint8.
      columns: images in a row; default about as many as there are rows.
      labels: N captions, cut at the image's width; default none.

    Raises:
      ValueError: no images, another shape or type, or another number of labels.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images) or images.dtype != np.uint8:
        raise ValueError(f"expected images (N, H, W, 3) uint8, N > 0; got {images.shape} {images.dtype}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    count, height, width, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    caption = CAPTION if labels is not None else 0
    cell_height, cell_width = height + caption + SEPARATOR, width + SEPARATOR
    sheet = Image.new("RGB", (columns * cell_width - SEPARATOR, rows * cell_height - SEPARATOR), PAPER)
    font = ImageFont.load_default(size=CAPTION - 2) if labels is not None else None
    for i, image in enumerate(images):
        x, y = i % columns * cell_width, i // columns * cell_height
        if labels is not None:
            strip = Image.new("RGB", (width, caption), PAPER)
            ImageDraw.Draw(strip).text((0, -1), labels[i], fill=INK, font=font)
            sheet.paste(strip, (x, y))
        sheet.paste(Image.fromarray(image), (x, y + caption))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        sheet.save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
