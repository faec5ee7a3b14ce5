"""Restoring on all processes of a job: choose a committed step, match the target, read, and agree on what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import msgspec
from absl import logging

from orchestrator import arrays, errors, failpoints, gc_pause
from orchestrator.arrays import ReadRequest
from orchestrator.arrays.tree import targets
from orchestrator.errors import (
    Damaged,
    Mismatch,
    NothingToRestore,
    OrchestratorError,
    OutcomeUnknown,
    SaveFailed,
    StepRetired,
    StorageError,
    Unavailable,
    UnsafeKey,
    UsageError,
)
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.restore_check import Proof, prove
from orchestrator.observe import heartbeat
from orchestrator.observe.events import Restored as RestoredEvent
from orchestrator.observe.events import SteppedDown, emit
from orchestrator.rules import arguments, journal, keys, matching
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import Head, Json, LeafSpec, LiveStep
from orchestrator.run.journal_store import Catalog
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

Value = TypeVar("Value")


@dataclass(frozen=True)
class Restored:
    """A restored step. `state`: the target's tree. `extra`: the user's JSON with `timestamp` (seconds since the epoch)
    added. `process_states`: what each saving process gave, by its index then."""

    step: int
    state: Any
    extra: dict[str, Json]
    metrics: dict[str, float]
    process_states: dict[int, bytes]


@dataclass(frozen=True)
class RestoreArgs:
    """partial: the target may leave out saved leaves. cast: dtypes are converted to the target's.
    strict: damage raises instead of stepping down. share: (process, count) of those that restore together, and share
    the checking of files whose chunks carry no checksum. record: journal what is damaged, and what was restored
    (`restore_together` only). attest: compare fingerprints with the saved ones, where there are any. load_once: what
    several processes want is read by one of them (`restore_together` only). reader: who reads the arrays."""

    partial: bool = False
    cast: bool = False
    strict: bool = False
    share: tuple[int, int] = (0, 1)
    record: bool = True
    attest: bool = False
    load_once: bool = False
    reader: Callable[..., list[Any]] = arrays.load


@dataclass
class Reading:
    """What reading arrays by `reader` has cost so far, on this process. `heard` is called with each read's bytes."""

    reader: Callable[..., list[Any]] = arrays.load
    heard: Callable[[int], None] = lambda read_bytes: None
    read_bytes: int = 0
    array_s: float = 0.0

    def load(self, stored: StoredStep, loads: list[ReadRequest]) -> list[Any]:
        """As `StoredStep.load`, counted."""
        started = time.monotonic()
        values = stored.load(loads, self._count, self.reader)
        self.array_s += time.monotonic() - started
        return values

    def _count(self, read_bytes: int) -> None:
        self.read_bytes += read_bytes
        self.heard(read_bytes)


_Loader = Callable[[StoredStep, list[ReadRequest]], list[Any]]


@dataclass(frozen=True)
class Plan:
    """A step and a target that fit each other: what will be read, and how it becomes the target's tree."""

    stored: StoredStep
    loads: list[ReadRequest]
    build: Callable[[list[Any]], Any]
    known: Mapping[str, str]  # fingerprints to compare with
    share: tuple[int, int]

    def read(self, load: _Loader) -> tuple[Restored, Proof]:
        """Read it. Also what this process can say of the arrays that it shares with others."""
        failpoints.hit("restore.read")
        stored, live = self.stored, self.stored.live
        if any(one.leaf.external for one in self.loads):  # their chunks have no checksum in the manifest
            stored.catalog.check_files(live, stored.manifest, keys.STATE, self.share)
        states = overlap.begin(partial(stored.catalog.process_states, live, stored.manifest))
        read = load(stored, self.loads)
        state = self.build(read)
        pairs = [(one.leaf, value) for one, value in zip(self.loads, read, strict=True) if _comparable(one, self.known)]
        proof = prove(pairs, self.known)
        restored = Restored(
            step=live.step,
            state=state,
            extra={**stored.extra.extra, "timestamp": stored.extra.timestamp},
            metrics=stored.extra.metrics,
            process_states=states.result(),
        )
        return restored, proof


