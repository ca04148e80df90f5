"""Where a run stands that was started elsewhere, from the files in its workdir.

jitjax status runs/a
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jitjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run, on this machine or mounted")


def run(args: argparse.Namespace) -> None:
    from jitjax.monitor import print_status

    file = Path(args.workdir).expanduser() / "config.json"
    try:
        saved = json.loads(file.read_text())
        total, epoch, name = saved.get("planned_steps"), saved.get("steps_per_epoch"), saved["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{args.workdir}: {file.name} cannot be read ({error}): give the workdir of a run") from None
    if not isinstance(total, int):
        raise UserError(f"{args.workdir}: the run has not recorded its length yet")
    print_status(file.parent, total_steps=total, steps_per_epoch=epoch, title=name)
