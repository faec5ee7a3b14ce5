"""`orchestrator COMMAND ROOT [flags]`: which command, what it prints, and how errors end.

Exit codes: 0 ok, 1 failed, 2 usage, 3 not a run, 4 damage found, 5 fenced, 6 nothing to restore.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

import orchestrator
from orchestrator.cli import (
    adopt,
    completion,
    diff,
    doctor,
    example,
    export,
    gc,
    inspect,
    launching,
    log,
    ls,
    pin,
    plan,
    prefetch,
    quarantine,
    recover,
    render,
    report,
    usage,
    verify,
    watch,
)
from orchestrator.cli.command import Command, Flags
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, OrchestratorError, UsageError
from orchestrator.observe import events

_BROKEN_PIPE = 128 + 13
_HELP = ("-h", "-help", "--help")

GROUPS: dict[str, dict[str, Command[Any]]] = {
    "look": {
        "ls": ls.COMMAND,
        "inspect": inspect.COMMAND,
        "log": log.COMMAND,
        "watch": watch.COMMAND,
        "report": report.COMMAND,
    },
    "check": {"doctor": doctor.COMMAND, "verify": verify.COMMAND, "diff": diff.COMMAND, "plan": plan.COMMAND},
    "change": {
        "pin": pin.PIN,
        "unpin": pin.UNPIN,
        "quarantine": quarantine.QUARANTINE,
        "release": quarantine.RELEASE,
        "gc": gc.COMMAND,
        "recover": recover.COMMAND,
    },
    "move": {"export": export.COMMAND, "adopt": adopt.COMMAND, "prefetch": prefetch.COMMAND},
}
COMMANDS: dict[str, Command[Any]] = {name: command for group in GROUPS.values() for name, command in group.items()}


def _schema(name: str) -> str:
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r} with --json; {usage.choose_from(name, COMMANDS)}")
    return render.document(msgspec.json.schema(COMMANDS[name].json_type))


def _completion(shell: str) -> str:
    flags = {name: [(flag.name, flag.about) for flag in command.all_flags] for name, command in COMMANDS.items()}
    return completion.script(shell, {**flags, **dict.fromkeys(_PRINTED, ())}, _abouts())


# What --help says of those that are not COMMANDS.
_SCHEMA_HELP = """\
usage: orchestrator schema COMMAND

the JSON Schema of what COMMAND prints with --json

examples:
  orchestrator schema ls > ls.schema.json"""
_COMPLETION_HELP = """\
usage: orchestrator completion SHELL

completes commands and flags in bash, zsh or fish

examples:
  source <(orchestrator completion bash)
  source <(orchestrator completion zsh)
  orchestrator completion fish | source"""
# Commands without a run: what they print for the word after them.
_PRINTED: dict[str, tuple[str, Callable[[str], str], Callable[[], str]]] = {
    "example": (example.ABOUT, example.source, example.listing),
    "schema": ("the JSON Schema of a command's --json: orchestrator schema ls", _schema, lambda: _SCHEMA_HELP),
    "completion": (
        "of commands and flags, for bash, zsh, fish (completion --help)",
        _completion,
        lambda: _COMPLETION_HELP,
    ),
}


def _abouts() -> dict[str, str]:
    """Every command's one line."""
    return {name: about for rows in _overview().values() for name, about in rows.items()}


def _overview() -> dict[str, dict[str, str]]:
    """The same by what one wants to do."""
    groups = {group: {name: one.about for name, one in commands.items()} for group, commands in GROUPS.items()}
    groups["start"] = {launching.NAME: launching.ABOUT}
    return {**groups, "other": {name: about for name, (about, *_) in _PRINTED.items()}}


def main(argv: Sequence[str]) -> int:
    """Run one command. Returns the exit code; users' mistakes and damage are one line on standard error."""
    if len(argv) < 2:
        print(usage.overview(_overview()), file=sys.stderr)
        return EXIT_USAGE
    name, words = argv[1], argv[2:]
    if name in ("--version", "-V", "version"):
        print(f"checkpoint-orchestrator {orchestrator.__version__}")
        return EXIT_OK
    if name in (*_HELP, "help"):
        about = words[0] if words else ""
        if about in _PRINTED:
            return _print(about, _HELP[:1])
        print(usage.help_text(about, COMMANDS[about]) if about in COMMANDS else usage.overview(_overview()))
        return EXIT_OK
    if name == launching.NAME:
        return launching.run(words)
    if name in _PRINTED:
        return _print(name, words)
    command = COMMANDS.get(name)
    if command is None:
        render.write_error(f"orchestrator: no command {name!r}; {usage.choose_from(name, _abouts())}")
        return EXIT_USAGE
    if any(word in _HELP for word in words):
        print(usage.help_text(name, command))
        return EXIT_OK
    try:
        with events.unlogged():
            return _run(command, *usage.parse(name, command, words))
    except OrchestratorError as error:
        render.write_error(f"orchestrator {name}: {error}")
        return error.exit_code


def _run(command: Command[Any], root: str, flags: Flags) -> int:
    """Run a command on a root, print what came of it, and return its exit code."""
    if command.follow and not flags["json"] and not flags["once"] and sys.stdout.isatty():
        render.follow(command.show(result, flags) for result in command.follow(root, flags))
        return EXIT_OK
    made = command.run(root, flags)
    if not isinstance(made, Iterator):
        _write(command, made, flags)
        return command.exit_code(made)
    documents, codes = [], [EXIT_OK]
    for result in made:
        if flags["json"]:
            documents.append(command.to_json(result))
        else:
            render.write(command.show(result, flags))  # at once: the next one may take hours, or fail
        codes.append(command.exit_code(result))
    if flags["json"]:
        render.write_json(documents)
    return max(codes)


def _write(command: Command[Any], result: Any, flags: Flags) -> None:
    if flags["json"]:
        render.write_json(command.to_json(result))
    else:
        render.write(command.show(result, flags))


def _print(name: str, words: Sequence[str]) -> int:
    about, text, help_of = _PRINTED[name]
    if any(word in _HELP for word in words) or (name == "example" and not words):
        print(help_of())
        return EXIT_OK
    if len(words) != 1:
        print(about, file=sys.stderr)
        return EXIT_USAGE
    try:
        print(text(words[0]))
    except UsageError as error:
        render.write_error(f"orchestrator {name}: {error}")
        return error.exit_code
    return EXIT_OK


def entry() -> None:
    """The console script."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has gone
        code = _BROKEN_PIPE
        _drop_output()
    except OSError as error:  # of our own output: the commands raise StorageError for what they read and write
        render.write_error(f"orchestrator: {error.strerror or error}")
        code = EXIT_FAILED
        _drop_output()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # a fault of ours: the whole traceback, but nothing in it that a terminal obeys
        for line in "".join(traceback.format_exception(error)).split("\n"):
            render.write_error(line)
        code = EXIT_FAILED
    sys.exit(code)


def _drop_output() -> None:
    """What is still in the buffer must not fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
