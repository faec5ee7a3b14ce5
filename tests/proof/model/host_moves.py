"""What one incarnation of a job on several hosts may do next, and what is wrong with it. That it stops for good is that
it is not asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from orchestrator.policy import last
from orchestrator.rules import held
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.domains import Domains, Site
from orchestrator.rules.records import FORMAT, FileEntry, Head, Manifest
from tests.proof.model.hosts import (
    STAMP,
    Host,
    Job,
    Moved,
    Part,
    Promise,
    Rules,
    Scenario,
    World,
    body_of,
    count,
    head_of,
    live,
    right,
    whole,
    with_item,
)

KEEP_HELD, KEEP_SAVED = last(2), last(1)
STARTING = ("starting", "looking", "choosing", "opening", "opening hosts")

Become = Callable[..., World]


def moves(scenario: Scenario, world: World, rules: Rules) -> Iterator[Moved]:
    for index in range(len(world.jobs)):
        early = STARTING[: 1 if scenario.overlap else None]
        if not index or world.jobs[index - 1].pc not in early:  # the supervisor starts them one after the other
            for what, after, problem in _moves(scenario, world, rules, index):
                yield f"{'ABC'[index]} {what}", after, problem


def _moves(scenario: Scenario, world: World, rules: Rules, index: int) -> Iterator[Moved]:
    job = world.jobs[index]
    become = partial(_become, world, index)
    if job.pc in STARTING and len(job.alive) < len(job.hosts):
        return  # a process is missing: no round of all comes to its end
    match job.pc:
        case "starting":
            up = tuple(number for number, host in enumerate(world.hosts) if host.up)
            if not up:
                return
            known = _known(world, up)
            yield "starts", become(pc="looking", hosts=up, alive=frozenset(range(len(up))), known=known), ""
        case "looking":
            yield _look(world, job, become)
        case "choosing":
            yield _choose(scenario, world, rules, job, become)
        case "opening":
            head = rules.open_run(head_of(world.run), STAMP)
            outside: dict[str, Any] = {"run": body_of(head)}
            if world.promise and world.promise.attempt not in job.known:
                outside["promise"] = None  # it was held while this one was choosing already
            yield "opens its epoch", become(outside, pc="opening hosts", epoch=head.epoch, known=frozenset()), ""
        case "opening hosts":
            yield _open_host(world, rules, job, become)
        case "running":
            if job.holds < scenario.holds[index]:
                if scenario.saves and job.upload:
                    yield from _save(world, rules, job, become)
                yield "begins to hold", become(pc="writing", at=0, step=job.step + 1, holds=job.holds + 1), ""
        case "writing":
            yield from _write(scenario, world, rules, job, become)
        case "entering":
            yield from _enter(scenario, world, rules, job, become)
    if job.entered:
        yield from _follow(scenario, world, rules, job, become)
    if job.upload:
        yield from _upload(world, rules, job, become)


def _become(world: World, index: int, outside: dict[str, Any] | None = None, **changes: Any) -> World:
    job = world.jobs[index]._replace(**changes)
    return world._replace(jobs=with_item(world.jobs, index, job), **(outside or {}))


# Coming back.


def _known(world: World, hosts: tuple[int, ...]) -> frozenset[AttemptId]:
    """What is called held when a job starts, and what a log of a host that is there says so."""
    heads = [head_of(world.hosts[number].log) for number in hosts]
    listed = {one.id for head in heads if head for one in head.live}
    return frozenset(listed | ({world.promise.attempt} if world.promise else set()))


def _look(world: World, job: Job, become: Become) -> Moved:
    host = world.hosts[job.hosts[job.at]]
    head = head_of(host.log)
    logged = job.logged | {each.id for each in (head.live if head else ())}
    after = {"seen": (*job.seen, host.parts), "logged": frozenset(logged)}
    ended = job.at + 1 == len(job.hosts)
    pc = "choosing" if ended else "looking"
    return f"looks at host {job.hosts[job.at]}", become(pc=pc, at=job.at + 1, **after), ""


def offered(rules: Rules, job: Job) -> list[AttemptId]:
    """What the processes together can have, by what each has found on its host."""
    union: frozenset[Part] = frozenset().union(*job.seen)
    found = {part.attempt for part in union if part.process < 0}
    listed = found if rules.finds_by_manifest else found & job.logged
    return sorted(each for each in listed if not rules.lacking(_manifest(count(union, each)), _had(job, each)))


def _had(job: Job, attempt: AttemptId) -> list[set[int]]:
    """The numbers of an attempt's files (`held.names`) that each host has."""
    return [{max(part.process + 1, 0) for part in parts if part.attempt == attempt} for parts in job.seen]


