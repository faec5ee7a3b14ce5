"""Who holds the leaves of a state, as all processes of a save must see it: they go by process 0's account (`holders`).

Process 0 posts its account with each attempt, and stores it in the attempt's intent. Another process needs it before it
stages a state of a form that is new to it, and waits for it then, on the main thread and bounded; process 0 never waits
for it. A state whose form is known costs no message: the receipt names the account that its process went by, and the
coordinator rejects one that is out of date. No collective: a form may be new to some processes only.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from absl import logging

from orchestrator.arrays import Flat, Form, views
from orchestrator.errors import OrchestratorError, StorageError, UsageError
from orchestrator.job.outcome import Aborted
from orchestrator.job.poll import Pause, poll, timed_out
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.signals import Signals
from orchestrator.observe import heartbeat
from orchestrator.rules import holders
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode
from orchestrator.rules.kept import kept
from orchestrator.rules.records import Held, Intent
from orchestrator.run.journal_store import JournalStore

_FORMS = 4  # remembered, as in `tree` and `write_plan`
_PAUSE = Pause(0.002, 0.05, growth=0.5)


class LeafAccounts:
    """Of one incarnation. `together`: whether JAX's processes are several. `account` and `obtain` belong to the main
    thread; `forget` may be called from any."""

    def __init__(
        self,
        store: JournalStore,
        rendezvous: Rendezvous,
        signals: Signals,
        timeout_s: float,
        *,
        together: bool,
        beside: LeafAccounts | None = None,
    ) -> None:
        """beside: whose forms these are, too, as the same states are saved there."""
        self._store, self._rendezvous, self._signals, self._timeout_s = store, rendezvous, signals, timeout_s
        self._known: OrderedDict[Form, tuple[Held, ...]] = beside._known if beside else OrderedDict()
        self._together = together

    def account(self, flat: Flat) -> tuple[Held, ...]:
        """On process 0: who holds the leaves, as it sees it; () in a job of one process."""
        if not self._together:
            return ()
        return self._known.get(flat.form) or self._remember(flat.form, _as_seen_here(flat.form))

    def obtain(self, flat: Flat, attempt: AttemptId, other_step: Callable[[], Aborted | None]) -> tuple[Held, ...]:
        """The account that this process goes by in an attempt.

        `other_step`: the outcome if process 0 saves another step instead; asked about once a second.
        Raises UsageError if process 0 takes no part in the attempt, WaitTimeout.
        """
        if not self._together:
            return ()
        if self._rendezvous.process == 0:
            known = flat.form in self._known
            held = self.account(flat)
            if known:  # hardly anybody waits for it
                posting = attempt, held
                threading.Thread(target=self._signals.post_held, args=posting, name="post", daemon=True).start()
            else:
                self._signals.post_held(attempt, held)
            return held
        return self._known.get(flat.form) or self._remember(flat.form, self._wait(attempt, other_step))

    def forget(self) -> None:
        """After a save that failed: ask again, whatever the form."""
        self._known.clear()

    def _remember(self, form: Form, held: tuple[Held, ...]) -> tuple[Held, ...]:
        known = self._known
        known[form] = held
        if len(known) > _FORMS:
            with contextlib.suppress(KeyError):  # forgotten meanwhile
                known.popitem(last=False)
        return held

    def _wait(self, attempt: AttemptId, other_step: Callable[[], Aborted | None]) -> tuple[Held, ...]:
        who = f"process 0 ({self._rendezvous.hosts[0]})"

        def signalled() -> tuple[Held, ...] | None:
            if held := self._signals.held(attempt):
                return held
            if decided := self._signals.decision(attempt):
                raise UsageError(f"{who} has decided without this process: {decided}")
            return None

        def stored() -> tuple[Held, ...] | None:
            heartbeat.record("waiting for process 0", attempt.step)
            if held := self._stored(attempt):
                return held
            if other := other_step():
                raise UsageError(other.reason)
            return None

        late = timed_out(
            f"{attempt.label}: {who} did not say within {self._timeout_s:g} s who holds the leaves of the "
            "state; check that host"
        )
        return poll(signalled, self._timeout_s, late, pause=_PAUSE, storage=stored)

    def _stored(self, attempt: AttemptId) -> tuple[Held, ...]:
        """From the attempt's intent, if a signal is lost."""
        key = attempt.intent_key
        try:
            body = self._store.storage.get(key)
            return decode(body, Intent, key, step=attempt.step, attempt=attempt.name).held if body else ()
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s cannot be read yet: %s", key, error)
        except OrchestratorError as error:
            logging.warning("%s: %s", key, error)
        return ()


@kept
def _as_seen_here(form: Form) -> tuple[Held, ...]:
    return holders.held(form.leaves, views(form))
