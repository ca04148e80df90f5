"""`python -m jitjax VERB ...`: the same program as `jitjax VERB ...`."""

import sys

from jitjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