@cache
def _manifest(processes: int) -> Manifest:
    files = tuple(FileEntry(path=f"part-{process}", bytes=1, crc32c="0") for process in range(processes))
    return Manifest(
        format=FORMAT, write_id="", step=0, attempt="", process_count=processes, files=files, hosts=(), seconds=()
    )


def _choose(scenario: Scenario, world: World, rules: Rules, job: Job, become: Become) -> Moved:
    head = head_of(world.run)
    if head is None:
        return "chooses", become(pc="opening", at=0, seen=(), logged=frozenset()), ""
    standing = held.standing(head)
    offers = [held.Offer(each.step, each.name, "0") for each in offered(rules, job)]
    taken: AttemptId | None = None
    wrong = ""
    for one in rules.candidates(standing, [offers] * len(job.hosts)):
        bodies = _read(world, rules, job, one.id)
        if bodies is not None:
            taken = one.id
            wrong = "" if set(bodies) <= {one.id} else f"{one.id.label} is restored with bytes that it never had"
            break
    taken = taken or standing.newest
    problem = wrong or _misjudged(scenario, world, rules, job, taken, standing)
    step = taken.step if taken else 0
    return "chooses", become(pc="opening", at=0, seen=(), logged=frozenset(), step=step), problem


def _read(world: World, rules: Rules, job: Job, attempt: AttemptId) -> list[AttemptId | None] | None:
    """Whose bytes each part has, as read from the first host whose copy is whole; None: no host has one."""
    there = [world.hosts[number].parts for number in job.hosts if world.hosts[number].up]
    union: frozenset[Part] = frozenset().union(*there)
    bodies: list[AttemptId | None] = []
    for process in range(count(union, attempt)):
        copies = [part for parts in there for part in sorted(parts, key=str) if part[:2] == (process, attempt)]
        copies = copies if rules.tries_other_hosts else copies[:1]
        good = [part.body for part in copies if part.body == attempt or not rules.checks_read_bytes]
        if not good:
            return None
        bodies.append(good[0])
    return bodies or None


def _misjudged(
    scenario: Scenario, world: World, rules: Rules, job: Job, taken: AttemptId | None, standing: held.Standing
) -> str:
    rank = held.rank(taken) if taken else (-1, -1, -1)
    label = taken.label if taken else "nothing"
    then = right(frozenset().union(*job.seen))
    now = right(frozenset().union(*(world.hosts[number].parts for number in job.hosts if world.hosts[number].up)))
    could = [each for each in job.known if whole(then, each) and whole(now, each)]
    store = [standing.newest] if standing.newest else []
    newer = [each for each in (*could, *store) if (each.epoch, each.step) > rank[:2] and each.epoch <= standing.epoch]
    if newer:
        kind = "of a newer start" if newer[0].epoch > rank[0] else "newer"
        return f"{label} is chosen over {newer[0].label}, which is {kind}"
    promise = world.promise
    if promise and promise.attempt in job.known and not promise.lied and rank < held.rank(promise.attempt):
        lost = {promise.hosts.index(number) for number in promise.lost if number in promise.hosts}
        if rules.survives(targets_of(rules, scenario, promise.hosts), lost):
            return f"{label} is chosen, and {promise.attempt.label} was promised to survive"
    return ""


# Opening.


