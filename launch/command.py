"""What the launchers' command lines have in common: own flags, then `--`, then the job's program and its arguments."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from launch import contract
from orchestrator.cli import usage
from orchestrator.errors import UsageError
from orchestrator.rules.arguments import is_utf8
from orchestrator.rules.arguments import path as local_path
from orchestrator.texts import printable

EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13
# Flags of any launcher that name files of this machine.
LOCAL_PATHS = ("log_dir", "hosts_file", "tier_dir", "output", "check")


class LaunchError(Exception):
    """The job cannot be started as asked; the message is one line for the user."""


def complain(text: str) -> None:
    """What went wrong, on standard error. It may quote what others have written: a file, another program's answer."""
    print(printable(text, details=True), file=sys.stderr, flush=True)


def help_text(text: str, values: flags.FlagValues) -> str:
    """A launcher's own words and its flags, as wide as the terminal."""
    rows = []
    for name in values:
        flag = values[name]
        about = flag.help.splitlines()[0].removesuffix(
            ";"
        )  # absl adds a line of its own to those that may be given again
        rows.append(usage.row(f"--{name}", f"{about}{usage.default_of(flag.default)}", 25))
    return f"{usage.rewrapped(text)}\n\nflags:\n" + "\n".join(rows)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's arguments, the program and its own)."""
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), list(arguments[cut + 1 :])


def parse(name: str, values: flags.FlagValues, arguments: Sequence[str]) -> dict[str, Any]:
    """The flags' values. Raises: LaunchError with one line for whatever cannot be used."""
    try:
        unexpected = values([f"launch {name}", *arguments])[1:]
    except flags.Error as error:
        raise LaunchError(str(error).splitlines()[0]) from error
    if unexpected:
        raise LaunchError(f"unexpected {unexpected[0]!r}; the program to run goes after --")
    found: dict[str, Any] = values.flag_values_dict()
    for flag in LOCAL_PATHS:
        if found.get(flag) is not None:
            try:
                local_path(f"--{flag}", found[flag])
            except UsageError as error:
                raise LaunchError(str(error)) from error
    return found


def run(
    name: str,
    about: str,
    values: flags.FlagValues,
    arguments: Sequence[str],
    body: Callable[[dict[str, Any], list[str]], int],
) -> int:
    """Carry out a launcher's command line: `body(flags, program)`, or its help, which begins with `about`. A user's
    mistake is one line and 2."""
    ours, program = split(arguments)
    try:
        if any(word in ("-h", "-help", "--help") for word in ours):
            print(help_text(about, values), flush=True)
            return 0
        return body(parse(name, values, ours), program)
    except LaunchError as error:
        complain(f"launch {name}: {error}")
        return EXIT_USAGE
    except KeyboardInterrupt:  # before, or after, a job takes the signal over
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the job was ended on the way here. Not at exit once more:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def needs_program(program: Sequence[str], example: str) -> None:
    """Raises: LaunchError if there is none, or one that a script or a manifest cannot hold."""
    if not program:
        raise LaunchError(f"no command to run; put it after --: launch {example} -- python train.py")
    for word in program:
        _in_utf8("the program's", word)


def _in_utf8(what: str, text: str) -> None:
    if not is_utf8(text):
        raise LaunchError(f"{what} {text!r}: expected text in UTF-8")


def define_environment_flags(values: flags.FlagValues) -> None:
    """The flags that every launcher has for the environment of its processes; `environment_of` reads them."""
    flags.DEFINE_string("run_root", None, f"where the checkpoints are ({contract.RUN_ROOT})", flag_values=values)
    flags.DEFINE_multi_string("env", [], "NAME=VALUE for every process; may be given again", flag_values=values)


def environment_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The variables that the flags of `define_environment_flags` set. Raises: LaunchError."""
    found = {}
    for pair in values["env"]:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"--env={pair}: expected NAME=VALUE")
        _in_utf8(f"--env {name}", value)
        found[name] = value
    if values["run_root"] is not None:
        _in_utf8("--run_root", values["run_root"])
        found[contract.RUN_ROOT] = values["run_root"]
    return found
