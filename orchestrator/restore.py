"""Restoring: choose a committed step, check it, match the target, read. For agents (all processes) and for readers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from orchestrator import arrays, errors, failpoints, heartbeat, journal, layout, plan
from orchestrator.arrays import Load
from orchestrator.catalog import Catalog
from orchestrator.errors import (
    Damaged,
    Mismatch,
    NewerFormat,
    NothingToRestore,
    OrchestratorError,
    SaveFailed,
    StorageError,
    UnsafeKey,
)
from orchestrator.events import Restored as RestoredEvent
from orchestrator.events import SteppedDown, emit
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
    the checking of files whose chunks carry no checksum."""

    partial: bool = False
    cast: bool = False
    strict: bool = False
    share: tuple[int, int] = (0, 1)


def read_step(
    catalog: Catalog, live: LiveStep, like: Any, args: RestoreArgs, on_bytes: Callable[[int], None] | None = None
) -> Restored:
    """Restore exactly this attempt into `like`'s structure, shapes, dtypes and shardings.

    `like`: a pytree of jax.ShapeDtypeStruct or arrays (numpy leaves are restored as numpy); None gives nested dicts of
    numpy arrays. Raises Mismatch before any array is read, Damaged if anything stored is not what was saved.
    """
    manifest = catalog.manifest(live)
    catalog.check_sizes(live, manifest)
    saved = catalog.intent(live, manifest).tree
    extra = catalog.extra(live, manifest)
    if any(leaf.foreign for leaf in saved.leaves):
        catalog.check_files(live, manifest, layout.STATE, args.share)
    prefix = layout.attempt_prefix(live.step, live.attempt)
    directory = f"{catalog.url}/{prefix}{layout.STATE}"
    if like is None:
        values = arrays.load(directory, [Load(leaf) for leaf in saved.leaves], on_bytes, manifest.chunks)
        state: Any = _nested(saved.leaves, values)
    else:
        wanted, leaves, treedef = targets(like)
        where = f"{catalog.url} {layout.shown(live.step, live.attempt)}"
        chosen = plan.match(saved, wanted, partial=args.partial, cast=args.cast, where=where)
        loads = [_load(leaf, target, args) for leaf, target in zip(chosen, leaves, strict=True) if leaf is not None]
        loaded = iter(arrays.load(directory, loads, on_bytes, manifest.chunks))
        values = [target if leaf is None else next(loaded) for leaf, target in zip(chosen, leaves, strict=True)]
        fitted = [_as_target(*each) for each in zip(chosen, leaves, values, strict=True)]
        state = jax.tree_util.tree_unflatten(treedef, fitted)
    return Restored(
        step=live.step,
        state=state,
        extra={**extra.extra, "timestamp": extra.timestamp},
        metrics=extra.metrics,
        process_states=catalog.process_states(live, manifest),
    )


def problems(catalog: Catalog, live: LiveStep, on_file: Callable[[str], None] | None = None) -> list[str]:
    """Read an attempt back whole: every file, then every chunk, which also tells another save's files from its own.
    What is not as it was saved, one line each; [] if all is."""
    found = catalog.problems(live, on_file)
    if found:
        return found
    directory = f"{catalog.url}/{layout.attempt_prefix(live.step, live.attempt)}{layout.STATE}"
    try:
        return arrays.check(directory, catalog.manifest(live).chunks)
    except OrchestratorError as error:
        return [str(error)]


def _load(leaf: LeafSpec, target: Any, args: RestoreArgs) -> Load:
    if not leaf.kind_stored or isinstance(target, int | float | complex):
        return Load(leaf)
    dtype = target.dtype if args.cast and leaf.kind != "key" else None
    return Load(leaf, arrays.sharding_of(target), dtype)