def _open_host(world: World, rules: Rules, job: Job, become: Become) -> Moved:
    number = job.hosts[job.at]
    host, before = world.hosts[number], head_of(world.hosts[number].log)
    made = rules.open_tier(before, STAMP, epoch=job.epoch, version=0)
    if not isinstance(made, Head):
        return f"is fenced on host {number}", become(pc="stopped"), ""
    problem = f"epoch {before.epoch} is followed by {job.epoch}" if before and before.epoch >= job.epoch else ""
    listed = job.listed | {one.id for one in made.live}
    if job.at:  # a crash may have come between process 0's entry and this one's
        made = _following(world, rules, job, host._replace(log=body_of(made))) or made
    host = host._replace(log=body_of(made), told=max(host.told, job.epoch))
    ended = job.at + 1 == len(job.hosts)
    then: dict[str, Any] = {"pc": "running", "at": 0} if ended else {"at": job.at + 1}
    world = world._replace(hosts=with_item(world.hosts, number, host))
    if ended:
        for process in range(len(job.hosts)):
            world = _freed(world, rules, job._replace(listed=listed), process, None)
    return f"opens host {number}", become({"hosts": world.hosts}, listed=listed, **then), problem


# Holding.


def _attempt(job: Job) -> AttemptId:
    return AttemptId.of(job.step, job.epoch, 1)


def holders(scenario: Scenario, rules: Rules, job: Job, process: int) -> list[int]:
    """The hosts that have a process's part: its own, and those that take copies."""
    targets = targets_of(rules, scenario, job.hosts)
    return [job.hosts[process], *(job.hosts[each] for each in targets[process])]


