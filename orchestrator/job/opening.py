"""Opening an incarnation's epoch, which fences every older one: last of all, after all checks have passed.

The first `save` or `restore` opens it. Before that the tree (or the target), the right to write and the run itself have
been looked at on every process, and nothing has been written: a job that is going to be rejected never fences the job
that the run belongs to. Making an agent, and reading, open nothing. Main thread: each method is a collective.

Process 0's probe of the right to write is also the mark by which the hosts prove that their root is one place: it stays
until every other one has seen it, and none of those writes anything, not even its own probe, before it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from orchestrator import failpoints
from orchestrator.arrays import Flat, Form
from orchestrator.errors import Damaged, NewerFormat, OtherJob, StorageError, Suspect, UsageError
from orchestrator.job import one_root, startup_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import agree, as_error, gather, raised
from orchestrator.job.startup_rounds import FirstRestore, FirstSave, Opened
from orchestrator.rules import journal, matching
from orchestrator.rules.configuration import who
from orchestrator.rules.journal import Compared, Overtaken
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_directory import unadopted
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

_TRIES = 10  # somebody else commits to the run between comparing and opening


class Opening:
    """epoch: this incarnation's; None until it is open. `opened` is then called with it, on every process.
    `other_tree`: the state may be of another tree than the run's. `take_over`: called just before, when nothing speaks
    against opening it."""

    def __init__(
        self,
        store: JournalStore,
        rendezvous: Rendezvous,
        timeout_s: float,
        opened: Callable[[int], None],
        *,
        other_tree: bool = False,
        take_over: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._rendezvous, self._timeout_s, self._opened = store, rendezvous, timeout_s, opened
        self.epoch: int | None = None
        self._take_over = take_over
        self._any_tree = other_tree
        self._tree: str | None = None  # of the states that this incarnation saves
        self._form: Form | None = None  # of the state that was last found to be of it
        self._compared: Compared | None = None  # on process 0, once the run has been looked at
        self._head: Begun[Head | None] | None = None  # as it was then
        self._mark = ""  # this process's probe of the right to write, while it is there
        self._deleting: Begun[None] | None = None  # it is being deleted

    def by_save(self, step: int, describe: Callable[[], Flat]) -> str:
        """Open the epoch for the first save. `describe` checks what this process was given. Returns '' once it is open;
        else why another process cannot take part in this save, and nothing was done.

        Raises what `describe` raises, OtherJob, JournalLost, UsageError in a directory of Orbax's, StorageError where
        this job may not write.
        """
        if self.epoch is not None:
            return ""
        error: Exception | None = None
        described: list[Flat] = []  # in it once this process has nothing to object to what it was given
        mine = FirstSave(step)

        def compare(head: Head | None) -> None:
            if not self._any_tree:
                check_tree(self._store, head, described[0])

        with self._marked():
            try:
                described.append(describe())
                mine = FirstSave(step, described=True, mark=self._admit(compare))
            except Exception as failure:  # the others must know of it before it is raised here
                error = failure
                mine = FirstSave(step, described=bool(described), rejected=raised(failure))
            answers = gather(self._rendezvous, startup_rounds.FIRST_SAVE, mine, self._timeout_s)
            if error:
                raise error
            first = answers[0]
            if first.described and first.rejected:  # it is the run that process 0 rejects: all raise it
                raise as_error(0, first.rejected)
            if rejected := self._rejected(answers):
                return rejected
            self._open(compare, first.mark)
        self._found_fit(described[0])
        return ""

    def check_tree(self, flat: Flat) -> None:
        """Each save must be of the run's own job: the first one, where a restore has opened the epoch, and all later
        ones; no save is in flight. Costs nothing for a state of the form of the one before. What was not committed
        binds nobody: a new tree is compared with the journal's. Raises OtherJob, StorageError, Damaged."""
        if not self._any_tree and flat.form is not self._form:
            if flat.spec.fingerprint() != self._tree:
                check_tree(self._store, self._store.require_head(), flat)
            self._found_fit(flat)

    def _found_fit(self, flat: Flat) -> None:
        self._tree, self._form = flat.spec.fingerprint(), flat.form

    def _rejected(self, answers: Sequence[FirstSave]) -> str:
        labels = [f"process {index} ({self._rendezvous.hosts.get(index, '?')})" for index in range(len(answers))]
        for process, answer in zip(labels, answers, strict=True):
            if answer.rejected:
                return f"{process}: {answer.rejected.kind}: {answer.rejected.text}"
            if answer.step != answers[0].step:
                theirs = f"{labels[0]} saves step {answers[0].step} where {process} saves step {answer.step}"
                return f"{theirs}; all must save the same steps in the same order"
        return ""

    def by_restore(self, tree: str | None) -> None:
        """Open the epoch for a restore, once all processes have matched their targets with the step that they will
        read; or in a new run. `tree`: of the newest step when the step was chosen, None in a new run. Raises, on all,
        what one of them has against it."""
        if self.epoch is not None:
            return
        error: Exception | None = None
        compare = partial(_unchanged, tree)
        with self._marked():
            try:
                mine = FirstRestore(mark=self._admit(compare))
            except Exception as failure:  # the others must know of it before it is raised here
                error = failure
                mine = FirstRestore(rejected=raised(failure))
            answers = gather(self._rendezvous, startup_rounds.FIRST_RESTORE, mine, self._timeout_s)
            if error:
                raise error
            for index, answer in enumerate(answers):
                if answer.rejected:
                    raise as_error(index, answer.rejected)
            self._open(compare, answers[0].mark)

    def _open(self, compare: Callable[[Head | None], None], mark: str) -> None:
        self._prove(mark)
        self._begin_deleting()
        self._take_over()
        opened = agree(self._rendezvous, startup_rounds.OPENED, self._timeout_s, partial(self._append, compare))
        self.epoch = opened.epoch
        # All processes' records build on it: it is durable.
        self._store.note_durable(opened.version)
        self._opened(self.epoch)

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Within it this process's mark may be there; after it, it is not."""
        try:
            yield
        finally:
            self._delete_mark()

    def _delete_mark(self) -> None:
        self._begin_deleting()
        deleting, self._deleting = self._deleting, None
        if deleting:
            deleting.result()

    def _begin_deleting(self) -> None:
        """The epoch is opened meanwhile."""
        if self._mark:
            self._deleting, self._mark = overlap.begin(partial(one_root.delete_mark, self._store, self._mark)), ""

    def _admit(self, compare: Callable[[Head | None], None]) -> str:
        """Whatever speaks against opening the run is raised. Process 0 inspects it, for all, and makes the mark whose
        key it returns; of the others nothing is known yet."""
        if self._rendezvous.process == 0:
            self._inspect(compare)
            self._mark = one_root.create_mark(self._store)
        return self._mark

    def _prove(self, mark: str) -> None:
        """Each other host sees process 0's mark, and may write beside it. Raises, on all, UsageError naming those whose
        root is another place, and StorageError."""
        if self._rendezvous.count == 1:
            return

        def look() -> bool:
            seen = one_root.sees_in_time(partial(one_root.sees, self._store, mark), self._timeout_s)
            if seen:
                self._mark = one_root.create_mark(self._store)
            return seen

        one_root.check_all_see(
            self._store,
            self._rendezvous,
            startup_rounds.ONE_ROOT,
            None if self._rendezvous.process == 0 else look,
            f"what {who(self._rendezvous.hosts, [0])} wrote there just now ({mark})",
            source=0,
            timeout_s=self._timeout_s,
        )

    def _inspect(self, compare: Callable[[Head | None], None]) -> None:
        """Process 0 reads the run. Whatever speaks against opening it is raised."""
        began_s = time.monotonic()
        head, _ = self._store.look()
        self._head = overlap.known(head, began_s)
        if rejection := unadopted(self._store, head):
            raise UsageError(rejection)
        compare(head)
        self._compared = Compared(journal.tree_of(head))

    def _append(self, compare: Callable[[Head | None], None]) -> Opened:
        failpoints.hit("epoch.before")
        for _ in range(_TRIES):
            try:
                opened = self._store.append(partial(journal.open_epoch, compared=self._compared), self._head)
            except Overtaken:
                self._inspect(compare)
                continue
            failpoints.hit("epoch.after")
            assert opened is not None
            return Opened(opened.epoch, opened.version)
        raise Overtaken(f"{self._store.url}: other jobs keep committing to this run; nothing was opened")


def check_tree(store: JournalStore, head: Head | None, flat: Flat) -> None:
    """The run's newest step must be of the same job as `flat`. Raises OtherJob saying how they differ."""
    newest = journal.newest(head) if head else None
    if newest is None or newest.tree == flat.spec.fingerprint():
        return
    lines: list[str] = []
    try:
        lines = matching.tree_differences(store.step(newest).intent.tree, flat.spec)
    except (StorageError, Damaged, Suspect, NewerFormat) as error:  # that they differ, the journal says
        lines = [f"how they differ cannot be read: {error}"]
    detail = "\n".join(f"  {line}" for line in lines or ["their trees differ"])
    raise OtherJob(
        f"{store.url} holds another job's state (step {newest.step}); use another root, or "
        f"Options(other_tree=True):\n{detail}"
    )


def _unchanged(tree: str | None, head: Head | None) -> None:
    if journal.tree_of(head) != tree:
        raise Overtaken("another job has committed a step to this run meanwhile; nothing was opened: restore again")
