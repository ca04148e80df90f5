"""`--config=file.py[:argument]` and `--config.field=value` beside argparse. Imports no JAX.

The same names as in the command line's own module, which takes this one's place once all verbs are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jitjax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a `UserError`: one line, exit code 2."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message} (`{self.prog} --help` lists the flags)")


def add(parser: argparse.ArgumentParser) -> None:
    """Announce the configuration in `--help`; the arguments themselves are split off before argparse sees them."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE[:ARGUMENT]", help="config file, e.g. configs/h200.py:finetune")
    group.add_argument("--config.FIELD", metavar="VALUE", help="override a field (=None unsets it)")
    parser.set_defaults(takes_config=True)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that belong to the configuration, each as one --name=value, and all others."""
    config, rest, waiting = [], [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, _ = argument.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(argument)
        elif equals:
            config.append(argument)
        elif waiting:
            config.append(f"{name}={waiting.pop(0)}")
        else:
            raise UserError(f"{name} needs a value, e.g. --config=configs/h200.py")
    return config, rest


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The parsed flags, with the configuration's arguments as `config_arguments`."""
    config, rest = split(argv)
    args = parser.parse_args(rest)
    args.config_arguments = config
    return args


def load(config_arguments: Sequence[str]) -> ConfigDict | None:
    """The config that the arguments describe; None if they name no file.

    Raises:
      UserError: no such file, an unknown field, or a value of another type.
    """
    unset = [a.partition("=")[0].removeprefix("--config.") for a in config_arguments if a.endswith("=None")]
    argv = ["jitjax", *(a for a in config_arguments if not a.endswith("=None"))]
    files = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    if not files:
        if config_arguments:
            raise UserError(f"{config_arguments[0]}: also name a config file, e.g. --config=configs/h200.py")
        return None
    if not Path(files[-1].partition(":")[0]).is_file():
        raise UserError(f"--config={files[-1].partition(':')[0]}: no such file")
    values = flags.FlagValues()  # of its own, so that several commands can run in one process
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = holder.value
        for name in unset:
            *parents, leaf = name.split(".")
            target = config
            for key in parents:
                target = target[key]
            if leaf not in target:
                raise KeyError(f"--config.{name}: there is no such field")
            with target.ignore_type():
                target[leaf] = None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        # An error inside a config file comes with its whole traceback; its last line says what is wrong.
        raise UserError(f"--config: {text.splitlines()[-1]}" if "Traceback" in text else text) from error
    return config


def at_least(low: float, kind: type = int):
    """An argparse type: a number of `kind` that is `low` or more."""

    def number(text: str):
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be {low} or more")
        return value

    number.__name__ = "whole number" if kind is int else "number"
    return number
