"""Agents of one process on one root: the one that opens its epoch last takes over from those before it, in order.

It would fence them, and drop what they are saving, as it does with incarnations in other processes. But a cell of a
notebook that is run again, or a second manager on a directory, is no other incarnation: the save in flight is waited
for, within its own bound, the older agent is closed, one line says so, and what uses it afterwards is told what has
happened. Making an agent only waits; nothing is closed before nothing speaks against opening the epoch (invariant 9).

The same root is the same directory, however it is spelled, or the same `gs://` prefix; the same process is one of the
same host name and index, so that tests may have several hosts in one interpreter. A forked child has none of this.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from absl import logging

from orchestrator.errors import OrchestratorError
from orchestrator.job.leaving import Lifetime
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.save_sequence import SaveSequence
from orchestrator.storage.port import Storage, local_path

_CALL_S = 60.0  # for another thread to return from the agent that is to be closed


@dataclass(eq=False)
class Holder:
    """An agent that has opened its epoch, and may be closed since; only its Takeover keeps it. finish: ends the agent,
    without a barrier, in the state given; returns why a save is lost that nobody knows of yet."""

    lifetime: Lifetime
    saves: SaveSequence
    finish: Callable[[str], OrchestratorError | None]

    def close(self) -> OrchestratorError | None:
        """Another agent takes over: the next use of this one says so. Returns what `finish` does."""
        self.lifetime.let_finish(_CALL_S)
        return self.finish("was closed when a newer agent of this process took over its root; use that one")


_holders: weakref.WeakKeyDictionary[Holder, Hashable] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_holders.clear)


class Takeover:
    """What one agent, or a manager, has to do with those before it. Main thread; no collectives."""

    def __init__(self, storage: Storage, rendezvous: Rendezvous) -> None:
        self._storage = storage
        self._own: Holder | None = None
        self._process = (rendezvous.hosts[rendezvous.process], rendezvous.process)

    def wait(self) -> Takeover:
        """Until this one has opened its epoch: until no agent before it is saving, whose step it is to restore. Bounded
        by that save."""
        for holder in [] if self._own else self._before():
            step = holder.saves.in_flight
            if step is not None:
                text = "%s: another agent of this process is saving step %d there: waiting for it"
                logging.warning(text, self._storage.url, step)
                holder.saves.settle()
        return self

    def take_over(self) -> None:
        """Close the agents before this one: its epoch is about to be opened."""
        for holder in self._before():
            step = holder.saves.in_flight
            error = holder.close()
            lost = error or (f"step {step} still hangs, and is lost" if holder.saves.in_flight is not None else None)
            logging.warning(
                "%s: takes over from another agent of this process, which is closed%s",
                self._storage.url,
                f"; {lost}" if lost else "",
            )

    def opened(self, holder: Holder) -> None:
        """The epoch of the agent that keeps `holder` is open: whoever comes next takes over from it."""
        self._own = holder
        if (place := self._place()) is not None:
            _holders[holder] = place

    def _before(self) -> list[Holder]:
        place = self._place() if _holders else None
        found = [holder for holder, held in list(_holders.items()) if held == place]
        # One that was closed matters only as long as it is saving, as after a Ctrl-C in `close`.
        return [holder for holder in found if holder.saves.in_flight is not None or not holder.lifetime.closed]

    def _place(self) -> Hashable:
        """What is the same for all spellings of one root; None where there is nothing yet."""
        path = local_path(self._storage.url)
        if path is None:  # a store in memory is a place of its own
            return (self._process, self._storage.url if self._storage.url.startswith("gs://") else id(self._storage))
        try:
            found = os.stat(path)
        except OSError:
            return None
        return (self._process, found.st_dev, found.st_ino)