def _as_target(leaf: LeafSpec | None, target: Any, value: Any) -> Any:
    """A loaded value as the target wants it: empty containers are the target's own (an optax EmptyState stays one), a
    Python number and an array without dimensions stand for each other."""
    if leaf is None or leaf.kind in ("none", "empty"):
        return target
    if isinstance(target, int | float | complex) and leaf.kind_stored:
        return type(target)(value)
    if leaf.number and not leaf.kind_stored and hasattr(target, "dtype"):
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
) -> Restored | None:
    """The newest good step (or `step`) on every process of the job; None if the run has no steps yet. Main thread.

    Process 0 chooses and broadcasts; if any process finds the step damaged, all agree, process 0 quarantines it in
    the journal and the next newest is tried. A step that was asked for, and `strict`, never step down. `back` leaves
    out that many of the newest steps: what a supervisor asks for after a crash loop.
    """
    started = time.monotonic()
    args = replace(args, share=(rendezvous.process, rendezvous.count))
    tried = 0
    while True:
        choice = agree(rendezvous, "restore: which step", timeout_s, partial(_choose, catalog, step, back))
        if choice is None:
            if tried:
                raise NothingToRestore(
                    f"{catalog.url}: all {tried} restorable steps are damaged; see `orchestrator log`"
                )
            return None
        failpoints.hit("restore.chosen")
        live = journal.find(catalog.entry(choice[0]), choice[1])
        assert live is not None  # process 0 found it in that very entry
        read_bytes = 0

        def count(more: int) -> None:
            nonlocal read_bytes
            read_bytes += more
            heartbeat.beat("restoring", None)

        restored, error = _try(partial(read_step, catalog, live, like, args, count))
        told = None if error is None else {"kind": type(error).__name__, "text": str(error)}
        answers = rendezvous.gather(f"restore: step {live.step}", told, timeout_s)
        found = next(((index, answer) for index, answer in enumerate(answers) if answer), None)
        if found is None:
            failpoints.hit("restore.after")
            heartbeat.beat("restored", live.step, restored_step=live.step)
            emit(RestoredEvent(live.step, live.attempt, time.monotonic() - started, read_bytes))
            return restored
        index, answer = found
        if answer["kind"] not in _DAMAGE:  # a target that does not fit, say: no other step would help
            raise error or as_error(index, answer["kind"], answer["text"])
        reason = f"process {index} ({rendezvous.hosts.get(index, '?')}): {answer['text']}"
        if step is not None or args.strict:
            raise Damaged(f"{catalog.url} {layout.shown(live.step, live.attempt)} cannot be restored: {reason}")
        emit(SteppedDown(live.step, live.attempt, reason))
        tried += 1
        rule = partial(journal.quarantine, step=live.step, attempt=live.attempt, reason=reason[:1000])
        agree(rendezvous, "restore: quarantine", timeout_s, partial(_append, catalog, rule))


_DAMAGE = frozenset(kind.__name__ for kind in (Damaged, UnsafeKey, NewerFormat, StorageError))


def _append(catalog: Catalog, rule: Callable[[Head | None, journal.Stamp], journal.Next]) -> None:
    catalog.append(rule)


def _choose(catalog: Catalog, step: int | None, back: int) -> tuple[int, int] | None:
    """(journal version, step) of what to restore. `back`: leave out that many of the newest."""
    if step is None and back:
        head = catalog.require_head()
        good = [live for live in head.live if live.restorable]
        if len(good) <= back:
            raise NothingToRestore(
                f"{catalog.url}: asked to leave out the newest {back} of {len(good)} restorable steps"
            )
        return head.version, good[-1 - back].step
    live = catalog.find(step)
    return (catalog.require_head().version, live.step) if live else None


def _try(read: Callable[[], Restored]) -> tuple[Restored | None, Exception | None]:
    """The restored step, or what went wrong: the other processes must hear of it before it is raised here."""
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
        live = self._catalog.find(None)
        return live.step if live else None

    def all_steps(self) -> list[int]:
        return sorted(live.step for live in self._catalog.require_head().live if live.restorable)

    def restore(
        self, like: Any = None, *, step: int | None = None, partial: bool = False, cast: bool = False
    ) -> Restored:
        """Read a step (the newest by default) into `like`; None gives nested dicts of numpy arrays.

        Steps down past damaged steps without writing that to the journal. Raises NothingToRestore, StepNotFound,
        Mismatch, Damaged (for a step that was asked for).
        """
        args = RestoreArgs(partial=partial, cast=cast)
        if step is not None:
            live = self._catalog.find(step)
            assert live is not None  # find raises for a step that is not there
            return read_step(self._catalog, live, like, args)
        problems = []
        for live in reversed([live for live in self._catalog.require_head().live if live.restorable]):
            try:
                return read_step(self._catalog, live, like, args)
            except (Damaged, StorageError) as error:
                emit(SteppedDown(live.step, live.attempt, str(error)))
                problems.append(f"step {live.step}: {error}")
        raise NothingToRestore(f"{self._catalog.url}: nothing to restore" + "".join(f"\n  {line}" for line in problems))

    def watch(self, *, poll_s: float = 1.0, timeout_s: float | None = None) -> Iterator[int]:
        """Yield steps committed from now on, each once. Ends after `timeout_s` without a new one (None: never)."""
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
