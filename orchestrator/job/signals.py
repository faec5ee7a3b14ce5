"""What the processes of one incarnation post to each other about saves. Only this module knows the keys and encodings:

    orchestrator/<incarnation>/saving/0                       the attempt that process 0 is saving
    orchestrator/<incarnation>/<step>/<attempt>/held/0        who holds the leaves, by process 0
    orchestrator/<incarnation>/<step>/<attempt>/receipt/<i>   process i's vote: its receipt is stored, or an abort vote
    orchestrator/<incarnation>/<step>/<attempt>/decision/0    how the attempt ended

Posting is best effort and storage is the truth: a lost signal makes a save slower. What was posted is validated before
anybody goes by it. A vote that makes no sense counts as an abort vote, which is always safe; anything else that makes
none counts as lost. Any thread.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from absl import logging

from orchestrator.errors import OrchestratorError, StorageError, UnsafeKey, UsageError
from orchestrator.job.outcome import Committed, Outcome
from orchestrator.rules import arguments, holders
from orchestrator.rules.attempt_id import AttemptId, parse_name
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import FORMAT, Failure, Held, Receipt
from orchestrator.texts import printable

Votes = dict[int, Receipt | None]  # process -> its abort vote; None: it says that its receipt is stored
Value = TypeVar("Value")
_STORED = "yes"
_PROCESS = re.compile("0|[1-9][0-9]{0,8}")
_WARN_S = 10.0
_LEAVES_MAX = 10_000_000
# Made by the thread that imports: see `rules.codec`.
_SAVING = msgspec.json.Decoder(tuple[int, str])
_HELD = msgspec.json.Decoder(tuple[Held, ...])
_OUTCOME: msgspec.json.Decoder[Outcome] = msgspec.json.Decoder(Outcome)


class SignalBoard(Protocol):
    """The part of a rendezvous that carries signals."""

    process: int
    count: int
    hosts: dict[int, str]

    def post(self, key: str, value: str) -> None: ...

    def forget(self, prefix: str) -> None: ...

    def poll(self, prefix: str) -> dict[str, str]: ...


def abort_vote(attempt: AttemptId, failure: Failure, **more: Any) -> Receipt:
    """`failure.process` did not make its part of `attempt` durable, or its receipt cannot be used."""
    return Receipt(
        format=FORMAT,
        write_id=uuid.uuid4().hex,
        step=attempt.step,
        attempt=attempt.name,
        process=failure.process,
        host=failure.host,
        failure=failure,
        **more,
    )


def unusable_receipt(attempt: AttemptId, process: int, hosts: Mapping[int, str], cause: str) -> Receipt:
    """What `process` has posted or stored is no receipt of this attempt: it counts as its vote to abort."""
    host = hosts.get(process, "?")
    return abort_vote(attempt, Failure(process=process, host=host, phase="receipt", cause=cause))


class Signals:
    """Of the incarnation with this random id: what an older one has posted is never taken for this one's."""

    def __init__(self, board: SignalBoard, incarnation_id: str) -> None:
        self._board = board
        self._all = f"orchestrator/{incarnation_id}/"
        self._decided: AttemptId | None = None

    # Every process.

    def vote(self, attempt: AttemptId) -> None:
        """This process's receipt is stored."""
        self._post_vote(attempt, _STORED)

    def vote_abort(self, receipt: Receipt) -> None:
        """This process's part of the receipt's attempt is not durable; `receipt.failure` says why."""
        self._post_vote(receipt.id, encode(receipt).decode())

    def _post_vote(self, attempt: AttemptId, text: str) -> None:
        self._board.post(f"{self._of(attempt)}receipt/{self._board.process}", text)

    def votes(self, attempt: AttemptId) -> Votes:
        """The votes that this process knows of."""
        votes: Votes = {}
        for name, text in self._board.poll(f"{self._of(attempt)}receipt/").items():
            if _PROCESS.fullmatch(name) and int(name) < self._board.count:
                try:
                    votes[int(name)] = None if text == _STORED else self._abort_vote(attempt, int(name), text)
                except StorageError as error:  # no memory for it: asked again
                    logging.warning("the vote of process %s cannot be read yet: %s", name, error)
        return votes

    def _abort_vote(self, attempt: AttemptId, process: int, text: str) -> Receipt:
        where = f"signal of process {process}"
        try:
            receipt = decode(
                text.encode(errors="replace"), Receipt, where, step=attempt.step, attempt=attempt.name, process=process
            )
            problem = "" if receipt.failure else f"{where}: a receipt without a failure, expected in storage"
        except StorageError:
            raise
        except OrchestratorError as error:
            problem = str(error)
        if not problem:
            return receipt
        return unusable_receipt(attempt, process, self._board.hosts, problem)

    # Process 0.

    def post_saving(self, attempt: AttemptId) -> None:
        """Process 0 is saving this attempt now: whoever saves another step learns of it."""
        self._board.post(f"{self._all}saving/0", msgspec.json.encode(attempt).decode())

    def saving(self) -> AttemptId | None:
        """The attempt that process 0 is saving, or saved last."""
        return self._of_process_0(self._all, "saving", _attempt)

    def post_held(self, attempt: AttemptId, held: tuple[Held, ...]) -> None:
        """Who holds the leaves of the state, as process 0 sees it."""
        self._board.post(f"{self._of(attempt)}held/0", msgspec.json.encode(held).decode())

    def held(self, attempt: AttemptId) -> tuple[Held, ...] | None:
        return self._of_process_0(self._of(attempt), "held", self._held)

    def _held(self, text: str) -> tuple[Held, ...]:
        held = _HELD.decode(text)
        holders.check_runs(held, self._board.count)
        if (leaves := sum(run.leaves for run in held)) > _LEAVES_MAX:
            raise ValueError(f"{leaves} leaves")
        return held

    def post_decision(self, attempt: AttemptId, outcome: Outcome) -> None:
        """How the attempt ended, so that the others need not ask the journal."""
        posted = Committed() if isinstance(outcome, Committed) else outcome  # what process 0 measured is its own
        self._board.post(f"{self._of(attempt)}decision/0", msgspec.json.encode(posted).decode())

    def decision(self, attempt: AttemptId) -> Outcome | None:
        return self._of_process_0(self._of(attempt), "decision", _OUTCOME.decode)

    def forget_previous(self, attempt: AttemptId) -> None:
        """`attempt` is being decided: whoever does not know by now how the one before ended finds it in the journal."""
        if self._decided is not None:
            self._board.forget(self._of(self._decided))
        self._decided = attempt

    # Keys and values.

    def _of(self, attempt: AttemptId) -> str:
        return f"{self._all}{attempt.step}/{attempt.name}/"

    def _of_process_0(self, prefix: str, kind: str, parse: Callable[[str], Value]) -> Value | None:
        text = self._board.poll(f"{prefix}{kind}/").get("0")
        if text is None:
            return None
        try:
            return parse(text)
        except (msgspec.MsgspecError, ValueError, RecursionError, UnsafeKey, UsageError) as error:
            what = f"{prefix}{kind}/0: {error}; taken as lost"
            logging.log_every_n_seconds(logging.WARNING, "%s", _WARN_S, printable(what))
            return None


def _attempt(text: str) -> AttemptId:
    attempt = AttemptId(*_SAVING.decode(text))
    arguments.step(attempt.step)
    parse_name(attempt.name)
    return attempt
