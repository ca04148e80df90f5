"""Convert a data set once, for faster reading: ArrayRecord shards of images at the training size.

    jitjax prepare --data_path ./data/train --output ./data/train64 --image_size 64
    jitjax prepare --check ./data/train64

Reads a folder of images, a zip or tar of one, Parquet or Arrow files, WebDataset shards or an .npz (docs/data.md). Interrupted,
the same command continues; the bytes do not depend on the number of workers.
"""

from __future__ import annotations

import argparse

from jitjax.cli.arguments import at_least
from jitjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jitjax.data.image import HIGH_DEPTH
    from jitjax.data.prepared import ENCODINGS
    from jitjax.prepare import MAX_RAW_SIZE

    parser.add_argument("--data_path", help="image folder, zip or tar of one, .npz file, Parquet, Arrow or tar files or folder")
    parser.add_argument("--output", help="folder to write")
    parser.add_argument("--image_size", type=at_least(1), help="edge of the published centre crop, in pixels")
    parser.add_argument(
        "--encoding",
        choices=ENCODINGS,
        help=f"default: raw up to {MAX_RAW_SIZE} px, png above; only jpeg loses anything",
    )
    parser.add_argument("--quality", type=at_least(1), help="of --encoding jpeg (default 95)")
    parser.add_argument("--exif_rotate", action="store_true", help="turn photographs as their EXIF orientation says")
    parser.add_argument("--split", default="", help="which split to read, by name or role; . for all (default: training)")
    parser.add_argument(
        "--labels", default="", help="folders, none, cls, json, FILE, FILE:COLUMN or a Parquet column (default: found)"
    )
    parser.add_argument("--all_formats", action="store_true", help="also read JPEG 2000 and other formats")
    parser.add_argument(
        "--high_depth",
        choices=HIGH_DEPTH,
        default="clip",
        help="16-bit and float pictures: clip as the official loader (default), or scale by the type's or the picture's range",
    )
    parser.add_argument("--zip_names", metavar="ENCODING", help="of file names in an old zip, such as gbk")
    parser.add_argument(
        "--limit", type=at_least(1), help="use only so many images, spread evenly over the set; small classes may get none"
    )
    parser.add_argument("--shards", type=at_least(1), help="number of files (default: one per 1024 images, at most 256)")
    parser.add_argument(
        "--on_bad", choices=("skip", "fail"), default="skip", help="what to do with an image that cannot be decoded"
    )
    parser.add_argument("--workers", type=at_least(0), help="processes; 0: none besides this one (default: all cores)")
    parser.add_argument("--image_column", help="Parquet column with the image bytes (default: found by name and type)")
    parser.add_argument("--label_column", help="Parquet column with the labels (default: found by name)")
    parser.add_argument("--check", metavar="DIR", help="verify a prepared directory instead: checksums, counts, every record")


def given_beside_check(args: argparse.Namespace) -> list[str]:
    """The flags that `--check` does not use and that were given another value than their default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([])).items()
    return [f"--{name}" for name, value in defaults if name not in ("check", "workers") and getattr(args, name) != value]


def run(args: argparse.Namespace) -> int:
    from jitjax import prepare

    if args.check is not None and (given := given_beside_check(args)):
        raise UserError(f"{', '.join(given)}: for preparing, but --check={args.check} only reads: leave out what is named")
    names = vars(args).keys() - {"verb", "run", "config_arguments"}
    return prepare.run({name: getattr(args, name) for name in names})
