"""What the model runs: the shipped rules, and where the shells around them choose an order. Mutations replace fields.

The engine numbers heads and attempts, so that states are small and hashable, and asks each question once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from orchestrator.policy import KeepPolicy, last
from orchestrator.rules import attempt, evidence, journal, removal
from orchestrator.rules.attempt import AppendAbort, AppendCommit, Attempt, Effect, Finalize, Phase
from orchestrator.rules.attempt_id import AttemptId, name_of
from orchestrator.rules.codec import encode
from orchestrator.rules.journal import Compared, FencedBy, Rejected, Stamp
from orchestrator.rules.records import FORMAT, Box, Failure, Head, Intent, LeafSpec, LiveStep, Receipt, TreeSpec
from orchestrator.storage.memory import MemoryStorage
from orchestrator.storage.port import Created


def put(there: bytes | None, body: bytes) -> tuple[bytes, bool]:
    """(what is stored afterwards, whether that is ours): the executable specification of `create`."""
    store = MemoryStorage()
    if there is not None:
        store.create("key", there)
    created = isinstance(store.create("key", body), Created)
    return store.get("key") or b"", created


@dataclass(frozen=True)
class Rules:
    """The functions are the shipped ones. The flags are what `journal_store`, `coordinator`, `contribution`, `deletion`
    and `posix` do."""

    advance: Callable[..., attempt.Step] = attempt.advance
    open_epoch: Callable[..., journal.Next] = journal.open_epoch
    commit: Callable[..., journal.Next] = journal.commit
    abort: Callable[..., journal.Next] = journal.abort
    retire: Callable[..., journal.Next] = journal.retire
    collected: Callable[..., journal.Next] = journal.collected
    pin: Callable[..., journal.Next] = journal.pin
    quarantine: Callable[..., journal.Next] = journal.quarantine
    release: Callable[..., journal.Next] = journal.release
    discard: Callable[..., journal.Next] = removal.discard
    lost: Callable[..., str] = evidence.lost
    choose: Callable[..., evidence.Choice] = evidence.choose
    recovered: Callable[..., Head] = evidence.recovered
    trusted: Callable[..., journal.Next] = journal.trusted
    newest: Callable[[Head], LiveStep | None] = journal.newest
    collectable: Callable[..., Any] = journal.collectable
    attempt_name: Callable[[int, int], str] = name_of
    put: Callable[[bytes | None, bytes], tuple[bytes, bool]] = put
    decides_again: bool = True  # a lost race: read the head and ask the rule again
    unknown_is: str = "compared"  # a lost reply: the object is read back and compared; "ours" or "theirs" are guesses
    ids_differ: bool = True  # every stored body carries a random id
    syncs_entries: bool = True  # an append is done when the entry is durable, not when it is visible
    seals_first: bool = True  # data is durable before its receipt is written
    hands_what_is_durable: bool = True  # a member's receipt goes to its leader after its data is durable
    signs_what_is_handed: bool = True  # a leader signs for nobody who has not handed over a receipt
    settles_before_report: bool = True  # an entry read from the journal is made durable before it is believed...
    settles_before_delete: bool = True  # ...also by a collector
    retires_first: bool = True  # gc journals what it lets go before it deletes it
    readers_need_journal: bool = True  # a step is what the journal lists, not what a directory holds
    compares_first: bool = True  # a job looks at the run's tree before it opens its epoch
    looks_first: bool = True  # and whoever writes or deletes, whether the journal has lost its tail
    checks_again: bool = True  # a collector looks whether an unfinished orphan was finished before its epoch was fenced
    builds_on_durable: bool = True  # records name a version that a power cut leaves
    opens_when_made: bool = False  # an agent opens its epoch when it is made, also if it only reads
    reads_twice: bool = True  # a restore that finds damage asks the store again
    unread_is_damage: bool = False  # what could not be read is quarantined


Answer = tuple[str, int]


class Engine:
    """One set of rules for `processes` processes; answers are remembered."""

    def __init__(self, rules: Rules, processes: int, keep: KeepPolicy) -> None:
        self.rules = rules
        self.processes = processes
        self.keep = keep
        self.heads: list[Head] = []
        self._bodies: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self.attempts: list[Attempt] = []
        self._attempt_numbers: dict[object, int] = {}
        self._memo: dict[object, Any] = {}

    def head(self, number: int) -> Head | None:
        return self.heads[number] if number >= 0 else None

    def number(self, head: Head) -> int:
        body = encode(head)
        if body not in self._numbers:
            self._numbers[body] = len(self.heads)
            self.heads.append(head)
            self._bodies.append(body)
        return self._numbers[body]

    def once(self, key: object, ask: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = ask()
        return self._memo[key]

    # The journal.

    def ask(self, task: str, arguments: tuple[Any, ...], head: int, actor: str) -> Answer:
        """What rule `task` makes of head number `head`: ("head", number), or ("none" | "fenced" | "refused", -1)."""
        return self.once(("ask", task, arguments, head, actor), lambda: self._ask(task, arguments, head, actor))

    def _ask(self, task: str, arguments: tuple[Any, ...], number: int, actor: str) -> Answer:
        head = self.head(number)
        version = head.version + 1 if head else 0
        unique = self.rules.ids_differ
        stamp = Stamp(actor if unique else "?", 0.0, f"{actor}-{version}" if unique else "?")
        match self._rule(task, arguments)(head, stamp):
            case None:
                return "none", -1
            case FencedBy():
                return "fenced", -1
            case Rejected():
                return "refused", -1
            case following:
                return "head", self.number(following)

    def _rule(self, task: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        rules = self.rules
        match task, arguments:
            case "open", ():
                return rules.open_epoch
            case "open", (tree,):
                return partial(rules.open_epoch, compared=Compared(tree))
            case "commit", (epoch, step, attempt, *tree):
                return partial(rules.commit, epoch=epoch, entry=entry(step, attempt, *tree), keep=self.keep)
            case "release", (step, attempt):
                return partial(rules.release, step=step, attempt=attempt, disproved=True)
            case "discard", (step, *_):
                return partial(rules.discard, step=step)
            case "abort", (epoch, step, attempt):
                return partial(rules.abort, epoch=epoch, attempt=AttemptId(step, attempt), failures=(), reason="no")
            case "retire", ():
                return partial(rules.retire, keep=last(1))
            case "collected", attempts:
                return partial(rules.collected, attempts=[AttemptId(*one) for one in attempts])
            case "pin", (step,):
                return partial(rules.pin, step=step, name="p")
            case "quarantine", (step, attempt):
                return partial(rules.quarantine, attempt=AttemptId(step, attempt), reason="bad")
            case "verify", (step, attempt):
                return partial(rules.trusted, attempt=AttemptId(step, attempt), trust="verified")
        raise AssertionError(task)

    def stored(self, there: int, wanted: int) -> tuple[int, bool]:
        """(head number under the key after the put, whether it is ours)."""
        return self.once(("put", there, wanted), lambda: self._stored(there, wanted))

    def _stored(self, there: int, wanted: int) -> tuple[int, bool]:
        body, ours = self.rules.put(self._bodies[there] if there >= 0 else None, self._bodies[wanted])
        return self._numbers[body], ours

    # Attempts.

    def opened(self, step: int, attempt: str) -> int:
        """A new attempt, waiting for receipts."""
        return self._numbered(Attempt(intent(step, attempt, self.processes)))

    def advance(self, number: int, event: attempt.Event, key: object) -> tuple[int, str]:
        """(the attempt's next state, what the coordinator does now: "finalize", "commit", "abort" or "")."""
        return self.once(("advance", number, key), lambda: self._advance(number, event))

    def _advance(self, number: int, event: attempt.Event) -> tuple[int, str]:
        state, effect = self.rules.advance(self.attempts[number], event)
        return self._numbered(state), "" if effect is None else _TASKS[type(effect)]

    def _numbered(self, state: Attempt) -> int:
        key = (
            state.intent.step,
            state.intent.attempt,
            state.phase,
            tuple(sorted((process, receipt.write_id) for process, receipt in state.receipts.items())),
            tuple(failure.process for failure in state.failures),
        )
        if key not in self._attempt_numbers:
            self._attempt_numbers[key] = len(self.attempts)
            self.attempts.append(state)
        return self._attempt_numbers[key]

    def phase(self, number: int) -> Phase:
        return self.attempts[number].phase


_TASKS: dict[type[Effect], str] = {Finalize: "finalize", AppendCommit: "commit", AppendAbort: "abort"}


def entry(step: int, attempt: str, tree: str = "") -> LiveStep:
    return LiveStep(
        step=step, attempt=attempt, manifest_crc32c="00000000", tree=tree, bytes=1, stored_metrics={}, time=0.0
    )


def intent(step: int, attempt: str, processes: int) -> Intent:
    """One array, one element to each process."""
    leaf = LeafSpec(path=("w",), kind="array", shape=(processes,), dtype="float32")
    return Intent(
        format=FORMAT,
        write_id="",
        step=step,
        attempt=attempt,
        epoch=AttemptId(step, attempt).epoch,
        opened_by="",
        time=0.0,
        process_count=processes,
        device_count=processes,
        mesh={},
        tree=TreeSpec(leaves=(leaf,)),
    )


def receipt(step: int, attempt: str, process: int, kind: str) -> Receipt:
    """kind: `yes`, `short` (its boxes leave a hole) or `no`."""
    boxes = {"w": (Box(start=(process,), stop=(process + 1,)),)} if kind == "yes" else {}
    failure = Failure(process=process, host="h", phase="write", cause="disk full") if kind == "no" else None
    return Receipt(
        format=FORMAT,
        write_id=f"{process}-{kind}",
        step=step,
        attempt=attempt,
        process=process,
        host="h",
        boxes=boxes,
        failure=failure,
    )
