"""The invariants of the on-disk contract, stated once as pure functions of what is stored and what was promised.

Each returns one line per violation, beginning with the invariant's number ("fence": the epoch rule that all rest on);
[] means that it holds. They are written against the contract and use nothing of `journal` or `attempt`.
`heads`: all journal entries in order; versions have no gaps but below a `recovered` entry. `acked`: (step, attempt) of
every save that was reported as saved. `stored`: (step, attempt) -> (whether it has a manifest, the version that its
records build on, -1 if they do not tell) of every attempt in storage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head, LiveStep


def restorable(head: Head | None) -> list[LiveStep]:
    """What may be restored, in commit order, newest last."""
    return [live for live in head.live if live.trust != "quarantined"] if head else []


def live_attempts(head: Head) -> set[AttemptId]:
    return {live.id for live in head.live}


def evidence(head: Head) -> set[AttemptId]:
    """The attempts that are quarantined, whether their step was committed again or not."""
    return {live.id for live in (*head.live, *head.aside) if live.trust == "quarantined"}


def listing(head: Head | None, listed: Collection[int], newest: int | None) -> list[str]:
    """1: what readers are shown (`listed` steps, `newest` among them) is what the highest entry says."""
    want = [live.step for live in restorable(head)]
    problems = []
    if sorted(listed) != sorted(want):
        problems.append(f"1: readers see steps {sorted(listed)}, the head has {sorted(want)}")
    if newest != (want[-1] if want else None):
        problems.append(f"1: the newest step is read as {newest}, the head says {want[-1] if want else None}")
    return problems


def linear(heads: Sequence[Head], trees: Mapping[str, str | None] | None = None) -> list[str]:
    """2, 6, 8, 9 and fence: the journal is one line of complete entries, each a legal successor of the one before.
    `trees`: writer -> the tree that it saves, None of one that only reads."""
    problems = []
    for version, head in enumerate(heads):
        if head.version != (heads[version - 1].version + 1 if version else 0) and head.event.kind != "recovered":
            problems.append(f"2: entry {version} says it is version {head.version}")
    if heads and heads[0].event.kind != "recovered" and (heads[0].event.kind != "opened-epoch" or heads[0].epoch != 1):
        problems.append("2: the first entry does not open epoch 1")
    openers: dict[int, str] = {}
    committed: set[AttemptId] = set()
    ended: set[AttemptId] = set()
    for head in heads:
        event = head.event
        if event.kind == "opened-epoch":
            if head.epoch in openers:
                problems.append(
                    f"fence: epoch {head.epoch} is opened twice, by {openers[head.epoch]} and {head.writer}"
                )
            openers[head.epoch] = head.writer
        if event.kind in ("committed", "aborted"):
            problems += _decision(head, openers, committed, ended)
        ended |= {gone.id for gone in head.retired}
    for before, after in itertools.pairwise(heads):
        problems += successor(before, after)
    return problems + (opened(heads, trees) if trees else [])


def opened(heads: Sequence[Head], trees: Mapping[str, str | None]) -> list[str]:
    """9 and 13: whoever opens an epoch saves or restores, and the run's newest step is of its own job."""
    problems = []
    for before, after in itertools.pairwise((None, *heads)):
        assert after is not None
        if after.event.kind != "opened-epoch" or after.writer not in trees:
            continue
        where = f"v{after.version}: epoch {after.epoch} is opened by {after.writer}"
        newest = restorable(before)[-1:]
        if trees[after.writer] is None:
            problems.append(f"13: {where}, which only reads")
        elif newest and newest[0].tree != trees[after.writer]:
            problems.append(f"9: {where}, but the run is of another job")
    return problems


