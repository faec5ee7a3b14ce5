"""`orchestrator COMMAND ROOT [flags]`: dispatch, flags, help, and how errors end.

Exit codes: 0 ok, 1 failed, 2 usage, 3 not a run, 4 damage found, 5 fenced, 6 nothing to restore.
"""

from __future__ import annotations

import io
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from absl import flags as absl_flags

from orchestrator.cli import commands, diff, doctor, export, plan, render, report, verify, watch
from orchestrator.cli.adopt import adopt
from orchestrator.cli.completion import script
from orchestrator.cli.recover import recover
from orchestrator.cli.schema import schema
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, OrchestratorError, UsageError
from orchestrator.rules.arguments import path as local_path

_BROKEN_PIPE = 128 + 13


@dataclass(frozen=True)
class Flag:
    """A flag of one command. `kind`: bool, int, float or str. `short`: one letter that stands for it. `path`: a file or
    directory of this machine."""

    name: str
    kind: type
    default: Any
    about: str
    short: str | None = None
    path: bool = False


_JSON = Flag("json", bool, False, "one JSON document instead of a table")
_STEP = Flag("step", int, None, "which step")
_EVENTS = Flag("events_dir", str, None, "where the job's events are; ROOT/events without it", path=True)
_NAME = Flag("name", str, "pin", "name of the pin; a step may have several")


@dataclass(frozen=True)
class Command:
    run: Callable[[str, dict[str, Any]], int]
    about: str
    flags: tuple[Flag, ...]
    examples: tuple[str, ...]
    arguments: tuple[str, ...] = ()  # words after ROOT; the command gets them among its flags


