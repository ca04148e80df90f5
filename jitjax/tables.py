"""Tables of text, and numbers with their units, as commands print them. Imports nothing."""

from __future__ import annotations

from collections.abc import Sequence


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
    """Decimal units, as disks have them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.3g} MB"
