"""Find the learning rate and warm-up with which runs score best, by training short ones.

    jitjax tune --config configs/h200.py --config.data.path=./data/train --config.total_steps=2000 \\
        --config.optim.power_emas="(0.1,0.05)" --workdir runs/tune

Each trial is a run in a folder of --workdir, scored at its end by the eval fields; interrupted, the same command goes on.
The search starts at --config.optim.lr, or at 2e-4, the recipe's for 1,024 images a step. Make the runs short but not tiny, and
let them have EMAs that fit any length: --config.optim.power_emas=(0.1,0.05). Prints a table and the command that trains with
the winner.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jitjax.cli import arguments
from jitjax.cli.arguments import at_least
from jitjax.errors import UserError
from jitjax.settings import INT32, check_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="folder of the trials")
    parser.add_argument("--start", type=at_least(1e-12, float), metavar="LR",
                        help="the first rate; default --config.optim.lr, else 2e-4")  # fmt: skip
    parser.add_argument("--factor", type=at_least(1.01, float), default=2.0, help="between two rates (default 2)")
    parser.add_argument("--warmup", default="100", metavar="STEPS[,STEPS]", help="warm-ups to compare (default 100)")
    arguments.add(parser)


def run(args: argparse.Namespace) -> int:
    loaded = arguments.load(args.config_arguments)
    for name, flag in (("optim.blr", "--start"), ("optim.warmup_epochs", "--warmup"), ("optim.warmup_steps", "--warmup")):
        if any(argument.startswith(f"--config.{name}=") for argument in args.config_arguments):
            searched = f", as {arguments.SIBLINGS[name]}" if name in arguments.SIBLINGS else ""
            raise UserError(f"--config.{name} is what tune searches for{searched}: use {flag}")
    if loaded.settings.stop_after:
        raise UserError(
            f"--config.stop_after={loaded.settings.stop_after} ends a trial before it is scored: leave it out, or unset it "
            "with --config.stop_after="
        )
    check_data(loaded.settings.data)
    if not args.workdir:
        raise UserError("--workdir is missing: name a folder for the trials, e.g. --workdir=runs/tune")
    try:
        warmups = [int(text) for text in args.warmup.split(",")]
        if min(warmups) < 0 or max(warmups) > INT32:
            raise ValueError
    except ValueError:
        raise UserError(f"--warmup={args.warmup}: give steps, up to {INT32}, e.g. 100 or 0,100,1000") from None
    from jitjax import tune

    start = args.start or loaded.settings.optim.lr or 2e-4
    if start > tune.HIGHEST:
        raise UserError(f"--start={start:g}: a rate is at most {tune.HIGHEST:g}")
    return tune.tune(
        args.config_arguments,
        loaded.settings,
        Path(args.workdir).expanduser(),
        start=start,
        factor=args.factor,
        warmups=warmups,
    )
