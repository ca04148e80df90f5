"""`python -m jitjax VERB ...`: the same program as `jitjax VERB ...`."""

from jitjax import cli

if __name__ == "__main__":
    cli.program()