COMMANDS = {
    "ls": Command(
        commands.ls,
        "the steps of a run; * marks the one that a restore takes",
        (),
        ("orchestrator ls /data/run", "orchestrator ls /data/run --json | jq .newest"),
    ),
    "inspect": Command(
        commands.inspect,
        "one step: its arrays, shardings and sizes, who wrote what and how long it took",
        (_STEP,),
        ("orchestrator inspect /data/run", "orchestrator inspect /data/run --step=100"),
    ),
    "log": Command(
        commands.log,
        "the journal: every change to the run, by whom and why",
        (Flag("last", int, 0, "only the last N entries; 0: all"),),
        ("orchestrator log /data/run --last=20",),
    ),
    "watch": Command(
        watch.watch,
        "what a run does now: hosts and their phases, the last commits, what would be lost if it died",
        (
            Flag("once", bool, False, "one look; the same where the output is no terminal"),
            Flag("interval_s", float, 1.0, "seconds from one look to the next"),
            _EVENTS,
        ),
        ("orchestrator watch /data/run", "orchestrator watch /data/run --json | jq .loss_s"),
    ),
    "doctor": Command(
        doctor.doctor,
        "what could hurt this run next, and what to do about it; 1 if it will, 4 if something is damaged",
        (Flag("read_only", bool, False, "do not try out the store with a file of its own"), _EVENTS),
        ("orchestrator doctor /data/run", "orchestrator doctor /data/run --json | jq -r .worst"),
    ),
    "report": Command(
        report.report,
        "one self-contained page: saves on each host, stragglers, incidents, retention, goodput, shardings",
        (Flag("output", str, "report.html", "the file to write", short="o", path=True), _EVENTS),
        ("orchestrator report /data/run -o report.html",),
    ),
    "export": Command(
        export.export,
        "a step, gathered from all shards, as files that other programs read; STEP is a number or newest",
        (Flag("format", str, "orbax", "orbax, safetensors or numpy"),),
        (
            "orchestrator export /data/run newest /data/model.safetensors --format=safetensors",
            "orchestrator export /data/run 100 /data/step-100 --format=numpy",
        ),
        arguments=("STEP", "DEST"),
    ),
    "plan": Command(
        plan.plan,
        "what restoring a step on another mesh would read, hold and take; 1 if it does not fit",
        (
            _STEP,
            Flag("mesh", str, None, "axes of the new mesh, as data=4,model=2; as saved without it"),
            Flag("processes", int, None, "processes of the new job; as saved without it"),
            Flag("host_memory", str, None, "memory of each host, as 64GiB: say whether it fits"),
            Flag("program_memory", str, "1GiB", "what of that the program uses beside the restore"),
            _EVENTS,
        ),
        (
            "orchestrator plan /data/run --mesh=data=4,model=2 --processes=4",
            "orchestrator plan /data/run --mesh=data=8 --processes=2 --host_memory=64GiB",
        ),
    ),
    "verify": Command(
        verify.verify,
        "read a step back, compare every file and chunk with the manifest; 4 if something is damaged",
        (
            _STEP,
            Flag("all", bool, False, "every step"),
            Flag("sample", str, None, "of the arrays' chunks, only this share, such as 10%; marks nothing as verified"),
            Flag("seed", int, 0, "chooses the sample"),
            Flag(
                "by_store", bool, False, "compare the store's own checksums: gs:// downloads nothing; nothing verified"
            ),
            Flag("repair_journal", str, "auto", "auto: mark the good as verified, quarantine the damaged; or never"),
        ),
        (
            "orchestrator verify /data/run",
            "orchestrator verify /data/run --all --repair_journal=never",
            "orchestrator verify /data/run --step=100 --sample=10%",
            "orchestrator verify /data/run --all --by_store",
        ),
    ),
    "diff": Command(
        diff.diff,
        "which leaves differ between steps A and B; 1 if any does",
        (
            Flag("other", str, None, "B is a step of this run instead of ROOT"),
            Flag("max_difference", bool, False, "read what differs: how many elements, and the greatest difference"),
            Flag("all", bool, False, "show equal leaves, too"),
        ),
        (
            "orchestrator diff /data/run 100 200",
            "orchestrator diff /data/run 100 100 --other=/data/second --max_difference",
        ),
        arguments=("A", "B"),
    ),
    "adopt": Command(
        adopt,
        "take over a directory of Orbax's CheckpointManager; nothing is copied",
        (
            Flag("from", str, None, "where Orbax's steps are; the run's own ROOT if unset"),
            Flag("skip", str, "", "items to leave out, separated by commas"),
        ),
        ("orchestrator adopt /data/run", "orchestrator adopt /data/run --from=/data/orbax-run"),
    ),
    "gc": Command(
        commands.gc,
        "delete the data of retired and aborted attempts, and what crashes have left behind",
        (
            Flag("dry_run", bool, False, "say what would be deleted, and delete nothing"),
            Flag("keep_last", int, None, "first retire all but the last N steps; pinned and quarantined ones stay"),
            Flag("quarantined", int, None, "first retire this step's quarantined attempts: nothing else does"),
        ),
        ("orchestrator gc /data/run --dry_run", "orchestrator gc /data/run --keep_last=3"),
    ),
    "pin": Command(
        commands.pin,
        "keep a step whatever the retention policy says",
        (_STEP, _NAME),
        ("orchestrator pin /data/run --step=100 --name=release",),
    ),
    "unpin": Command(
        commands.unpin,
        "take a pin off a step",
        (_STEP, _NAME),
        ("orchestrator unpin /data/run --step=100 --name=release",),
    ),
    "quarantine": Command(
        commands.quarantine,
        "take a step out of those that can be restored; its data stays",
        (_STEP, Flag("reason", str, "by hand", "why; goes into the journal")),
        ("orchestrator quarantine /data/run --step=100 --reason='loss spike'",),
    ),
    "release": Command(
        commands.release,
        "lift the quarantine of a step: it can be restored again",
        (
            _STEP,
            Flag("attempt", str, None, "which of the step's quarantined attempts; the latest if unset"),
            Flag("reason", str, "by hand", "why; goes into the journal"),
        ),
        ("orchestrator release /data/run --step=100 --reason='the disk was replaced'",),
    ),
    "recover": Command(
        recover,
        "a run whose journal is lost or cut short: what is whole; 4 if entries are missing",
        (Flag("write", bool, False, "create the entry that the run goes on from; no job may be using the run"),),
        ("orchestrator recover /data/run", "orchestrator recover /data/run --write"),
    ),
}


# Commands without a run: what they print for the word after them.
_PRINTED: dict[str, tuple[str, Callable[[str], str]]] = {
    "schema": ("JSON Schema of a command's --json: orchestrator schema ls", lambda word: render.document(schema(word))),
    "completion": (
        "completion for bash, zsh or fish: source <(orchestrator completion bash)",
        lambda word: script(word, {**_flag_names(), **dict.fromkeys(_PRINTED, ())}, _abouts()),
    ),
}


def _flag_names() -> dict[str, list[tuple[str, str]]]:
    return {name: [(flag.name, flag.about) for flag in (*command.flags, _JSON)] for name, command in COMMANDS.items()}


def _abouts() -> dict[str, str]:
    printed = {name: about for name, (about, _) in _PRINTED.items()}
    return {name: command.about for name, command in COMMANDS.items()} | printed


def _row(term: str, about: str, width: int) -> str:
    """A term and what it means, in lines of 80 columns."""
    return textwrap.fill(
        about, 80, initial_indent=f"  {term:<{width}} ", subsequent_indent=" " * (width + 3), break_on_hyphens=False
    )