@cache
def targets_of(rules: Rules, scenario: Scenario, hosts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    sites = [Site(f"host-{number}", Domains(node=f"n{number}", slice=scenario.domains[number])) for number in hosts]
    found: tuple[tuple[int, ...], ...] = rules.pair(sites, scenario.copies, "slice").targets
    return found


def _put(
    scenario: Scenario, world: World, rules: Rules, job: Job, process: int, what: int
) -> tuple[tuple[Any, ...] | None, str]:
    """The hosts with a file of a process's and its copies; None if a server does not take it."""
    part, hosts, problem = Part(what, _attempt(job), _attempt(job)), world.hosts, ""
    for number in holders(scenario, rules, job, process):
        host = hosts[number]
        if number != job.hosts[process]:
            if job.hosts.index(number) not in job.alive:
                if rules.waits_for_copies:
                    return None, problem
                continue
            log = head_of(host.log)
            newest = max(host.told, log.epoch if log else 0)
            if newest > job.epoch:
                if rules.servers_fence:
                    return None, problem
                problem = f"host {number} takes a copy of epoch {job.epoch}, and knows of epoch {newest}"
        hosts = with_item(hosts, number, host._replace(parts=host.parts | {part}))
    return hosts, problem


def _write(scenario: Scenario, world: World, rules: Rules, job: Job, become: Become) -> Iterator[Moved]:
    if job.at not in job.alive or job.at in job.behind:
        return  # lost, or at the step before still
    hosts, problem = _put(scenario, world, rules, job, job.at, job.at)
    if hosts is None:
        yield f"process {job.at} cannot have its copies taken", _given_up(world, rules, job, become), ""
        return
    ended = job.at + 1 == len(job.hosts)
    after = become({"hosts": hosts}, pc="entering" if ended else "writing", at=0 if ended else job.at + 1)
    yield f"process {job.at} writes its part and copies", after, problem


def _given_up(world: World, rules: Rules, job: Job, become: Become) -> World:
    """Each process frees what its host has of it, as far as the logs tell that it is not held."""
    if 0 not in job.alive:
        return become({"hosts": world.hosts}, pc="running", at=0)
    for process in sorted(job.alive):
        world = _freed(world, rules, job, process, _attempt(job))
    return become({"hosts": world.hosts}, pc="running", at=0)


def _freed(world: World, rules: Rules, job: Job, process: int, ended: AttemptId | None) -> World:
    """What a process frees of its host's memory once an attempt has ended: its own, copies, and what is left over."""
    number = job.hosts[process]
    host = world.hosts[number]
    logs = [head_of(host.log), head_of(world.hosts[job.hosts[0]].log)]
    now = frozenset(one.id for log in logs if log for one in log.live)
    listed = now if any(one.epoch == job.epoch for one in now) else job.listed | now
    found = {part.attempt for part in host.parts}
    gone = set(rules.to_free(found, listed, epoch=job.epoch, decided={ended} - {None}))
    parts = frozenset(part for part in host.parts if part.attempt not in gone)
    return world._replace(hosts=with_item(world.hosts, number, host._replace(parts=parts)))


def _enter(scenario: Scenario, world: World, rules: Rules, job: Job, become: Become) -> Iterator[Moved]:
    """The manifest, and then the entry in process 0's log."""
    if 0 not in job.alive or job.behind:
        return
    hosts, problem = _put(scenario, world, rules, job, 0, -len(job.hosts))
    if hosts is None:
        yield "cannot have the manifest's copy taken", _given_up(world, rules, job, become), ""
        return
    attempt, number = _attempt(job), job.hosts[0]
    before = head_of(hosts[number].log)
    made = rules.enter(before, STAMP, epoch=job.epoch, entry=live(attempt), keep=KEEP_HELD)
    if not isinstance(made, Head):
        yield "is fenced in process 0's log", _given_up(world._replace(hosts=hosts), rules, job, become), ""
        return
    if before is not None and before.epoch > job.epoch:
        problem = problem or f"{attempt.label} is held in a tier that epoch {before.epoch} has opened"
    problem = problem or _too_soon(scenario, world._replace(hosts=hosts), rules, job)
    hosts = with_item(hosts, number, hosts[number]._replace(log=body_of(made)))
    then: dict[str, Any] = {"pc": "running", "at": 0, "entered": attempt}
    if scenario.promotes and not job.upload:
        then["upload"] = (attempt, 0)
    freed = _freed(world._replace(hosts=hosts), rules, job, 0, attempt)
    after = become({"hosts": freed.hosts}, behind=frozenset(range(1, len(job.hosts))), **then)
    if rules.is_held_when_entered or not _takers(scenario, rules, job):
        after = _called_held(after, job, attempt)
    yield "enters the step", after, problem


def _takers(scenario: Scenario, rules: Rules, job: Job) -> set[int]:
    """The processes on the hosts that have copies of process 0's part."""
    return set(targets_of(rules, scenario, job.hosts)[0])


def _called_held(world: World, job: Job, attempt: AttemptId) -> World:
    """From now on people are told that the step is held: a promise, unless somebody has replaced this job."""
    head = head_of(world.run)
    if head is None or head.epoch != job.epoch:
        return world
    lost = frozenset(host for process, host in enumerate(job.hosts) if process not in job.alive)
    there = [part for host in world.hosts for part in host.parts if part.attempt == attempt and part.process >= 0]
    lied = any(part.body != attempt for part in there)
    return world._replace(promise=Promise(attempt, job.hosts, lost, lied))


def _too_soon(scenario: Scenario, world: World, rules: Rules, job: Job) -> str:
    """A step is called held only if its copies were in: on each host that is still there."""
    head = head_of(world.run)
    if head is None or head.epoch != job.epoch:
        return ""  # a zombie: others may have freed what it had written
    for process in range(len(job.hosts)):
        for number in holders(scenario, rules, job, process):
            if job.hosts.index(number) in job.alive and not any(
                part[:2] == (process, _attempt(job)) for part in world.hosts[number].parts
            ):
                return f"{_attempt(job).label} is called held, and host {number} has no part {process}"
        lost = [number for number in holders(scenario, rules, job, process) if job.hosts.index(number) not in job.alive]
        if lost and rules.waits_for_copies is False:
            return f"{_attempt(job).label} is called held, and host {lost[0]} has never had part {process}"
    return ""


def _follow(scenario: Scenario, world: World, rules: Rules, job: Job, become: Become) -> Iterator[Moved]:
    """A process enters into its log what process 0's says; by then the job may be at the next step."""
    attempt = job.entered
    assert attempt is not None
    for process in sorted(job.behind):
        if process not in job.alive or 0 not in job.alive:
            continue
        number = job.hosts[process]
        host = world.hosts[number]
        before, made, problem = head_of(host.log), _following(world, rules, job, host), ""
        if made is not None:
            if before is not None and before.epoch > job.epoch:
                problem = f"epoch {job.epoch} changes a tier that epoch {before.epoch} has opened"
            host = host._replace(log=body_of(made))
        freed = _freed(world._replace(hosts=with_item(world.hosts, number, host)), rules, job, process, attempt)
        after = become({"hosts": freed.hosts}, behind=job.behind - {process})
        if _is_held(scenario, after, rules, job, process):
            after = _called_held(after, job, attempt)
        yield f"process {process} follows", after, problem


def _following(world: World, rules: Rules, job: Job, host: Host) -> Head | None:
    """A log's next entry, after process 0's; None where there is nothing to enter, or it may not be."""
    theirs, here = head_of(world.hosts[job.hosts[0]].log), {part.attempt for part in host.parts}
    lines = [one for one in theirs.live if one.id in here] if theirs else []
    made = rules.follow(head_of(host.log), STAMP, epoch=job.epoch, live=lines)
    return made if isinstance(made, Head) else None


def _is_held(scenario: Scenario, after: World, rules: Rules, job: Job, process: int) -> bool:
    """Whether process 0 says so now: the hosts that have copies of its part have the step in their logs, too."""
    takers = _takers(scenario, rules, job)
    if rules.is_held_when_first_follows:
        return len(job.behind) == len(job.hosts) - 1
    if process not in takers or rules.is_held_when_entered:
        return False
    logs = [head_of(after.hosts[job.hosts[each]].log) for each in takers]
    return all(log and job.entered in {one.id for one in log.live} for log in logs)


# Promotion.


def _upload(world: World, rules: Rules, job: Job, become: Become) -> Iterator[Moved]:
    assert job.upload
    attempt, process = job.upload
    processes = len(job.hosts)
    if process < processes:
        if process not in job.alive:
            return
        mine = [part for part in world.hosts[job.hosts[process]].parts if part[:2] == (process, attempt)]
        body = mine[0].body if mine else None
        if rules.checks_uploaded_bytes and body != attempt:
            yield f"process {process} has not got {attempt.label} whole any more", become(upload=None), ""
            return
        store = world.store | {Part(process, attempt, body)}
        yield f"process {process} uploads", become({"store": store}, upload=(attempt, process + 1)), ""
        return
    if 0 not in job.alive:
        return
    before = head_of(world.run)
    if rules.keeps_uploads_in_order and before and any(held.rank(one.id) > held.rank(attempt) for one in before.live):
        yield "does not commit what is older than the newest", become(upload=None), ""
        return
    made = rules.commit(before, STAMP, epoch=job.epoch, entry=live(attempt), keep=KEEP_SAVED)
    if not isinstance(made, Head):
        yield "may not commit", become(upload=None), ""
        return
    problem = _out_of_order(before, attempt)
    if before is not None and before.epoch > job.epoch:
        problem = f"epoch {job.epoch} commits in a run that epoch {before.epoch} has opened"
    gone = {old.id for old in made.retired}
    store = frozenset(part for part in world.store if part.attempt not in gone) | {Part(-processes, attempt, attempt)}
    yield "commits the upload", become({"store": store, "run": body_of(made)}, upload=None), problem


def _out_of_order(before: Head | None, attempt: AttemptId) -> str:
    newer = [one.id for one in before.live if held.rank(one.id) > held.rank(attempt)] if before else []
    return f"{attempt.label} is committed after {newer[0].label}" if newer else ""


def _save(world: World, rules: Rules, job: Job, become: Become) -> Iterator[Moved]:
    """A step that could not be held goes to the store directly, whatever is being uploaded. In one: the other model has
    its interleavings."""
    attempt, before = AttemptId.of(job.step + 1, job.epoch, 1), head_of(world.run)
    made = rules.commit(before, STAMP, epoch=job.epoch, entry=live(attempt), keep=KEEP_SAVED)
    if len(job.alive) < len(job.hosts) or not isinstance(made, Head):
        return
    parts = {Part(process, attempt, attempt) for process in (*range(len(job.hosts)), -len(job.hosts))}
    gone = {old.id for old in made.retired}
    store = frozenset(part for part in world.store if part.attempt not in gone) | parts
    outside = {"store": store, "run": body_of(made)}
    yield "saves a step directly", become(outside, step=attempt.step, holds=job.holds + 1), ""
