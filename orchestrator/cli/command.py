"""What a command is, and what several of them need: flags, the run's store, the step that is asked for.

A command's `run` does the work and returns what came of it as a frozen struct; it prints nothing. `main` encodes that
for --json, or prints what `show` makes of it for people. Errors are raised.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from orchestrator import environment
from orchestrator.cli import render
from orchestrator.cli.render import Shown
from orchestrator.errors import EXIT_OK, StepNotFound, UsageError
from orchestrator.rules import journal
from orchestrator.rules.records import LiveStep
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import Patience, open_storage

STORE_DEADLINE_S = 20.0  # for one operation of a command; a job has more patience
Flags = dict[str, Any]
R = TypeVar("R")


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a command prints with --json: a contract. Fields may be added; none goes or changes its meaning."""


@dataclass(frozen=True)
class Flag:
    """A flag of one command. `kind`: bool, int, float or str. `short`: one letter that stands for it. `path`: a file or
    directory of this machine. `required`: must be given. `choices`: the values that it takes, any if empty."""

    name: str
    kind: type
    default: Any
    about: str
    short: str | None = None
    path: bool = False
    required: bool = False
    choices: tuple[str, ...] = ()


JSON = Flag("json", bool, False, "one JSON document instead of a table")  # of every command
# A command with this flag takes the step after ROOT, too: `orchestrator inspect ROOT 100`.
STEP = Flag("step", int, None, "which step; the newest without it")
REQUIRED_STEP = Flag("step", int, None, "which step", required=True)
EVENTS = Flag("events_dir", str, None, "where the job's events are; ROOT/events without it", path=True)


def _ok(result: object) -> int:
    return EXIT_OK


@dataclass(frozen=True)
class Command(Generic[R]):
    """One command.

    run: of a root and the flags. Where it returns an iterator, each result is shown as soon as it is there, --json
    prints a list of all, and the greatest exit code counts.
    show: a result for people. exit_code: of a result.
    encode: what --json prints of a result that holds more than that; None: the result as it is.
    follow: the result again and again, for a terminal, until the user has enough; such a command has a flag `once`.
    arguments: words after ROOT; `run` gets them among its flags, "" for the one in brackets if it is left out.
    about: one short line; detail: more, for --help.
    """

    run: Callable[[str, Flags], R | Iterator[R]]
    show: Callable[[R, Flags], Iterable[Shown]]
    about: str
    flags: tuple[Flag, ...]
    examples: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    detail: str = ""
    exit_code: Callable[[R], int] = _ok
    encode: Callable[[R], Result] | None = None
    follow: Callable[[str, Flags], Iterator[R]] | None = None

    @property
    def all_flags(self) -> tuple[Flag, ...]:
        return (*self.flags, JSON)

    @property
    def json_type(self) -> Any:
        """The type of what --json prints, as the functions that make it are annotated."""
        made = get_type_hints(self.run)["return"]
        several = get_origin(made) is Iterator
        one = get_type_hints(self.encode)["return"] if self.encode else get_args(made)[0] if several else made
        return list[one] if several else one  # type: ignore[valid-type]

    def to_json(self, result: R) -> Any:
        """A result in the types that JSON has."""
        return msgspec.to_builtins(self.encode(result) if self.encode else result)


def open_store(root: str) -> JournalStore:
    """The run at `root`, to which whoever runs the command signs what they write. A store that does not answer is tried
    for STORE_DEADLINE_S, not for as long as a job tries, and whoever waits at a terminal is told."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        user = str(os.getuid())
    patience = Patience(environment.store_deadline_s(STORE_DEADLINE_S), _notify if sys.stderr.isatty() else None)
    return JournalStore(open_storage(root, patience), writer=f"cli/{user}@{socket.gethostname()}")


def _notify(text: str) -> None:
    render.write_error(f"orchestrator: {text}")


def live_step(store: JournalStore, step: int | None) -> LiveStep:
    """The given step, quarantined or not, or the newest. Raises StepNotFound."""
    head = store.require_head()
    live = journal.newest(head) if step is None else journal.find(head, step)
    if live is None:
        if step is None:
            have = ", ".join(str(one.step) for one in head.live[-journal.STEPS_NAMED :]) or "none at all"
            raise StepNotFound(f"{store.url}: no step can be restored; quarantined or never committed: {have}")
        raise StepNotFound(f"{store.url}: {journal.not_here(head, step)}")
    return live


def step_of(text: str, where: str = "STEP") -> int | None:
    """The step that a word stands for; None for `newest`. Raises UsageError."""
    if text == "newest":
        return None
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{where} {text!r}: expected the number of a step, or newest")
    return int(text)