def fit(stored: StoredStep, like: Any, args: RestoreArgs) -> Plan:
    """Match the step and `like`, a pytree of jax.ShapeDtypeStruct or arrays (numpy leaves are restored as numpy); None
    gives nested dicts of numpy arrays. Reads records and no array. Raises Mismatch, and what StoredStep raises."""
    stored.begin()
    saved = stored.intent.tree
    known = stored.manifest.fingerprints if args.attest else {}
    if like is None:
        loads = [ReadRequest(leaf) for leaf in saved.leaves]
        return Plan(stored, loads, partial(_nested, saved.leaves), known, args.share)
    with gc_pause.paused():
        wanted, leaves, treedef = targets(like)
        chosen = matching.match(saved, wanted, partial=args.partial, cast=args.cast, where=stored.where)
        shardings = arrays.shardings_of([leaf.label for leaf in wanted], leaves, stored.where)
        each = list(zip(chosen, leaves, shardings, strict=True))
        loads = [_load(leaf, target, sharding, args) for leaf, target, sharding in each if leaf is not None]

    def build(read: list[Any]) -> Any:
        loaded = iter(read)
        fitted = [target if leaf is None else _as_target(leaf, target, to, next(loaded)) for leaf, target, to in each]
        return jax.tree_util.tree_unflatten(treedef, fitted)

    return Plan(stored, loads, build, known, args.share)


def _comparable(load: ReadRequest, known: Mapping[str, str]) -> bool:
    """Whether a leaf has a saved fingerprint, and still the bits that it is of: a cast one has not."""
    return load.leaf.name in known and (load.dtype is None or str(load.dtype) == load.leaf.dtype)


_NUMBERS = (int, float, complex)


def _load(leaf: LeafSpec, target: Any, sharding: Any, args: RestoreArgs) -> ReadRequest:
    if not leaf.kind_stored or isinstance(target, _NUMBERS):
        return ReadRequest(leaf)
    dtype = target.dtype if args.cast and leaf.kind != "key" else None
    return ReadRequest(leaf, sharding, dtype)


def _as_target(leaf: LeafSpec, target: Any, sharding: Any, value: Any) -> Any:
    """A loaded value as the target wants it: empty containers are the target's own (an optax EmptyState stays one), a
    Python number and an array without dimensions stand for each other."""
    if leaf.kind in ("none", "empty"):
        return target
    if leaf.kind_stored:
        return type(target)(value) if isinstance(target, _NUMBERS) else value
    return arrays.as_array(leaf, value, target.dtype, sharding) if leaf.number and hasattr(target, "dtype") else value


def _nested(leaves: tuple[LeafSpec, ...], values: list[Any]) -> Any:
    if len(leaves) == 1 and not leaves[0].path:
        return values[0]
    root: dict[str, Any] = {}
    for leaf, value in zip(leaves, values, strict=True):
        *above, last = leaf.path
        node = root
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return root


_Passed = dict[AttemptId, str]  # attempts that are proven to be damaged -> how
_RETIRED_MAX = 20  # times that retention may be quicker than a restore


Opens = Callable[[str | None, Callable[[Json], list[Json]]], list[Json]]


