"""Held steps on several hosts: copies, hosts that are lost or come back, zombies, copies that lie, and promotion.

The rules are the shipped ones (`rules/held`, `rules/journal`, `rules/pairing`, `rules/survival`). Around them is what a
job does with them, one effect at a time (`host_moves`): it looks at one host after the other, reads what it has chosen
from whichever host has it, opens its epoch in the run's journal and then host by host, and holds: each process writes
its part and has copies of it taken by other hosts' servers; then process 0 enters the step, and the others follow. What
is held is uploaded to the store in between, and committed there as the same attempt. Anybody may stop anywhere for
good, or go on as a zombie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import msgspec

from orchestrator.rules import held, held_files, journal, pairing, survival
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import Stamp
from orchestrator.rules.records import Head, JournalEvent, LiveStep

from .search import trace


@dataclass(frozen=True)
class Rules:
    """The shipped ones, and what the shells around them do; a mutation replaces one."""

    open_run: Callable[..., Any] = journal.open_epoch
    open_tier: Callable[..., Any] = held.open_epoch
    enter: Callable[..., Any] = journal.commit
    follow: Callable[..., Any] = held.follow
    candidates: Callable[..., Any] = held.candidates
    lacking: Callable[..., Any] = held_files.lacking
    to_free: Callable[..., Any] = held.to_free
    release: Callable[..., Any] = held.release
    commit: Callable[..., Any] = journal.commit
    pair: Callable[..., Any] = pairing.pair
    survives: Callable[..., Any] = survival.survives
    checks_read_bytes: bool = True
    checks_uploaded_bytes: bool = True
    waits_for_copies: bool = True
    servers_fence: bool = True
    tries_other_hosts: bool = True
    finds_by_manifest: bool = True
    is_held_when_entered: bool = False
    is_held_when_first_follows: bool = False
    keeps_uploads_in_order: bool = True


class Part(NamedTuple):
    """What lies on a host. process: -n is the manifest of an attempt of n processes. body: whose bytes they are; None:
    nobody's."""

    process: int
    attempt: AttemptId
    body: AttemptId | None


class Host(NamedTuple):
    """log: of its process, encoded; b"" where there is none. told: the newest epoch that its server has heard of."""

    log: bytes = b""
    told: int = 0
    parts: frozenset[Part] = frozenset()
    up: bool = True


class Job(NamedTuple):
    """An incarnation. at: how far it has come within `pc`. hosts: of its processes; alive: those whose host is there.
    seen: what each host had when it looked. logged: what their logs say is held.
    known: what was called held when it started. listed: what all logs said when it opened them. holds: so many by
    now. entered: the step that process 0 has entered last; behind: the processes that have not, yet.
    upload: what goes to the store, and how far it is."""

    pc: str = "starting"
    at: int = 0
    epoch: int = 0
    hosts: tuple[int, ...] = ()
    alive: frozenset[int] = frozenset()
    seen: tuple[frozenset[Part], ...] = ()
    logged: frozenset[AttemptId] = frozenset()
    step: int = 0
    holds: int = 0
    listed: frozenset[AttemptId] = frozenset()
    entered: AttemptId | None = None
    behind: frozenset[int] = frozenset()
    upload: tuple[AttemptId, int] | None = None
    known: frozenset[AttemptId] = frozenset()


class Promise(NamedTuple):
    """The newest step that was called held, of a job that nobody had replaced. lost: hosts of that job since."""

    attempt: AttemptId
    hosts: tuple[int, ...]
    lost: frozenset[int] = frozenset()
    lied: bool = False


class World(NamedTuple):
    run: bytes
    store: frozenset[Part]
    hosts: tuple[Host, ...]
    jobs: tuple[Job, ...]
    promise: Promise | None
    losses: int
    leaves: int
    lies: int


@dataclass(frozen=True)
class Scenario:
    """domains: of each host. holds: how many steps each incarnation holds. losses, leaves, lies: so many hosts are lost
    with their memory, go away and may come back with what they had, and so many files change. promotes: whether held
    steps go to the store, too. saves: whether others go there directly.
    overlap: whether one starts while the one before is starting still."""

    name: str
    domains: tuple[str, ...]
    holds: tuple[int, ...]
    copies: int = 1
    losses: int = 0
    leaves: int = 0
    lies: int = 0
    promotes: bool = False
    saves: bool = False
    overlap: bool = True


class Found(NamedTuple):
    states: int
    choices: int
    violation: str | None
    trace: tuple[str, ...] = ()


Moved = tuple[str, World, str]  # what was done, what is there then, and what is wrong with it

STAMP = Stamp("w", 0.0, "id")
_EVENT = JournalEvent(kind="opened-epoch")


