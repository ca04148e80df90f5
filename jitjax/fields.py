"""Fields of settings classes: type, default, range, unit, one line of what each does, and how text becomes an allowed value.

`jitjax.settings` declares the classes with `setting`, `free` and `group`. Checks, `--help` and the reference page are read off
the fields.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from jitjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field allows beyond its type, and what it means."""

    help: str
    unit: str = ""
    low: float = -math.inf  # least value; excluded if `open_low`
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    pattern: str = ""  # of text, a regular expression
    form: str = ""  # the pattern in words
    length: int | None = None  # of a tuple
    free: bool = False  # may differ between the starts of one run: changes where, how fast and how loudly it runs


def setting(default: Any, help: str, **rule: Any) -> Any:
    """A field of a settings class: its default, one line of help, and the keyword arguments of `Rule`."""
    return dataclasses.field(default=default, metadata={"rule": Rule(help, **rule)})


def free(default: Any, help: str, **rule: Any) -> Any:
    """A `setting` that may differ between the starts of one run."""
    return setting(default, help, free=True, **rule)


def group(kind: type) -> Any:
    """A field that holds the settings class `kind`, at its defaults."""
    return dataclasses.field(default_factory=kind, metadata={"group": kind})


@dataclasses.dataclass(frozen=True)
class Field:
    """One field by its dotted name, e.g. name "optim.lr", type float, optional True."""

    name: str
    type: type  # bool, int, float, str, or tuple (of floats)
    optional: bool
    default: Any
    rule: Rule

    def allowed(self) -> str:
        """What the field takes, in words: "a whole number in [1, 8192]"."""
        if self.rule.choices:
            return "one of " + ", ".join(choice or "''" for choice in self.rule.choices)
        if self.rule.pattern:
            return self.rule.form
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "numbers"}[self.type]
        if self.type is tuple and self.rule.length:
            words = f"{self.rule.length} numbers"
        if self.type in (int, float, tuple) and (math.isfinite(self.rule.low) or math.isfinite(self.rule.high)):
            words += f" in {'(' if self.rule.open_low else '['}{self.rule.low:.10g}, "
            words += f"{self.rule.high:.10g}{')' if self.rule.open_high else ']'}"
        if self.type is tuple:
            words += ", e.g. (0.1,1.0)" if self.rule.length == 2 else ", e.g. (0.9999,)"
        return words + (" or None" if self.optional else "")

    def parse(self, text: str) -> Any:
        """The value that `--config.<name>=<text>` gives. Whole numbers may be written 1e6.

        Raises:
          UserError: not of this field's type or out of its range.
        """
        if text == "None":
            return self.check(None, text)
        if self.type is str:
            return self.check(text, text)
        if self.type is bool:
            values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return self.check(values.get(text.lower(), text), text)
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.get(text.strip().lower(), text)
        return self.check(value, text)

    def check(self, value: Any, shown: Any = None, *, flag: str = "") -> Any:
        """The value in this field's type. `flag` is the name that an error shows, default --config.<name>.

        Raises:
          UserError: one line with the flag, the value and what is allowed.
        """
        shown = value if shown is None else shown
        if value is None and self.optional:
            return None
        if self.type is tuple:
            items = value if isinstance(value, tuple | list) else (value,)
            if self.rule.length not in (None, len(items)) or (not items and self.default):
                self._refuse(shown, flag)
            return tuple(self._number(item, float, shown, flag) for item in items)
        if self.type in (int, float):
            return self._number(value, self.type, shown, flag)
        wrong = not isinstance(value, self.type) or (self.rule.choices and value not in self.rule.choices)
        if wrong or "\0" in str(value) or (self.rule.pattern and not re.fullmatch(self.rule.pattern, value)):
            self._refuse(shown, flag)
        return value

    def _number(self, value: Any, kind: type, shown: Any, flag: str) -> Any:
        rule = self.rule
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) < 1e300:
            self._refuse(shown, flag)
        if kind is int and value != int(value):
            self._refuse(shown, flag)
        below = value <= rule.low if rule.open_low else value < rule.low
        above = value >= rule.high if rule.open_high else value > rule.high
        if below or above:
            self._refuse(shown, flag)
        return kind(value)

    def _refuse(self, shown: Any, flag: str) -> typing.NoReturn:
        shown = shown if isinstance(shown, str) else repr(shown)
        raise UserError(f"{flag or '--config.' + self.name}={shown[:80]}: must be {self.allowed()}")


def _fields_of(kind: type, prefix: str) -> Iterator[Field]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "group" in field.metadata:
            yield from _fields_of(field.metadata["group"], f"{prefix}{field.name}.")
            continue
        hint = hints[field.name]
        optional = isinstance(hint, types.UnionType)
        hint = next(part for part in typing.get_args(hint) if part is not type(None)) if optional else hint
        yield Field(prefix + field.name, typing.get_origin(hint) or hint, optional, field.default, field.metadata["rule"])


def fields_of(kind: type, prefix: str = "") -> dict[str, Field]:
    """The fields of one settings class by name."""
    return {field.name: field for field in _fields_of(kind, prefix)}


def get(settings: Any, dotted: str) -> Any:
    """The value of the field with this dotted name, e.g. "optim.lr"."""
    return functools.reduce(getattr, dotted.split("."), settings)
