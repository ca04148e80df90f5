"""Tables of text, and numbers with their units, as commands print them."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO


def columns(cells: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Columns under a line below the first row, right-aligned but for those whose titles `left` names."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    align = ["<" if title in left else ">" for title in cells[0]]
    rows = [[f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)] for line in cells]
    lines = ["  ".join(row).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def format_duration(seconds: float) -> str:
    """1.5 days and more in days, less in hours, minutes, seconds."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size * (1 if unit != "days" else 1.5):
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def format_bytes(number: float) -> str:
    """Three digits and a binary unit, as memory has them: 2.62 GiB, 0.977 GiB, 512 MiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if (count := number / size) >= 999.5 / 1024:
            return f"{count:.{max(0, 3 - len(str(int(count)).lstrip('0')))}f} {unit}"
    return f"{number:.0f} B"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print sentences as `wrap` lays them out; default to stdout."""
    stream = sys.stdout if stream is None else stream
    print(wrap(text, stream), file=stream, flush=True)


def wrap(text: str, stream: TextIO) -> str:
    """Lines broken between words to fit the terminal that `stream` is; as they are where it is none. A word that is longer than
    a line stays whole, so that a path can be copied."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError, AttributeError):
        width = 0
    if not width:
        return text
    options = dict(break_long_words=False, break_on_hyphens=False, replace_whitespace=False, expand_tabs=False)
    lines = []
    for line in text.split("\n"):
        title = re.match(r"\S+(?: \S+)*  +(?=\S)", line)  # of a table's row: the rest stands under the second column
        indent = title.end() if title and title.end() <= width // 2 else 0
        lines += textwrap.wrap(line, width, subsequent_indent=" " * indent, **options) or [line]
    return "\n".join(lines)
