"""Held steps: incarnations that take over from one another, each of two processes with a tier of its own.

An older incarnation may be dead, or a zombie that holds on for ever, before, between and after all that a newer one
does. The moves are those of `job/held_restore` and `job/holding`, in their order, with the shipped rules: what each
process can have is looked at, one process after the other; the chosen step is taken; the epoch is opened in the run's
journal, in process 0's tier and in process 1's; then steps are held (data, process 0's log, process 1's log), now and
then committed, and released where process 0 needs the room. Anybody may stop anywhere, for good.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from orchestrator.policy import last
from orchestrator.rules import held
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head

from .hosts import STAMP, Found, Rules, body_of, head_of, live

KEEP = last(2)


class Incarnation(NamedTuple):
    """pc: what it has done last. seen: what process 0 and 1 can have. step: that it is at. holds: so many by now."""

    pc: str = "starting"
    epoch: int = 0
    seen: tuple[frozenset[AttemptId], ...] = ()
    step: int = 0
    holds: int = 0


class World(NamedTuple):
    """run, logs: entries, encoded; b"" where there is none. data: (process, attempt) whose part is in its tier."""

    run: bytes
    logs: tuple[bytes, bytes]
    data: frozenset[tuple[int, AttemptId]]
    actors: tuple[Incarnation, ...]


def _attempts(body: bytes) -> frozenset[AttemptId]:
    head = head_of(body)
    return frozenset(live.id for live in head.live) if head else frozenset()


def _whole(world: World) -> frozenset[AttemptId]:
    listed = _attempts(world.logs[0]) | _attempts(world.logs[1])
    return frozenset(one for one in listed if {(0, one), (1, one)} <= world.data)


def explore(holds: Sequence[int], rules: Rules | None = None) -> Found:
    """Every interleaving of incarnations that hold at most so many steps each."""
    rules, rivals = rules or Rules(), len(holds)
    start = World(b"", (b"", b""), frozenset(), (Incarnation(),) * rivals)
    seen, waiting, choices = {start}, deque([start]), 0
    while waiting:
        world = waiting.popleft()
        for index in range(rivals):
            for after, problem in _moves(world, index, holds[index], rules):
                choices += world.actors[index].pc == "looked at both"
                if problem:
                    return Found(len(seen), choices, problem)
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
    return Found(len(seen), choices, None)


def _moves(world: World, index: int, holds: int, rules: Rules) -> Iterator[tuple[World, str]]:
    """What one incarnation may do next, and what is wrong with it. That it stops for good is that it is not asked."""
    one = world.actors[index]
    if index and world.actors[index - 1].pc == "starting":
        return  # the supervisor starts them one after the other

    def become(world: World, **changes: Any) -> World:
        actors = list(world.actors)
        actors[index] = one._replace(**changes)
        return world._replace(actors=tuple(actors))

    match one.pc:
        case "starting":
            yield become(world, pc="looked at one", seen=(_whole(world),)), ""
        case "looked at one":
            yield become(world, pc="looked at both", seen=(*one.seen, _whole(world))), ""
        case "looked at both":
            yield _choose(world, one, rules, become)
        case "chosen":
            head = rules.open_run(head_of(world.run), STAMP)
            yield become(world._replace(run=body_of(head)), pc="open", epoch=head.epoch), ""
        case "open":
            yield _open_tier(world, 0, one, rules, become)
        case "open in 0":
            yield _open_tier(world, 1, one, rules, become)
        case "running":
            yield from _run(world, one, holds, rules, become)
        case "written":
            yield _enter(world, one, rules, become)
        case "entered":
            yield _follow(world, one, rules, become)


Become = Callable[..., World]
Moved = tuple[World, str]


def _choose(world: World, one: Incarnation, rules: Rules, become: Become) -> Moved:
    head = head_of(world.run)
    if head is None:
        return become(world, pc="chosen", seen=(), step=0), ""
    standing = held.standing(head)
    offers = [[held.Offer(each.step, each.name, "0") for each in view] for view in one.seen]
    ranked = [each.id for each in rules.candidates(standing, offers)]
    store = [standing.newest] if standing.newest else []
    taken = (ranked or store or [None])[0]
    problem = ""
    if taken is not None:
        everywhere = one.seen[0] & one.seen[1]
        newer = [each for each in (*everywhere, *store) if each.epoch > taken.epoch]
        if newer:
            problem = f"{taken.label} is chosen over {newer[0].label}, of a newer incarnation"
        if taken not in store and taken not in everywhere:
            problem = f"{taken.label} is chosen, and not all can have it"
        if best := [each for each in (*everywhere, *store) if held.rank(each) > held.rank(taken)]:
            problem = problem or f"{taken.label} is chosen, and {best[0].label} is newer"
    return become(world, pc="chosen", seen=(), step=taken.step if taken else 0), problem


def _open_tier(world: World, process: int, one: Incarnation, rules: Rules, become: Become) -> Moved:
    made = rules.open_tier(head_of(world.logs[process]), STAMP, epoch=one.epoch, version=0)
    if not isinstance(made, Head):
        return become(world, pc="stopped"), ""  # fenced: it holds nothing
    before = head_of(world.logs[process])
    problem = f"epoch {before.epoch} is followed by {one.epoch}" if before and before.epoch >= one.epoch else ""
    logs = list(world.logs)
    logs[process] = body_of(made)
    after = world._replace(logs=(logs[0], logs[1]))
    return become(after, pc="running" if process else "open in 0"), problem


def _run(world: World, one: Incarnation, holds: int, rules: Rules, become: Become) -> Iterator[Moved]:
    attempt = AttemptId.of(one.step + 1, one.epoch, 1)
    if one.holds < holds:
        data = world.data | {(0, attempt), (1, attempt)}
        yield become(world._replace(data=data), pc="written", step=attempt.step), ""
    before = head_of(world.logs[0])
    if before is not None and len(before.live) > 1:  # memory is short
        made = rules.release(before, STAMP, epoch=one.epoch, attempts={before.live[0].id}, reason="room")
        if isinstance(made, Head):
            older = before.epoch > one.epoch
            problem = f"epoch {one.epoch} releases a step in epoch {before.epoch}'s tier" if older else ""
            yield _collected(world, 0, made, one, become, "running", problem, counts=False)
    if one.step and one.holds:
        saved = AttemptId.of(one.step, one.epoch, 1)
        head = rules.enter(head_of(world.run), STAMP, epoch=one.epoch, entry=live(saved), keep=KEEP)
        if isinstance(head, Head):
            yield become(world._replace(run=body_of(head)), holds=one.holds), ""


def _enter(world: World, one: Incarnation, rules: Rules, become: Become) -> Moved:
    attempt, before = AttemptId.of(one.step, one.epoch, 1), head_of(world.logs[0])
    made = rules.enter(before, STAMP, epoch=one.epoch, entry=live(attempt), keep=KEEP)
    if not isinstance(made, Head):
        data = world.data - {(0, attempt), (1, attempt)}
        return become(world._replace(data=data), pc="stopped"), ""
    problem = ""
    if before is not None and before.epoch > one.epoch:
        problem = f"{attempt.label} is held in a tier that epoch {before.epoch} has opened"
    return _collected(world, 0, made, one, become, "entered", problem)


def _follow(world: World, one: Incarnation, rules: Rules, become: Become) -> Moved:
    theirs, before = head_of(world.logs[0]), head_of(world.logs[1])
    assert theirs is not None
    live = [each for each in theirs.live if (1, each.id) in world.data]
    made = rules.follow(before, STAMP, epoch=one.epoch, live=live)
    if made is None:
        return become(world, pc="running", holds=one.holds + 1), ""
    if not isinstance(made, Head):
        return become(world, pc="stopped"), ""
    problem = ""
    if before is not None and before.epoch > one.epoch:
        problem = f"epoch {one.epoch} changes a tier that epoch {before.epoch} has opened"
    return _collected(world, 1, made, one, become, "running", problem)


def _collected(
    world: World,
    process: int,
    made: Head,
    one: Incarnation,
    become: Become,
    pc: str,
    problem: str,
    counts: bool = True,
) -> Moved:
    """The log's next entry, and what it says is held no more is deleted."""
    gone = {(process, old.id) for old in made.retired}
    if kept := gone & {(process, live.id) for live in made.live}:
        problem = problem or f"{min(kept)[1].label} is deleted, and held"
    logs = list(world.logs)
    logs[process] = body_of(made)
    after = world._replace(logs=(logs[0], logs[1]), data=world.data - gone)
    return become(after, pc=pc, holds=one.holds + (pc == "running" and counts)), problem