def _usage() -> str:
    rows = "\n".join(_row(name, about, 11) for name, about in _abouts().items())
    return f"usage: orchestrator COMMAND ROOT [flags]\n\ncommands (each has --help):\n{rows}"


def _help(name: str, command: Command) -> str:
    rows = []
    for flag in (*command.flags, _JSON):
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        short = f"-{flag.short}, " if flag.short else ""
        rows.append(_row(f"{short}--{flag.name}", f"{flag.about}{default}", 16))
    examples = "\n".join(f"  {line}" for line in command.examples)
    return (
        f"usage: orchestrator {' '.join((name, 'ROOT', *command.arguments))} [flags]\n\n"
        f"{textwrap.fill(command.about, 80)}\n\nflags:\n" + "\n".join(rows) + f"\n\nexamples:\n{examples}"
    )


def _parse(name: str, command: Command, arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(root, flags). Raises UsageError with one line."""
    values = absl_flags.FlagValues()
    define: dict[type, Callable[..., Any]] = {
        bool: absl_flags.DEFINE_bool,
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
        str: absl_flags.DEFINE_string,
    }
    for flag in (*command.flags, _JSON):
        define[flag.kind](flag.name, flag.default, flag.about, flag_values=values, short_name=flag.short)
    try:
        positional = values([name, *arguments])[1:]
    except absl_flags.Error as error:
        raise UsageError(_plainly(str(error).splitlines()[0], command)) from error
    wanted = ("ROOT", *command.arguments)
    if len(positional) != len(wanted):
        missing = wanted[len(positional)] if len(positional) < len(wanted) else ""
        wrong = f"the run's {missing} is missing" if missing == "ROOT" else f"{missing} is missing"
        wrong = wrong if missing else f"unexpected {positional[len(wanted)]!r}"
        raise UsageError(f"{wrong}; usage: orchestrator {name} {' '.join(wanted)} [flags]")
    for flag in command.flags:
        if flag.path and values[flag.name].value is not None:
            local_path(f"--{flag.name}", values[flag.name].value)
    words = {word.lower(): value for word, value in zip(command.arguments, positional[1:], strict=True)}
    return positional[0], {**values.flag_values_dict(), **words}


_WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


def _plainly(text: str, command: Command) -> str:
    """absl's word for a value that a flag cannot take speaks of Python's int()."""
    given, _, _ = text.removeprefix("flag ").partition(": ")
    kinds = {f"--{flag.name}": flag.kind for flag in (*command.flags, _JSON)}
    wanted = _WANTED.get(kinds.get(given.partition("=")[0], str))
    return f"{given}: expected {wanted}" if wanted and "=" in given else text


def main(argv: Sequence[str]) -> int:
    """Run one command. Returns the exit code; users' mistakes and damage are one line on standard error."""
    if len(argv) < 2:
        print(_usage(), file=sys.stderr)
        return EXIT_USAGE
    name, arguments = argv[1], argv[2:]
    if name in ("-h", "-help", "--help", "help"):
        about = arguments[0] if arguments else ""
        print(_help(about, COMMANDS[about]) if about in COMMANDS else _usage())
        return EXIT_OK
    if name in _PRINTED:
        return _print(name, arguments)
    command = COMMANDS.get(name)
    if command is None:
        render.complain(f"orchestrator: no command {name!r}; there is: {', '.join(COMMANDS)}")
        return EXIT_USAGE
    if any(word in ("-h", "-help", "--help") for word in arguments):
        print(_help(name, command))
        return EXIT_OK
    try:
        return command.run(*_parse(name, command, arguments))
    except OrchestratorError as error:
        render.complain(f"orchestrator {name}: {error}")
        return error.exit_code


def _print(name: str, arguments: Sequence[str]) -> int:
    about, text = _PRINTED[name]
    if len(arguments) != 1 or arguments[0] in ("-h", "-help", "--help"):
        asked = len(arguments) == 1
        print(about, file=sys.stdout if asked else sys.stderr)
        return EXIT_OK if asked else EXIT_USAGE
    try:
        print(text(arguments[0]))
    except UsageError as error:
        render.complain(f"orchestrator {name}: {error}")
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
        _say_no_more()
    except OSError as error:  # of our own output: the commands raise StorageError for what they read and write
        render.complain(f"orchestrator: {error.strerror or error}")
        code = EXIT_FAILED
        _say_no_more()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # a fault of ours: the whole traceback, but nothing in it that a terminal obeys
        for line in "".join(traceback.format_exception(error)).split("\n"):
            render.complain(line)
        code = EXIT_FAILED
    sys.exit(code)


def _say_no_more() -> None:
    """What is still in the buffer must not fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
