"""Weights between jitjax, the official PyTorch code, safetensors and Diffusers; exact in every direction.

    python -m jitjax.convert --from checkpoint-last.pth --to runs/imported        any file of weights -> jitjax
    python -m jitjax.convert --from runs/a --to a.pth                             jitjax -> official .pth
    python -m jitjax.convert --from runs/a --to a.safetensors --which model_ema1  one set of weights
    python -m jitjax.convert --from runs/a --to folder --format diffusers         a folder for Diffusers' JiTPipeline

--from takes what `jitjax.interop.weights.read_weights` reads: a .pth (.pt, .pth.tar, .ckpt, .bin), a .safetensors, a hub or
Diffusers folder, a jitjax workdir or one of its checkpoints. A workdir made from a file is for `--config.init_from`,
sampling and evaluation; if the .pth has the state of AdamW, that comes along, and training the workdir further continues
the official run. Whatever a file cannot hold, and whatever was assumed, is printed. Nothing in a .pth is executed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jitjax import checkpoint
from jitjax.config import from_dict
from jitjax.errors import UserError, cli
from jitjax.interop import diffusers, sources, weights, workdir

FORMATS = ("jitjax", "pth", "safetensors", "diffusers")
PTH_ENDINGS = (".pth", ".pt", ".pth.tar", ".ckpt", ".bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, help="file or folder of weights, or a jitjax workdir")
    parser.add_argument("--to", required=True, help="file or new folder to write")
    parser.add_argument("--format", choices=FORMATS, help="what to write; default by the ending of --to, a workdir without one")
    parser.add_argument(
        "--which", help="set for .safetensors and Diffusers: model, model_ema1 (default), model_ema2 or a decay"
    )
    parser.add_argument("--context_start", type=int, help="first block with context tokens, for unpublished sizes")


def format_of(path: str) -> str:
    """What a target's ending stands for."""
    name = path.lower()
    if name.endswith(".safetensors"):
        return "safetensors"
    return "pth" if name.endswith(PTH_ENDINGS) else "jitjax"


def run(args: argparse.Namespace) -> None:
    """Raises:
    UserError: a source that is not one of the kinds, or a target that cannot be written or cannot hold it.
    """
    checkpoint.quiet()
    source, target = Path(args.source).expanduser(), Path(args.to).expanduser()
    kind = args.format or format_of(args.to)
    from_workdir = source.is_dir() and sources.is_workdir(source)
    if from_workdir and kind == "jitjax":
        raise UserError(
            f"--from={source} and --to={target} are both jitjax workdirs: end --to in .pth or .safetensors, or add --format"
        )
    if kind in ("pth", "safetensors") and not target.absolute().parent.is_dir():
        raise UserError(f"--to={target}: the folder {target.absolute().parent} does not exist")
    one_set = kind in ("safetensors", "diffusers")
    if args.which and not one_set:
        raise UserError(f"--which={args.which}: a {kind} holds every set of weights; leave --which out")
    if not source.exists():
        raise UserError(f"--from={source}: no such file or folder")
    found = weights.read_weights(source, context_start=args.context_start, moments=not one_set)
    if kind in ("pth", "diffusers") and found.prediction not in (None, "x"):
        raise UserError(
            f"--from={source} predicts {found.prediction}, and whoever reads --to={target} ({kind}) samples it as a prediction "
            "of x: write a .safetensors, which keeps the prediction type"
        )
    written = list(found.sets)
    if kind == "jitjax":
        workdir.write_run(target, found)
    elif kind == "pth":
        config = workdir.config_of(found) if found.config is None else from_dict(found.config)
        workdir.write_official(target, found, config)
    else:
        default = next(name for name in ("model_ema1", "model") if name in found.sets)
        which = weights.select(found.origins, found.decays, args.which or default, source, found.notes)
        write = weights.write_safetensors if kind == "safetensors" else diffusers.write_folder
        write(target, found.sets[which], found.geometry, facts=found.facts)
        written, rest = [which], [name for name in found.sets if name != which]
        found.notes.append(f"written is {which}; not written: {', '.join([*rest, 'optimizer state'])}")
        if kind == "diffusers" and found.noise_scale not in (None, 1.0):
            found.notes.append(f"call the pipeline with noise_scale={found.noise_scale:g}: its default is 1")
    print(f"{source} -> {target}: {', '.join(written)}; {json.dumps(dataclasses.asdict(found.geometry))}")
    if found.moments and not one_set:
        print(f"with the state of AdamW after {found.step} steps")
    for note in found.notes:
        print(f"note: {note}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
      UserError: see `run`.
    """
    parser = argparse.ArgumentParser("jitjax.convert", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_arguments(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, only moved
    raise SystemExit(cli(lambda: main(sys.argv[1:])))