def restore_together(
    catalog: Catalog,
    rendezvous: Rendezvous,
    like: Any,
    step: int | None,
    args: RestoreArgs,
    timeout_s: float,
    back: int = 0,
    opening: Opens | None = None,
) -> Restored | None:
    """The newest good step (or `step`) on every process of the job; None in a new run, which has never had one. Main
    thread.

    Process 0 chooses and broadcasts. If the step is proven to be damaged, all agree, process 0 quarantines it in the
    journal and the next newest is tried. A step that merely cannot be read is no reason for that: Unavailable is raised
    on all, and nothing is changed. A step that was asked for, and `strict`, never step down. `back` leaves out that
    many of the newest steps: what a supervisor asks for after a crash loop. `opening` (`Opening.by_restore`) opens
    the epoch, once a step and the target are known to fit on all processes, before anything is written to the journal
    or any array is read; or in a new run.
    Raises Damaged, Unavailable, NothingToRestore, Mismatch.
    """
    step = arguments.saved_step(step)
    started = time.monotonic()
    args = replace(args, share=(rendezvous.process, rendezvous.count))
    meet = partial(rendezvous.gather, "restore: open the epoch", timeout_s=timeout_s)
    together = _Together(catalog, rendezvous, timeout_s, step is not None or args.strict, args.record)
    while True:
        decide = partial(_choose, catalog, step, back, together.passed)
        choice = agree(rendezvous, "restore: which step", timeout_s, decide)
        if choice is None:
            if opening:
                opening(None, meet)
            return None
        failpoints.hit("restore.chosen")
        head = decode(choice[1].encode(), Head, f"{catalog.url}: what process 0 has read")
        live = journal.find(head, choice[0])
        assert live is not None  # process 0 found it in that very entry
        stored = StoredStep(catalog, live)
        fitted = together.all_of(stored, "fits", partial(fit, stored, like, args))
        if fitted is None:
            continue
        if opening:
            opening(journal.tree_of(head), meet)
        together.quarantine()
        reading = Reading(args.reader, lambda read_bytes: heartbeat.record("restoring", None))
        load: _Loader = partial(_load_once, rendezvous, timeout_s, reading) if args.load_once else reading.load
        noted = rendezvous.process == 0 and args.record and live.trust != "restored"
        early = overlap.begin(catalog.head) if noted else None  # it takes no longer than the arrays
        outcome = together.all_of(stored, "", partial(fitted.read, load))
        if outcome is not None and (not args.attest or together.proves(stored, outcome[1])):
            failpoints.hit("restore.after")
            heartbeat.record("restored", live.step, restored_step=live.step)
            elapsed_s = time.monotonic() - started
            emit(RestoredEvent(live.step, live.attempt, elapsed_s, reading.read_bytes, reading.array_s))
            if noted:
                _note_restored(catalog, live, early)
            return outcome[0]
        together.quarantine()


class _Stopped(Exception):
    """The processes met before an exchange, and shall not begin it. `answers`: of all of them; [] if one did not come,
    which is the cause then."""

    def __init__(self, answers: list[Json]) -> None:
        super().__init__()
        self.answers = answers


def _load_once(
    rendezvous: Rendezvous, timeout_s: float, reading: Reading, stored: StoredStep, loads: list[ReadRequest]
) -> list[Any]:
    """As `reading.load`, but what several processes want is read by one of them and exchanged. An exchange begins only
    when all have read their part: whoever has failed tells so in `_Together.all_of`, which is the same meeting to the
    others.
    """
    values: list[Any] = [None] * len(loads)
    together = arrays.exchange_groups(loads)
    for group in together:
        parts = reading.load(stored, group.slab_requests)
        try:
            answers = rendezvous.gather(_meeting(stored, ""), {"exchange": group.signature}, timeout_s)
        except OrchestratorError as error:
            raise _Stopped([]) from error
        if answers != [{"exchange": group.signature}] * len(answers):
            raise _Stopped(answers)
        for place, value in zip(group.positions, group.exchanged(parts), strict=True):
            values[place] = value
    alone = sorted(set(range(len(loads))).difference(*(group.positions for group in together)))
    for place, value in zip(alone, reading.load(stored, [loads[at] for at in alone]), strict=True):
        values[place] = value
    return values


def _meeting(stored: StoredStep, what: str) -> str:
    return f"restore: step {stored.live.step}{what and ' ' + what}"


# Named, as they come from other processes. A newer format is none: this version cannot judge it.
_DAMAGE = frozenset(kind.__name__ for kind in (Damaged, UnsafeKey))
_STORE = frozenset(kind.__name__ for kind in (StorageError, Unavailable, OutcomeUnknown))


