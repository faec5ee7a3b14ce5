"""Signing receipts in groups (`rules.receipt_groups`): members hand theirs to their leader, who stores them as one.

A receipt is handed over once what it promises is durable, so what a leader stores is as good a promise as its members'
own. Nothing depends on a message: a member whose leader has not stored its receipt in time stores it itself, and a
leader waits for nobody longer than `Bounds.sign_s`. Save threads only.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator import environment, failpoints
from orchestrator.errors import StorageError
from orchestrator.job.contribution import Contribution
from orchestrator.job.poll import REAL, Clock
from orchestrator.job.rendezvous import Rendezvous, slices
from orchestrator.job.signals import Signals
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.receipt_groups import Bounds, Group, bounds, group_of, like
from orchestrator.rules.records import FORMAT, GroupReceipt, Receipt
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage.port import Exists

Work = Callable[[], None]  # what is left to do: called again and again while the decision is waited for


@dataclass(frozen=True)
class ReceiptSigning:
    """How `process` signs. group: that it is in; None: alone, as process 0 does."""

    store: JournalStore
    signals: Signals
    process: int
    count: int
    group: Group | None
    bounds: Bounds
    clock: Clock = REAL

    @classmethod
    def of(cls, store: JournalStore, signals: Signals, me: Rendezvous, save_timeout_s: float) -> ReceiptSigning:
        group = group_of(me.process, me.count, slices(me.count), environment.receipt_group())
        return cls(store, signals, me.process, me.count, group, bounds(save_timeout_s))

    @property
    def alike(self) -> int:
        """How many processes do in a save what this one does."""
        return like(self.group, self.process, self.count)

    def sign(self, attempt: AttemptId, own: Contribution) -> Work:
        """Have this process's receipt stored, after `make_durable`: by itself, now, or with its group's. Returns what
        is left to do for it. Both raise StorageError."""
        if self.group and self.process == self.group.leader:
            return Leader(self, self.group, attempt, own.receipt).work
        if self.group and self.signals.hand_over(attempt, own.signed):
            failpoints.hit("receipt.handed")
            return Member(self, self.group, attempt, own).work
        self.store_alone(attempt, own)
        return lambda: None

    def store_alone(self, attempt: AttemptId, own: Contribution) -> None:
        own.store_receipt()
        failpoints.hit("receipt.after")
        self.signals.vote(attempt)


class Member:
    """A process that has handed over its receipt."""

    def __init__(self, signing: ReceiptSigning, group: Group, attempt: AttemptId, own: Contribution) -> None:
        self._signing, self._group, self._attempt, self._own = signing, group, attempt, own
        self._until = signing.clock.now() + signing.bounds.hand_s
        self._over = False

    def work(self) -> None:
        """Store the receipt after all, once the leader has had its time."""
        if self._over or self._signing.clock.now() < self._until:
            return
        self._over = True
        if self._signing.process not in self._signing.signals.signed(self._attempt, self._group.leader):
            self._signing.store_alone(self._attempt, self._own)


class Leader:
    """Collects what its members hand over, and stores it: once all are in, or a part of it, when that has waited for
    `Bounds.sign_s`; the rest follows in a further object."""

    def __init__(self, signing: ReceiptSigning, group: Group, attempt: AttemptId, own: Receipt) -> None:
        self._store, self._signals, self._attempt = signing.store, signing.signals, attempt
        self._leader, self._sign_s, self._clock = group.leader, signing.bounds.sign_s, signing.clock
        self._missing = list(group.members[1:])
        self._unsigned = [own]
        self._since = self._clock.now()  # when the oldest of them came
        self._number = 0  # of objects stored

    def work(self) -> None:
        due = self._clock.now() >= self._since + self._sign_s
        self._collect(all_of_them=bool(self._unsigned) and due)
        if self._unsigned and (due or not self._missing):
            self._store_receipts()

    def _collect(self, *, all_of_them: bool) -> None:
        """Ask for the next member's receipt, and once that is there for those after it: while one is slow, so that a
        job of thousands asks little, for that one only; unless what is there is about to be stored."""
        found = []
        for member in self._missing:
            receipt = self._signals.handed_over(self._attempt, member)
            if receipt:
                found.append(receipt)
            elif not all_of_them:
                break
        if found:
            self._since = self._since if self._unsigned else self._clock.now()
            self._unsigned += found
            gone = {receipt.process for receipt in found}
            self._missing = [member for member in self._missing if member not in gone]

    def _store_receipts(self) -> None:
        failpoints.hit("group.sign")
        number = self._number + 1
        record = GroupReceipt(
            format=FORMAT,
            write_id=uuid.uuid4().hex,
            step=self._attempt.step,
            attempt=self._attempt.name,
            process=self._leader,
            number=number,
            receipts=tuple(self._unsigned),
            built_on=self._store.built_on,
        )
        key = self._attempt.key(keys.group_receipt_name(self._leader, number))
        if isinstance(self._store.storage.create(key, encode(record)), Exists):
            raise StorageError(f"{self._store.url}/{key}: another writer was here; attempts are never reused")
        failpoints.hit("group.signed")
        self._signals.vote_for_group(self._attempt, number, [receipt.process for receipt in self._unsigned])
        self._number, self._unsigned = number, []
