"""Restoring: choose a committed step, check it, match the target, read. For agents (all processes) and for readers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging

from orchestrator import arguments, arrays, errors, failpoints, garbage, heartbeat, journal, layout, plan
from orchestrator.arrays import Load
from orchestrator.catalog import Catalog
from orchestrator.errors import (
    Damaged,
    Mismatch,
    NewerFormat,
    NothingToRestore,
    OrchestratorError,
    OutcomeUnknown,
    SaveFailed,
    StorageError,
    Unavailable,
    UnsafeKey,
    UsageError,
)
from orchestrator.events import Restored as RestoredEvent
from orchestrator.events import SteppedDown, emit
from orchestrator.proof import Proof, prove
from orchestrator.records import Head, Json, LeafSpec, LiveStep
from orchestrator.rendezvous import Rendezvous
from orchestrator.tree import targets


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
    the checking of files whose chunks carry no checksum. attest: compare fingerprints with the saved ones, where there
    are any. load_once: what several processes want is read by one of them (`restore_together` only). reader: who reads
    the arrays."""

    partial: bool = False
    cast: bool = False
    strict: bool = False
    share: tuple[int, int] = (0, 1)
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

    def load(self, directory: str, loads: list[Load], checksums: dict[str, str]) -> list[Any]:
        """As `arrays.load`, counted."""
        started = time.monotonic()
        values = self.reader(directory, loads, self._count, checksums)
        self.array_s += time.monotonic() - started
        return values

    def _count(self, read_bytes: int) -> None:
        self.read_bytes += read_bytes
        self.heard(read_bytes)


def read_step(
    catalog: Catalog, live: LiveStep, like: Any, args: RestoreArgs, reading: Reading | None = None
) -> Restored:
    """Restore exactly this attempt into `like`'s structure, shapes, dtypes and shardings.

    `like`: a pytree of jax.ShapeDtypeStruct or arrays (numpy leaves are restored as numpy); None gives nested dicts of
    numpy arrays. Raises Mismatch before any array is read, Damaged if anything stored is not what was saved.
    """
    return _read(catalog, live, like, args, (reading or Reading(args.reader)).load)[0]


_Loader = Callable[[str, list[Load], dict[str, str]], list[Any]]


def _read(catalog: Catalog, live: LiveStep, like: Any, args: RestoreArgs, load: _Loader) -> tuple[Restored, Proof]:
    """As `read_step`, and what this process can say of the arrays that it shares with others."""
    manifest = catalog.manifest(live)
    catalog.check_sizes(live, manifest)
    saved = catalog.intent(live, manifest).tree
    extra = catalog.extra(live, manifest)
    if any(leaf.foreign for leaf in saved.leaves):
        catalog.check_files(live, manifest, layout.STATE, args.share)
    prefix = layout.attempt_prefix(live.step, live.attempt)
    directory = f"{catalog.url}/{prefix}{layout.STATE}"
    if like is None:
        loads = [Load(leaf) for leaf in saved.leaves]
        read = load(directory, loads, manifest.chunks)
        state: Any = _nested(saved.leaves, read)
    else:
        with garbage.paused():
            wanted, leaves, treedef = targets(like)
            where = f"{catalog.url} {layout.shown(live.step, live.attempt)}"
            chosen = plan.match(saved, wanted, partial=args.partial, cast=args.cast, where=where)
            loads = [_load(leaf, target, args) for leaf, target in zip(chosen, leaves, strict=True) if leaf is not None]
        read = load(directory, loads, manifest.chunks)
        loaded = iter(read)
        values = [target if leaf is None else next(loaded) for leaf, target in zip(chosen, leaves, strict=True)]
        fitted = [_as_target(*each) for each in zip(chosen, leaves, values, strict=True)]
        state = jax.tree_util.tree_unflatten(treedef, fitted)
    known = manifest.fingerprints if args.attest else {}
    pairs = [(one.leaf, value) for one, value in zip(loads, read, strict=True) if _comparable(one, known)]
    proof = prove(pairs, known)
    restored = Restored(
        step=live.step,
        state=state,
        extra={**extra.extra, "timestamp": extra.timestamp},
        metrics=extra.metrics,
        process_states=catalog.process_states(live, manifest),
    )
    return restored, proof


