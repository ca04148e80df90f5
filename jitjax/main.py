"""`python -m jitjax.main --config configs/h200.py --config.data.path=./data/train --workdir runs/a`

Trains, or goes on where the run in that workdir was. Every field of the config can be overridden on the command line;
`--config.field=None` unsets one. A mistake costs one line and exit code 2.
"""

from __future__ import annotations

import sys

from jitjax import runtime

if runtime.is_worker():
    runtime.hide_accelerators()

from absl import app, flags  # noqa: E402

from jitjax import config_flags  # noqa: E402
from jitjax.errors import UserError, cli  # noqa: E402

CONFIG = config_flags.define()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, samples, metrics.jsonl.")
ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Go on in a workdir whose run began with another config.")


def main() -> int:
    config = CONFIG.value()
    if not WORKDIR.value:
        raise UserError("--workdir is missing: name a folder for this run, e.g. --workdir=runs/a")
    runtime.set_environment()
    runtime.start_distributed()
    from jitjax.train import train  # only now: it imports JAX, which reads the environment

    return train(config, WORKDIR.value, accept_config_changes=ACCEPT.value)


if __name__ == "__main__":
    app.run(lambda _: sys.exit(cli(main)), flags_parser=config_flags.parse)
