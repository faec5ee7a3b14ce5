"""The checks of `orchestrator doctor` that read what the run has stored."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.finding import CLOCK_S, RECOVER, ExaminedRun, Finding, Level
from orchestrator.errors import Damaged, JournalLost, OrchestratorError, StepRetired
from orchestrator.observe.event_log import DIRECTORY
from orchestrator.rules import evidence, journal
from orchestrator.rules.journal import StoredAttempt
from orchestrator.rules.records import Head
from orchestrator.storage.directory import Root

_STALE_S = 3600.0
_RECENT = 20  # decided saves that the abort rate is about
_STRANGERS_SHOWN = 10
_ENTRIES_MAX = 2000  # of the journal that are read, the newest: the older ones decide nothing any more


def journal_entries(run: ExaminedRun) -> Iterator[Finding]:
    """Every entry can be read, none is missing, epochs and times do not go back."""
    store = run.store
    try:
        store.look()
    except JournalLost as error:
        yield Finding("journal", "damage", str(error), RECOVER)
    versions = store.versions()
    heads: list[Head] = []
    with render.bar("journal", min(len(versions), _ENTRIES_MAX)) as bar:
        for version in versions[-_ENTRIES_MAX:]:
            try:
                heads.append(store.entry(version))
            except OrchestratorError as error:
                do = "restores are not affected: only the newest entry counts; find out what wrote below the root"
                yield Finding("journal", "damage", str(error), do)
            bar.add(1)
    recovered = {head.version for head in heads if head.event.kind == "recovered"}
    for first, last in evidence.holes(versions):
        text = f"entries {first} to {last} are missing" if last > first else f"entry {first} is missing"
        if last + 1 in recovered:
            yield Finding("journal", "ok", f"{text}, which the one after it knows (recovered)")
        elif last < max(recovered, default=-1):
            yield Finding("journal", "warn", f"{text}, from before the journal was recovered", "nothing: it is history")
        else:
            yield Finding("journal", "damage", text, RECOVER)
    for before, after in itertools.pairwise(heads):
        if after.epoch < before.epoch:
            text = f"epoch goes back from {before.epoch} to {after.epoch} at version {after.version}"
            yield Finding("journal", "damage", text, "two runs share this root; give each its own")
        if after.time < before.time - CLOCK_S:
            back = render.duration(before.time - after.time)
            text = f"version {after.version} by {after.writer} is {back} older than the one before by {before.writer}"
            yield Finding("clocks", "warn", text, "synchronize the clocks of these hosts (NTP)")
    decided = [head.event for head in heads if head.event.kind in ("committed", "aborted")][-_RECENT:]
    aborted = [event for event in decided if event.kind == "aborted"]
    if len(aborted) * 5 > len(decided):
        causes = {failure.cause for event in aborted for failure in event.failures}
        causes = causes or {event.reason for event in aborted}
        text = f"{len(aborted)} of the last {len(decided)} saves were aborted: {'; '.join(sorted(causes))[:300]}"
        yield Finding("saves", "bad", text, "orchestrator log ROOT --last=20 names hosts and phases")
    more = "" if len(heads) == len(versions) else f" of {len(versions)}"
    yield Finding(
        "journal",
        "ok",
        f"{render.counted(len(heads), 'entry', 'entries')}{more} can be read; version {run.head.version}",
    )


def steps(run: ExaminedRun) -> Iterator[Finding]:
    """Every live step has its manifest and all files in their sizes; the newest was proven."""
    head = run.head
    for live in head.live:
        try:
            run.store.step(live).check_sizes()
        except Damaged as error:
            do = f"orchestrator verify ROOT --step={live.step}; then restore from another step, or quarantine this one"
            yield Finding("steps", "damage", str(error), do)
        except StepRetired:
            continue  # a job is at work beside us
        except OrchestratorError as error:
            do = "this says nothing about what is stored: fix what keeps it from being read, then run doctor again"
            yield Finding("steps", "bad", f"step {live.step} could not be read: {error}", do)
    newest = journal.newest(head)
    if newest is None:
        yield Finding("steps", "bad", "no step can be restored", "a job that dies now starts from nothing; save soon")
    elif newest.trust == "committed":
        text = f"newest step {newest.step} has never been read back"
        yield Finding("steps", "warn", text, f"orchestrator verify ROOT --step={newest.step}")
    size = render.size(sum(live.bytes for live in head.live))
    yield Finding(
        "steps", "ok", f"{render.counted(len(head.live), 'step')}, {size}; read back or restored: {_proven(head)}"
    )


def quarantined(run: ExaminedRun) -> Iterator[Finding]:
    """What is kept as evidence, why, and what it holds."""
    evidence = run.head.quarantined
    for live in evidence:
        why = f": {live.quarantine.reason}" if live.quarantine and live.quarantine.reason else ""
        text = f"{live.id.label} is quarantined and holds {render.size(live.bytes)}{why}"
        do = (
            f"orchestrator verify ROOT --step={live.step}; to have it restored again: orchestrator release ROOT "
            f"--step={live.step}; to delete it: orchestrator gc ROOT --quarantined={live.step}"
        )
        yield Finding("quarantine", "warn", text, do)
    if not evidence:
        yield Finding("quarantine", "ok", "no step is quarantined")


def _proven(head: Head) -> str:
    return ", ".join(str(live.step) for live in head.live if live.trust in ("verified", "restored")) or "none"


def orphans(run: ExaminedRun) -> Iterator[Finding]:
    """What nobody needs any more."""
    gone = journal.collectable(run.head, run.stored)
    size = sum(run.stored.get(each.id, StoredAttempt()).bytes for each in gone)
    if size:
        text = f"{render.counted(len(gone), 'attempt')} that can never be restored: {render.size(size)}"
        yield Finding("orphans", "warn", text, "orchestrator gc ROOT (--dry_run first)")
    stale = _stale(run.root) if run.root else 0
    if stale:
        text = f"{stale} unfinished files of an hour ago or more in {run.local}/.tmp"
        yield Finding("orphans", "warn", text, "the next process that writes to the run removes them")
    if not size:
        yield Finding("orphans", "ok", "nothing is left over")


def _stale(root: Root) -> int:
    try:
        with root.directory(".tmp") as temporaries:
            names = os.listdir(temporaries)
            times = [os.stat(name, dir_fd=temporaries, follow_symlinks=False).st_mtime for name in names]
    except FileNotFoundError:  # or gone since
        return 0
    return sum(time_s < time.time() - _STALE_S for time_s in times)


def strangers(run: ExaminedRun) -> Iterator[Finding]:
    """What stands among the run's files and is none: nothing follows it or opens it."""
    if run.root is None:  # a bucket has only objects, and those with odd names are not listed
        return
    odd = [entry for entry in run.store.storage.list("") if entry.problem]
    for entry in odd[:_STRANGERS_SHOWN]:
        do = "move what it points to back to its place, or take it away; until then nothing is read through it"
        level: Level = "warn" if entry.key.startswith(f"{DIRECTORY}/") else "bad"
        yield Finding("strangers", level, f"{run.store.url}/{entry.key} {entry.problem}", do)
    if len(odd) > _STRANGERS_SHOWN:
        yield Finding("strangers", "bad", f"... and {len(odd) - _STRANGERS_SHOWN} more", "look through the root")
    if not odd:
        yield Finding("strangers", "ok", "everything below the root is a plain file with a plain name")
