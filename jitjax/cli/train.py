"""Train a model, or continue the run in a workdir.

    jitjax train --config configs/h200.py --config.data.path=./data/train --workdir runs/a
    jitjax train --config configs/h200.py --dry_run --devices 8 --card h200

The same command again continues after anything. Every field below can be overridden. `--dry_run` needs no card, and no data:
it says whether the run fits a card's memory, what looks wrong, what the run will be and what crosses the links between cards;
with `--print_config` also the settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import traceback
from collections.abc import Sequence

from jitjax import cards, runtime, tables
from jitjax.cli import arguments
from jitjax.errors import UserError
from jitjax.settings import Settings, check_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="folder of this run: checkpoints, samples, metrics.jsonl")
    parser.add_argument("--accept_config_changes", nargs="?", const=True, default=False, type=arguments.boolean,
                        metavar="BOOL", help="continue a run that began with another configuration")  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="print the resolved run and what follows from it, and stop")
    parser.add_argument("--dry_run", action="store_true", help="print all that can be known before the run, and stop")
    pretend = parser.add_argument_group("for --dry_run")
    pretend.add_argument("--devices", type=arguments.at_least(1), metavar="N", help="cards to pretend; default those here")
    pretend.add_argument("--card", choices=list(cards.CARDS), help="their kind; default that of those here, else h200")
    arguments.add(parser)


def run(args: argparse.Namespace) -> int:
    loaded = arguments.load(args.config_arguments)
    if args.dry_run:
        return dry_run(args, loaded.settings, loaded.notes)
    if args.devices or args.card:
        raise UserError("--devices and --card are for --dry_run: a run takes the devices that are there")
    check_data(loaded.settings.data)
    if not args.workdir and not args.print_config:
        raise UserError("--workdir is missing: name a folder for this run, e.g. --workdir=runs/a")
    runtime.set_environment()
    peers = runtime.start_distributed()
    if args.print_config:
        from jitjax.describe import describe

        for note in loaded.notes:
            tables.say(note)
        print(describe(loaded.settings))
        return 0
    from jitjax.train import train  # only now: it imports JAX, which reads the environment

    try:
        code = train(
            loaded.settings, args.workdir, accept_config_changes=args.accept_config_changes, notes=loaded.notes, peers=peers
        )
    except UserError as error:
        peers.failed(str(error), error.exit_code)
        raise
    except BaseException as error:
        if peers.count > 1:
            traceback.print_exc()
        peers.failed(f"{type(error).__name__}: {error}", 1)
        raise
    peers.close()
    return code


def dry_run(args: argparse.Namespace, settings: Settings, notes: Sequence[str]) -> int:
    """Print `jitjax.dry_run`. The devices are emulated: their number is settled here, before JAX starts."""
    for note in notes:
        tables.say(note)
    here = cards.here()
    axes = [size for size in dataclasses.astuple(settings.mesh) if isinstance(size, int)]
    configured = settings.mesh.data and math.prod(axes)
    devices = args.devices or configured or len(here) or int(os.environ.get("JAX_NUM_CPU_DEVICES", "1"))
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    from jitjax import describe, dry_run

    found = here and cards.name_of(here[0])
    card = args.card or found or "h200"
    if here and not args.card and not found:
        tables.say(f"{here[0]} is not known: planned as on an {card.upper()}; --card takes {', '.join(cards.CARDS)}")
    tables.say(dry_run.dry_run(settings, devices=devices, card=card))
    if args.print_config:
        print(f"\n{describe.settings_text(settings)}")
    return 0
