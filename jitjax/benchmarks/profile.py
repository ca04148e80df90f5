"""A table of GPU kernels by the part of the program that they belong to, from a trace of a few steps.

The program names its parts with `jax.named_scope`, which XLA keeps for every operation; our own kernels have the scope in their
names. What is in no scope counts by kind, or as "other": `Summary.other` is its share."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jitjax.kernels import constants

STEPS = 3  # in one trace
LARGEST = 30  # kernels listed one by one
WAIT = 8.0  # us: a longer gap is no launch of the next kernel, but a wait for data

MATMULS, REDUCTIONS, COPIES, COLLECTIVES, OTHER = "matmuls", "reductions", "copies", "collectives", "other"
# Scopes (`jax.named_scope`) of the program and the group that each counts to.
SCOPES = {
    constants.ATTENTION: "attention",
    constants.NORM: "norm and modulation",
    constants.ROPE: "RoPE and qk-norm",
    constants.SWIGLU: "SwiGLU",
    constants.MLP: MATMULS,
    constants.DROPOUT: "dropout",
    "embed": "patches, time and class",
    "loss": "noise and loss",
    "optimizer": "optimizer and EMA",
    "muon": "Muon",
}
GROUPS = tuple(dict.fromkeys((MATMULS, *SCOPES.values(), REDUCTIONS, COPIES, COLLECTIVES, OTHER)))

# Kernels of libraries and of the driver, by their own names; first match wins.
_LIBRARIES = (
    (COLLECTIVES, r"nccl|all.?reduce|all.?gather|reduce.?scatter|collective"),
    ("attention", r"fmha|flash|sdpa|cudnn"),
    (MATMULS, r"nvjet|gemm|cutlass|xmma|cublas|splitk|gemv"),
    (COPIES, r"memcpy|memset"),
)
# Fusions of XLA outside all scopes, by what their names say that they do.
_FUSIONS = (
    (REDUCTIONS, r"reduce"),
    (COPIES, r"copy|transpose|concatenate|pad|slice|convert|broadcast|bitcast"),
)


class Kernel(NamedTuple):
    """One execution on the GPU. Times in us."""

    name: str
    start: float
    duration: float


def group_of(name: str, scope: str = "") -> str:
    """The group of a GPU kernel.

    Args:
      name: the kernel's, e.g. "nvjet_hsh_128x256_64x4", "loop_add_fusion_12", or scope_name for a kernel of ours.
      scope: the innermost scope of the operation behind it, from `scopes`; "" if there is none.

    A fusion counts as what its last operation is, so a few bytes are in the wrong group.
    """
    lower = name.lower()
    own = next((scope for scope in constants.SCOPES if lower.startswith(f"{scope}_")), "")
    if own:
        return SCOPES[own]
    library = next((group for group, pattern in _LIBRARIES if re.search(pattern, lower)), "")
    if library:
        return library
    if scope:
        return SCOPES[scope]
    return next((group for group, pattern in _FUSIONS if re.search(pattern, lower)), OTHER)


def scopes(hlo: str) -> dict[str, str]:
    """The innermost scope of every instruction of a compiled program that is in one, by the name that its kernel has.

    XLA's text has the path of scopes of each operation in its metadata: op_name="jit(step)/transpose(jvp(norm))/mul".
    """
    found = {}
    for line in hlo.splitlines():
        name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        path = re.search(r'op_name="([^"]*)"', line)
        if name and path:
            inside = [part for part in re.split(r"[/()]+", path[1]) if part in SCOPES]
            if inside:
                found[_kernel_name(name[1])] = inside[-1]
    return found


def _kernel_name(instruction: str) -> str:
    return re.sub(r"[^\w]", "_", instruction)


def read_trace(folder: Path) -> list[Kernel]:
    """All that ran on the first GPU, from the newest trace below `folder`; empty if the trace has no GPU."""
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    with gzip.open(files[-1]) as file:
        return gpu_kernels(json.load(file)["traceEvents"])


def gpu_kernels(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """The complete events on streams of the first GPU, from a trace in Chrome's format."""
    events = list(events)
    streams: set[tuple[int, int]] = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("ph") == "M" and event["name"] == "thread_name" and "Stream" in event["args"]["name"]
    }
    first = min((pid for pid, _ in streams), default=None)
    return [
        Kernel(event["name"], event["ts"], event["dur"])
        for event in events
        if event.get("ph") == "X" and event["pid"] == first and (event["pid"], event.get("tid")) in streams
    ]


