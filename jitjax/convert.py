"""Weights between jitjax, the official PyTorch code, safetensors and Diffusers; exact in every direction."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jitjax import checkpoint, cli, hub, pipeline, settings, tables
from jitjax.errors import UserError, naming
from jitjax.interop import diffusers, sets, sources, weights, workdir

PTH_ENDINGS = (".pth", ".pt", ".pth.tar", ".ckpt", ".bin")


def format_of(path: str) -> str:
    """What a target's ending stands for."""
    name = path.lower()
    if hub.is_name(name):
        return "folder"
    if name.endswith(".safetensors"):
        return "safetensors"
    return "pth" if name.endswith(PTH_ENDINGS) else "jitjax"


def run(args: argparse.Namespace) -> None:
    """Raises:
    UserError: a source that is not one of the kinds, or a target that cannot be written or cannot hold it.
    """
    checkpoint.quiet()
    if hub.is_name(args.source):
        args.source = hub.download(args.source)
    source, target = Path(args.source).expanduser(), Path(args.to).expanduser()
    kind = args.format or format_of(args.to)
    if kind == "folder":
        export(source, args)
        return
    from_workdir = source.is_dir() and sources.is_workdir(source)
    if from_workdir and kind == "jitjax":
        raise UserError(
            f"--from={source} and --to={target} are both jitjax workdirs: end --to in .pth or .safetensors, or add --format"
        )
    if kind in ("pth", "safetensors") and not target.absolute().parent.is_dir():
        raise UserError(f"--to={target}: there is no folder {target.absolute().parent}: make it, or name another")
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
    if first := found.geometry.class_start:
        official = f"the official code conditions every block on the class, this model those from block {first} on"
        if kind in ("pth", "diffusers"):
            raise UserError(f"--from={source} cannot be written as {kind}: {official}; write a .safetensors, which says so")
        found.notes.append(f"for jitjax only: {official}")
    if not one_set:
        found.leave_out_power_functions()
    written = list(found.sets)
    if kind == "jitjax":
        workdir.write_run(target, found)
    elif kind == "pth":
        config = workdir.config_of(found) if found.config is None else settings.from_mapping(found.config, ignore_unknown=True)
        with naming("--to", target):
            workdir.write_official(target, found, config)
    else:
        default = next(name for name in ("model_ema1", "model") if name in found.sets)
        which = sets.select(found.origins, found.decays, args.which or default, source, found.notes)
        write = weights.write_safetensors if kind == "safetensors" else diffusers.write_folder
        with naming("--to", target):
            write(target, found.sets[which], found.geometry, facts=found.facts)
        written, rest = [which], [name for name in found.sets if name != which]
        emas = (name for name in found.sets if name != "model")
        said = {"model": "model", **{name: f"{name} ({decay})" for name, decay in zip(emas, found.decays, strict=True)}}
        left = ", ".join([*(said[name] for name in rest), "optimizer state"])
        found.notes.append(f"written is {said[which]}; not written: {left}")
        if kind == "diffusers" and found.noise_scale not in (None, 1.0):
            found.notes.append(f"call the pipeline with noise_scale={found.noise_scale:g}: its default is 1")
    print(f"{source} -> {target}: {', '.join(written)}; {json.dumps(dataclasses.asdict(found.geometry))}")
    if found.moments and not one_set:
        print(f"with the state of AdamW after {found.step} steps")
    for note in found.notes:
        tables.say(f"note: {note}")


def export(source: Path, args: argparse.Namespace) -> None:
    """An exported folder with every set of weights and a model card, in `args.to` or on the hub.

    Raises:
      UserError: a flag that has no meaning there, or what `Pipeline.save` and `push` refuse.
    """
    for flag, value in (("--which", args.which), ("--context_start", args.context_start)):
        if value is not None:
            raise UserError(f"{flag}={value}: a folder holds every set of weights as they are; leave {flag} out")
    pipe = pipeline.load(source)
    if hub.is_name(args.to):
        written = pipe.push(args.to)
    else:
        with naming("--to", args.to):
            written = pipe.save(args.to)
    print(f"{source} -> {written}: {', '.join(pipe.weights)}")
    for note in pipe.notes:
        tables.say(f"note: {note}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `jitjax convert`, for scripts.

    Raises:
      UserError: see `run`.
    """
    from jitjax.cli import convert

    parser = cli.Parser(prog="jitjax convert", description=convert.__doc__)
    convert.add_arguments(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    cli.program(["convert", *sys.argv[1:]])