class _Together:
    """What the processes of a job find out about steps, the same on all of them. `passed`: attempts proven to be
    damaged; those that are `found` so are journalled by `quarantine`."""

    def __init__(
        self, catalog: Catalog, rendezvous: Rendezvous, timeout_s: float, never_down: bool, record: bool
    ) -> None:
        self._catalog, self._rendezvous, self._timeout_s = catalog, rendezvous, timeout_s
        self._never_down, self._record, self._retired = never_down, record, 0
        self.passed: _Passed = {}
        self._found: list[LiveStep] = []

    def all_of(self, stored: StoredStep, what: str, read: Callable[[], Value]) -> Value | None:
        """What `read` returns, if it has returned on all processes. None if another step is to be tried: this one is
        damaged, or retired since. Raises, on all, what no other step would mend."""
        outcome, error = _try(read)
        if isinstance(error, _Stopped):
            if error.__cause__:
                raise error.__cause__
            answers, error = error.answers, None
        else:
            answers = self._rendezvous.gather(_meeting(stored, what), _told(error), self._timeout_s)
        failed = [(index, answer) for index, answer in enumerate(answers) if "kind" in answer]
        if not failed:
            if outcome is None or not all(answer == {"read": True} for answer in answers):
                text = "load_once: the processes ask for different arrays; `like` must be the same on all of them"
                raise UsageError(text)
            return outcome
        for index, answer in failed:
            if answer["kind"] not in {*_DAMAGE, *_STORE, StepRetired.__name__}:  # a target that does not fit, say
                raise error or as_error(index, answer["kind"], answer["text"])
        if any(answer["kind"] == StepRetired.__name__ for _, answer in failed):
            self._again_if_retired(failed)
            return None
        unread = [self._line(index, answer) for index, answer in failed if answer["kind"] in _STORE]
        if unread:
            raise Unavailable(f"{stored.where} cannot be read now, and nothing was changed for it: {unread[0]}")
        self._damaged(stored, *failed[0])
        return None

    def proves(self, stored: StoredStep, proof: Proof) -> bool:
        """Whether what all processes have restored is what was saved, by its fingerprints. False: it is damaged."""
        told = {"sums": proof.told(), "wrong": proof.wrong_here[:5]}
        answers = self._rendezvous.gather(_meeting(stored, "fingerprints"), told, self._timeout_s)
        lines = [line for answer in answers for line in answer["wrong"]]
        if not proof.holds([answer["sums"] for answer in answers]):
            told = proof.details()
            details = self._rendezvous.gather(_meeting(stored, "all fingerprints"), told, self._timeout_s)
            lines += proof.wrong(details)
        if not lines:
            return True
        names = [name for name, _ in lines[:3]]
        text = "; ".join(line for _, line in lines[:5])
        judge = partial(stored.judge_fingerprints, names, text)
        try:
            agree(self._rendezvous, _meeting(stored, "stored fingerprints"), self._timeout_s, judge)
        except Damaged as proof:
            self._pass(stored.live, str(proof))
        return False

    def quarantine(self) -> None:
        """Journal what was found to be damaged."""
        while self._found and self._record:
            live = self._found.pop(0)
            reason = self.passed[live.id][:1000]
            rule = partial(journal.quarantine, attempt=live.id, reason=reason)
            agree(self._rendezvous, "restore: quarantine", self._timeout_s, partial(_append, self._catalog, rule))

    def _again_if_retired(self, failed: list[tuple[int, Json]]) -> None:
        self._retired += 1
        index, answer = next(each for each in failed if each[1]["kind"] == StepRetired.__name__)
        if self._never_down or self._retired > _RETIRED_MAX:
            raise StepRetired(self._line(index, answer))

    def _damaged(self, stored: StoredStep, index: int, answer: Json) -> None:
        """Process `index` has proof. What process 0 journals it has seen itself: a host with a bad cache or bad memory
        may prove anything."""

        def confirm() -> str:
            if index == 0:
                return str(answer["text"])
            try:
                stored.judge(answer["files"], answer["chunks"])
            except Damaged:
                return str(answer["text"])
            return ""

        if not agree(self._rendezvous, _meeting(stored, "damage"), self._timeout_s, confirm):
            raise Unavailable(
                f"{stored.where}: {self._line(index, answer)}; process 0 finds it as it was saved: look at that host"
            )
        self._pass(stored.live, self._line(index, answer))

    def _pass(self, live: LiveStep, reason: str) -> None:
        if self._never_down:
            shown = live.id.label
            raise Damaged(f"{self._catalog.url} {shown} cannot be restored: {reason}")
        emit(SteppedDown(live.step, live.attempt, reason))
        self.passed[live.id] = reason
        self._found.append(live)

    def _line(self, index: int, answer: Json) -> str:
        return f"process {index} ({self._rendezvous.hosts.get(index, '?')}): {answer['text']}"