class Summary(NamedTuple):
    """Times in us of all steps together."""

    groups: dict[str, float]
    kernels: dict[str, tuple[str, list[float]]]  # by short name: group, time of each execution
    span: float  # from the first kernel's start to the last one's end
    gaps: list[float]  # of `gaps_between`

    @property
    def other(self) -> float:
        """The share of the time that belongs to no part of the program."""
        return self.groups[OTHER] / max(sum(self.groups.values()), 1e-9)


def summarise(kernels: list[Kernel], hlo: str) -> Summary | None:
    """Kernels by group and by name; None without any."""
    if not kernels:
        return None
    scope_of = scopes(hlo)
    groups, by_name = dict.fromkeys(GROUPS, 0.0), {}
    for kernel in kernels:
        scope = scope_of.get(_kernel_name(kernel.name), "")
        group = group_of(kernel.name, scope)
        groups[group] += kernel.duration
        short = re.sub(r"_\d+$", "", kernel.name)[:60] + (f"  [{scope}]" if scope else "")
        by_name.setdefault(short, (group, []))[1].append(kernel.duration)
    span = max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)
    return Summary(groups, by_name, span, gaps_between(kernels))


def gaps_between(kernels: Iterable[Kernel]) -> list[float]:
    """us from the end of everything before to the start of the next kernel, below 0 where it overlaps. Copies, which run beside
    kernels, do not count; memsets do."""
    ordered = sorted((k.start, k.start + k.duration) for k in kernels if "memcpy" not in k.name.lower())
    ends = itertools.accumulate((end for _, end in ordered), max)
    return [start - end for (start, _), end in zip(ordered[1:], ends, strict=False)]


def table(summary: Summary | None, steps: int) -> str:
    """Groups with us per step and share, then the kernels that take longest."""
    if summary is None:
        return "the trace holds no GPU kernels (only GPUs are profiled)\n"
    total = sum(summary.groups.values())
    lines = [f"{'group':<25}{'us/step':>10}{'share':>8}"]
    lines += [f"{group:<25}{time / steps:>10.0f}{time / total:>8.1%}" for group, time in summary.groups.items()]
    lines += [f"{'sum of kernels':<25}{total / steps:>10.0f}", f"{'span':<25}{summary.span / steps:>10.0f}"]
    if gaps := summary.gaps:
        waits = sum(gap for gap in gaps if gap > WAIT)
        idle = sum(gap for gap in gaps if gap > 0) - waits
        lines += [
            f"{'short gaps':<25}{idle / steps:>10.0f}{idle / summary.span:>8.1%}"
            f"  {len(gaps) / steps:,.0f} kernels follow one another, {statistics.median(gaps):.2f} us apart in the median",
            f"{f'gaps above {WAIT:.0f} us':<25}{waits / steps:>10.0f}{waits / summary.span:>8.1%}",
        ]
    lines += [""]
    lines += [f"{'us/step':>10}{'calls':>7}{'us/call':>9}  kernel"]
    for name, (group, times) in sorted(summary.kernels.items(), key=lambda item: -sum(item[1][1]))[:LARGEST]:
        each = sum(times) / len(times)
        lines.append(f"{sum(times) / steps:>10.1f}{len(times) / steps:>7.1f}{each:>9.1f}  {group}: {name}")
    return "\n".join(lines) + "\n"
