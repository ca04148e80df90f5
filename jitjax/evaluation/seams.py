"""The seam index: a number for the mesh of patch borders that a young model's samples show."""

from __future__ import annotations

import numpy as np

from jitjax.errors import UserError

_CHUNK = 64  # images converted to float at once


def seam_index(images: np.ndarray, patch: int) -> float:
    """Mean absolute difference of neighbouring pixels across patch borders, divided by that inside patches.

    1.0 where borders show no more than any other pixel pair, above where a mesh shows. Photographs give about 1.0 (measure
    the data beside the samples: JPEG blocks of a multiple of the patch also count).

    Args:
      images: (N, H, W, C) uint8. patch: edge of the model's patches in pixels.

    Raises:
      UserError: not images, a patch that does not divide them or leaves no border, or flat images (no gradient inside
        patches: the ratio is undefined).
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UserError(f"seam_index: images must be uint8 of shape (N, H, W, C), got {images.dtype} {images.shape}")
    height, width = images.shape[1:3]
    if patch < 2 or height % patch or width % patch or max(height, width) == patch:
        raise UserError(f"seam_index: patch={patch} must be at least 2 and divide {height} x {width} px into several patches")
    sums, counts = np.zeros(2), np.zeros(2)  # inside patches, across borders
    for start in range(0, len(images), _CHUNK):
        pixels = images[start : start + _CHUNK].astype(np.int16)
        for axis in (1, 2):
            step = np.abs(np.diff(pixels, axis=axis)).mean(axis=(0, 3 - axis, 3), dtype=np.float64) * len(pixels)
            border = np.arange(1, len(step) + 1) % patch == 0
            sums += step[~border].sum(), step[border].sum()
            counts += (~border).sum() * len(pixels), border.sum() * len(pixels)
    inside, across = sums / np.maximum(counts, 1)
    if inside == 0:
        raise UserError("seam_index: the images are flat inside patches, so the ratio is undefined")
    return float(across / inside)
