"""Whether the root is one place for all hosts of a job: what one of them has written there, each other must see.

A network file system may show a host an old answer for some seconds: what is not seen is polled for, in directories
that are opened again, for SEEN_WITHIN_S. Main thread; `check_all_see` is a collective.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from absl import logging

from orchestrator.errors import StorageError, UsageError
from orchestrator.job.poll import Pause, poll
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import Round, as_error, gather, raised
from orchestrator.job.startup_rounds import Sighting
from orchestrator.rules import keys
from orchestrator.rules.configuration import who
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage.port import refresh

SEEN_WITHIN_S = 10.0  # what another host has written; a network file system's caches last some seconds
_PAUSE = Pause(0.05, 1.0, growth=1.0)


def create_mark(store: JournalStore) -> str:
    """Create an object among the attempts: whether this process may save here at all. The journal needs no probe, as
    opening an epoch is one create in it. Returns its key, for other hosts to look for; what a crash leaves of it is an
    object of a few bytes that nobody takes for part of a run. Raises StorageError; nothing is left behind then."""
    key = f"{keys.STEPS}.probe-{uuid.uuid4().hex}"
    store.storage.create(key, store.writer.encode(errors="replace"))
    return key


def delete_mark(store: JournalStore, key: str) -> None:
    """A mark that cannot be deleted is logged, and harmless."""
    try:
        store.storage.delete(key)
    except StorageError as error:  # saving needs no right to delete, retention does
        logging.warning("%s/%s: cannot be deleted, nor will old steps be: %s", store.url, key, error)


def sees(store: JournalStore, key: str) -> bool:
    """Whether this host sees the object at `key`, which another one has made."""
    if store.storage.get(key) is not None:
        return True
    refresh(store.storage, key)
    return store.storage.get(key) is not None


def sees_entry(store: JournalStore, version: int, write_id: str) -> bool:
    """Whether this host sees the journal entry that another one has read."""
    return sees(store, keys.journal_key(version)) and store.entry(version).write_id == write_id


def sees_in_time(look: Callable[[], bool], timeout_s: float) -> bool:
    """Whether `look` says so within SEEN_WITHIN_S (and well before others, who wait for `timeout_s`, give this process
    up). Raises what it raises by then."""
    error: StorageError | None = None

    def seen() -> bool | None:
        nonlocal error
        error = None
        try:
            return look() or None
        except StorageError as failed:  # perhaps it passes, as caches do
            error = failed
            return None

    def late() -> bool:
        if error:
            raise error
        return False

    return poll(seen, _bound_s(timeout_s), late, pause=_PAUSE)


def _bound_s(timeout_s: float) -> float:
    return min(SEEN_WITHIN_S, timeout_s / 2)


def check_all_see(
    store: JournalStore,
    rendezvous: Rendezvous,
    round_: Round[Sighting],
    look: Callable[[], bool] | None,
    what: str,
    *,
    source: int,
    timeout_s: float,
    failure: Exception | None = None,
) -> None:
    """Raises, the same on all, unless each host sees `what`, which host `source` wrote or has read. `look`: whether
    this one does; None if it need not look. `failure`: what it has failed with already."""
    mine = Sighting(store.url)
    if look:
        try:
            mine = Sighting(store.url, sees=look())
        except Exception as error:  # the others must know of it before it is raised here
            failure = error
    if failure:
        mine = Sighting(store.url, rejected=raised(failure))
    sightings = gather(rendezvous, round_, mine, timeout_s)
    for process, sighting in enumerate(sightings):
        if sighting.rejected:
            own = failure if process == rendezvous.process else None
            raise own or as_error(process, sighting.rejected)
    blind = [process for process, sighting in enumerate(sightings) if sighting.sees is False]
    if not blind:
        return
    where = sightings[source].url
    others = sorted({sightings[process].url for process in blind} - {where})
    hint = "; a relative path begins at each host's own directory" if where.startswith("file:") else ""
    places = f" (at {', '.join(others[:3])}{hint})" if others else ""
    verb = "do" if len(blind) > 1 else "does"
    raise UsageError(
        f"{where} is not one place for all hosts of this job: {who(rendezvous.hosts, blind)}{places} {verb} not see "
        f"{what}, after {_bound_s(timeout_s):g} s; nothing was opened or saved. Give all hosts the same directory, of "
        "a file system that they share, or a bucket (gs://...)"
    )
