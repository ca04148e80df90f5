"""A labelled data set that the program draws itself: one shape and one colour a class, as PNG files in class folders.

For a first run without a download. The colours are corners of the RGB cube around a mid-grey ground and all shapes
cover about the same area, so the mean colour of an image is enough to know its class, and so is a look.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jitjax.errors import UserError

# Colour (RGB) by class; the part after "_" is the shape.
COLOURS = {
    "black_diamond": (20, 20, 20),
    "blue_triangle": (40, 60, 230),
    "cyan_ring": (30, 220, 225),
    "green_square": (40, 200, 50),
    "magenta_cross": (225, 40, 220),
    "red_circle": (230, 40, 35),
    "white_crescent": (245, 245, 245),
    "yellow_star": (240, 225, 40),
}
CLASSES = tuple(COLOURS)

PER_CLASS = 64
GROUND = 112  # grey of the background
AREA = 0.26  # of the image that a shape of average size covers
SUPERSAMPLING = 4
RECORD = "shapes.json"  # what was drawn; its presence means that the set is whole

Points = list[tuple[float, float]]


def draw_dataset(
    root: str | os.PathLike,
    *,
    image_size: int = 32,
    per_class: int = PER_CLASS,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
) -> Path:
    """Draws root/train/<class>/<nnnn>.png, unless they are there already.

    The same arguments give the same pixels. The set is drawn beside `root` and moved there when whole, so an
    interrupted call leaves no folder that looks complete, and two processes may call at once.

    Args:
      root: folder to make; must not exist, be empty, or hold the same set.
      image_size: side in pixels.
      per_class: images of each class.
      seed: of position, size, turn and shade.
      classes: names out of `CLASSES`.

    Returns:
      `root` as a Path.

    Raises:
      UserError: unknown class, a number that is not positive, or `root` holds something else.
    """
    root = Path(root)
    unknown = [name for name in classes if name not in COLOURS]
    if unknown or not classes:
        raise UserError(f"unknown shape class {', '.join(unknown) or '(none given)'}: use some of {', '.join(CLASSES)}")
    if image_size < 8 or per_class < 1:
        raise UserError(f"shapes need image_size >= 8 and per_class >= 1, not {image_size} and {per_class}")
    record = {"image_size": image_size, "per_class": per_class, "seed": seed, "classes": list(classes)}
    if _is_complete(root, record):
        return root

    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".partial", dir=root.parent))
    try:
        for name in classes:
            folder = partial / "train" / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                draw(name, image_size, (seed, CLASSES.index(name), number)).save(folder / f"{number:04d}.png")
        (partial / RECORD).write_text(json.dumps(record) + "\n")
        partial.chmod(0o755)  # mkdtemp makes folders private
        try:
            os.rename(partial, root)  # replaces nothing but an empty folder
        except OSError:
            if not _is_complete(root, record):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _is_complete(root: Path, record: dict) -> bool:
    """Whether `root` holds this very set; False when nothing is there. UserError when something else is."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / RECORD).read_text())
    except (OSError, ValueError):
        raise UserError(f"{root} exists and is no set of drawn shapes: give another folder to draw them in") from None
    if found != record:
        raise UserError(f"{root} holds shapes drawn with other settings ({found}): delete it, or give another folder")
    for name in record["classes"]:
        folder = root / "train" / name
        count = sum(1 for _ in folder.glob("*.png")) if folder.is_dir() else 0
        if count != record["per_class"]:
            raise UserError(f"{folder} holds {count} of {record['per_class']} drawn shapes: delete {root} to redraw")
    return True


def draw(name: str, image_size: int, seed: Sequence[int]) -> Image.Image:
    """One image of a class: RGB, `image_size` square, antialiased; `seed` decides place, size, turn and shade."""
    rng = np.random.default_rng(list(seed))
    side = image_size * SUPERSAMPLING
    centre = side / 2 + rng.uniform(-0.06, 0.06, 2) * side
    scale = side * math.sqrt(AREA) * rng.uniform(0.9, 1.1)  # side of the square of equal area
    turn = rng.uniform(-12, 12) * math.pi / 180
    shade = np.clip(np.array(COLOURS[name]) + rng.integers(-14, 15, 3), 0, 255)
    ground = (GROUND + int(rng.integers(-6, 7)),) * 3

    image = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(image)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    for points, is_shape in _outlines(name.split("_")[1]):
        corners = np.array(points) @ rotation.T * scale + centre
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=tuple(shade.tolist()) if is_shape else ground)
    return image.reduce(SUPERSAMPLING)


def _outlines(shape: str) -> Iterator[tuple[Points, bool]]:
    """Polygons around the origin, of area about one together; the second of each pair is False for a hole."""
    match shape:
        case "square":
            yield _regular(4, math.sqrt(0.5), start=45), True
        case "diamond":
            yield [(0.0, -0.84), (1 / 1.68, 0.0), (0.0, 0.84), (-1 / 1.68, 0.0)], True
        case "triangle":
            yield _regular(3, math.sqrt(4 / (3 * math.sqrt(3))), start=-90), True
        case "circle":
            yield _regular(64, math.sqrt(1 / math.pi)), True
        case "ring":
            outer = 0.72
            yield _regular(64, outer), True
            yield _regular(64, math.sqrt(outer**2 - 1 / math.pi)), False
        case "cross":
            arm = 0.22  # half an arm's width; the area 4 arm (2 reach - arm) is one
            reach = (1 / (4 * arm) + arm) / 2
            yield [(-reach, -arm), (reach, -arm), (reach, arm), (-reach, arm)], True
            yield [(-arm, -reach), (arm, -reach), (arm, reach), (-arm, reach)], True
        case "star":
            outer, inner = 0.86, 0.86 * 0.45
            area = 5 * outer * inner * math.sin(math.pi / 5)
            tips, notches = _regular(5, outer, start=-90), _regular(5, inner, start=-54)
            star = [point for pair in zip(tips, notches, strict=True) for point in pair]
            yield [(x / math.sqrt(area), y / math.sqrt(area)) for x, y in star], True
        case "crescent":
            yield _regular(64, 0.74), True
            yield [(x + 0.42, y) for x, y in _regular(64, 0.6)], False


def _regular(corners: int, radius: float, start: float = 0.0) -> Points:
    """A regular polygon around the origin; `start` is the first corner's angle in degrees."""
    angles = [math.radians(start + 360 * k / corners) for k in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]
