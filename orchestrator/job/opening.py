"""Opening an incarnation's epoch, which fences every older one: last of all, once nothing can be objected any more.

The first `save` or `restore` opens it. Before that the tree (or the target), the right to write and the run itself have
been looked at on every process, and nothing has been written: a job that is going to be rejected never fences the job
that the run belongs to. Making an agent, and reading, open nothing. Main thread: each method is a collective.

Process 0's probe of the right to write is also the mark by which the hosts prove that their root is one place: it stays
until every other one has seen it, and none of those writes anything, not even its own probe, before it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from orchestrator import failpoints
from orchestrator.arrays import Flat
from orchestrator.errors import Damaged, NewerFormat, OtherJob, StorageError, Suspect, UsageError
from orchestrator.job import startup
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import Round, agree, as_error
from orchestrator.rules import journal, matching
from orchestrator.rules.configuration import who
from orchestrator.rules.journal import Compared, Overtaken
from orchestrator.rules.records import Head, Json
from orchestrator.run.journal_store import Catalog
from orchestrator.run.orbax_directory import unadopted
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

_OPENED: Round[dict[str, int]] = Round("open the epoch", dict[str, int])  # what process 0 has appended
_TRIES = 10  # somebody else commits to the run between comparing and opening


class Opening:
    """epoch: this incarnation's; None until it is open. `opened` is then called with it, on every process.
    `other_tree`: the state may be of another tree than the run's."""

    def __init__(
        self,
        catalog: Catalog,
        rendezvous: Rendezvous,
        timeout_s: float,
        opened: Callable[[int], None],
        *,
        other_tree: bool = False,
    ) -> None:
        self._catalog, self._rendezvous, self._timeout_s, self._opened = catalog, rendezvous, timeout_s, opened
        self.epoch: int | None = None
        self._tree_checked = other_tree  # of the state that this incarnation saves
        self._compared: Compared | None = None  # on process 0, once the run has been looked at
        self._head: Begun[Head | None] | None = None  # as it was then
        self._mark = ""  # this process's probe of the right to write, while it is there
        self._unmarked: Begun[None] | None = None  # it is being deleted

    def by_save(self, step: int, describe: Callable[[], Flat]) -> str:
        """Open the epoch for the first save. `describe` checks what this process was given. Returns '' once it is open;
        else why another process cannot take part in this save, and nothing was done.

        Raises what `describe` raises, OtherJob, JournalLost, UsageError in a directory of Orbax's, StorageError where
        this job may not write.
        """
        if self.epoch is not None:
            return ""
        told: Json = {"step": step}
        error: Exception | None = None
        described: list[Flat] = []  # in it once this process has nothing to object to what it was given

        def compare(head: Head | None) -> None:
            if not self._tree_checked:
                check_tree(self._catalog, head, described[0])

        with self._marked():
            try:
                described.append(describe())
                told["mark"] = self._admit(compare)
            except Exception as failure:  # the others must hear of it before it is raised here
                error = failure
                told["rejected"] = [type(failure).__name__, str(failure)]
            # Of process 0 it is the run's objection: all raise it.
            answers = self._rendezvous.gather(
                "open the epoch: first save", told | {"run": bool(described)}, self._timeout_s
            )
            if error:
                raise error
            if answers[0]["run"] and "rejected" in answers[0]:
                raise as_error(0, *answers[0]["rejected"])
            if rejected := self._rejected(answers):
                return rejected
            self._open(compare, answers[0]["mark"])
        self._tree_checked = True
        return ""

    def check_tree(self, flat: Flat) -> None:
        """Where a restore has opened the epoch, the first save must be of the run's own job, too. Raises OtherJob,
        StorageError, Damaged."""
        if not self._tree_checked:
            check_tree(self._catalog, self._catalog.require_head(), flat)
            self._tree_checked = True

    def _rejected(self, answers: list[Json]) -> str:
        shown = [f"process {index} ({self._rendezvous.hosts.get(index, '?')})" for index in range(len(answers))]
        for process, answer in zip(shown, answers, strict=True):
            if "rejected" in answer:
                return f"{process}: {': '.join(answer['rejected'])}"
            if answer["step"] != answers[0]["step"]:
                theirs = f"{shown[0]} saves step {answers[0]['step']} where {process} saves step {answer['step']}"
                return f"{theirs}; all must save the same steps in the same order"
        return ""

    def by_restore(self, tree: str | None, meet: Callable[[Json], list[Json]]) -> list[Json]:
        """Open the epoch for a restore whose target this process has matched with the step it will read, or in a new
        run. `tree`: of the newest step when the step was chosen, None in a new run. `meet` gathers an answer of every
        process. Returns [] once it is open; else all answers, of which one is another's rejection: nothing was done."""
        if self.epoch is not None:
            return []
        error: Exception | None = None
        compare = partial(_unchanged, tree)
        mark = ""
        with self._marked():
            try:
                mark = self._admit(compare)
            except Exception as failure:
                error = failure
            answers = meet({"opens": [type(error).__name__, str(error)] if error else [], "mark": mark})
            if not all("opens" in answer for answer in answers):
                return answers
            if error:
                raise error
            for index, answer in enumerate(answers):
                if answer["opens"]:
                    raise as_error(index, *answer["opens"])
            self._open(compare, answers[0]["mark"])
        return []

    def _open(self, compare: Callable[[Head | None], None], mark: str) -> None:
        self._prove(mark)
        self._begin_unmark()
        opened = agree(self._rendezvous, _OPENED, self._timeout_s, partial(self._append, compare))
        self.epoch = opened["epoch"]
        # All processes' records build on it: it is durable.
        self._catalog.durable_version = max(self._catalog.durable_version, opened["version"])
        self._opened(self.epoch)

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Within it this process's mark may be there; after it, it is not."""
        try:
            yield
        finally:
            self._unmark()

    def _unmark(self) -> None:
        self._begin_unmark()
        unmarked, self._unmarked = self._unmarked, None
        if unmarked:
            unmarked.result()

    def _begin_unmark(self) -> None:
        """The epoch is opened meanwhile."""
        if self._mark:
            self._unmarked, self._mark = overlap.begin(partial(startup.unmark, self._catalog, self._mark)), ""

    def _admit(self, compare: Callable[[Head | None], None]) -> str:
        """Whatever speaks against opening the run is raised. Process 0 looks, for all, and makes the mark whose key it
        returns; of the others nothing is known yet."""
        if self._rendezvous.process == 0:
            self._look(compare)
            self._mark = startup.mark(self._catalog)
        return self._mark

    def _prove(self, mark: str) -> None:
        """Each other host sees process 0's mark, and may write beside it. Raises, on all, UsageError naming those whose
        root is another place, and StorageError."""
        if self._rendezvous.count == 1:
            return
        told: Json = {"url": self._catalog.url}
        failure: Exception | None = None
        if self._rendezvous.process != 0:
            try:
                told["sees"] = startup.awaited(partial(startup.has, self._catalog, mark), self._timeout_s)
                if told["sees"]:
                    self._mark = startup.mark(self._catalog)
            except Exception as error:
                failure = error
                told["error"] = [type(error).__name__, str(error)]
        there = self._rendezvous.gather("open the epoch: one root", told, self._timeout_s)
        what = f"what {who(self._rendezvous.hosts, [0])} wrote there just now ({mark})"
        startup.raise_unless_seen(self._rendezvous, there, failure, 0, what, self._timeout_s)

    def _look(self, compare: Callable[[Head | None], None]) -> None:
        began_s = time.monotonic()
        head, _ = self._catalog.look()
        self._head = overlap.known(head, began_s)
        if rejection := unadopted(self._catalog, head):
            raise UsageError(rejection)
        compare(head)
        self._compared = Compared(journal.tree_of(head))

    def _append(self, compare: Callable[[Head | None], None]) -> dict[str, int]:
        failpoints.hit("epoch.before")
        for _ in range(_TRIES):
            try:
                opened = self._catalog.append(partial(journal.open_epoch, compared=self._compared), self._head)
            except Overtaken:
                self._look(compare)
                continue
            failpoints.hit("epoch.after")
            assert opened is not None
            return {"epoch": opened.epoch, "version": opened.version}
        raise Overtaken(f"{self._catalog.url}: other jobs keep committing to this run; nothing was opened")


def check_tree(catalog: Catalog, head: Head | None, flat: Flat) -> None:
    """The run's newest step must be of the same job as `flat`. Raises OtherJob saying how they differ."""
    newest = journal.newest(head) if head else None
    if newest is None or newest.tree == flat.spec.fingerprint():
        return
    lines: list[str] = []
    try:
        lines = matching.tree_differences(catalog.intent(newest, catalog.manifest(newest)).tree, flat.spec)
    except (StorageError, Damaged, Suspect, NewerFormat) as error:  # that they differ, the journal says
        lines = [f"how they differ cannot be read: {error}"]
    detail = "\n".join(f"  {line}" for line in lines or ["their trees differ"])
    raise OtherJob(
        f"{catalog.url} holds another job's state (step {newest.step}); use another root, or "
        f"Options(other_tree=True):\n{detail}"
    )


def _unchanged(tree: str | None, head: Head | None) -> None:
    if journal.tree_of(head) != tree:
        raise Overtaken("another job has committed a step to this run meanwhile; nothing was opened: restore again")