@cache
def head_of(body: bytes) -> Head | None:
    return msgspec.json.decode(body, type=Head) if body else None


def body_of(head: Head) -> bytes:
    """What matters of it: how often it was changed, and what was deleted since, says nothing more."""
    return msgspec.json.encode(msgspec.structs.replace(head, version=0, retired=(), event=_EVENT))


@cache
def live(attempt: AttemptId) -> LiveStep:
    return LiveStep(
        step=attempt.step, attempt=attempt.name, manifest_crc32c="0", tree="t", bytes=1, stored_metrics={}, time=0.0
    )


def count(parts: frozenset[Part], attempt: AttemptId) -> int:
    """How many parts an attempt has, by its manifest; 0 without one."""
    return max((-part.process for part in parts if part.attempt == attempt and part.process < 0), default=0)


def whole(parts: frozenset[Part], attempt: AttemptId) -> bool:
    """Whether there are bytes of all parts, right or wrong, and the manifest."""
    there = {part.process for part in parts if part.attempt == attempt}
    return bool(expected := count(parts, attempt)) and there >= set(range(expected))


def right(parts: frozenset[Part]) -> frozenset[Part]:
    return frozenset(part for part in parts if part.body == part.attempt)


def lies_in(store: frozenset[Part], run: bytes) -> str:
    """A committed step is never lost: all of it is in the store, with the bytes that it had."""
    head = head_of(run)
    for one in head.live if head else ():
        mine = frozenset(part for part in store if part.attempt == one.id)
        if not whole(right(mine), one.id):
            return f"{one.id.label} is committed, and not whole in the store"
    return ""


# What nobody asked for.


def accidents(world: World) -> Iterator[Moved]:
    for index, host in enumerate(world.hosts):
        if host.up and world.losses:
            yield f"host {index} is lost with its memory", _gone(world, index, Host(), losses=world.losses - 1), ""
        if host.up and world.leaves:
            away = host._replace(up=False)
            yield f"host {index} goes away", _gone(world, index, away, leaves=world.leaves - 1), ""
        if not host.up:
            hosts = with_item(world.hosts, index, host._replace(up=True))
            yield f"host {index} comes back with what it had", world._replace(hosts=hosts), ""
        if world.lies:
            yield from _lies(world, index, host)


def _gone(world: World, index: int, left: Host, **changes: Any) -> World:
    jobs = tuple(
        job._replace(alive=job.alive - {process for process, host in enumerate(job.hosts) if host == index})
        for job in world.jobs
    )
    promise = world.promise and world.promise._replace(lost=world.promise.lost | {index})
    return world._replace(hosts=with_item(world.hosts, index, left), jobs=jobs, promise=promise, **changes)


def _lies(world: World, index: int, host: Host) -> Iterator[Moved]:
    """One file has other bytes of the same length: nobody's, or another attempt's."""
    for part in sorted(part for part in host.parts if part.process >= 0 and part.body == part.attempt):
        stale = [other.attempt for other in host.parts if other.process == part.process]
        for body in (None, *{each for each in stale if each != part.attempt}):
            parts = host.parts - {part} | {part._replace(body=body)}
            promise = world.promise
            if promise and promise.attempt == part.attempt:
                promise = promise._replace(lied=True)
            hosts = with_item(world.hosts, index, host._replace(parts=parts))
            what = f"host {index}: part {part.process} of {part.attempt.label} is now {body.label if body else 'noise'}"
            yield what, world._replace(hosts=hosts, lies=world.lies - 1, promise=promise), ""


def with_item(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def explore(scenario: Scenario, rules: Rules | None = None, states_max: int = 3_000_000) -> Found:
    """Everything that can happen, or the shortest way to the first violation."""
    from tests.proof.model.host_moves import moves  # it needs the types above

    rules = rules or Rules()
    start = World(
        b"",
        frozenset(),
        (Host(),) * len(scenario.domains),
        (Job(),) * len(scenario.holds),
        None,
        scenario.losses,
        scenario.leaves,
        scenario.lies,
    )
    came: dict[World, tuple[World | None, str]] = {start: (None, "")}
    waiting, choices = deque([start]), 0
    while waiting:
        world = waiting.popleft()
        for what, after, problem in [*moves(scenario, world, rules), *accidents(world)]:
            choices += what.endswith("chooses")
            if not problem and (after.store != world.store or after.run != world.run):
                problem = lies_in(after.store, after.run)
            if problem:
                return Found(len(came), choices, problem, tuple([*trace(came, world), what]))
            if after not in came:
                came[after] = (world, what)
                waiting.append(after)
        if len(came) > states_max:
            raise AssertionError(f"{scenario.name}: more than {states_max} states")
    return Found(len(came), choices, None)
