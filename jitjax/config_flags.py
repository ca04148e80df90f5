"""`--config=file.py --config.field=value` for every command, with mistakes told in one line.

On top of `ml_collections.config_flags`: `--config.field=None` unsets a field, whole numbers may be written 1e6, and a run
length on the command line replaces the config file's (two on the command line are a mistake).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jitjax.config import RUN_LENGTHS
from jitjax.errors import UserError

PREFIX = "--config."
_unset: list[str] = []  # fields that the command line set to None


class ConfigFlag:
    """The parsed configuration; call `value()` after flag parsing."""

    def __init__(self, holder: Any):
        self._holder = holder

    def value(self) -> ConfigDict:
        """The config file's configuration with the command line's overrides.

        Raises:
          UserError: no config given, or two run lengths on the command line.
        """
        config = self._holder.value
        if config is None:
            raise UserError("--config is missing: name a config file, e.g. --config=configs/quickstart.py")
        overridden = config_flags.get_override_values(flags.FLAGS["config"])
        for name in _unset:
            *parents, leaf = name.split(".")
            target = config
            for key in parents:
                target = target[key]
            with target.ignore_type():
                target[leaf] = None
        lengths = [name for name in RUN_LENGTHS if overridden.get(name)]
        if len(lengths) > 1:
            given = " and ".join(f"--config.{name}={overridden[name]}" for name in lengths)
            raise UserError(f"two run lengths are set, {given}: give exactly one of {', '.join(RUN_LENGTHS)}")
        if lengths:
            for name in RUN_LENGTHS:
                if name != lengths[0]:
                    config[name] = None
        return config


def define() -> ConfigFlag:
    """Define --config. The file is loaded when flags are parsed."""
    return ConfigFlag(config_flags.DEFINE_config_file("config", None, "Config file, optionally with an argument: file.py:arg"))


def parse(argv: Sequence[str]) -> list[str]:
    """The flags parser for `absl.app.run(..., flags_parser=parse)`: a mistake prints one line and exits with 2."""
    try:
        return _parse(list(argv))
    except UserError as error:
        message = str(error)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = _one_line(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    _unset.clear()
    kept, previous = argv[:1], ""
    for argument in argv[1:]:
        name, equals, value = argument.partition("=")
        if name.startswith(PREFIX) and equals and value == "None":
            _unset.append(name[len(PREFIX) :])
            continue
        if name.startswith(PREFIX) and equals:
            argument = f"{name}={_whole_number(value)}"
        file = value if name == "--config" and equals else argument if previous == "--config" else ""
        if file and not Path(file.partition(":")[0]).is_file():
            raise UserError(f"--config={file.partition(':')[0]}: there is no such file; the repository's are configs/*.py")
        kept.append(argument)
        previous = argument
    remaining = flags.FLAGS(kept)
    if len(remaining) > 1:
        raise UserError(f"what is {remaining[1]!r}? Flags begin with --, config fields with {PREFIX}")
    for name in _unset:
        _require_field(name)
    return remaining


def _require_field(dotted: str) -> None:
    config = flags.FLAGS["config"].value
    for key in dotted.split("."):
        if config is None or key not in config:
            raise UserError(f"--config.{dotted}: there is no such field")
        config = config[key]


def _whole_number(text: str) -> str:
    """1e6 -> 1000000, which an integer field takes and a float field reads the same."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return str(int(value)) if isinstance(value, float) and "e" in text.lower() and value.is_integer() else text


def _one_line(error: BaseException) -> str:
    """absl and ml_collections explain over several lines, with a traceback or with a bare key."""
    text = str(error)
    if "Traceback (most recent call last)" in text:  # a mistake in a config file or in its argument: its own message
        text = text.splitlines()[-1].partition(": ")[2]
    if isinstance(error, AttributeError | KeyError):
        text = " ".join(text.replace("\\n", " ").replace("\\'", "").strip("\"'").split())
        return f"--config has no field {text.replace(' Did you', '. Did you')} (all fields: jitjax/config.py)"
    return " ".join(text.split())
