"""The words of a command line: its help, and what they stand for. Prints nothing."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from orchestrator.cli.command import Command, Flag, Flags, step_of
from orchestrator.errors import UsageError
from orchestrator.rules.arguments import path as local_path

_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def columns() -> int:
    """Of the terminal; 80 where there is none, or it does not say."""
    return max(40, shutil.get_terminal_size().columns)


def overview(groups: Mapping[str, Mapping[str, str]]) -> str:
    """All commands, by group, each with its one line."""
    blocks = [
        f"{group}:\n" + "\n".join(row(name, about, 11) for name, about in rows.items())
        for group, rows in groups.items()
    ]
    return "\n\n".join(["usage: orchestrator COMMAND ROOT [flags]; each has --help", *blocks])


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """What was probably meant, '' if nothing is like it."""
    near = difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f"did you mean {near[0]}?" if near else ""


def choose_from(word: str, choices: Iterable[str]) -> str:
    """What to do about a word that is none of `choices`: one that is like it, if any, and all."""
    every = list(choices)
    return " ".join(part for part in (did_you_mean(word, every), f"choose from {', '.join(every)}") if part)


def help_text(name: str, command: Command[Any]) -> str:
    rows = []
    for flag in command.all_flags:
        default = " (required)" if flag.required else default_of(flag.default)
        short = f"-{flag.short}, " if flag.short else ""
        rows.append(row(f"{short}--{flag.name}", f"{flag.about}{default}", 16))
    examples = "\n".join(f"  {line}" for line in command.examples)
    return (
        f"usage: orchestrator {_usage(name, command)}\n\n"
        + "\n".join(textwrap.fill(text, columns()) for text in (command.about, command.detail) if text)
        + "\n\nflags:\n"
        + "\n".join(rows)
        + f"\n\nexamples:\n{examples}"
    )


def default_of(value: object) -> str:
    """What a flag's help says of its default: nothing of one that stands for `not given`."""
    return "" if value in (None, False, "", []) else f" (default {value})"


def row(term: str, about: str, width: int) -> str:
    """A term and what it means, in lines as wide as the terminal."""
    indents = f"  {term:<{width}} ", " " * (width + 3)
    return textwrap.fill(
        about, columns(), initial_indent=indents[0], subsequent_indent=indents[1], break_on_hyphens=False
    )


def rewrapped(text: str) -> str:
    """`text` with its paragraphs as wide as the terminal. Usage and whatever is indented stay as they are."""
    blocks = text.strip("\n").split("\n\n")
    return "\n\n".join(block if _is_fixed(block) else textwrap.fill(block, columns()) for block in blocks)


def _is_fixed(block: str) -> bool:
    return block.startswith("usage:") or any(line.startswith(" ") for line in block.splitlines())


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
    except absl_flags.UnrecognizedFlagError as error:
        known = [f"--{flag.name}" for flag in command.all_flags]
        raise UsageError(f"no flag --{error.flagname}; {choose_from(f'--{error.flagname}', known)}") from error
    except absl_flags.Error as error:
        raise UsageError(_plainly(str(error).splitlines()[0], command)) from error
    flags = values.flag_values_dict()
    expected = ("ROOT", *command.arguments)
    optional = _step_flag(command)
    if optional and len(given) == len(expected) + 1:
        _take_step(flags, given.pop(), optional)
    if len(given) == len(expected) - 1 and any(map(_may_be_missing, expected)):
        given.insert(next(at for at, word in enumerate(expected) if _may_be_missing(word)), "")
    if len(given) != len(expected):
        if len(given) > len(expected):
            wrong = f"unexpected {given[len(expected) + bool(optional)]!r}"
        else:
            missing = [word for word in expected if not _may_be_missing(word)][len(given)]
            wrong = f"the run's {missing} is missing" if missing == "ROOT" else f"{missing} is missing"
        raise UsageError(f"{wrong}; usage: orchestrator {_usage(name, command)}")
    for flag in command.flags:
        _check(name, command, flag, flags[flag.name])
    arguments = {word.strip("[]").lower(): value for word, value in zip(command.arguments, given[1:], strict=True)}
    return given[0], {**flags, **arguments}


def _may_be_missing(word: str) -> bool:
    return word.startswith("[")


def _usage(name: str, command: Command[Any]) -> str:
    """The words after `orchestrator`."""
    step = _step_flag(command)
    steps = () if step is None else ("STEP",) if step.required else ("[STEP]",)
    required = [f"--{flag.name}=..." for flag in command.flags if flag.required and flag is not step]
    return " ".join((name, "ROOT", *command.arguments, *steps, *required, "[flags]"))


def _step_flag(command: Command[Any]) -> Flag | None:
    """The flag that may stand after ROOT as a word."""
    return next((flag for flag in command.flags if flag.name == "step"), None)


def _take_step(flags: Flags, word: str, flag: Flag) -> None:
    step = step_of(word)
    if step is None and flag.required:  # what changes a step says which: another may be the newest by then
        raise UsageError(f"STEP {word!r}: expected the number of a step")
    if flags["step"] not in (None, step):
        raise UsageError(f"two steps, {word} and --step={flags['step']}: give one")
    flags["step"] = step


def _check(name: str, command: Command[Any], flag: Flag, value: Any) -> None:
    """Raises UsageError for a value that the flag cannot have."""
    if flag.required and value is None:
        what = "the STEP" if flag.name == "step" else f"--{flag.name}"
        raise UsageError(f"{what} is missing ({flag.about}); for example: {command.examples[0]}")
    if flag.path and value is not None:
        local_path(f"--{flag.name}", value)
    if flag.choices and value not in flag.choices:
        raise UsageError(f"--{flag.name}={value}: {choose_from(value, flag.choices)}")


def _plainly(text: str, command: Command[Any]) -> str:
    """absl's word for a value that a flag cannot take speaks of Python's int()."""
    given, _, _ = text.removeprefix("flag ").partition(": ")
    kinds = {f"--{flag.name}": flag.kind for flag in command.all_flags}
    expected = _EXPECTED.get(kinds.get(given.partition("=")[0], str))
    return f"{given}: expected {expected}" if expected and "=" in given else text
