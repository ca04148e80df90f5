"""Find the best guidance scale, interval and EMA of a model by a search.

    jitjax sweep runs/a --reference ./data/train --cfg_scale 1.0:4.0 --interval 0.1,1 --interval 0,1 --which all --num 8000

Noise, labels and reference are shared by all evaluations. Interrupted, the same command continues. Prints a table and the
command that evaluates the winner again, and plots the score against guidance with a curve for each EMA.
"""

from __future__ import annotations

import argparse

from jitjax import runtime
from jitjax.cli import arguments
from jitjax.cli.arguments import at_least
from jitjax.cli.evaluate import add_extractor
from jitjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="whatever `jitjax sample` takes")
    parser.add_argument("--out", metavar="FILE.jsonl", default="sweep.jsonl", help="results; the plot lies beside it")
    parser.add_argument(
        "--cfg_scale", default="1.0:4.0", metavar="LOW:HIGH[:STEP]", help="guidance scales (default 1.0:4.0:0.1)"
    )
    parser.add_argument("--interval", type=arguments.interval, action="append", metavar="LOW,HIGH",
                        help="guidance interval; may be given several times (default 0.1,1)")  # fmt: skip
    parser.add_argument("--which", default="all", help="EMAs to compare, separated by commas (default all, raw weights too)")
    parser.add_argument("--num", type=at_least(2), default=8000, help="images per evaluation (default 8000)")
    parser.add_argument(
        "--metric", help="score to minimise (default the Fréchet distance); inception_score, precision, recall: maximise"
    )
    parser.add_argument("--labels", default="all", help="as for `jitjax sample`")
    parser.add_argument("--steps", type=at_least(1), default=50, help="steps of the time grid (default 50)")
    parser.add_argument("--method", default="heun", help="solver (default heun)")
    parser.add_argument("--grid", default="uniform", help="time grid, see docs/sampling.md")
    parser.add_argument("--t_eps", type=float, help="lower clip of 1 - t; default the model's")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise (default 0)")
    parser.add_argument("--batch_size", type=at_least(1), help="images at once, over all devices")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default bfloat16 on a GPU, else float32")
    add_extractor(parser)


def run(args: argparse.Namespace) -> int:
    arguments.existing_model(args.model, "MODEL")
    if args.reference is None:
        raise UserError("--reference is missing: name a folder of images, a prepared set or a file of statistics")
    arguments.existing(args.reference, "--reference")
    from jitjax import sweep

    sweep.scales(args.cfg_scale)
    options = {name: getattr(args, name) for name in ("steps", "method", "grid", "t_eps")}
    runtime.set_environment()
    runtime.start_distributed()
    return sweep.sweep(
        args.model,
        args.reference,
        args.out,
        cfg_scale=args.cfg_scale,
        intervals=args.interval or [(0.1, 1.0)],
        which=args.which,
        num=args.num,
        labels=args.labels,
        metric=args.metric,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=args.dtype,
        split=args.split,
        extractor=dict(which=args.extractor, weights=args.inception),
        options={name: value for name, value in options.items() if value is not None},
    )
