"""Images side by side, with captions: PNG grids, strips of a denoising path, animations."""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from jitjax import atomic

SEPARATOR = 2  # pixels between images
FONT_SIZE = 12
LINE, BASELINE = 16, 12  # pixels of one line of text, and from its top to the foot of a letter
GAP = 12  # pixels between the columns of the legend
LONGEST_ENTRY = 480  # pixels of a name in the legend; what is longer is cut and written to the text file, too
PAPER, INK = (255, 255, 255), (0, 0, 0)
MAKER = "jitjax"  # in the files, so that a picture of someone else's is not overwritten


def save_grid(
    path: str | os.PathLike,
    images: np.ndarray,
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> Path:
    """Writes images side by side, row by row, as PNG. A reader never sees half a file.

    Captions that fit stand above their images, or once above each column that has a single one. Otherwise the labels stand
    there instead, and a legend below the grid says what they mean. A name for which this machine has no font, or that is too
    long, is written to a text file beside the picture (`NAME.txt` for `NAME.png`: label, tab, name), and the legend says so.

    Args:
      path: the PNG file; its folder is made when absent.
      images: (N, H, W, 3) uint8.
      columns: images in a row; default about as many as there are rows.
      captions: one for each image, e.g. class names in any script; default none.
      labels: the class of each caption, by which commands take it; default the distinct captions counted from 0.

    Raises:
      ValueError: no images, another shape or type, or another number of captions or labels.
    """
    sheet, unreadable = draw_grid(images, columns=columns, captions=captions, labels=labels)
    path = Path(path)
    if unreadable:
        lines = "".join(f"{number}\t{name}\n" for number, name in unreadable.items())
        _write(legend_of(path), lambda partial: partial.write_text(lines, encoding="utf-8"))
    signed = PngImagePlugin.PngInfo()
    signed.add_text("Software", MAKER)
    return _write(path, lambda partial: sheet.save(partial, format="PNG", pnginfo=signed))


def legend_of(path: Path) -> Path:
    """The text file beside a grid."""
    return path.with_suffix(".txt")


def written_here(legend: Path) -> bool:
    """Whether a text file is one that `save_grid` wrote: a number, a tab and a name in each line."""
    try:
        lines = legend.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    return bool(lines) and all(re.fullmatch(r"\d+\t.*", line) for line in lines)


def drawn_here(path: str | os.PathLike) -> bool:
    """Whether a file is a grid, strip or film (.gif) that this module wrote."""
    try:
        with Image.open(path) as image:
            return MAKER in (image.info.get("Software"), image.info.get("comment", b"").decode("latin-1"))
    except (OSError, ValueError, AttributeError):
        return False


def save_strip(path: str | os.PathLike, states: Sequence[np.ndarray], *, captions: Sequence[str] | None = None) -> Path:
    """Writes a denoising path as PNG: one row an image, one column a state.

    Args:
      path: the PNG file.
      states: S arrays (N, H, W, 3) uint8, from noise to image.
      captions: one for each state, e.g. its time; default none.
    """
    by_image = np.stack(states, axis=1)  # (N, S, H, W, 3)
    count, steps = by_image.shape[:2]
    labels = None if captions is None else [*captions] * count
    return save_grid(path, by_image.reshape(count * steps, *by_image.shape[2:]), columns=steps, captions=labels)


def save_animation(
    path: str | os.PathLike,
    states: Sequence[np.ndarray],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    milliseconds: int = 80,
    hold_milliseconds: int = 1500,
) -> Path:
    """Writes a denoising path as a moving grid that repeats for ever.

    Args:
      path: a .gif (256 colours a frame), .webp or .png (both lossless) file.
      states: S arrays (N, H, W, 3) uint8, from noise to image.
      columns, captions: as for `save_grid`.
      milliseconds: time of each state; the last one stays for `hold_milliseconds`.

    Raises:
      ValueError: no states, or another kind of file.
    """
    path = Path(path)
    formats = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path}: an animation is a {', '.join(formats)} file")
    if not len(states):
        raise ValueError("an animation needs at least one state")
    frames = [draw_grid(state, columns=columns, captions=captions)[0] for state in states]
    times = [milliseconds] * (len(frames) - 1) + [hold_milliseconds]
    options = dict(save_all=True, append_images=frames[1:], duration=times, loop=0)
    if path.suffix.lower() == ".webp":
        options["lossless"] = True
    elif path.suffix.lower() == ".gif":
        options["comment"] = MAKER.encode()
    return _write(path, lambda partial: frames[0].save(partial, format=formats[path.suffix.lower()], **options))


