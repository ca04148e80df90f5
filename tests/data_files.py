"""Real images for the tests of the input pipeline, and the published preprocessing written out plainly."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from conftest import shared
from PIL import Image


def caltech_folder(target: Path, every: int) -> Path:
    """Unpacks every n-th training photograph of the Caltech set, class folders kept; returns the folder."""
    with tarfile.open(shared("data/caltech64.tar.gz")) as archive:
        members = [m for m in archive if m.isreg() and "/train/" in f"/{m.name}" and m.name.endswith(".jpg")]
        for member in sorted(members, key=lambda m: m.name)[::every]:
            *_, class_name, file = member.name.split("/")
            (target / class_name).mkdir(parents=True, exist_ok=True)
            (target / class_name / file).write_bytes(archive.extractfile(member).read())
    return target


def official_pixels(path: str | Path, size: int) -> np.ndarray:
    """What the official loader makes of a file: RGB, halved by box filters, scaled by a bicubic one, cropped. (S, S, 3)
    uint8.
    """
    picture = Image.open(path).convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(edge // 2 for edge in picture.size), resample=Image.BOX)
    scale = size / min(picture.size)
    pixels = np.array(picture.resize(tuple(round(edge * scale) for edge in picture.size), resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
