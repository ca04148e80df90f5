"""Draw images from a trained model.

    jitjax sample runs/a --num 16 --out grid.png
    jitjax sample runs/a --labels cat,dog --cfg_scale 2.9 --interval 0.1,1 --out images/
    jitjax sample runs/a --labels all --num 50000 --out samples.npz

MODEL is a workdir, a checkpoint, an exported folder, an official .pth, a .safetensors file, or hf://OWNER/NAME on the Hugging
Face Hub. Image i depends on (seed, i, its label) alone. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse

from jitjax import runtime
from jitjax.cli import arguments
from jitjax.cli.arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="workdir, checkpoint, exported folder, .pth, .safetensors or hf://OWNER/NAME"
    )
    parser.add_argument("--out", required=True, help="FILE.png: a captioned grid; FILE.npz: arr_0, arr_1; else a folder")
    parser.add_argument("--num", type=int, help="images; default one per label, or 16")
    parser.add_argument("--path", metavar="FILE", help="also the way from noise to image: FILE.png (strips) or FILE.gif")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The flags of every verb that draws images."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--labels", default="all", help="all (class-balanced), none, or numbers and names: 1,7,cat")
    group.add_argument("--which", help="weights: an EMA's decay, power:0.1, model_ema1, or model (raw); default the first EMA")
    group.add_argument("--cfg_scale", type=float, default=1.0, help="guidance scale; 1 (the default) is off")
    group.add_argument(
        "--interval", type=arguments.interval, default=(0.0, 1.0), help="times of guidance, e.g. 0.1,1 (default 0,1)"
    )
    group.add_argument("--steps", type=at_least(1), default=50, help="steps of the time grid (default 50)")
    group.add_argument("--method", default="heun", help="solver: heun (default), euler, ...; docs/sampling.md compares them")
    group.add_argument("--grid", default="uniform", help="time grid, see docs/sampling.md")
    group.add_argument("--t_eps", type=float, help="lower clip of 1 - t; default the model's")
    group.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise (default 0)")
    group.add_argument("--batch_size", type=at_least(1), help="images at once, over all devices")
    group.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default bfloat16 on a GPU, else float32")


def sampling_options(args: argparse.Namespace) -> dict:
    """The sampler's options among the flags, those that were given."""
    names = ("cfg_scale", "interval", "steps", "method", "grid", "t_eps")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampling_given(args: argparse.Namespace) -> list[str]:
    """The flags of `add_sampling` that were given another value than their default."""
    parser = argparse.ArgumentParser()
    add_sampling(parser)
    return [f"--{name}" for name, value in vars(parser.parse_args([])).items() if getattr(args, name) != value]


def run(args: argparse.Namespace) -> int:
    arguments.existing_model(args.model, "MODEL")
    runtime.set_environment()
    runtime.start_distributed()
    from jitjax import draw  # only now: it imports JAX, which reads the environment

    return draw.draw(
        args.model,
        args.out,
        num=args.num,
        labels=args.labels,
        which=args.which,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=args.dtype,
        options=sampling_options(args),
        path=args.path,
    )
