"""What crosses devices in a compiled program: its collectives and their bytes, read from its HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TRUE_FALSE = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # one of `KINDS`
    bytes: int  # of the whole array: what is reduced, or what every device has afterwards
    group: int  # devices that take part
    times: int | None  # how often it runs in one call of the program; None: in a loop of unknown length
    computation: str  # where it stands; "ENTRY" for the program's own

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time by the usual ring algorithms."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of a compiled program, inside loops too. Of several branches, those of the one that sends
    least: in a training step the others are for numbers that are not finite.

    Args:
      text: `compiled.as_text()`.
      devices: of the whole program; the group of a collective that does not list its own.
    """
    bodies = dict(_computations(text))

    def visit(name: str, times: int | None) -> list[Collective]:
        found = []
        for line in bodies.get(name, ()):
            if op := _COLLECTIVE.search(line):
                group = _group(line, devices)
                found.append(Collective(op[2], _bytes(op[1], op[2], bool(op[3]), group), group, times, name))
                continue  # its to_apply adds two numbers
            inner = times
            if " while(" in line:
                trips = _TRIPS.search(line)
                inner = times * int(trips[1]) if trips and times is not None else None
            for called in _CALLED.findall(line):
                found += visit(called, inner)
            listed = _BRANCHES.search(line)
            branches = re.findall(r"[\w.\-]+", listed[1]) if listed else _TRUE_FALSE.findall(line)
            found += min((visit(branch, inner) for branch in branches), key=_sent, default=[])
        return found

    return visit("ENTRY", 1)


def _sent(found: list[Collective]) -> float:
    return sum(op.sent * (op.times or 1) for op in found)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, lines = "ENTRY" if head[1] else head[2], []
        elif line == "}":
            yield name, lines
        else:
            lines.append(line)


def _bytes(result: str, kind: str, started: bool, group: int) -> int:
    sizes = [math.prod(map(int, filter(None, dims.split(",")))) * _width(dtype) for dtype, dims in _ARRAY.findall(result)]
    if started and kind in ("all-gather", "collective-permute"):  # a tuple of what goes in and what comes out
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]
    return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _width(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1  # pred


def _group(line: str, devices: int) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # jax 0.11 and later: along axes of the mesh
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']*)'", named[2]))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return pairs[1].count("{")
    return devices
