"""How long a run takes, and what it costs: from a config and token counts to days, epochs, GPU-hours and disk. Needs no GPU.

    jitjax estimate --config configs/h200.py --tokens 10e9,1e12 --devices 8 --price_per_gpu_hour 2.5
    jitjax estimate --from runs/a --tokens 1e12 --devices 8
    jitjax estimate --config configs/h200.py --measure

A token is an image patch; in-context class tokens do not count. The utilisation is the share of the datasheet's dense bf16
operations that training uses (`jitjax.flops` has the formula of the operations). Three tables:

- This program, conservative, middle and optimistic. By default from the measured train step of one card (docs/speed.md has
  commands and conditions): B, L and H at 256 tokens with the fused kernels in bfloat16, less what more cards and a run's
  pauses are assumed to take, which is printed. With --from, a run of your own on the same kind of card: lower decile, median
  and upper decile of its speed, times its goodput (share of its time in which it trained; start and compilation left out).
  This is the one to believe. With --measure, this machine, for a minute or two.
- What the guide to training JiT in PyTorch plans with: 240, 400 and 640 thousand tokens/s on eight H200 for JiT-B/4 at 64 px,
  2 to 5% of the cards. It is an assumption, not a measurement; another model gets the tokens/s of the same utilisation.
- What another batch, image size, patch or model changes; "state" is parameters, moments and EMAs, in GiB as --dry_run has it.
"""

from __future__ import annotations

import argparse

from jitjax import cards, runtime
from jitjax.cli import arguments
from jitjax.cli.arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    arguments.add(parser)
    parser.add_argument("--tokens", default="10e9,1e12", metavar="N,M", help="image tokens to train on (default 10e9,1e12)")
    parser.add_argument(
        "--devices", type=at_least(1), metavar="N", help="number of cards (default 8; with --measure, those here)"
    )
    parser.add_argument("--card", choices=cards.WITH_FLOPS, help="kind of card; default that of the run, else h200")
    parser.add_argument("--from", dest="run_from", metavar="WORKDIR", help="a run of your own: estimate from its speed")
    parser.add_argument("--measure", action="store_true", help="estimate from a measurement on this machine, now")
    parser.add_argument("--run_devices", type=at_least(1), metavar="N", help="cards of that run, if it did not record them")
    parser.add_argument("--run_card", choices=cards.WITH_FLOPS, help="kind of card of that run, if it did not record it")
    parser.add_argument(
        "--price_per_gpu_hour",
        type=at_least(0, float),
        default=0.0,
        metavar="P",
        help="adds a column of costs, in the currency of P",
    )
    parser.add_argument("--images_per_epoch", type=at_least(1), metavar="N", help="images in the data set; default ImageNet's")


def run(args: argparse.Namespace) -> None:
    if args.measure:
        runtime.set_environment()
    else:
        import jax

        jax.config.update("jax_platforms", "cpu")
    from jitjax import estimate

    estimate.run(args)
