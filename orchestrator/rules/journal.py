"""The journal's rules: heads, events, and how version v+1 is made out of v.

Every function takes a head and returns the next one, a `Rejected`, or None where there is nothing to change. The
caller creates the next version with put-if-absent; if another writer was first, it reads the head and applies the rule
again. Pure: time and ids come with `Stamp`. An entry is complete: a reader needs only the highest version.

Order: `live` is in commit order, so the newest step is the one committed last. After a deliberate return to an older
step (`restore(step=50)` in a run that had reached 100), the next commit is the newest, whatever its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from orchestrator import policy
from orchestrator.errors import JournalLost, OrchestratorError, StepNotFound, UsageError
from orchestrator.policy import KeepPolicy
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.json_numbers import stored_all
from orchestrator.rules.records import FORMAT, Cause, Failure, Head, JournalEvent, LiveStep, Quarantine, RetiredAttempt


@dataclass(frozen=True)
class Stamp:
    """Who writes, when, and a random id that tells this write from any other."""

    writer: str
    time: float
    write_id: str


@dataclass(frozen=True)
class FencedBy:
    """A head of a higher epoch was found: this incarnation may not change the run any more."""

    epoch: int
    writer: str


@dataclass(frozen=True)
class Rejected:
    """The rule does not allow the change; `error` says why. Nothing is written."""

    error: OrchestratorError


# Bounds on texts keep an entry small: it is read whole, often. `pins` are in all later entries while their step is
# live; the other texts are in one entry.
PINS_MAX = 100
PIN_CHARS = 200
REASON_CHARS = 4000
FAILURES_MAX = 64
CAUSE_CHARS = 2000
NAME_CHARS = 300
STEPS_NAMED = 12  # in a message


class Overtaken(OrchestratorError):
    """The run has changed since an incarnation was compared with it: compare again, then open the epoch."""


@dataclass(frozen=True)
class Compared:
    """What an incarnation was compared with: the tree of the newest restorable step, None where there was none."""

    tree: str | None


@dataclass(frozen=True)
class StoredAttempt:
    """An attempt as storage has it. whole: it has its manifest, which is written last. built_on: the version of the
    head that its records build on, -1 where that is not known. bytes: of all its files."""

    whole: bool = False
    built_on: int = -1
    bytes: int = 0


Next = Head | FencedBy | Rejected | None
Rule = Callable[[Head | None, Stamp], Next]


def successor(head: Head | None, stamp: Stamp, event: JournalEvent, **changes: object) -> Head:
    """The next entry: `head` with `changes`, by `event`."""
    base = head or Head(format=FORMAT, version=-1, epoch=0, writer="", write_id="", time=0.0, event=event)
    following = replace(
        base,
        version=base.version + 1,
        writer=_cut(stamp.writer, NAME_CHARS),
        write_id=stamp.write_id,
        time=stamp.time,
        event=_bounded(event),
    )
    return replace(following, **changes)


def _bounded(event: JournalEvent) -> JournalEvent:
    failures = tuple(
        replace(each, host=_cut(each.host, NAME_CHARS), cause=_cut(each.cause, CAUSE_CHARS))
        for each in event.failures[:FAILURES_MAX]
    )
    more = len(event.failures) - len(failures)
    left_out = f"; {more} more processes failed" if more else ""
    return replace(event, reason=_cut(event.reason, REASON_CHARS - len(left_out)) + left_out, failures=failures)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def open_epoch(head: Head | None, stamp: Stamp, *, compared: Compared | None = None) -> Next:
    """A new incarnation: epoch + 1. It fences every older one. `compared`: rejected with Overtaken if the run's newest
    step has another tree than that by now."""
    if compared is not None and tree_of(head) != compared.tree:
        return Rejected(Overtaken("another job has committed a step to this run meanwhile"))
    return successor(head, stamp, JournalEvent(kind="opened-epoch"), epoch=(head.epoch if head else 0) + 1)


def tree_of(head: Head | None) -> str | None:
    """The tree of the newest restorable step; None where there is none."""
    found = newest(head) if head else None
    return found.tree if found else None


def commit(
    head: Head | None,
    stamp: Stamp,
    *,
    epoch: int,
    entry: LiveStep,
    keep: KeepPolicy | None,
    reason: str = "",
    quarantine_keep_s: float | None = None,
) -> Next:
    """Add `entry` to the live steps and retire, in the same entry, what it replaces and what retention releases.

    A quarantined attempt is never replaced: it is put aside. `quarantine_keep_s`: how long such evidence is kept (None:
    for ever). `reason`: for the log.
    `entry` comes with all of its step's metrics; as many as a head carries stay in it.
    """
    if head is None or head.epoch != epoch:
        return _not_our_epoch(head, epoch)
    if is_live(head, entry.id) or is_aside(head, entry.id):
        return None  # the reply to our create was lost, and another writer has appended since
    if is_retired(head, entry.id):
        where = entry.id.label
        return Rejected(
            OrchestratorError(f"{where}: the journal has aborted or retired it already; it cannot be committed")
        )
    replaced = [live for live in head.live if live.step == entry.step]
    pins = tuple(pin for old in replaced for pin in old.pins)  # a pin is on the step, not on the attempt
    live = (*(old for old in head.live if old.step != entry.step), replace(carried(entry, keep), pins=pins))
    aside = (*head.aside, *(replace(old, pins=()) for old in replaced if not old.restorable))
    dropped = _dropped(live, keep, stamp.time) if keep else frozenset()
    expired = {id(old) for old in (*live, *aside) if _expired(old, stamp.time, quarantine_keep_s)}
    retired = [
        *(retired_as(old, "replaced") for old in replaced if old.restorable),
        *(retired_as(old, "retention") for old in live if old.step in dropped),
        *(retired_as(old, "quarantine_keep_s") for old in (*live, *aside) if id(old) in expired),
    ]
    steps = tuple(sorted({*dropped, *(old.step for old in live if id(old) in expired)}))
    event = JournalEvent(kind="committed", step=entry.step, attempt=entry.attempt, reason=reason, steps=steps)
    return successor(
        head,
        stamp,
        event,
        live=tuple(old for old in live if old.step not in dropped and id(old) not in expired),
        retired=(*head.retired, *retired),
        aside=tuple(old for old in aside if id(old) not in expired),
    )


def retired_as(old: LiveStep, reason: str) -> RetiredAttempt:
    return RetiredAttempt(step=old.step, attempt=old.attempt, reason=reason)


def _expired(old: LiveStep, now: float, keep_s: float | None) -> bool:
    """Whether evidence may be released. Never if its time is not recorded, nor for a pinned step."""
    return bool(keep_s is not None and old.quarantine and not old.pins and now - old.quarantine.time > keep_s)


def abort(
    head: Head | None,
    stamp: Stamp,
    *,
    epoch: int,
    attempt: AttemptId,
    failures: tuple[Failure, ...],
    reason: str,
    cause: Cause = Cause.FAILED,
) -> Next:
    """Journal that an attempt will never commit; its data may be deleted."""
    if head is None or head.epoch != epoch:
        return _not_our_epoch(head, epoch)
    if is_known(head, attempt):
        return None
    event = JournalEvent(
        kind="aborted", step=attempt.step, attempt=attempt.name, failures=failures, reason=reason, cause=cause
    )
    gone = RetiredAttempt(step=attempt.step, attempt=attempt.name, reason="aborted", cause=cause)
    return successor(head, stamp, event, retired=(*head.retired, gone))


def retire(head: Head | None, stamp: Stamp, *, keep: KeepPolicy) -> Next:
    """Apply a retention policy outside a commit (`gc --keep_last`)."""
    if head is None:
        return None
    dropped = _dropped(head.live, keep, stamp.time)
    if not dropped:
        return None
    gone = [retired_as(old, "retention") for old in head.live if old.step in dropped]
    kept = tuple(old for old in head.live if old.step not in dropped)
    return successor(
        head,
        stamp,
        JournalEvent(kind="retired", steps=tuple(sorted(dropped))),
        live=kept,
        retired=(*head.retired, *gone),
    )


def collected(head: Head | None, stamp: Stamp, *, attempts: Iterable[AttemptId]) -> Next:
    """Forget retired attempts whose data is deleted."""
    if head is None:
        return None
    done = set(attempts)
    left = tuple(gone for gone in head.retired if gone.id not in done)
    if len(left) == len(head.retired):
        return None
    return successor(
        head,
        stamp,
        JournalEvent(kind="collected", steps=tuple(sorted({attempt.step for attempt in done}))),
        retired=left,
    )


def pin(head: Head | None, stamp: Stamp, *, step: int, name: str) -> Next:
    """Keep a step whatever the retention policy says."""
    found = find(head, step) if head else None
    if len(name) > PIN_CHARS or (found and name not in found.pins and len(found.pins) >= PINS_MAX):
        return Rejected(UsageError(f"step {step}: at most {PINS_MAX} pins, of at most {PIN_CHARS} characters each"))
    return _change(head, stamp, step, "pinned", lambda live: replace(live, pins=(*live.pins, name)), name, True)


def unpin(head: Head | None, stamp: Stamp, *, step: int, name: str) -> Next:
    def without(live: LiveStep) -> LiveStep:
        return replace(live, pins=tuple(pin for pin in live.pins if pin != name))

    return _change(head, stamp, step, "unpinned", without, name, False)


def quarantine(
    head: Head | None,
    stamp: Stamp,
    *,
    attempt: AttemptId,
    reason: str,
    by_hand: bool = False,
    spare_last: bool = False,
) -> Next:
    """Make an attempt not restorable. It is evidence from now on: retention and later saves keep its data, and
    `release` makes it restorable again. by_hand: a person's decision, not proof from reading the data. spare_last:
    reject it for the only step that can be restored."""
    if head is None or not is_live(head, attempt):
        return None
    if spare_last and [live.id for live in head.live if live.restorable] == [attempt]:
        text = "is the only step that can be restored: without it no job can resume"
        return Rejected(UsageError(f"step {attempt.step} {text}; add --force to quarantine it all the same"))

    def taken(live: LiveStep) -> LiveStep:
        if not live.restorable:
            return live
        why = Quarantine(time=stamp.time, reason=reason, by_hand=by_hand, trust=live.trust)
        return replace(live, trust="quarantined", quarantine=why)

    return _change(head, stamp, attempt.step, "quarantined", taken, reason, None)


def release(
    head: Head | None, stamp: Stamp, *, step: int, attempt: str = "", reason: str = "", disproved: bool = False
) -> Next:
    """Lift the quarantine of a step: it is restorable again, with the trust that it had. `attempt`: which one of the
    step's; the latest without it. disproved: the data has been read and is whole, which lifts no quarantine by hand;
    where there is nothing to lift, nothing is changed then."""
    evidence = [old for old in (head.quarantined if head else ()) if old.step == step and attempt in ("", old.attempt)]
    there = find(head, step) if head else None
    if head is None or not evidence:
        if disproved or there:
            return None
        have = ", ".join(sorted({str(old.step) for old in head.quarantined})) if head else ""
        return Rejected(StepNotFound(f"step {step} has no quarantined attempt; quarantined steps: {have or 'none'}"))
    found = evidence[-1]
    if disproved and (found is not there or (found.quarantine and found.quarantine.by_hand)):
        return None
    if there is not None and there.restorable:
        where = found.id.label
        text = f"{where}: the step is restorable as {there.attempt}; quarantine that one first, then release this one"
        return Rejected(OrchestratorError(text))
    trust = found.quarantine.trust if found.quarantine else "committed"
    lifted = replace(found, trust=trust, quarantine=None, pins=there.pins if there else found.pins)
    event = JournalEvent(kind="released", step=step, attempt=found.attempt, reason=reason)
    aside = [old for old in head.aside if old is not found]
    if there is None:
        return successor(head, stamp, event, live=_put_back(head.live, lifted), aside=tuple(aside))
    aside += [replace(there, pins=())] if there is not found else []
    live = tuple(lifted if old is there else old for old in head.live)
    return successor(head, stamp, event, live=live, aside=tuple(aside))


def _put_back(live: tuple[LiveStep, ...], lifted: LiveStep) -> tuple[LiveStep, ...]:
    """`lifted` among the live steps: never after one of a later incarnation, as it was committed before."""
    mine = (lifted.id.epoch, lifted.step)
    after = [index for index, old in enumerate(live) if (old.id.epoch, old.step) > mine]
    at = min(after, default=len(live))
    return (*live[:at], lifted, *live[at:])


def trusted(head: Head | None, stamp: Stamp, *, attempt: AttemptId, trust: str) -> Next:
    """Record that an attempt was read back whole (`verified`), or that a run has come up on it (`restored`). Trust only
    grows, and a quarantined attempt stays quarantined."""
    if head is None or not is_live(head, attempt):
        return None

    def raised(live: LiveStep) -> LiveStep:
        return replace(live, trust=trust) if live.restorable and _LADDER[trust] > _LADDER[live.trust] else live

    return _change(head, stamp, attempt.step, trust, raised, "", None)


_LADDER = {"committed": 0, "verified": 1, "restored": 2}


def _change(
    head: Head | None,
    stamp: Stamp,
    step: int,
    kind: str,
    change: Callable[[LiveStep], LiveStep],
    reason: str,
    pinned: bool | None,
) -> Next:
    found = next((live for live in head.live if live.step == step), None) if head else None
    if head is None or found is None:
        return Rejected(StepNotFound(not_here(head, step)))
    if pinned is not None and (reason in found.pins) == pinned:
        return None
    changed = change(found)
    if changed == found:
        return None
    live = tuple(changed if entry is found else entry for entry in head.live)
    return successor(head, stamp, JournalEvent(kind=kind, step=step, attempt=found.attempt, reason=reason), live=live)


def _not_our_epoch(head: Head | None, epoch: int) -> FencedBy | Rejected:
    """Why a decision of incarnation `epoch` may not be journalled: the head must be of that very epoch."""
    if head is None:
        text = f"the journal that epoch {epoch} opened is gone; nothing can be saved to this run"
        return Rejected(JournalLost(text))
    if head.epoch > epoch:
        return FencedBy(head.epoch, head.writer)
    return Rejected(
        JournalLost(f"the journal is back at epoch {head.epoch}, after epoch {epoch} was opened; entries were removed")
    )


def _dropped(live: tuple[LiveStep, ...], keep: KeepPolicy, now: float) -> frozenset[int]:
    """Steps that retention releases. Never the newest restorable, nor the newest proven one, nor a pinned one, nor
    one that is quarantined: evidence is deleted only on request."""
    good = [entry for entry in live if entry.restorable]
    if not good:
        return frozenset()
    kept = set(kept_by(keep, good, now)) | {good[-1].step}
    proven = [entry.step for entry in good if entry.trust in ("verified", "restored")]
    kept.update(proven[-1:])
    kept.update(entry.step for entry in live if entry.pins)
    return frozenset(entry.step for entry in good if entry.step not in kept)


def kept_by(keep: KeepPolicy, good: list[LiveStep], now: float) -> frozenset[int]:
    """What `keep` keeps of restorable steps. One is kept if the head lacks the metric that decides: only extra.json may
    have it."""
    undecided = frozenset(entry.step for entry in good if not _has_metrics(entry, keep))
    judged = [entry for entry in good if entry.step not in undecided] if undecided else good
    return undecided | keep.keep(judged, now) if judged else undecided


def carried(entry: LiveStep, keep: KeepPolicy | None) -> LiveStep:
    """`entry`, which has all metrics of its step, with as many as a head carries."""
    chosen = policy.carried(entry.metrics, keep)
    omitted = len(entry.stored_metrics) - len(chosen)
    if not omitted:
        return entry
    absent = tuple(sorted((policy.needed(keep, entry.metrics) or frozenset()) - entry.stored_metrics.keys()))
    return replace(entry, stored_metrics=stored_all(chosen), metrics_omitted=omitted, metrics_absent=absent)


def _has_metrics(entry: LiveStep, keep: KeepPolicy) -> bool:
    """Whether the head has every metric of the step that `keep` uses."""
    if not entry.metrics_omitted:
        return True
    names = policy.needed(keep, entry.metrics)
    return names is not None and names <= entry.stored_metrics.keys() | set(entry.metrics_absent)


def newest(head: Head) -> LiveStep | None:
    """The restorable step committed last."""
    return next((entry for entry in reversed(head.live) if entry.restorable), None)


def find(head: Head, step: int) -> LiveStep | None:
    return next((entry for entry in head.live if entry.step == step), None)


def not_here(head: Head | None, step: int) -> str:
    """For people who have asked for a step that the run has not: those that it has, or the nearest if they are many."""
    steps = sorted(entry.step for entry in head.live) if head else []
    if len(steps) <= STEPS_NAMED:
        return f"step {step} is not in this run; it has: {', '.join(map(str, steps)) or 'no steps'}"
    near = sorted(sorted(steps, key=lambda one: abs(one - step))[:4])
    return f"step {step} is not in this run; nearest of its {len(steps)}: {', '.join(map(str, near))}"


def is_live(head: Head, attempt: AttemptId) -> bool:
    return any(live.step == attempt.step and live.attempt == attempt.name for live in head.live)


def is_retired(head: Head, attempt: AttemptId) -> bool:
    return any(gone.step == attempt.step and gone.attempt == attempt.name for gone in head.retired)


def abort_of(head: Head, attempt: AttemptId) -> tuple[str, Cause]:
    """Reason and cause of an abort that `head` still knows. Only the entry that aborts has the reason."""
    gone = next((gone for gone in head.retired if gone.id == attempt), None)
    ours = head.event.kind == "aborted" and (head.event.step, head.event.attempt) == attempt
    return (head.event.reason if ours else "") or "aborted", (gone and gone.cause) or Cause.FAILED


def is_aside(head: Head, attempt: AttemptId) -> bool:
    return any(old.step == attempt.step and old.attempt == attempt.name for old in head.aside)


def is_known(head: Head, attempt: AttemptId) -> bool:
    """Whether the head says what has become of an attempt."""
    return is_live(head, attempt) or is_retired(head, attempt) or is_aside(head, attempt)


def collectable(head: Head, found: Mapping[AttemptId, StoredAttempt] | None = None) -> tuple[RetiredAttempt, ...]:
    """Attempts whose data may be deleted: retired or aborted ones, and, out of those `found` in storage, uncommitted
    ones of an epoch below the head's (they can never commit any more). A whole one that a crash kept from its
    commit may be all that is left of its steps: it stays until a later save has replaced it.

    The caller has made sure that the journal has lost nothing (`evidence`)."""
    orphans = [
        RetiredAttempt(step=attempt.step, attempt=attempt.name, reason="orphan")
        for attempt, one in (found or {}).items()
        if attempt.epoch < head.epoch
        and not is_known(head, attempt)
        and not (one.whole and not superseded(head, attempt))
    ]
    return (*head.retired, *orphans)


def superseded(head: Head, attempt: AttemptId) -> bool:
    """Whether a restorable step, as new or newer, was committed by the same or a later incarnation."""
    epoch = attempt.epoch
    return any(old.restorable and old.step >= attempt.step and old.id.epoch >= epoch for old in head.live)
