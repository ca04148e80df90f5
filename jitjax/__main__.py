"""`python -m jitjax VERB ...`: the same program as `jitjax VERB ...`."""

from jitjax import signals
from jitjax.cli import main

if __name__ == "__main__":
    signals.end(main())
