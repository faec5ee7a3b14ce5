"""What this process contributes to one attempt: its part of the arrays, its own state, and the receipt for both."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable

from msgspec.structs import replace

from orchestrator import failpoints
from orchestrator.arrays import ArrayWriter, Flat, PendingWrite
from orchestrator.errors import Fenced, StorageError
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.signals import abort_vote
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import FORMAT, Cause, Failure, FileEntry, Held, Receipt
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Exists, Storage

_CAUSE_CHARS = 2000


class Contribution:
    """Used in the order of its methods: `stage` on the main thread, all else on the save's own. seconds: how long
    each part took, for the receipt. pending: the staged arrays; None before, and once they are released."""

    def __init__(
        self, store: JournalStore, rendezvous: Rendezvous, attempt: AttemptId, own_state: bytes | None
    ) -> None:
        self._store, self._attempt = store, attempt
        self._process, self._host = rendezvous.process, rendezvous.hosts[rendezvous.process]
        self._own_state = own_state
        self._beside: Begun[None] | None = None
        self._files: tuple[FileEntry, ...] = ()
        self.seconds: dict[str, float] = {}
        self.written = False  # all of it, as far as it is this process's
        self.pending: PendingWrite | None = None

    def stage(
        self,
        writer: ArrayWriter,
        flat: Flat,
        held: tuple[Held, ...],
        *,
        attest: bool,
        admit: Callable[[int], None] = lambda need: None,
    ) -> None:
        """Take `flat` from the devices. `admit`: told how many bytes this process is going to write, before anything is
        taken. Raises what it and the writer raise."""
        own_bytes = len(self._own_state or b"")
        directory = f"{self._store.url}/{self._attempt.state_prefix}"
        self.pending = writer.stage(directory, flat, attest, held, lambda need: admit(need + own_bytes))

    def write(self, timeout_s: float, given_up: Callable[[], bool]) -> None:
        """Write the arrays, and the process's own state beside them: a store far away takes as long for both as for
        one. Raises WriteStopped soon after `given_up` has said so, WaitTimeout, StorageError."""
        assert self.pending is not None
        began = time.monotonic()
        if self._own_state is not None:
            self._beside = overlap.begin(self._put_own_state)
        self.pending.finish(timeout_s, given_up)
        self.written = True
        self.seconds["write"] = time.monotonic() - began

    def _put_own_state(self) -> None:
        self._create(self._attempt.process_state_key(self._process), self._own_state or b"")

    def make_durable(self, here: Storage | None = None) -> None:
        """Make what this process wrote durable, whoever else writes beside it. here: without the copies elsewhere that
        the store may make of it."""
        assert self.pending is not None
        began = time.monotonic()
        failpoints.hit("save.seal")
        own = []
        if self._beside:
            if here is None:
                self._beside.result()
            own = [self._attempt.process_state_key(self._process)]
        known = {self._attempt.state_prefix + file.path: file for file in self.pending.files}
        durable = (here or self._store.storage).make_durable([*own, *known], known)
        self._files = tuple(replace(entry, path=entry.path.removeprefix(self._attempt.prefix)) for entry in durable)
        self.seconds["seal"] = time.monotonic() - began

    @property
    def written_bytes(self) -> int:
        """Of the arrays, so far. Any thread."""
        pending = self.pending
        return pending.written_bytes if pending else 0

    def store_receipt(self) -> bytes:
        """Returns it as the store has acknowledged it. After `make_durable`: a receipt survives power loss."""
        self._create(self._attempt.receipt_key(self._process), self.signed)
        return self.signed

    @functools.cached_property
    def signed(self) -> bytes:
        """`receipt` as it is stored; kept when the arrays are released."""
        return encode(self.receipt)

    @functools.cached_property
    def receipt(self) -> Receipt:
        """This process's promise. After `make_durable`."""
        assert self.pending is not None
        return Receipt(
            format=FORMAT,
            write_id=uuid.uuid4().hex,
            step=self._attempt.step,
            attempt=self._attempt.name,
            process=self._process,
            host=self._host,
            files=self._files,
            boxes=self.pending.boxes,
            places=self.pending.places(self._files),
            small=self.pending.small,
            prints=self.pending.fingerprints(),
            seconds=self.seconds,
            built_on=self._store.built_on,
            went_by=self.pending.went_by,
            own=self.pending.own,
        )

    def abort_vote(self, phase: str, cause: BaseException, kind: Cause = Cause.REJECTED) -> Receipt:
        """Instead of the receipt: what has failed, and in which phase. kind: what all processes count it as; a newer
        incarnation that has taken over is always counted as that."""
        kind = Cause.FENCED if isinstance(cause, Fenced) else kind
        # A file's name may be no UTF-8, and this record must not fail, too.
        text = f"{type(cause).__name__}: {cause}"[:_CAUSE_CHARS].encode(errors="backslashreplace").decode()
        failure = Failure(process=self._process, host=self._host, phase=phase, cause=text, kind=kind)
        return abort_vote(self._attempt, failure, seconds=self.seconds, built_on=self._store.built_on)

    def store_abort_vote(self, vote: Receipt) -> None:
        """For whoever misses the signal. Raises what the store does."""
        self._store.storage.create(self._attempt.receipt_key(self._process), encode(vote))

    def wait_for_own_state(self, grace_s: float) -> None:
        """Nothing of this process should appear in an attempt that is decided: wait for what is under way."""
        if self._beside:
            self._beside.wait(grace_s)

    def release(self) -> None:
        """Give back the memory that is still held."""
        self.pending = None

    def _create(self, key: str, body: bytes) -> None:
        if isinstance(self._store.storage.create(key, body), Exists):
            raise StorageError(f"{self._store.url}/{key}: another writer was here; attempts are never reused")