def draw_grid(
    images: np.ndarray,
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> tuple[Image.Image, dict[int, str]]:
    """The picture that `save_grid` writes, and the captions that it could not draw, by label (see there)."""
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images) or images.dtype != np.uint8:
        raise ValueError(f"expected images (N, H, W, 3) uint8, N > 0; got {images.shape} {images.dtype}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    if labels is not None and len(labels) != len(captions or ()):
        raise ValueError(f"{len(labels)} labels for {len(captions or ())} captions")
    count, height, width, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)

    header: Sequence[str] = ()  # what stands above each image
    legend: list[str] = []
    unreadable: dict[int, str] = {}
    if captions is not None:
        # A folder's name may hold bytes that are no text.
        header = [" ".join(caption.encode("utf-8", "backslashreplace").decode().split()) for caption in captions]
        if any(_font(text) is None or _width(text) > width for text in set(header)):
            if labels is None:
                numbers = {text: number for number, text in enumerate(dict.fromkeys(header))}
                labels = [numbers[text] for text in header]
            named = {int(label): text for label, text in zip(labels, header, strict=True) if text}
            for label, text in sorted(named.items()):
                entry, complete = _legend_entry(f"{label}  ", text)
                legend.append(entry)
                if not complete:
                    unreadable[label] = text
            header = [str(label) if text else "" for label, text in zip(labels, header, strict=True)]
    # An image narrower than the label above it stands in the middle of a wider cell.
    cell_width = max([width, *map(_width, header)]) + SEPARATOR
    # One header is enough where each column has one caption.
    headers = 0 if not header else 1 if all(text == header[i % columns] for i, text in enumerate(header)) else rows
    cell_height = height + SEPARATOR
    tops = [min(row + 1, headers) * LINE + row * cell_height for row in range(rows)]  # of the images
    grid_width, grid_height = columns * cell_width - SEPARATOR, tops[-1] + height
    entry_width = max(map(_width, legend), default=0) + GAP
    sheet_width = max(grid_width, entry_width - GAP)
    legend_columns = max((sheet_width + GAP) // entry_width, 1) if legend else 1
    legend_rows = math.ceil(len(legend) / legend_columns)
    sheet = Image.new("RGB", (sheet_width, grid_height + legend_rows * LINE + (SEPARATOR if legend else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = column * cell_width, tops[row]
        if row < headers:
            draw.text((x, y - LINE + BASELINE), header[i], fill=INK, font=_font(header[i]), anchor="ls")
        sheet.paste(Image.fromarray(image), (x + (cell_width - SEPARATOR - width) // 2, y))
    for i, entry in enumerate(legend):  # read downwards, column by column
        column, row = divmod(i, legend_rows)
        at = column * entry_width, grid_height + SEPARATOR + row * LINE + BASELINE
        draw.text(at, entry, fill=INK, font=_font(entry), anchor="ls")
    return sheet, unreadable


def _legend_entry(number: str, name: str) -> tuple[str, bool]:
    """The line of a name in the legend, and whether it shows all of the name."""
    if _font(name) is None:
        # Without the missing letters the rest of a name may still say something.
        name = "".join(char for char in name if _font(char) is not None).strip()
        return number + f"{name} (no font: see .txt)".strip(), False
    if _width(number + name) <= LONGEST_ENTRY:
        return number + name, True
    font = _font(name)
    while font.getlength(f"{number}{name}...") > LONGEST_ENTRY:
        name = name[:-1]
    return f"{number}{name}...", False


def _width(text: str) -> int:
    font = _font(text)
    return math.ceil(font.getlength(text)) if font is not None else 0


@functools.lru_cache(maxsize=4096)
def _font(text: str) -> ImageFont.FreeTypeFont | None:
    """A font with a glyph for each character of the text: Pillow's own (ASCII and little else) or the system's; or None."""
    default = ImageFont.load_default(size=FONT_SIZE)
    if _covers(default, text):
        return default
    system = _system_font("".join(sorted(set(text))))
    return system if system is not None and _covers(system, text) else None


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether each character has a glyph of its own: one without looks like U+10FFFF, which no font has."""

    def drawn(char: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(char)
        return mask.size, bytes(mask)

    missing = drawn("\U0010ffff")
    return all(char.isspace() or drawn(char) != missing for char in set(text))


@functools.lru_cache(maxsize=4096)
def _system_font(characters: str) -> ImageFont.FreeTypeFont | None:
    """The font that fontconfig finds best for these characters; None without fontconfig."""
    charset = " ".join(f"{ord(char):x}" for char in characters)
    command = ["fc-match", "-f", "%{file}\t%{index}", f"sans-serif:scalable=true:charset={charset}"]
    try:
        file, index = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\t")
        return ImageFont.truetype(file, FONT_SIZE, index=int(index))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _write(path: Path, save: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.writing(path) as partial:
        save(partial)
    return path
