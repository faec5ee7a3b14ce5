"""The words of a command line: its help, and what they stand for. Prints nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from orchestrator.cli.command import Command, Flags
from orchestrator.errors import UsageError
from orchestrator.rules.arguments import path as local_path

_COLUMNS = 80
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def overview(abouts: Mapping[str, str]) -> str:
    """All commands, of which `abouts` has one line each."""
    rows = "\n".join(_row(name, about, 11) for name, about in abouts.items())
    return f"usage: orchestrator COMMAND ROOT [flags]\n\ncommands (each has --help):\n{rows}"


def help_text(name: str, command: Command[Any]) -> str:
    rows = []
    for flag in command.all_flags:
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        short = f"-{flag.short}, " if flag.short else ""
        rows.append(_row(f"{short}--{flag.name}", f"{flag.about}{default}", 16))
    examples = "\n".join(f"  {line}" for line in command.examples)
    return (
        f"usage: orchestrator {' '.join((name, 'ROOT', *command.arguments))} [flags]\n\n"
        f"{textwrap.fill(command.about, _COLUMNS)}\n\nflags:\n" + "\n".join(rows) + f"\n\nexamples:\n{examples}"
    )


def _row(term: str, about: str, width: int) -> str:
    """A term and what it means, in lines of 80 columns."""
    indents = f"  {term:<{width}} ", " " * (width + 3)
    return textwrap.fill(
        about, _COLUMNS, initial_indent=indents[0], subsequent_indent=indents[1], break_on_hyphens=False
    )


def parse(name: str, command: Command[Any], words: Sequence[str]) -> tuple[str, Flags]:
    """(root, flags). Raises UsageError with one line."""
    values = absl_flags.FlagValues()
    define: dict[type, Callable[..., Any]] = {
        bool: absl_flags.DEFINE_bool,
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
        str: absl_flags.DEFINE_string,
    }
    for flag in command.all_flags:
        define[flag.kind](flag.name, flag.default, flag.about, flag_values=values, short_name=flag.short)
    try:
        given = values([name, *words])[1:]
    except absl_flags.Error as error:
        raise UsageError(_plainly(str(error).splitlines()[0], command)) from error
    expected = ("ROOT", *command.arguments)
    if len(given) != len(expected):
        if len(given) > len(expected):
            wrong = f"unexpected {given[len(expected)]!r}"
        else:
            missing = expected[len(given)]
            wrong = f"the run's {missing} is missing" if missing == "ROOT" else f"{missing} is missing"
        raise UsageError(f"{wrong}; usage: orchestrator {name} {' '.join(expected)} [flags]")
    for flag in command.flags:
        if flag.path and values[flag.name].value is not None:
            local_path(f"--{flag.name}", values[flag.name].value)
    arguments = {word.lower(): value for word, value in zip(command.arguments, given[1:], strict=True)}
    return given[0], {**values.flag_values_dict(), **arguments}


def _plainly(text: str, command: Command[Any]) -> str:
    """absl's word for a value that a flag cannot take speaks of Python's int()."""
    given, _, _ = text.removeprefix("flag ").partition(": ")
    kinds = {f"--{flag.name}": flag.kind for flag in command.all_flags}
    expected = _EXPECTED.get(kinds.get(given.partition("=")[0], str))
    return f"{given}: expected {expected}" if expected and "=" in given else text