def _decision(head: Head, openers: dict[int, str], committed: set[AttemptId], ended: set[AttemptId]) -> list[str]:
    """Only the incarnation that opened the head's epoch decides, only on its own attempts, and only once on each."""
    event = head.event
    assert event.step is not None and event.attempt is not None
    key, where = (
        (event.step, event.attempt),
        f"v{head.version} {event.kind} {AttemptId(event.step, event.attempt).label}",
    )
    problems = []
    if AttemptId(event.step, event.attempt).epoch != head.epoch:
        problems.append(f"fence: {where}: in epoch {head.epoch}")
    if openers.get(head.epoch) != head.writer:
        problems.append(f"fence: {where}: by {head.writer}, but epoch {head.epoch} is {openers.get(head.epoch)}'s")
    if key in ended or key in committed:
        problems.append(f"2: {where}: that attempt was decided before")
    if event.kind == "committed":
        committed.add(key)
        if key not in live_attempts(head):
            problems.append(f"1: {where}: it is not live in its own entry")
    return problems


def successor(before: Head, after: Head) -> list[str]:
    """2 and 6: what one entry may change in the one before."""
    where, kind = f"v{after.version} {after.event.kind}", after.event.kind
    problems = []
    if kind == "recovered":
        return [] if after.epoch > before.epoch else [f"fence: {where}: epoch {before.epoch} becomes {after.epoch}"]
    if after.epoch != before.epoch + (kind == "opened-epoch"):
        problems.append(f"fence: {where}: epoch {before.epoch} becomes {after.epoch}")
    was, now = live_attempts(before), live_attempts(after)
    retired = {gone.id for gone in after.retired}
    if now & retired:
        problems.append(f"5: {where}: {sorted(now & retired)} are live and retired at once")
    taken = evidence(before) - evidence(after)
    if kind == "released":
        taken -= {(after.event.step, after.event.attempt)} & now
        now, was = now - {(after.event.step, after.event.attempt)}, was - evidence(before)
    by_name = (
        {key for key in taken if key[0] in after.event.steps} if kind == "retired" and after.event.reason else set()
    )
    if taken - by_name:
        problems.append(f"8: {where}: {sorted(taken - by_name)} was quarantined, and is evidence no more")
    was, now = was - by_name, now | {key for key in evidence(after) if key in was}
    if kind not in ("committed", "retired"):
        if was != now:
            problems.append(f"1: {where}: changes the live steps from {sorted(was)} to {sorted(now)}")
        return problems
    added = {(after.event.step, after.event.attempt)} if kind == "committed" else set()
    if now - was - added:
        problems.append(f"1: {where}: makes {sorted(now - was)} live")
    if (was - now) - retired:
        problems.append(f"5: {where}: {sorted(was - now)} left without being retired")
    return problems + _kept(before, after, where)


def _kept(before: Head, after: Head, where: str) -> list[str]:
    """6: retention keeps the newest restorable step, the newest proven one and everything pinned. A step that is
    committed again keeps its place under its new attempt."""
    steps = {live.step for live in after.live}
    good = restorable(before)
    problems = []
    if good and not restorable(after):
        problems.append(f"6: {where}: nothing is restorable any more")
    if good and after.event.kind == "retired" and good[-1].step not in steps:
        problems.append(f"6: {where}: drops the newest step {good[-1].step}")
    proven = [live.step for live in good if live.trust in ("verified", "restored")]
    if proven and proven[-1] not in steps:
        problems.append(f"6: {where}: drops the newest verified step {proven[-1]}")
    pinned = {(live.step, name) for live in before.live for name in live.pins}
    lost = pinned - {(live.step, name) for live in after.live for name in live.pins}
    if lost:
        problems.append(f"6: {where}: drops pinned {sorted(lost)}")
    return problems


def unchanged(before: Sequence[object], after: Sequence[object]) -> list[str]:
    """2: entries are only added. Any two comparable descriptions of the entries will do."""
    kept = after[: len(before)]
    return [] if list(kept) == list(before) else ["2: a journal entry was overwritten or removed"]


def whole(head: Head | None, damage: Callable[[LiveStep], str]) -> list[str]:
    """2: everything under every live attempt is as promised. `damage` says what is wrong with one, "" if nothing."""
    lines = [(live, damage(live)) for live in (*head.live, *head.aside)] if head else []
    return [f"2: live {live.id.label}: {text}" for live, text in lines if text]


