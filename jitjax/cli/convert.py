"""Weights between jitjax, the official PyTorch code, safetensors and Diffusers; exact in every direction.

    jitjax convert --from checkpoint-last.pth --to runs/imported        # any file of weights -> jitjax
    jitjax convert --from runs/a --to a.pth                             # jitjax -> official .pth
    jitjax convert --from runs/a --to a.safetensors --which model_ema1  # one set of weights
    jitjax convert --from runs/a --to diffusers --format diffusers      # a folder for Diffusers' JiTPipeline
    jitjax convert --from runs/a --to exported --format folder          # weights, config.json and a model card
    jitjax convert --from runs/a --to hf://me/shapes                    # the same, uploaded to the Hugging Face Hub

--from takes what `jitjax.interop.weights.read_weights` reads: a .pth (.pt, .pth.tar, .ckpt, .bin), a .safetensors, a hub or
Diffusers folder, a jitjax workdir or one of its checkpoints, hf://OWNER/NAME. A workdir made from a file is for
`--config.init_from`, sampling and evaluation; if the .pth has the state of AdamW, that comes along, and training the workdir
further continues the official run. Whatever a file cannot hold, and whatever was assumed, is printed. Nothing in a .pth is
executed.
"""

from __future__ import annotations

import argparse

FORMATS = ("jitjax", "pth", "safetensors", "diffusers", "folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, help="file or folder of weights, or a jitjax workdir")
    parser.add_argument("--to", required=True, help="file or new folder to write, or hf://OWNER/NAME")
    parser.add_argument("--format", choices=FORMATS, help="what to write; default by the ending of --to, a workdir without one")
    parser.add_argument(
        "--which", help="set for .safetensors and Diffusers: model, model_ema1 (default), model_ema2, a decay or power:0.1"
    )
    parser.add_argument("--context_start", type=int, help="first block with context tokens, for unpublished sizes")


def run(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, only moved
    from jitjax import convert

    convert.run(args)
