"""A table of GPU kernels by what they compute, from a trace of a few steps."""

from __future__ import annotations

import collections
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 3  # in one trace
LARGEST = 30  # kernels listed one by one

MATMUL, ATTENTION, NORM, ROPE, SWIGLU = "matrix products", "attention", "norm and modulation", "RoPE and qk-norm", "SwiGLU"
REDUCTIONS, OPTIMIZER, COPIES, COLLECTIVES, OTHER = "reductions", "optimizer and EMA", "copies", "collectives", "other"
GROUPS = (MATMUL, ATTENTION, NORM, ROPE, SWIGLU, REDUCTIONS, OPTIMIZER, COPIES, COLLECTIVES, OTHER)

# By the kernel's own name, first match wins: NCCL, `jitjax.kernels`, cuDNN, cuBLAS, the driver.
_NAMES = (
    (COLLECTIVES, r"nccl|all.?reduce|all.?gather|reduce.?scatter|collective"),
    (ROPE, r"^(hopper_)?norm_rope_"),
    (NORM, r"^(residual_|hopper_)?norm_(forward|backward)|^residual_backward"),
    (SWIGLU, r"^swiglu_"),
    (MATMUL, r"^hopper_swiglu_"),  # the products of the MLP with SwiGLU at their side
    (ATTENTION, r"^attention_|^hopper_attention_|fmha|flash|sdpa|cudnn"),
    (MATMUL, r"nvjet|gemm|cutlass|xmma|cublas|splitk|gemv"),
    (COPIES, r"memcpy|memset"),
)
# By the line of ours (or of optax) that XLA's fusion ends in: "file:function".
_ORIGINS = (
    (NORM, r"kernels/(hopper_)?norm\.py:"),
    (SWIGLU, r"kernels/(hopper_)?swiglu\.py:(?!pad_hidden)"),
    (ATTENTION, r"kernels/attention\.py:(plain_qkv|qkv)_attention|kernels/hopper_(forward|backward|wide)\.py:"),
    (ROPE, r"kernels/attention\.py:(?!_permuted|_half_split)|kernels/hopper_rope\.py:"),
    (OPTIMIZER, r"optax/|jitjax/optimizer\.py:|sharding\.py:global_norm|step\.py:make_train_step|step\.py:next_loss_scale"),
)
# By what XLA's name for a fusion says it does.
_FUSIONS = (
    (REDUCTIONS, r"reduce"),
    (COPIES, r"copy|transpose|concatenate|pad|slice|convert|broadcast|bitcast"),
)


class Kernel(NamedTuple):
    """One execution on the GPU. Times in us."""

    name: str
    start: float
    duration: float


def group_of(name: str, origin: str = "") -> str:
    """The group of a GPU kernel.

    Args:
      name: the kernel's, e.g. "nvjet_hsh_128x256_64x4" or "loop_add_fusion_12".
      origin: "file:function" of the source line behind it, from `origins`; "" if unknown.

    A fusion counts as what its last operation is, so a few bytes land in the wrong group; sums of partial results count
    to the operation that left them.
    """
    for rules, text in ((_NAMES, name.lower()), (_ORIGINS, origin), (_FUSIONS, name.lower())):
        for group, pattern in rules:
            if re.search(pattern, text):
                return group
    return OTHER


def origins(hlo: str) -> dict[str, str]:
    """File and function ("file:function") of every instruction of a compiled program by the name that its kernel has.

    XLA's text has tables of file names, functions and source positions before the instructions, which refer to them.
    """
    tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
    current, found = "", {}
    for line in hlo.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = line
        elif current and (entry := re.match(r"(\d+) (.*)", line)):
            tables[current][entry[1]] = entry[2].strip('"')
        elif (name := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)) and (frame := re.search(r"stack_frame_id=(\d+)", line)):
            position = re.search(r"file_location_id=(\d+)", tables["StackFrames"].get(frame[1], ""))
            place = tables["FileLocations"].get(position[1], "") if position else ""
            ids = re.search(r"file_name_id=(\d+) function_name_id=(\d+)", place)
            if ids:
                file, function = tables["FileNames"].get(ids[1], ""), tables["FunctionNames"].get(ids[2], "")
                found[_kernel_name(name[1])] = f"{file}:{function}"
        elif line.strip():
            current = ""
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


def table(kernels: list[Kernel], hlo: str, steps: int) -> str:
    """Groups with us per step and share, then the kernels that take longest."""
    if not kernels:
        return "the trace holds no GPU kernels (only GPUs are profiled)\n"
    origin = origins(hlo)
    by_group: collections.Counter[str] = collections.Counter()
    by_kernel: dict[str, list[float]] = collections.defaultdict(list)
    groups = {}
    for kernel in kernels:
        where = origin.get(_kernel_name(kernel.name), "")
        group = group_of(kernel.name, where)
        short = re.sub(r"_\d+$", "", kernel.name)[:60] + (f"  [{where.rpartition('/')[2]}]" if where else "")
        groups[short] = group
        by_group[group] += kernel.duration
        by_kernel[short].append(kernel.duration)
    total = sum(by_group.values())
    span = max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)
    lines = [f"{'group':<22}{'us/step':>10}{'share':>8}"]
    lines += [f"{group:<22}{by_group[group] / steps:>10.0f}{by_group[group] / total:>8.1%}" for group in GROUPS]
    lines += [f"{'sum of kernels':<22}{total / steps:>10.0f}", f"{'span':<22}{span / steps:>10.0f}", ""]
    lines += [f"{'us/step':>10}{'calls':>7}{'us/call':>9}  kernel"]
    for name, times in sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:LARGEST]:
        each = sum(times) / len(times)
        lines.append(f"{sum(times) / steps:>10.1f}{len(times) / steps:>7.1f}{each:>9.1f}  {groups[name]}: {name}")
    return "\n".join(lines) + "\n"
