"""docs/commands.md: every verb and flag in Markdown, read off the parsers.

`python -m jitjax.cli.reference > docs/commands.md`
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator

from jitjax import cli


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The parser of every verb, each followed by those of its own verbs (`jitjax bench step`)."""
    for verb in cli.VERBS:
        yield from _with_children(_children(cli.make_parser(verb))[verb])


def flags_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags and positional arguments, without --help and verbs."""
    skipped = argparse._HelpAction | argparse._SubParsersAction
    return [action for action in parser._actions if not isinstance(action, skipped)]


def page() -> str:
    """The text of docs/commands.md."""
    lines = [
        "# Commands",
        "",
        "Every command and flag, as `jitjax VERB --help` prints them. Fields of a run (`--config.FIELD=VALUE`) are on the page",
        "[Settings](settings.md). A mistake costs one line and exit code 2; exit codes of training are on the page",
        "[Reliability](reliability.md#being-stopped). Made by `python -m jitjax.cli.reference > docs/commands.md`.",
    ]
    for parser in parsers():
        lines += ["", f"{'###' if parser.prog.count(' ') > 1 else '##'} {parser.prog}", "", *_prose(parser.description)]
        if flags := flags_of(parser):
            lines += ["", "| flag | what it does |", "|---|---|", *(_row(parser, action) for action in flags)]
    return "\n".join(lines)


def _with_children(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for child in _children(parser).values():
        yield from _with_children(child)


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def _prose(text: str) -> list[str]:
    """A docstring as Markdown: its indented examples become blocks of commands."""
    lines, block = [], False
    for line in inspect.cleandoc(text).splitlines():
        example = line.startswith("    ") or (not block and re.match(r"jitjax \w+ ", line) is not None)
        if example != block:
            lines += ["<!-- needs your files -->", "```sh"] if example else ["```"]
            if not example and line:
                lines.append("")
        block = example
        if not example or line.strip():
            lines.append(line.strip() if example else line)
    return lines + (["```"] if block else [])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One line of the table. Defaults are those that the help names."""
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    shown = f"{name} {value}".strip() if action.option_strings else name
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"| `{shown}` | {'required; ' if action.required and action.option_strings else ''}{text} |"


if __name__ == "__main__":
    print(page())
