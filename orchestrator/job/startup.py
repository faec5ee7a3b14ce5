"""The first meeting of a job's hosts: one place, one configuration. What they find out, all of them find out, and raise
the same error, before anything is written.

Two things are settled here, at once. *One place*: each host reads the head of the run's journal, and what one of them
sees all must see, by its write_id. In a new run there is nothing to see yet: there, and against roots that are copies
of each other, `Opening` has process 0 make a mark just before the epoch is opened, which every other host must see
(`awaited`) before it writes anything itself. *One configuration*: see `configuration`.

A network file system may show a host an old answer for some seconds: what is not seen is looked for again, in
directories that are opened again, for SEEN_WITHIN_S. Main thread; each function but `awaited` is a collective.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
from absl import logging

from orchestrator.errors import StorageError, UsageError
from orchestrator.job import startup_rounds as rounds
from orchestrator.job.poll import Pause, poll
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import as_error, gather, raised
from orchestrator.job.startup_rounds import Arrival, Sighting
from orchestrator.rules import configuration, keys
from orchestrator.rules.configuration import Settings, who
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage.port import refresh
from orchestrator.texts import printable

SEEN_WITHIN_S = 10.0  # what another host has written; a network file system's caches last some seconds
_PAUSE = Pause(0.05, 1.0, growth=1.0)


def meet(
    catalog: JournalStore,
    rendezvous: Rendezvous,
    name: str,
    given: Settings,
    timeout_s: float,
    admit: Callable[[Head | None], None] = lambda head: None,
) -> str:
    """Have all hosts meet. Returns an id of this incarnation, random and the same on all. `given`: what this host was
    given (`configuration.of_agent`). `admit`: what process 0 has to say against the run, raised on all.

    Costs one exchange of a short message, and each host the reading of the journal's head; where hosts differ two more.
    Raises UsageError, the same on all, naming the hosts that do not share the root, or the settings in which they
    differ; what process 0 finds wrong with the run; WaitTimeout naming who did not come.
    """
    alone = rendezvous.count == 1
    settings = {} if alone else {**given, **surroundings()}
    digest = "" if alone else configuration.digest(settings)
    incarnation_id = uuid.uuid4().hex if rendezvous.process == 0 else ""
    failure: Exception | None = None
    try:
        head = catalog.head()  # whether it can be trusted
        if rendezvous.process == 0:
            admit(head)
        mine = Arrival(digest, incarnation_id, None if head is None else (head.version, head.write_id))
    except Exception as error:  # the others must hear of it before it is raised here
        failure = error
        mine = Arrival(digest, incarnation_id, rejected=raised(error))
    answers = gather(rendezvous, rounds.arrival(name), mine, timeout_s)
    first = answers[0]
    if first.rejected:
        raise failure or as_error(0, first.rejected)
    if len({answer.configuration for answer in answers}) > 1:
        _compare(rendezvous, name, settings, timeout_s)
    if any(answer.rejected or answer.head != first.head for answer in answers):
        _find_out(catalog, rendezvous, name, answers, failure, timeout_s)
    return first.incarnation_id


def surroundings() -> dict[str, str]:
    """What this process runs with that all hosts of a job should have in common."""
    found = {name: str(getattr(jax.config, name, "not known")) for name in configuration.JAX_SETTINGS}
    found |= {name: repr(os.environ[name]) if os.environ.get(name) else "not set" for name in configuration.ENVIRONMENT}
    for package in configuration.PACKAGES:
        found[package] = "not installed"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"Python": ".".join(platform.python_version_tuple()[:2])}


def _compare(rendezvous: Rendezvous, name: str, settings: Mapping[str, str], timeout_s: float) -> None:
    given = gather(rendezvous, rounds.configurations(name), dict(settings), timeout_s)
    errors, notes = configuration.differences(given, partial(who, rendezvous.hosts))
    if rendezvous.process == 0 or given[rendezvous.process] != given[0]:  # not each of a thousand alike
        for note in notes:
            logging.warning("the hosts of this job differ in %s", printable(note))
    if errors:
        lines = "\n  ".join(errors)
        raise UsageError(f"the hosts of this job are not configured alike; give all of them the same:\n  {lines}")


def _find_out(
    catalog: JournalStore,
    rendezvous: Rendezvous,
    name: str,
    answers: Sequence[Arrival],
    failure: Exception | None,
    timeout_s: float,
) -> None:
    """Hosts have read different heads: of one journal, between whose entries somebody wrote, or of several? An entry is
    never changed or taken away, so that the one which process 0 has read must be there for all; where it has read none,
    the newest that another has."""
    heads = [answer.head for answer in answers]
    source = 0 if heads[0] else max(range(len(heads)), key=lambda process: heads[process] or (-1, ""))
    sought = heads[source]
    sees: bool | None = None
    if sought is not None and heads[rendezvous.process] != sought:
        failure = None  # what could not be read before may be read by now
        try:
            sees = awaited(partial(_has_entry, catalog, *sought), timeout_s)
        except Exception as error:
            failure = error
    mine = Sighting(catalog.url, sees, raised(failure) if failure else None)
    there = gather(rendezvous, rounds.one_root(name), mine, timeout_s)
    what = f"version {sought[0]} of the journal that {who(rendezvous.hosts, [source])} sees there" if sought else ""
    raise_unless_seen(rendezvous, there, failure, source, what, timeout_s)


def _has_entry(catalog: JournalStore, version: int, write_id: str) -> bool:
    key = keys.journal_key(version)
    return has(catalog, key) and catalog.entry(version).write_id == write_id


def mark(catalog: JournalStore) -> str:
    """Create an object among the attempts: whether this process may save here at all. The journal needs no probe, as
    opening an epoch is one create in it. Returns its key, for other hosts to look for; what a crash leaves of it is an
    object of a few bytes that nobody takes for part of a run. Raises StorageError; nothing is left behind then."""
    key = f"{keys.STEPS}.probe-{uuid.uuid4().hex}"
    catalog.storage.create(key, catalog.writer.encode(errors="replace"))
    return key


def unmark(catalog: JournalStore, key: str) -> None:
    try:
        catalog.storage.delete(key)
    except StorageError as error:  # saving needs no right to delete, retention does
        logging.warning("%s/%s: cannot be deleted, nor will old steps be: %s", catalog.url, key, error)


def has(catalog: JournalStore, key: str) -> bool:
    """Whether this host sees the object at `key`, which another one has made."""
    if catalog.storage.get(key) is not None:
        return True
    refresh(catalog.storage, key)
    return catalog.storage.get(key) is not None


def awaited(look: Callable[[], bool], timeout_s: float) -> bool:
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


def raise_unless_seen(
    rendezvous: Rendezvous,
    there: Sequence[Sighting],
    failure: Exception | None,
    source: int,
    what: str,
    timeout_s: float,
) -> None:
    """Raises, the same on all, unless each host has seen `what`. `there`: of each of them; `failure`: this host's.
    `source`: whose it is. `timeout_s`: as in `awaited`."""
    for process, answer in enumerate(there):
        if answer.rejected:
            raise failure if failure and process == rendezvous.process else as_error(process, answer.rejected)
    blind = [process for process, answer in enumerate(there) if answer.sees is False]
    if not blind:
        return
    where = there[source].url
    others = sorted({there[process].url for process in blind} - {where})
    hint = "; a relative path begins at each host's own directory" if where.startswith("file:") else ""
    places = f" (at {', '.join(others[:3])}{hint})" if others else ""
    verb = "do" if len(blind) > 1 else "does"
    raise UsageError(
        f"{where} is not one place for all hosts of this job: {who(rendezvous.hosts, blind)}{places} {verb} not see "
        f"{what}, after {_bound_s(timeout_s):g} s; nothing was opened or saved. Give all hosts the same directory, of "
        "a file system that they share, or a bucket (gs://...)"
    )
