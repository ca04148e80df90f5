"""Train a model, or continue the run in a workdir.

    jitjax train --config configs/h200.py --config.data.path=./data/train --workdir runs/a

The same command again continues after anything. Every field below can be overridden.
"""

from __future__ import annotations

import argparse
import traceback

from jitjax import runtime
from jitjax.cli import arguments
from jitjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="folder of this run: checkpoints, samples, metrics.jsonl")
    parser.add_argument("--accept_config_changes", nargs="?", const=True, default=False, type=arguments.boolean,
                        metavar="BOOL", help="continue a run that began with another configuration")  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="print the resolved run and what follows from it, and stop")
    arguments.add(parser)


def run(args: argparse.Namespace) -> int:
    loaded = arguments.load(args.config_arguments)
    from jitjax.settings import check_data

    check_data(loaded.settings.data)
    if not args.workdir and not args.print_config:
        raise UserError("--workdir is missing: name a folder for this run, e.g. --workdir=runs/a")
    runtime.set_environment()
    peers = runtime.start_distributed()
    if args.print_config:
        from jitjax.describe import describe

        print(describe(loaded.settings))
        return 0
    from jitjax.train import train  # only now: it imports JAX, which reads the environment

    try:
        code = train(
            loaded.settings, args.workdir, accept_config_changes=args.accept_config_changes, notes=loaded.notes, peers=peers
        )
    except UserError as error:
        peers.failed(str(error), 2)
        raise
    except BaseException as error:
        if peers.count > 1:
            traceback.print_exc()
        peers.failed(f"{type(error).__name__}: {error}", 1)
        raise
    peers.close()
    return code
