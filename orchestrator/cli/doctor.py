"""`orchestrator doctor`: what could hurt this run next, and what to do about it. Reads records, not array data.

Each check is a function that yields findings; one that fails is itself a finding. With --read_only nothing is written;
else one small object is created under `.tmp/` and deleted, to see what the store really does.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from orchestrator.cli import host_checks, machine_checks, record_checks, render, tier_checks
from orchestrator.cli.command import EVENTS, Command, Flag, Flags, Result, open_store
from orchestrator.cli.finding import LEVELS, RECOVER, ExaminedRun, Finding, Level
from orchestrator.errors import EXIT_DAMAGED, EXIT_FAILED, EXIT_OK, Damaged, JournalLost, OrchestratorError
from orchestrator.observe.event_log import directory_of
from orchestrator.rules.records import Head, JournalEvent

Check = Callable[[ExaminedRun], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "journal": record_checks.journal_entries,
    "steps": record_checks.steps,
    "quarantine": record_checks.quarantined,
    "orphans": record_checks.orphans,
    "strangers": record_checks.strangers,
    "space": machine_checks.space,
    "permissions": machine_checks.permissions,
    "store": machine_checks.store,
    "durability": machine_checks.disk,
    "clocks": machine_checks.clocks,
    "hosts": host_checks.hosts,
    "tiers": tier_checks.tiers,
    "versions": machine_checks.versions,
}
_TONES: dict[Level, render.Tone] = {"ok": "good", "warn": "warn", "bad": "bad", "damage": "bad"}
_CLAUSES = re.compile(
    r"""(?:'[^']*'|"[^"]*"|[^;]|;(?! ))+"""
)  # of what to do: `; ` is between them, but for quoted names
_ALIKE_MAX = 10  # findings of one level and check
_TEXT_AT = 21  # the column in which what was found begins
# What can be checked where the journal's newest entry cannot be read.
WITHOUT_HEAD = ("permissions", "store", "durability", "versions")
_NO_HEAD = Head(format=0, version=-1, epoch=0, writer="", write_id="", time=0.0, event=JournalEvent(kind=""))


class Diagnosis(Result, frozen=True):
    """`doctor`."""

    root: str
    worst: Level
    findings: tuple[Finding, ...]


def run(root: str, flags: Flags) -> Diagnosis:
    store = open_store(root)
    events_dir = directory_of(store.url, flags["events_dir"])
    checks = CHECKS
    findings: list[Finding] = []
    try:
        head = store.require_head()
    except (JournalLost, Damaged) as error:
        findings.append(Finding("journal", "damage", str(error), RECOVER))
        head = _NO_HEAD
        checks = {name: CHECKS[name] for name in WITHOUT_HEAD}
    examined = ExaminedRun(store, flags["read_only"], events_dir, head)
    findings += [finding for name, check in checks.items() for finding in _findings(name, check, examined)]
    worst: Level = max((finding.level for finding in findings), key=LEVELS.index, default="ok")
    return Diagnosis(store.url, worst, tuple(_for_shell(finding, root) for finding in findings))


def _findings(name: str, check: Check, examined: ExaminedRun) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(examined))
    except (OrchestratorError, OSError) as error:
        found.append(Finding(name, "bad", f"could not be checked: {error}", "fix this, then run doctor again"))
    return found


def _for_shell(finding: Finding, root: str) -> Finding:
    """The run's own root in what to do, so that it can be pasted."""
    return replace(finding, do=re.sub(r"\bROOT\b", lambda found: shlex.quote(root), finding.do))


def show(diagnosis: Diagnosis, flags: Flags) -> Iterator[render.Shown]:
    """The worst first; of what is good only how much."""
    words = {level: level if level == "ok" else level.upper() for level in LEVELS}
    alike: Counter[tuple[Level, str]] = Counter()
    for finding in sorted(diagnosis.findings, key=lambda one: -LEVELS.index(one.level)):
        alike[kind := (finding.level, finding.check)] += 1
        if alike[kind] > _ALIKE_MAX and not flags["all"]:
            continue
        if finding.level != "ok" or flags["all"]:
            line = f"{words[finding.level]:<6}  {finding.check:<11}  {finding.text}"
            yield render.hanging(line, _TEXT_AT, _TONES[finding.level])
        for index, choice in enumerate(_CLAUSES.findall(finding.do)):
            yield render.hanging(f"{'' if index else 'do: ':>{_TEXT_AT}}{choice.strip()}", _TEXT_AT + 2)
    for (level, check), count in alike.items():
        if count > _ALIKE_MAX and level != "ok" and not flags["all"]:
            line = f"{words[level]:<6}  {check:<11}  ... and {count - _ALIKE_MAX} more like these (--all shows them)"
            yield render.hanging(line, _TEXT_AT, _TONES[level])
    counts = {level: sum(one.level == level for one in diagnosis.findings) for level in reversed(LEVELS)}
    found = ", ".join(f"{count} {words[level]}" for level, count in counts.items() if count)
    more = "" if flags["all"] or not counts["ok"] else " (--all shows them)"
    yield render.toned(f"{diagnosis.root}: {found}{more}", _TONES[diagnosis.worst])


def exit_code(diagnosis: Diagnosis) -> int:
    """4 if something is damaged, 1 if a job hangs or something will hurt the next save or restore, else 0."""
    return {"damage": EXIT_DAMAGED, "bad": EXIT_FAILED}.get(diagnosis.worst, EXIT_OK)


COMMAND = Command(
    run,
    show,
    "what could hurt this run next, and what to do about it",
    flags=(
        Flag("all", bool, False, "show what is good, too, and all of many alike"),
        Flag("read_only", bool, False, "do not try out the store with a file of its own"),
        EVENTS,
    ),
    detail="Exit code 1 if the job hangs, or something will hurt the next save or restore; 4 if something is damaged.",
    examples=("orchestrator doctor /data/run", "orchestrator doctor /data/run --json | jq -r .worst"),
    exit_code=exit_code,
)