def _comparable(load: Load, known: Mapping[str, str]) -> bool:
    """Whether a leaf has a saved fingerprint, and still the bits that it is of: a cast one has not."""
    return load.leaf.name in known and (load.dtype is None or str(load.dtype) == load.leaf.dtype)


_NUMBERS = (int, float, complex)


def _load(leaf: LeafSpec, target: Any, args: RestoreArgs) -> Load:
    if not leaf.kind_stored or isinstance(target, _NUMBERS):
        return Load(leaf)
    dtype = target.dtype if args.cast and leaf.kind != "key" else None
    return Load(leaf, arrays.sharding_of(target), dtype)


def _as_target(leaf: LeafSpec | None, target: Any, value: Any) -> Any:
    """A loaded value as the target wants it: empty containers are the target's own (an optax EmptyState stays one), a
    Python number and an array without dimensions stand for each other."""
    if leaf is None or leaf.kind in ("none", "empty"):
        return target
    if leaf.kind_stored:
        return type(target)(value) if isinstance(target, _NUMBERS) else value
    if leaf.number and hasattr(target, "dtype"):
        host = np.asarray(value, target.dtype)
        sharding = arrays.sharding_of(target)
        return host if sharding is None else jax.make_array_from_callback((), sharding, lambda index: host)
    return value


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

    Process 0 chooses and broadcasts; if any process finds the step damaged, all agree, process 0 quarantines it in
    the journal and the next newest is tried. So it is if the store fails, but then nothing is quarantined: it may
    answer tomorrow; if it does not answer at all, Unavailable is raised: an older step would be no answer. A step that
    was asked for, and `strict`, never step down. `back` leaves out that many of the newest steps: what a supervisor
    asks for after a crash loop. `opening` (`opening.Opening.by_restore`) opens the epoch, once the target has been
    matched and before arrays are read, or in a new run. Raises Damaged, StorageError, NothingToRestore, Mismatch.
    """
    step = arguments.saved_step(step)
    started = time.monotonic()
    args = replace(args, share=(rendezvous.process, rendezvous.count))
    passed: dict[tuple[int, str], _Objection] = {}
    while True:
        choice = agree(rendezvous, "restore: which step", timeout_s, partial(_choose, catalog, step, back, passed))
        if choice is None:
            if opening:
                opening(None, lambda told: rendezvous.gather("restore: a new run", told, timeout_s))
            return None
        failpoints.hit("restore.chosen")
        head = catalog.entry(choice[0])
        live = journal.find(head, choice[1])
        assert live is not None  # process 0 found it in that very entry
        reading = Reading(args.reader, lambda read_bytes: heartbeat.beat("restoring", None))
        load = partial(_load_once, rendezvous, live, timeout_s, reading) if args.load_once else reading.load
        if opening:
            load = partial(_once_opened, partial(opening, journal.tree_of(head)), rendezvous, live, timeout_s, load)
        outcome, error = _try(partial(_read, catalog, live, like, args, load))
        objection = _objection(rendezvous, live, outcome, error, timeout_s)
        if outcome and not objection:
            failpoints.hit("restore.after")
            heartbeat.beat("restored", live.step, restored_step=live.step)
            elapsed_s = time.monotonic() - started
            emit(RestoredEvent(live.step, live.attempt, elapsed_s, reading.read_bytes, reading.array_s))
            if rendezvous.process == 0:
                _note_restored(catalog, live)
            return outcome[0]
        assert objection is not None
        if step is not None or args.strict:
            kind = Damaged if objection.damage else StorageError
            shown = layout.shown(live.step, live.attempt)
            raise kind(f"{catalog.url} {shown} cannot be restored: {objection.reason}")
        emit(SteppedDown(live.step, live.attempt, objection.reason))
        passed[live.step, live.attempt] = objection
        if objection.damage:
            rule = partial(journal.quarantine, step=live.step, attempt=live.attempt, reason=objection.reason[:1000])
            agree(rendezvous, "restore: quarantine", timeout_s, partial(_append, catalog, rule))


class _Stopped(Exception):
    """The processes met before an exchange, and shall not begin it. `answers`: of all of them; [] if one did not come,
    which is the cause then."""

    def __init__(self, answers: list[Json]) -> None:
        super().__init__()
        self.answers = answers


Opens = Callable[[str | None, Callable[[Json], list[Json]]], list[Json]]


def _once_opened(
    opening: Callable[[Callable[[Json], list[Json]]], list[Json]],
    rendezvous: Rendezvous,
    live: LiveStep,
    timeout_s: float,
    load: _Loader,
    directory: str,
    loads: list[Load],
    checksums: dict[str, str],
) -> list[Any]:
    """As `load`, once the epoch is open. Whoever does not come here, because its target does not fit, say, tells so in
    `_objection`, which is the same meeting to the others."""
    try:
        answers = opening(lambda told: rendezvous.gather(_meeting(live), told, timeout_s))
    except Exception as error:  # on all processes
        raise _Stopped([]) from error
    if answers:
        raise _Stopped(answers)
    return load(directory, loads, checksums)


def _load_once(
    rendezvous: Rendezvous,
    live: LiveStep,
    timeout_s: float,
    reading: Reading,
    directory: str,
    loads: list[Load],
    checksums: dict[str, str],
) -> list[Any]:
    """As `reading.load`, but what several processes want is read by one of them and exchanged. An exchange begins only
    when all have read their part: whoever has failed tells so in `_objection`, which is the same meeting to the others.
    """
    values: list[Any] = [None] * len(loads)
    together = arrays.groups(loads)
    for group in together:
        parts = reading.load(directory, group.parts, checksums)
        try:
            answers = rendezvous.gather(_meeting(live), {"exchange": group.told}, timeout_s)
        except OrchestratorError as error:
            raise _Stopped([]) from error
        if answers != [{"exchange": group.told}] * len(answers):
            raise _Stopped(answers)
        for place, value in zip(group.places, group.exchanged(parts), strict=True):
            values[place] = value
    alone = sorted(set(range(len(loads))).difference(*(group.places for group in together)))
    for place, value in zip(alone, reading.load(directory, [loads[at] for at in alone], checksums), strict=True):
        values[place] = value
    return values


def _meeting(live: LiveStep) -> str:
    return f"restore: step {live.step}"


_DAMAGE = frozenset(kind.__name__ for kind in (Damaged, UnsafeKey, NewerFormat))
_STORE = frozenset(kind.__name__ for kind in (StorageError, OutcomeUnknown))


@dataclass(frozen=True)
class _Objection:
    """Why a step cannot be used. `damage`: what is stored is not what was saved; else the store could not be read."""

    reason: str
    damage: bool


def _objection(
    rendezvous: Rendezvous,
    live: LiveStep,
    outcome: tuple[Restored, Proof] | None,
    error: Exception | None,
    timeout_s: float,
) -> _Objection | None:
    """Why this step cannot be used, on all processes alike. Raises, on all, what no other step would mend."""
    proof = outcome[1] if outcome else None
    if isinstance(error, _Stopped):
        if error.__cause__:
            raise error.__cause__
        answers, error = error.answers, None
    else:
        told = {"proof": proof.told()} if proof else {"kind": type(error).__name__, "text": str(error)}
        answers = rendezvous.gather(_meeting(live), told, timeout_s)
    for index, answer in enumerate(answers):
        if "kind" in answer:
            if answer["kind"] not in _DAMAGE | _STORE:  # a target that does not fit, say
                raise error or as_error(index, answer["kind"], answer["text"])
            reason = f"process {index} ({rendezvous.hosts.get(index, '?')}): {answer['text']}"
            return _Objection(reason, answer["kind"] in _DAMAGE)
    if proof is None or not all("proof" in answer for answer in answers):
        raise UsageError("load_once: the processes ask for different arrays; `like` must be the same on all of them")
    if proof.holds([answer["proof"] for answer in answers]):
        return None
    details = rendezvous.gather(f"restore: fingerprints of step {live.step}", proof.details(), timeout_s)
    return _Objection("; ".join(proof.wrong(details)[:5]), damage=True)


def _note_restored(catalog: Catalog, live: LiveStep) -> None:
    """Journal that a run has come up on this attempt: retention keeps the newest of those. Not worth failing for."""
    try:
        catalog.append(partial(journal.trusted, step=live.step, attempt=live.attempt, trust="restored"))
    except OrchestratorError as error:
        logging.warning("%s: could not be journalled as restored: %s", layout.shown(live.step, live.attempt), error)


def _append(catalog: Catalog, rule: Callable[[Head | None, journal.Stamp], journal.Next]) -> None:
    catalog.append(rule)


def _choose(
    catalog: Catalog, step: int | None, back: int, passed: Mapping[tuple[int, str], _Objection]
) -> tuple[int, int] | None:
    """(journal version, step) of what to restore, not among `passed`; None in a new run. `back`: leave out that many of
    the newest."""
    if step is None:
        head = catalog.head()
        if head is None:
            return None
        good = [live for live in head.live if live.restorable and (live.step, live.attempt) not in passed]
        if len(good) > back:
            return head.version, good[-1 - back].step
        failed = [f"step {number}: {why.reason}" for (number, _), why in passed.items() if not why.damage]
        if failed:
            raise StorageError(f"{catalog.url}: none of {len(passed)} steps could be read; " + "; ".join(failed[:3]))
        if catalog.newest(head) or back:
            raise NothingToRestore(
                f"{catalog.url}: asked to leave out the newest {back} of {len(good)} restorable steps"
            )
        return None
    live = catalog.find(step)
    assert live is not None  # find raises for a step that is not there
    return catalog.require_head().version, live.step


def _try(read: Callable[[], tuple[Restored, Proof]]) -> tuple[tuple[Restored, Proof] | None, Exception | None]:
    """What was read, or what went wrong: the other processes must hear of it before it is raised here."""
    try:
        failpoints.hit("restore.read")
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


class Run:
    """A run opened for reading (evaluators, notebooks): no epoch is opened and nothing is ever written."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        catalog.require_head()

    def latest_step(self) -> int | None:
        """The newest restorable step; None in a new run. Raises NothingToRestore where all steps are quarantined."""
        live = self._catalog.find(None)
        return live.step if live else None

    def all_steps(self) -> list[int]:
        return sorted(live.step for live in self._catalog.require_head().live if live.restorable)

    def restore(
        self,
        like: Any = None,
        *,
        step: int | None = None,
        partial: bool = False,
        cast: bool = False,
        attest: bool = False,
    ) -> Restored:
        """Read a step (the newest by default) into `like`; None gives nested dicts of numpy arrays.

        Steps down past damaged steps without writing that to the journal. `attest`: compare fingerprints with those of
        the save, of arrays that are wholly in this process. Raises NothingToRestore, StepNotFound,
        Mismatch, Damaged (for a step that was asked for).
        """
        args = RestoreArgs(partial=partial, cast=cast, attest=attest)
        step = arguments.saved_step(step)
        if step is not None:
            live = self._catalog.find(step)
            assert live is not None  # find raises for a step that is not there
            return read_step(self._catalog, live, like, args)
        problems = []
        head = self._catalog.require_head()
        if self._catalog.newest(head) is None:
            raise NothingToRestore(f"{self._catalog.url}: nothing to restore: no step has been committed yet")
        for live in reversed([live for live in head.live if live.restorable]):
            try:
                return read_step(self._catalog, live, like, args)
            except Unavailable:  # an older step would be no answer to a store that is down
                raise
            except (Damaged, StorageError) as error:
                emit(SteppedDown(live.step, live.attempt, str(error)))
                problems.append(f"step {live.step}: {error}")
        raise NothingToRestore(f"{self._catalog.url}: nothing to restore" + "".join(f"\n  {line}" for line in problems))

    def watch(self, *, poll_s: float = 1.0, timeout_s: float | None = None) -> Iterator[int]:
        """Yield steps committed from now on, each once. Ends after `timeout_s` without a new one (None: never)."""
        arguments.seconds("poll_s", poll_s)
        if timeout_s is not None:
            arguments.seconds("timeout_s", timeout_s)
        seen = {(live.step, live.attempt) for live in self._catalog.require_head().live}
        quiet_since = time.monotonic()
        while timeout_s is None or time.monotonic() - quiet_since < timeout_s:
            fresh = [live for live in self._catalog.require_head().live if (live.step, live.attempt) not in seen]
            for live in fresh:
                seen.add((live.step, live.attempt))
                yield live.step
                quiet_since = time.monotonic()
            if not fresh:
                time.sleep(poll_s)
