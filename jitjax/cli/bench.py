"""Measure this machine with the program's own code. Each benchmark prints one JSON object a line on stdout, all else on stderr.

    jitjax bench step --config configs/h200.py --kernels plain,fused --batch_sizes 64,256
    jitjax bench step --config configs/h200.py --devices 1,2,4,8 --forms zero,fsdp --batch_sizes 64,256 --accumulation_steps 1,2
    jitjax bench sample --config configs/imagenet.py:b16 --baseline
    jitjax bench checkpoint --config configs/imagenet.py:h16 --directory /disk/to/test
    jitjax bench input --config configs/h200.py --config.data.path=./data/train64
    jitjax bench kernels --config configs/h200.py:finetune

`--config.field=value` overrides a field as in training. `jitjax bench step --help` explains a benchmark and its flags.
"""

from __future__ import annotations

import argparse
import importlib

from jitjax import runtime
from jitjax.cli import arguments
from jitjax.cli.arguments import at_least

BENCHMARKS = {
    "step": "measure the train step: tokens/s, utilisation, memory",
    "sample": "measure the sampler: images/s",
    "checkpoint": "measure saving and restoring a train state",
    "input": "measure the input pipeline: images/s",
    "kernels": "check every fused operation and the model's gradients on this card, and time them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all benchmarks. Imports no JAX, so that a mistake is answered at once."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", title="benchmarks", required=True)

    def add(name: str, repeats: bool = True) -> argparse.ArgumentParser:
        text = BENCHMARKS[name]
        child = benchmarks.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if repeats:
            text = "measurements; the median, minimum and maximum are reported (default 3)"
            child.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help=text)
        arguments.add(child)
        return child

    step = add("step")
    step.add_argument("--steps", type=at_least(1), default=60, metavar="N", help="steps of a measurement, back to back (60)")
    step.add_argument("--warmup", type=at_least(1), default=20, metavar="N", help="steps before the first measurement (20)")
    step.add_argument("--kernels", default="", metavar="A,B", help="kernels to compare, e.g. plain,fused; default the config's")
    step.add_argument("--batch_sizes", default="", metavar="N,M", help="batch sizes to measure; default the config's")
    step.add_argument("--accumulation_steps", default="", metavar="N,M", help="micro-batches to measure; default the config's")
    step.add_argument("--devices", default="", metavar="N,M",
                      help="numbers of devices to measure, the first ones; with 1 among them the others say their share of as "
                           "many times one; default all devices")  # fmt: skip
    step.add_argument("--forms", default="", metavar="A,B",
                      help="ways to share the work over several devices: zero, fsdp, data; default the config's")  # fmt: skip
    step.add_argument("--xla_options", action="append", metavar="NAME=VALUE,...",
                      help="compile with these options of XLA; may be given several times, '' for none")  # fmt: skip
    step.add_argument("--profile", metavar="DIR", help="write a trace of three steps and a table of its GPU kernels there")
    step.add_argument("--max_other", type=at_least(0, float), default=0.1, metavar="SHARE",
                      help="fail if more of the profiled time belongs to no part of the program (default 0.1)")  # fmt: skip

    sample = add("sample")
    sample.add_argument("--num_images", type=at_least(1), metavar="N", help="images in a batch; default preview.num_images")
    sample.add_argument("--baseline", action="store_true", help="also time the published way to sample, for the ratio")

    checkpoint = add("checkpoint")
    checkpoint.add_argument("--directory", metavar="DIR", help="existing folder on the disk to test; default a temporary one")

    data = add("input", repeats=False)
    data.add_argument("--seconds", type=at_least(0.1, float), default=10.0, help="how long to measure each of two stages (10)")

    kernels = add("kernels")
    kernels.add_argument("--check_images", type=at_least(1), default=8, metavar="N",
                         help="images whose values and gradients are compared (8)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that the parsed flags name.

    Raises:
      UserError: a mistake in the configuration, or a result that is not as it must be.
    """
    runtime.set_environment()  # before anything imports JAX
    runtime.start_distributed()
    return importlib.import_module(f"jitjax.benchmarks.{args.benchmark}").run(args) or 0