def written(head: Head | None, step: int, attempt: str) -> list[str]:
    """2: a write below `attempt` is about to happen while `head` is the highest entry."""
    if head is None or (step, attempt) not in live_attempts(head):
        return []
    return [f"2: {AttemptId(step, attempt).label} is live, and its data is written again"]


def promises(heads: Sequence[Head], receipts: Iterable[tuple[int, str, int, str]]) -> list[str]:
    """3: what a receipt promises is there. `receipts`: (step, attempt, process, what is missing or '') of each YES.

    Only attempts that can still be committed, or are: the data of the others may go at any time.
    """
    ended = {gone.id for head in heads for gone in head.retired}
    epoch = heads[-1].epoch if heads else 0
    live = live_attempts(heads[-1]) if heads else set()
    return [
        f"3: process {process} promised {AttemptId(step, attempt).label}, but {missing}"
        for step, attempt, process, missing in receipts
        if missing
        and (step, attempt) not in ended
        and (AttemptId(step, attempt).epoch >= epoch or (step, attempt) in live)
    ]


def journalled(heads: Sequence[Head], acked: Iterable[AttemptId]) -> list[str]:
    """4: every save that was reported is committed in `heads`, which is what a power cut leaves of the journal."""
    committed = {(head.event.step, head.event.attempt) for head in heads if head.event.kind == "committed"}
    return [
        f"4: {AttemptId(*save).label} was reported as saved, but is not journalled"
        for save in sorted(acked)
        if save not in committed
    ]


def deleted(heads: Sequence[Head], step: int, attempt: str, stored: Mapping[AttemptId, tuple[bool, int]]) -> list[str]:
    """5, 8 and 12: data of `attempt` is deleted while `heads` is what a power cut would leave of the journal and
    `stored` is what storage has."""
    where = AttemptId(step, attempt).label
    head = heads[-1] if heads else None
    if proof := tail_lost(head, stored):
        return [f"12: {where} deleted, though {proof}"]
    if head is None:
        return [f"5: {where} deleted without a journal"]
    if (step, attempt) in evidence(head):
        return [f"8: {where} deleted, but it is quarantined"]
    if (step, attempt) in live_attempts(head):
        return [f"5: {where} deleted, but it is live"]
    ended = any(gone.id == (step, attempt) for entry in heads for gone in entry.retired)
    if ended:
        return []
    if AttemptId(step, attempt).epoch >= head.epoch:
        return [f"5: {where} deleted, but epoch {head.epoch} can still commit it"]
    whole = stored.get((step, attempt), (False, -1))[0]
    commits = [entry.event.step for entry in heads if entry.event.kind == "committed"]
    if whole and not any(committed is not None and committed >= step for committed in commits):
        return [f"5: {where} deleted: a whole attempt, and no newer step was committed"]
    return []


def tail_lost(head: Head | None, stored: Mapping[AttemptId, tuple[bool, int]]) -> str:
    """12: what proves that the journal has lost its tail; '' if nothing does."""
    version, epoch = (head.version, head.epoch) if head else (-1, 0)
    known = {gone.id for gone in head.retired} | live_attempts(head) | evidence(head) if head else set()
    for attempt, (_, built_on) in stored.items():
        if attempt.epoch > epoch or (built_on > version and attempt not in known):
            return f"{attempt.label} knows of entries above version {version}"
    return ""


def gone_on(before: Head | None, stored: Mapping[AttemptId, tuple[bool, int]], after: Head) -> list[str]:
    """12: an entry `after` is created where `before` was the highest; only a recovery may, if the tail is lost."""
    proof = tail_lost(before, stored)
    return (
        [f"12: v{after.version} {after.event.kind}, though {proof}"]
        if proof and after.event.kind != "recovered"
        else []
    )


def proven(after: Head, rotten: Collection[AttemptId]) -> list[str]:
    """7: what a restore quarantines is damaged. `rotten`: the attempts whose stored bytes are not what was written."""
    event = after.event
    if event.kind != "quarantined" or (event.step, event.attempt) in rotten:
        return []
    return [f"7: v{after.version}: step {event.step} is quarantined, and nothing is wrong with it"]
