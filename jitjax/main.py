"""`python -m jitjax.main --config configs/h200.py --config.data.path=./data/train --workdir runs/a`

Trains, or continues the run in that workdir: the same as `jitjax train` with the same flags.
"""

import sys

from jitjax import cli

if __name__ == "__main__":
    cli.program(["train", *sys.argv[1:]])