def _told(error: Exception | None) -> Json:
    if error is None:
        return {"read": True}
    suspects = {"files": error.files, "chunks": error.chunks} if isinstance(error, Damaged) else {}
    return {"kind": type(error).__name__, "text": str(error), **suspects}


def _note_restored(catalog: Catalog, live: LiveStep, early: Begun[Head | None] | None) -> None:
    """Journal that a run has come up on this attempt: retention keeps the newest of those. Not worth failing for, but
    done before the restore returns: the next save's retention must know of it."""
    try:
        catalog.append(partial(journal.trusted, attempt=live.id, trust="restored"), early)
    except OrchestratorError as error:
        logging.warning("%s: could not be journalled as restored: %s", live.id.label, error)


def _append(catalog: Catalog, rule: Callable[[Head | None, journal.Stamp], journal.Next]) -> None:
    catalog.append(rule)


def _choose(catalog: Catalog, step: int | None, back: int, passed: _Passed) -> tuple[int, str] | None:
    """(step, head) of what to restore, not among `passed`; None in a new run. `back`: leave out that many of the
    newest. The head is the journal's newest entry as this process has read it, cut to what a restore looks at."""
    if step is None:
        head = catalog.head()
        if head is None:
            return None
        good = [live for live in head.live if live.restorable and live.id not in passed]
        if len(good) > back:
            return _told_of(head, good[-1 - back])
        if passed:
            catalog.look()  # what is damaged may be a newer entry's to judge: the journal itself may have lost its tail
            raise NothingToRestore(f"{catalog.url}: nothing to restore, and nothing was changed" + shown(passed))
        if catalog.newest(head) or back:
            raise NothingToRestore(
                f"{catalog.url}: asked to leave out the newest {back} of {len(good)} restorable steps"
            )
        return None
    head = catalog.head()
    return _told_of(head, catalog.found(head, step))


def _told_of(head: Head | None, live: LiveStep) -> tuple[int, str]:
    assert head is not None  # `live` is in it
    kept = tuple(one for one in head.live if one is live or one is journal.newest(head))
    return live.step, encode(msgspec.structs.replace(head, live=kept, retired=(), aside=())).decode()


def shown(passed: _Passed) -> str:
    """A line for each step that is damaged."""
    return "".join(f"\n  step {attempt.step}: {reason}" for attempt, reason in passed.items())


def _try(read: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """What was read, or what went wrong: the other processes must hear of it before it is raised here."""
    try:
        return read(), None
    except Exception as error:
        return None, error


def agree(rendezvous: Rendezvous, name: str, timeout_s: float, decide: Callable[[], Json]) -> Any:
    """What process 0's `decide` returned, on every process; what it raised, it raises, and the others too."""
    failure: Exception | None = None
    message: Json = None
    if rendezvous.process == 0:
        try:
            message = {"value": decide()}
        except Exception as error:  # told to all before it is raised here
            failure, message = error, {"error": type(error).__name__, "text": str(error)}
    answer = rendezvous.broadcast(name, message, timeout_s)
    if failure:
        raise failure
    if "error" in answer:
        raise as_error(0, answer["error"], answer["text"])
    return answer["value"]


def as_error(process: int, name: str, text: str) -> Exception:
    """Another process's error, of the same kind where it is one of ours."""
    kind = getattr(errors, name, None)
    message = f"process {process}: {text}"
    # Mismatch and SaveFailed take more than a message.
    if isinstance(kind, type) and issubclass(kind, OrchestratorError) and not issubclass(kind, Mismatch | SaveFailed):
        return kind(message)
    return OrchestratorError(f"process {process}: {name}: {text}")
