"""How long, how many epochs, how many GPU-hours: a table from a config and token counts. Needs no GPU.

    jitjax estimate --config configs/h200.py --tokens 10e9,1e12 --devices 8
    jitjax estimate --from runs/a --tokens 1e12 --devices 8

Each row is a speed, for every token count. A token is an image patch; in-context class tokens
do not count. The utilisation is the share of the datasheet's dense bf16 operations that training uses (`jitjax.flops` has the
formula of the operations).

- "JiT-B/4, batch 64" and so on: this program, measured on one card of that kind (commands and conditions: docs/speed.md), times
  the number of cards. They exist for the sizes and cards that were measured: B, L and H at 256 tokens with the fused
  kernels in bfloat16. On eight cards the exchange of gradients is expected to take 3 to 20% of that.
- "conservative", "middle", "optimistic": the PyTorch guide's plan of 240, 400 and 640 thousand tokens/s on eight H200 for
  JiT-B/4 at 64 px; another model gets the tokens/s that the same utilisation yields.
- "this run", with --from: the utilisation of a run of your own, which is the one to believe. It must have run on the same kind
  of card.
"""

from __future__ import annotations

import argparse

from jitjax.cli import arguments
from jitjax.cli.arguments import at_least
from jitjax.flops import CARDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    arguments.add(parser)
    parser.add_argument("--tokens", default="10e9,1e12", metavar="N,M", help="image tokens to train on (default 10e9,1e12)")
    parser.add_argument("--devices", type=at_least(1), default=8, metavar="N", help="number of cards (default 8)")
    parser.add_argument("--card", choices=list(CARDS), help="kind of card; default that of the run, else h200")
    parser.add_argument("--from", dest="run_from", metavar="WORKDIR", help="a run of your own: adds a row with its speed")
    parser.add_argument("--run_devices", type=at_least(1), metavar="N", help="cards of that run, if it did not record them")
    parser.add_argument("--run_card", choices=list(CARDS), help="kind of card of that run, if it did not record it")
    parser.add_argument("--images_per_epoch", type=at_least(1), metavar="N", help="images in the data set; default ImageNet's")


def run(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jitjax import estimate

    estimate.run(args)
