"""Make one optimizer step of a run again, with statistics by layer and the batch by file and loss.

    jitjax replay runs/a --step 12345
    jitjax replay runs/a --step 12345 --dtype float32 --kernels plain

From the nearest whole checkpoint before the step; the workdir is only read. On other devices than the run's the numbers differ
by rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from jitjax import runtime
from jitjax.cli import arguments
from jitjax.cli.arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run")
    parser.add_argument("--step", type=at_least(1), required=True, metavar="N", help="the optimizer step, as in metrics.jsonl")
    parser.add_argument("--worst", type=at_least(0), default=8, metavar="N", help="images of the largest loss to list (8)")
    parser.add_argument(
        "--data_path", default="", metavar="PATH", help="where the run's data set lies now; default where it lay"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="compute in another type than the run")
    parser.add_argument("--kernels", choices=("auto", "fused", "plain"), help="another implementation than the run's")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object; not finite: null")


def run(args: argparse.Namespace) -> None:
    arguments.existing(args.workdir, "WORKDIR")
    runtime.set_environment()
    from jitjax import replay  # only now: it imports JAX, which reads the environment

    record = replay.replay(
        args.workdir,
        args.step,
        data_path=args.data_path,
        dtype=args.dtype or "",
        kernel=args.kernels or "",
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(_plain(record)) if args.json else "\n".join(replay.report(record, args.worst)))


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinities."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
