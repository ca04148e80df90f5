"""The program: `jitjax VERB ...`, also `python -m jitjax VERB ...`. One file a verb: flags in, one call, lines out.

Each verb's module has `add_arguments(parser)` and `run(args) -> exit code`; `run` is the first to import JAX, so that a
mistake in the flags is answered before JAX starts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from jitjax import runtime, signals, tables
from jitjax.errors import UserError

if runtime.is_worker():  # a data worker re-imports the main module, and with it this one
    runtime.hide_accelerators()

VERBS = {
    "train": "train a model, or continue a run",
    "sample": "draw images from a model",
    "evaluate": "score a model or a set of images; make reference statistics",
    "sweep": "find the best guidance and EMA of a run",
    "tune": "find the learning rate and warm-up with which short runs score best",
    "status": "where a run stands that was started elsewhere",
    "replay": "make one step of a run again and look at it by layer and image",
    "report": "one HTML file about one or several runs",
    "prepare": "convert a data set once, for faster reading",
    "convert": "exchange weights with the official code, safetensors and Diffusers",
    "estimate": "how long a run takes",
    "bench": "measure this machine",
}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a `UserError`: one line, exit code 2."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message} (`{self.prog} --help` lists the flags)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with the given arguments and return its exit code; 2 for a user's mistake."""
    return guarded(lambda: dispatch(list(sys.argv[1:] if argv is None else argv)))


def program(argv: Sequence[str] | None = None) -> None:
    """`main` as a process: ends it, whatever threads are still doing. Never returns."""
    signals.keep_interrupts()
    signals.end(main(argv))


def dispatch(argv: list[str]) -> int:
    """Run the verb that `argv` names and return its exit code; without arguments print the help.

    Raises:
      UserError: a user's mistake, see `guarded`.
    """
    parser = make_parser(next((word for word in argv if word in VERBS), None))
    if not argv:
        parser.print_help()
        return 0
    return run(parser, argv)


def make_parser(wanted: str | None) -> Parser:
    """The program's parser. Only the verb that is `wanted` has its flags, so that a command imports nothing else."""
    parser = Parser(prog="jitjax", description="JiT image diffusion in JAX.", epilog="`jitjax VERB --help` explains a verb.")
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb, text in VERBS.items():
        module = importlib.import_module(f"jitjax.cli.{verb}") if verb == wanted else None
        child = verbs.add_parser(verb, help=text, description=module and module.__doc__)
        if module:
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def run(parser: Parser, argv: list[str]) -> int:
    """Parse and call the verb. Arguments that begin with --config are left to `jitjax.cli.arguments`, in their order."""
    from jitjax.cli import arguments

    config, rest = arguments.split(argv)
    args = parser.parse_args(rest)
    if config and not getattr(args, "takes_config", False):
        raise UserError(f"{config[0]}: `{parser.prog} {args.verb}` takes no configuration (`--help` lists its flags)")
    args.config_arguments = config
    return args.run(args) or 0


def guarded(call: Callable[[], int | None]) -> int:
    """The exit code of `call`. A `UserError` is one line on stderr and its code, mostly 2; Ctrl-C is 130; --help is 0."""
    try:
        return call() or 0
    except UserError as error:
        tables.say(f"error: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # `jitjax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2


def _version() -> str:
    import jitjax

    return f"jitjax {jitjax.__version__}"
