"""One committed step as the tree that a caller asks for, read by this process: choose, match, read, check.

Knows nothing of other processes: `orchestrator.reader` needs no more than this, and `restore` does it on every process
of a job. It is here, and not in `run/` or `arrays/`, because it joins the two: a step's records and its arrays.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax

from orchestrator import arrays, failpoints, gc_pause
from orchestrator.arrays import ReadRequest
from orchestrator.job.restore_check import Proof, prove
from orchestrator.observe.events import AGREEING, READING, RestorePhase, emit
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head, Json, LiveStep
from orchestrator.run import stored_arrays
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

DamagedSteps = Mapping[AttemptId, str]  # attempts that are proven to be damaged -> how


@dataclass(frozen=True)
class Restored:
    """A restored step. `state`: the target's tree. `extra`: the user's JSON with `timestamp` (seconds since the epoch)
    added. `process_states`: what each saving process gave, by its index then. `sources`: how many bytes of arrays this
    process has read from where: "memory" (this host's tier), "peers" (those of other hosts), "store"."""

    step: int
    state: Any
    extra: dict[str, Json]
    metrics: dict[str, float]
    process_states: dict[int, bytes]
    sources: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        # Never the arrays: to show them, they would be fetched from the devices.
        leaves = jax.tree.leaves(self.state)
        state_bytes = sum(getattr(leaf, "nbytes", 0) for leaf in leaves)
        own = ", ".join(f"{process}: {len(body)} B" for process, body in self.process_states.items())
        return (
            f"Restored(step={self.step}, state=<{len(leaves)} leaves, {state_bytes / 2**20:.1f} MiB>, "
            f"metrics={reprlib.repr(self.metrics)}, extra={reprlib.repr(self.extra)}, process_states={{{own}}})"
        )


@dataclass(frozen=True)
class ReadOptions:
    """How a step is read into a target. partial: the target may leave out saved leaves. cast: dtypes are converted to
    the target's. attest: compare fingerprints with the saved ones, where there are any. share: (process, count) of
    those that restore together, and share the checking of files whose chunks carry no checksum. reader: what reads
    arrays, as `arrays.load` does."""

    partial: bool = False
    cast: bool = False
    attest: bool = False
    share: tuple[int, int] = (0, 1)
    reader: Callable[..., list[Any]] = arrays.load


REPORT_S = 1.0  # from one event about a restore that is reading to the next


@dataclass
class ArrayReads:
    """Reads arrays by `reader`, and counts what that has cost this process so far. `on_bytes`: called with the bytes of
    each read, from the thread that has read them. `expected`: all that is going to be read, in however many calls."""

    reader: Callable[..., list[Any]] = arrays.load
    on_bytes: Callable[[int], None] = lambda read_bytes: None
    expected: Sequence[ReadRequest] = ()
    read_bytes: int = 0
    array_s: float = 0.0
    _started_s: float = field(default_factory=time.monotonic)
    _reported_s: float = field(default_factory=time.monotonic)
    _total_bytes: int | None = None

    def load(self, stored: StoredStep, requests: Sequence[ReadRequest]) -> list[Any]:
        """As `stored_arrays.load`. What takes longer than REPORT_S is reported."""
        started = time.monotonic()
        try:
            return stored_arrays.load(stored, requests, partial(self._count, stored.live), self.reader)
        finally:
            self.array_s += time.monotonic() - started
            if self._total_bytes is not None:
                self._report(stored.live, AGREEING)

    def sources(self, stored: StoredStep) -> dict[str, int]:
        """How many of the bytes that this process has read came from where."""
        return stored_arrays.sources(stored, self.read_bytes)

    def _count(self, live: LiveStep, read_bytes: int) -> None:
        self.read_bytes += read_bytes
        self.on_bytes(read_bytes)
        if time.monotonic() - self._reported_s >= REPORT_S:
            self._report(live, READING)

    def _report(self, live: LiveStep, phase: str) -> None:
        self._reported_s = time.monotonic()
        if self._total_bytes is None:  # only now: short restores need not know
            self._total_bytes = arrays.bytes_to_read(self.expected)
        elapsed_s = self._reported_s - self._started_s
        emit(RestorePhase(live.step, live.attempt, phase, elapsed_s, self.read_bytes, self._total_bytes))


@dataclass(frozen=True)
class ReadPlan:
    """A step and a target that fit each other: what is to be read (`requests`), and how it becomes the target's tree.
    Between `begin` and `finish` whoever holds the plan reads `requests`, in order."""

    stored: StoredStep
    requests: Sequence[ReadRequest]
    build: Callable[[Sequence[Any]], Any]
    fingerprints: Mapping[str, str]  # of the save, to be compared with
    share: tuple[int, int]

    def begin(self) -> Begun[dict[int, bytes]]:
        """What comes before the arrays; the process states are read beside them."""
        failpoints.hit("restore.read")
        stored = self.stored
        if any(one.leaf.external for one in self.requests):  # their chunks have no checksum in the manifest
            stored.read_in_store()
            stored.check_files(keys.STATE, self.share)
        return overlap.begin(stored.process_states)

    def finish(self, values: list[Any], process_states: Begun[dict[int, bytes]]) -> tuple[Restored, Proof]:
        """The restored step, and this process's share of the proof that it is what was saved."""
        state = self.build(values)
        read = zip(self.requests, values, strict=True) if self.fingerprints else ()
        restored = [(request.leaf, value) for request, value in read if _is_comparable(request, self.fingerprints)]
        proof = prove(restored, self.fingerprints)
        extra = self.stored.extra
        return (
            Restored(
                step=self.stored.live.step,
                state=state,
                extra={**extra.extra, "timestamp": extra.timestamp},
                metrics=extra.metrics,
                process_states=process_states.result(),
            ),
            proof,
        )


def match_target(stored: StoredStep, like: Any, options: ReadOptions) -> ReadPlan:
    """Match the step and `like`, a pytree of jax.ShapeDtypeStruct or arrays (numpy leaves are restored as numpy); None
    gives nested dicts of numpy arrays. Reads records and no array. Raises Mismatch, and what StoredStep raises."""
    stored.read_ahead()
    with gc_pause.paused():
        stored.check_sizes()
        saved = stored.intent.tree
    fingerprints = stored.manifest.fingerprints if options.attest else {}
    with gc_pause.paused():
        found = arrays.match_tree(saved, like, partial=options.partial, cast=options.cast, where=stored.where)
    return ReadPlan(stored, found.requests, found.build, fingerprints, options.share)


def read_step(
    store: JournalStore, live: LiveStep, like: Any, options: ReadOptions, reads: ArrayReads | None = None
) -> Restored:
    """Restore exactly this attempt into `like`'s structure, shapes, dtypes and shardings: see `match_target`.

    Raises Mismatch before any array is read, Damaged, StepRetired, Unavailable.
    """
    return read_stored(store.step(live), like, options, reads)


def read_stored(stored: StoredStep, like: Any, options: ReadOptions, reads: ArrayReads | None = None) -> Restored:
    """As `read_step`, of a step wherever it is."""
    plan = match_target(stored, like, options)
    process_states = plan.begin()
    reads = reads or ArrayReads(options.reader, expected=plan.requests)
    values = reads.load(stored, plan.requests)
    restored, proof = plan.finish(values, process_states)
    if proof.wrong_here:
        names = [name for name, _ in proof.wrong_here]
        stored_arrays.judge_fingerprints(stored, names, "; ".join(line for _, line in proof.wrong_here[:5]))
    return replace(restored, sources=reads.sources(stored))


def candidates(head: Head, damaged: DamagedSteps) -> list[LiveStep]:
    """The steps to choose from, oldest first: restorable ones that are not among the `damaged`."""
    return [live for live in head.live if live.restorable and live.id not in damaged]


def listed(damaged: DamagedSteps) -> str:
    """A line for each step that is damaged."""
    return "".join(f"\n  step {attempt.step}: {reason}" for attempt, reason in damaged.items())


# From values that were read to leaves of the target.


def _is_comparable(request: ReadRequest, fingerprints: Mapping[str, str]) -> bool:
    """Whether a leaf has a saved fingerprint, and still the bits that it is of: a cast one has not."""
    unchanged = request.dtype is None or str(request.dtype) == request.leaf.dtype
    return unchanged and request.leaf.name in fingerprints
