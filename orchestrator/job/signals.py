"""What the processes of one incarnation post to each other about saves. Only this module knows the keys and encodings:

    orchestrator/<incarnation>/saving/0                       the attempt that process 0 is saving
    orchestrator/<incarnation>/<step>/<attempt>/held/0        who holds the leaves, by process 0
    orchestrator/<incarnation>/<step>/<attempt>/receipt/<i>   process i's vote: its receipt is stored, or how many
                                                              receipts of its group it has stored, or an abort vote
    orchestrator/<incarnation>/<step>/<attempt>/part/<i>/0    process i's receipt, handed to its group's leader
    orchestrator/<incarnation>/<step>/<attempt>/signed/<i>/<n>  whose receipts are in leader i's n-th one
    orchestrator/<incarnation>/<step>/<attempt>/uploading/<i> a number that grows for as long as process i uploads its
                                                              part from memory
    orchestrator/<incarnation>/<step>/<attempt>/decision/0    how the attempt ended

Posting is best effort and storage is the truth: a lost signal makes a save slower. What was posted is validated before
anybody goes by it. A vote that makes no sense counts as an abort vote, which is always safe; anything else that makes
none counts as lost. Any thread.
"""

from __future__ import annotations

import base64
import contextlib
import re
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from absl import logging

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.job.outcome import Committed, Outcome
from orchestrator.rules import arguments, holders
from orchestrator.rules.attempt_id import AttemptId, parse_name
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.receipt_groups import PART_BYTES_MAX, posted_bytes_max
from orchestrator.rules.records import FORMAT, Failure, Held, Receipt
from orchestrator.texts import printable

# Process -> its abort vote; None: it says that its receipt is stored; a number: that so many of its group's are.
Votes = dict[int, Receipt | int | None]
Value = TypeVar("Value")
_STORED = "yes"
_GROUPED = re.compile("group ([1-9][0-9]{0,5})")
_PACKED_LEVEL = 1  # of zlib: a receipt is mostly names and numbers that are much alike
_PROCESS = re.compile("0|[1-9][0-9]{0,8}")
_WARN_S = 10.0
_LEAVES_MAX = 10_000_000
# Made by the thread that imports: see `rules.codec`.
_SAVING = msgspec.json.Decoder(tuple[int, str])
_PROCESSES = msgspec.json.Decoder(tuple[int, ...])
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
                    votes[int(name)] = self._vote(attempt, int(name), text)
                except StorageError as error:  # no memory for it: asked again
                    logging.warning("the vote of process %s cannot be read yet: %s", name, error)
        return votes

    def _vote(self, attempt: AttemptId, process: int, text: str) -> Receipt | int | None:
        if text == _STORED:
            return None
        grouped = _GROUPED.fullmatch(text)
        return int(grouped[1]) if grouped else self._abort_vote(attempt, process, text)

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

    def post_uploading(self, attempt: AttemptId, said: int) -> None:
        """This process goes on uploading its part, as it has said `said` times now."""
        self._board.post(f"{self._of(attempt)}uploading/{self._board.process}", str(said))

    def uploading(self, attempt: AttemptId) -> dict[int, int]:
        """By process, how often it has said so."""
        posted = self._board.poll(f"{self._of(attempt)}uploading/")
        known = {name: text for name, text in posted.items() if _PROCESS.fullmatch(name) and _PROCESS.fullmatch(text)}
        return {int(name): int(text) for name, text in known.items() if int(name) < self._board.count}

    # Of a group: its members, and its leader.

    def hand_over(self, attempt: AttemptId, receipt: bytes) -> bool:
        """This process's receipt, for its leader to store. False if it is too large for a message."""
        text = base64.b85encode(zlib.compress(receipt, _PACKED_LEVEL)).decode()
        fits = len(receipt) <= PART_BYTES_MAX and len(text) <= posted_bytes_max(self._board.count)
        if fits:
            self._board.post(f"{self._of(attempt)}part/{self._board.process}/0", text)
        return fits

    def handed_over(self, attempt: AttemptId, member: int) -> Receipt | None:
        """What `member` has handed over, None if nothing has come (yet)."""

        def parse(text: str) -> Receipt:
            packed = zlib.decompressobj()
            body = packed.decompress(base64.b85decode(text), PART_BYTES_MAX)
            where, step, name = f"receipt that process {member} has handed over", attempt.step, attempt.name
            return decode(body, Receipt, where, step=step, attempt=name, process=member)

        return self._posted(f"{self._of(attempt)}part/{member}/", parse)

    def vote_for_group(self, attempt: AttemptId, number: int, processes: Sequence[int]) -> None:
        """The leader: `number` receipts of its group are stored, the last one with the receipts of `processes`."""
        leader = self._board.process
        self._post_vote(attempt, f"group {number}")
        self._board.post(f"{self._of(attempt)}signed/{leader}/{number}", msgspec.json.encode(processes).decode())

    def signed(self, attempt: AttemptId, leader: int) -> set[int]:
        """The processes whose receipts `leader` has stored."""
        found: set[int] = set()
        for text in self._board.poll(f"{self._of(attempt)}signed/{leader}/").values():
            with contextlib.suppress(msgspec.MsgspecError, ValueError):  # taken as lost: they are stored once more
                found.update(_PROCESSES.decode(text))
        return found

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
        return self._posted(f"{prefix}{kind}/", parse)

    def _posted(self, prefix: str, parse: Callable[[str], Value]) -> Value | None:
        text = self._board.poll(prefix).get("0")
        if text is None:
            return None
        try:
            return parse(text)
        except (msgspec.MsgspecError, ValueError, RecursionError, zlib.error, OrchestratorError) as error:
            what = f"{prefix}0: {error}; taken as lost"
            logging.log_every_n_seconds(logging.WARNING, "%s", _WARN_S, printable(what))
            return None


def _attempt(text: str) -> AttemptId:
    attempt = AttemptId(*_SAVING.decode(text))
    arguments.step(attempt.step)
    parse_name(attempt.name)
    return attempt
