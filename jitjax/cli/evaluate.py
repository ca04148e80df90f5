"""Score a model or a set of images, or make reference statistics.

    jitjax evaluate runs/a --reference ./data/train --num 5000 --cfg_scale 2.9 --interval 0.1,1
    jitjax evaluate samples.npz --reference imagenet64_stats.npz
    jitjax evaluate stats ./data/train --image_size 64 --out stats64.npz

TARGET is a model (whatever `jitjax sample` takes), a folder of images, or an .npz with `arr_0`. The reference is a folder of
images, a prepared data set, an .npz of images, or a file of statistics (of jitjax, torch-fidelity's fork, ADM, edm, edm2).
Scores: FID (or the Fréchet distance of another extractor, named so), sFID, Inception score, KID, precision, recall, MIND and
the seam index. docs/evaluation.md says what each is, and where the Inception weights come from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jitjax import runtime
from jitjax.cli import arguments
from jitjax.cli.arguments import at_least
from jitjax.cli.sample import add_sampling, sampling_given, sampling_options
from jitjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="model, folder of images or .npz; or the word stats")
    parser.add_argument("data", metavar="DATA", nargs="?", help="with stats: the images whose statistics are made")
    parser.add_argument("--num", type=at_least(2), help="images to draw from a model (default 50000)")
    parser.add_argument("--json", metavar="FILE", help="also write the scores there")
    parser.add_argument("--out", metavar="FILE.npz", help="with stats: the file to write")
    parser.add_argument("--image_size", type=at_least(1), help="with stats: size to which folders are cropped")
    add_extractor(parser)
    add_sampling(parser)


def add_extractor(parser: argparse.ArgumentParser) -> None:
    """The flags of every verb that scores."""
    parser.add_argument("--reference", metavar="PATH", help="folder, prepared set, .npz of images, or file of statistics")
    parser.add_argument("--split", default="", metavar="NAME", help="which split, where that is a folder; default: training")
    parser.add_argument("--extractor", default="auto", metavar="NAME",
                        help="inception, efficientnet-lite0 or FILE.onnx; default: inception if it is found")  # fmt: skip
    parser.add_argument("--inception", metavar="FILE", help="the FID Inception's weights; default: the cache")


def run(args: argparse.Namespace) -> int:
    stats = args.target == "stats"
    for flag, value in (("--out", args.out), ("--image_size", args.image_size), ("DATA", args.data)):
        if stats and value is None and not (flag == "--image_size" and str(args.data).lower().endswith(".npz")):
            raise UserError(f"{flag} is missing: jitjax evaluate stats DATA --image_size 64 --out stats64.npz")
        if not stats and value is not None:
            raise UserError(f"{flag}={value} is for `jitjax evaluate stats DATA`")
    for flag, value in (("--reference", args.reference), ("--json", args.json)):
        if stats and value is not None:
            raise UserError(f"{flag}={value} is for scores, `jitjax evaluate stats` makes statistics: leave it out")
    if not stats:
        arguments.existing_model(args.target, "TARGET")
        if args.reference is None:
            raise UserError("--reference is missing: name a folder of images, a prepared set or a file of statistics")
        arguments.existing(args.reference, "--reference")
    else:
        if Path(args.out).exists():
            raise UserError(f"--out={args.out} exists already: name another file")
        if Path(args.out).suffix != ".npz":
            raise UserError(f"--out={args.out}: statistics are written as FILE.npz")
        arguments.existing(args.data, "DATA")
        refuse_drawing(args, "statistics are of images")
    if args.json is not None and Path(args.json).expanduser().is_dir():
        raise UserError(f"--json={args.json} is a folder: name a file")
    runtime.set_environment()
    runtime.start_distributed()
    from jitjax.evaluation import report  # only now: it imports JAX, which reads the environment

    if not stats and report.is_images(Path(args.target).expanduser()):
        refuse_drawing(args, f"{args.target} is a set of images, scored as it is")
    extractor = dict(which=args.extractor, weights=args.inception)
    if stats:
        return report.make(args.data, args.out, image_size=args.image_size, extractor=extractor, split=args.split)
    return report.evaluate(
        args.target,
        args.reference,
        num=args.num or 50_000,
        labels=args.labels,
        which=args.which,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=args.dtype,
        extractor=extractor,
        split=args.split,
        options=sampling_options(args),
        json_file=args.json,
    )


def refuse_drawing(args: argparse.Namespace, why: str) -> None:
    """Raises:
    UserError: flags were given that say how images are drawn, where none are; names them.
    """
    given = [*(["--num"] if args.num is not None else []), *sampling_given(args)]
    if given:
        raise UserError(f"{', '.join(given)}: for drawing images from a model, but {why}: leave out what is named")
