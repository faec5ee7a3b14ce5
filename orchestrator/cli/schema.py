"""What each command's --json prints, as types: a contract. Fields may be added; none goes or changes its meaning.

`orchestrator schema COMMAND` prints the JSON Schema of it; the tests decode every command's output with these types.
"""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.cli.doctor import Diagnosis
from orchestrator.cli.export import Exported
from orchestrator.cli.plan import Plan
from orchestrator.cli.recover import Recovery
from orchestrator.cli.report import Report
from orchestrator.cli.watch import Now
from orchestrator.errors import UsageError
from orchestrator.rules.json_numbers import Stored
from orchestrator.rules.records import Event, FileEntry, LiveStep, RetiredAttempt


class _Output(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Uncommitted(_Output):
    step: int
    attempt: str


class Listing(_Output):
    """`ls`. newest: the step that a restore takes. aside: quarantined attempts whose step was saved again."""

    root: str
    version: int
    epoch: int
    newest: int | None
    steps: list[LiveStep]
    retired: list[RetiredAttempt]
    aside: list[LiveStep]
    uncommitted: list[Uncommitted]


class Writer(_Output):
    """A process that wrote part of a step."""

    process: int
    host: str
    files: int
    bytes: int
    seconds: dict[str, float]


class Inspection(_Output):
    """`inspect`. leaves: as in the tree spec of the on-disk format, and `bytes`. metrics: all of the step's."""

    root: str
    step: LiveStep
    opened_by: str
    epoch: int
    process_count: int
    device_count: int
    mesh: dict[str, int]
    leaves: list[dict[str, Any]]
    metrics: dict[str, Stored]
    extra: dict[str, Any]
    files: list[FileEntry]
    processes: list[Writer]


class Entry(_Output):
    """`log` prints a list of these: journal entries without the steps."""

    version: int
    epoch: int
    writer: str
    time: float
    event: Event


class Verified(_Output):
    """`verify` prints a list of these. problems: what is damaged; unread: what could not be read;
    retired: a job has retired the step meanwhile; not_recorded: why the journal does not say so."""

    step: int
    attempt: str
    bytes: int
    files: int
    chunks: int
    sample: float | None
    by_store: bool
    problems: list[str]
    unread: list[str]
    retired: str
    not_recorded: str


class Difference(_Output):
    leaf: str
    a: str
    b: str
    state: str
    by: str
    elements: int | None
    largest: float | None


class Comparison(_Output):
    """`diff`. a, b: steps. equal: how many leaves are."""

    a: int
    b: int
    root: str
    other: str
    equal: int
    differing: list[Difference]


class Collected(_Output):
    """`gc`. retired: steps that a dry run would retire."""

    dry_run: bool
    retired: list[int]
    attempts: list[RetiredAttempt]
    files: int
    bytes: int
    failed: list[str]


class Changed(_Output):
    """`pin`, `unpin`, `quarantine`, `release`."""

    changed: bool
    version: int
    step: LiveStep | None


class Adoption(_Output):
    """`adopt`. older: steps left where they are, because the run has newer ones."""

    root: str
    steps: list[int]
    older: list[int]
    bytes: int


OUTPUTS: dict[str, Any] = {
    "ls": Listing,
    "inspect": Inspection,
    "log": list[Entry],
    "watch": Now,
    "doctor": Diagnosis,
    "plan": Plan,
    "report": Report,
    "export": Exported,
    "verify": list[Verified],
    "diff": Comparison,
    "gc": Collected,
    "adopt": Adoption,
    "recover": Recovery,
    **dict.fromkeys(("pin", "unpin", "quarantine", "release"), Changed),
}


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema of a command's --json. Raises UsageError."""
    if command not in OUTPUTS:
        raise UsageError(f"schema {command}: choose one of {', '.join(OUTPUTS)}")
    return msgspec.json.schema(OUTPUTS[command])
