"""How all processes come to go by one account of who holds the leaves of a state: process 0's (`holders`).

Process 0 posts its account with each attempt, and has it in the attempt's intent. Another process needs it before it
stages a state of a form that is new to it, and waits for it then, on the main thread and bounded; nobody waits for
that process. A state whose form is known costs no message: the receipt names the account that was gone by, and the
coordinator rejects one that is out of date. No collective: a form may be new to some processes only.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from absl import logging

from orchestrator.arrays.tree import Flat, Form
from orchestrator.arrays.writing.write_plan import views
from orchestrator.errors import OrchestratorError, StorageError, UsageError, WaitTimeout
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.observe import heartbeat
from orchestrator.rules import holders
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode
from orchestrator.rules.records import Held, Intent
from orchestrator.run.journal_store import Catalog

_FORMS = 4  # remembered, as in `tree` and `planning`
_POLL_S = 0.002
_POLL_MAX_S = 0.05
_STORAGE_POLL_S = 1.0
_DECODER = msgspec.json.Decoder(tuple[Held, ...])


class Agreement:
    """Of one incarnation. `together`: whether JAX's processes are several. `account` and `settle` belong to the main
    thread; `doubt` may be called from any."""

    def __init__(self, catalog: Catalog, rendezvous: Rendezvous, timeout_s: float, *, together: bool) -> None:
        self._catalog, self._rendezvous, self._timeout_s = catalog, rendezvous, timeout_s
        self._known: OrderedDict[Form, tuple[Held, ...]] = OrderedDict()
        self._together = together

    def account(self, flat: Flat) -> tuple[Held, ...]:
        """On process 0: who holds the leaves, as it sees it; () in a job of one process."""
        if not self._together:
            return ()
        return self._known.get(flat.form) or self._remember(flat.form, holders.held(flat.spec.leaves, views(flat)))

    def settle(
        self, flat: Flat, attempt: AttemptId, prefix: str, apart: Callable[[], tuple[object, str] | None]
    ) -> tuple[Held, ...]:
        """The account that this process goes by in an attempt, whose signals are below `prefix`.

        `apart`: whether process 0 saves something else, and what to say of it; asked about once a second.
        Raises UsageError if process 0 takes no part in the attempt, WaitTimeout.
        """
        if not self._together:
            return ()
        if self._rendezvous.process == 0:
            known = flat.form in self._known
            held = self.account(flat)
            posting = (f"{prefix}held/0", msgspec.json.encode(held).decode())
            if known:  # hardly anybody waits for it
                threading.Thread(target=self._rendezvous.post, args=posting, name="post", daemon=True).start()
            else:
                self._rendezvous.post(*posting)
            return held
        return self._known.get(flat.form) or self._remember(flat.form, self._wait(attempt, prefix, apart))

    def doubt(self) -> None:
        """After a save that failed: ask again, whatever the form."""
        self._known = OrderedDict()

    def _remember(self, form: Form, held: tuple[Held, ...]) -> tuple[Held, ...]:
        known = self._known
        known[form] = held
        if len(known) > _FORMS:
            known.popitem(last=False)
        return held

    def _wait(
        self, attempt: AttemptId, prefix: str, apart: Callable[[], tuple[object, str] | None]
    ) -> tuple[Held, ...]:
        me = self._rendezvous
        started = time.monotonic()
        look_at, pause_s = started + _STORAGE_POLL_S, _POLL_S
        while (now := time.monotonic()) - started < self._timeout_s:
            if said := me.poll(f"{prefix}held/").get("0"):
                return _DECODER.decode(said)
            if decided := me.poll(f"{prefix}decision/").get("0"):
                raise UsageError(f"process 0 ({me.hosts[0]}) has decided without this process: {decided}")
            if now >= look_at:
                look_at = now + _STORAGE_POLL_S
                heartbeat.record("waiting for process 0", attempt.step)
                if found := self._stored(attempt):
                    return found
                if other := apart():
                    raise UsageError(other[1])
            time.sleep(pause_s)
            pause_s = min(_POLL_MAX_S, 1.5 * pause_s)
        raise WaitTimeout(
            f"{attempt.label}: process 0 ({me.hosts[0]}) did not say within {self._timeout_s:g} s who "
            "holds the leaves of the state; look at that host"
        )

    def _stored(self, attempt: AttemptId) -> tuple[Held, ...]:
        """From the attempt's intent, if a signal is lost."""
        key = attempt.intent_key
        try:
            body = self._catalog.storage.get(key)
            return decode(body, Intent, key, step=attempt.step, attempt=attempt.name).held if body else ()
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s cannot be read yet: %s", key, error)
        except OrchestratorError as error:
            logging.warning("%s: %s", key, error)
        return ()
