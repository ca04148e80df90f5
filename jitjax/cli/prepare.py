"""Convert a data set once, for faster reading: ArrayRecord shards of images at the training size.

jitjax prepare --data_path ./data/train --output ./data/train64 --image_size 64
jitjax prepare --check ./data/train64
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jitjax import prepare

    prepare.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from jitjax import prepare

    return prepare.run(args)
