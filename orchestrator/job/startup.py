"""What all hosts of a job agree on at its start: one place, one configuration. What one of them finds out, all of them
do, and raise the same error, before anything is written.

Two things are settled here, at once. *One place*: each host reads the head of the run's journal, and what one of them
sees all must see, by its write_id. In a new run there is nothing to see yet: there, and against roots that are copies
of each other, `Opening` has process 0 make a mark just before the epoch is opened, which every other host must see
before it writes anything itself (`one_root`). *One configuration*: see `configuration`. Main thread.
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

from orchestrator.errors import UsageError
from orchestrator.job import one_root, startup_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import as_error, gather, raised
from orchestrator.job.startup_rounds import Arrival
from orchestrator.rules import configuration
from orchestrator.rules.configuration import Settings, who
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.texts import printable


def agree_at_start(
    store: JournalStore,
    rendezvous: Rendezvous,
    name: str,
    given: Settings,
    timeout_s: float,
    admit: Callable[[Head | None], None] = lambda head: None,
) -> str:
    """Returns an id of this incarnation, random and the same on all hosts, once they have agreed. `name`: of the round.
    `given`: what this host was given (`configuration.of_agent`). `admit`: what process 0 has to say against the run,
    raised on all. A collective.

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
        head = store.head()  # whether it can be trusted
        if rendezvous.process == 0:
            admit(head)
        mine = Arrival(digest, incarnation_id, None if head is None else (head.version, head.write_id))
    except Exception as error:  # the others must know of it before it is raised here
        failure = error
        mine = Arrival(digest, incarnation_id, rejected=raised(error))
    arrivals = gather(rendezvous, startup_rounds.arrival(name), mine, timeout_s)
    first = arrivals[0]
    if first.rejected:
        raise failure or as_error(0, first.rejected)
    if len({arrival.configuration for arrival in arrivals}) > 1:
        _check_settings(rendezvous, name, settings, timeout_s)
    if any(arrival.rejected or arrival.head != first.head for arrival in arrivals):
        _check_root(store, rendezvous, name, arrivals, failure, timeout_s)
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


def _check_settings(rendezvous: Rendezvous, name: str, settings: Mapping[str, str], timeout_s: float) -> None:
    given = gather(rendezvous, startup_rounds.configurations(name), dict(settings), timeout_s)
    errors, notes = configuration.differences(given, partial(who, rendezvous.hosts))
    if rendezvous.process == 0 or given[rendezvous.process] != given[0]:  # not each of a thousand alike
        for note in notes:
            logging.warning("the hosts of this job differ in %s", printable(note))
    if errors:
        lines = "\n  ".join(errors)
        raise UsageError(f"the hosts of this job are not configured alike; give all of them the same:\n  {lines}")


def _check_root(
    store: JournalStore,
    rendezvous: Rendezvous,
    name: str,
    arrivals: Sequence[Arrival],
    failure: Exception | None,
    timeout_s: float,
) -> None:
    """Hosts have read different heads: of one journal, between whose entries somebody wrote, or of several? An entry is
    never changed or taken away, so that the one which process 0 has read must be there for all; where it has read none,
    the newest that another has."""
    heads = [arrival.head for arrival in arrivals]
    source = 0 if heads[0] else max(range(len(heads)), key=lambda process: heads[process] or (-1, ""))
    sought = heads[source]
    look: Callable[[], bool] | None = None
    what = ""
    if sought:
        what = f"version {sought[0]} of the journal that {who(rendezvous.hosts, [source])} sees there"
        if heads[rendezvous.process] != sought:
            failure = None  # what could not be read before may be read by now
            look = partial(one_root.sees_in_time, partial(one_root.sees_entry, store, *sought), timeout_s)
    one_root.check_all_see(
        store,
        rendezvous,
        startup_rounds.one_root(name),
        look,
        what,
        source=source,
        timeout_s=timeout_s,
        failure=failure,
    )
