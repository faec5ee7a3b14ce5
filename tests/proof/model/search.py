"""Breadth-first search of everything that can happen in a scenario, judging every state and every effect.

In each state a crash of all processes and a power cut are judged as well: what they leave must satisfy the
invariants, and a new incarnation must be able to open it, find what it should and commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.policy import last
from orchestrator.rules.attempt_id import name_of
from orchestrator.rules.records import Head, LiveStep

from . import invariants
from .others import Reader
from .rules import Engine, Rules
from .world import (
    ENDED,
    Actor,
    Coordinator,
    Effect,
    Local,
    Object,
    World,
    late_puts,
    needed,
    normal,
    stored,
    top,
)

State = TypeVar("State")


@dataclass(frozen=True)
class Scenario:
    """Who acts. `losses`: how many requests or replies of journal puts may be lost. `keep`: steps that commits keep;
    `gc` keeps one."""

    name: str
    actors: tuple[Actor, ...]
    processes: int = 1
    losses: int = 0
    keep: int = 1


@dataclass(frozen=True)
class Found:
    """A violation and the shortest way to it."""

    problems: list[str]
    trace: list[str]

    def __str__(self) -> str:
        steps = [f"{number:3}. {label}" for number, label in enumerate(self.trace, 1)]
        return "\n".join([*self.problems, *steps])


@dataclass(frozen=True)
class Result:
    states: int
    moves: int
    images: int  # different things that a crash or a power cut can leave
    violation: Found | None


class Judge:
    """The invariants over worlds; each part of a state is judged once."""

    def __init__(self, engine: Engine, trees: Mapping[str, str | None]) -> None:
        self._engine, self._trees = engine, trees
        self.images: set[object] = set()

    def heads(self, journal: tuple[int, ...]) -> list[Head]:
        return [self._engine.heads[number] for number in journal if number >= 0]

    def effect(self, before: World, after: World, effect: Effect) -> list[str]:
        problems = (
            []
            if after.cut > before.cut or after.journal[: len(before.journal)] == before.journal
            else invariants.unchanged(before.journal, after.journal)
        )
        if effect.kind == "write":
            problems += invariants.written(self._engine.head(before.top), effect.step, effect.attempt)
        if effect.kind == "delete":
            durable = self.heads(before.journal[: before.durable])
            problems += invariants.deleted(durable, effect.step, effect.attempt, stored(before.objects))
        if len(after.journal) > len(before.journal):
            new = self._engine.heads[after.top]
            problems += invariants.gone_on(self._engine.head(before.top), stored(before.objects), new)
            if new.writer.startswith("restore"):
                rotten = {(step, attempt) for step, attempt, name in before.objects if name == "rot"}
                problems += invariants.proven(new, rotten)
        return problems

    def world(self, world: World) -> list[str]:
        """All of it: as a reader sees it now, and as a crash or a power cut at this point would leave it."""
        problems = list(self.image(world, world.journal, world.objects))
        if world.volatile or world.durable < len(world.journal):
            left = world.objects - world.volatile
            for kept in range(world.durable, len(world.journal) + 1):
                problems += [f"{line} (power cut)" for line in self.image(world, world.journal[:kept], left)]
        return problems

    def image(self, world: World, journal: tuple[int, ...], objects: frozenset[Object]) -> list[str]:
        acked = world.acked
        key = (journal, objects, acked, world.cut)
        if key in self.images:
            return []
        self.images.add(key)
        judged = self._engine.once(("journal", journal), lambda: self._journal(journal))
        head = self._engine.head(top(journal))
        damage = self._engine.once(("data", journal, objects), lambda: self._data(journal, objects))
        listed = self._readers(head, objects)
        promised = self._engine.once(("4", journal, acked), lambda: invariants.journalled(self.heads(journal), acked))
        # Without a power cut an entry is there for everybody, durable or not.
        alarm = [] if world.cut else self._engine.once(("12", journal, objects), lambda: self._alarm(head, objects))
        return [*judged, *damage, *listed, *promised, *alarm]

    def _alarm(self, head: Head | None, objects: frozenset[Object]) -> list[str]:
        proof = invariants.tail_lost(head, stored(objects))
        return [f"12: nothing was lost, but {proof}"] if proof else []

    def _journal(self, journal: tuple[int, ...]) -> list[str]:
        return invariants.linear(self.heads(journal), self._trees) + self._recovery(journal)

    def _data(self, journal: tuple[int, ...], objects: frozenset[Object]) -> list[str]:
        heads = self.heads(journal)

        def damage(live: LiveStep) -> str:
            plain = {(step, attempt, name.partition("@")[0]) for step, attempt, name in objects}
            missing = needed(live.step, live.attempt, self._engine.processes) - plain
            return f"missing {sorted(name for _, _, name in missing)}" if missing else ""

        return invariants.whole(heads[-1] if heads else None, damage) + invariants.promises(heads, receipts(objects))

    def _readers(self, head: Head | None, objects: frozenset[Object]) -> list[str]:
        if not self._engine.rules.readers_need_journal:
            listed = sorted({step for step, _, name in objects if name == "manifest"})
            return invariants.listing(head, listed, listed[-1] if listed else None)
        if head is None:
            return []
        newest = self._engine.rules.newest(head)
        listed = [live.step for live in head.live if live.restorable]
        return invariants.listing(head, listed, newest.step if newest else None)

    def _recovery(self, journal: tuple[int, ...]) -> list[str]:
        """A new incarnation can open what is left and commit the next step."""
        kind, opened = self._engine.ask("open", (), top(journal), "recovery")
        if kind != "head":
            return [f"2: no new incarnation can be opened: {kind}"]
        epoch = self._engine.heads[opened].epoch
        kind, number = self._engine.ask("commit", (epoch, 9, name_of(epoch, 1)), opened, "recovery")
        if kind != "head":
            return [f"2: the next incarnation cannot commit: {kind}"]
        return invariants.linear([*self.heads(journal), self._engine.heads[opened], self._engine.heads[number]])


def receipts(objects: frozenset[Object]) -> Iterator[tuple[int, str, int, str]]:
    for step, attempt, name in objects:
        if name.startswith("receipt-") and name.endswith("-yes"):
            process = int(name.split("-")[1])
            there = (step, attempt, f"data-{process}") in objects
            yield step, attempt, process, "" if there else "its data is not there"


def moves(engine: Engine, scenario: Scenario, world: World) -> Iterator[tuple[str, World, Effect]]:
    for index, actor in enumerate(scenario.actors):
        yield from actor.moves(engine, world, index)
    yield from late_puts(engine, world)


def stuck(scenario: Scenario, world: World) -> list[str]:
    """Nobody can move, and somebody who began has not ended."""
    waiting = [
        actor.name
        for actor, local in zip(scenario.actors, world.actors, strict=True)
        if local.pc not in ENDED | {"start"}
    ]
    return [f"stuck: {', '.join(waiting)} can never go on"] if waiting else []


def explore(scenario: Scenario, rules: Rules | None = None, states_max: int = 5_000_000) -> Result:
    """Everything that can happen, or the shortest way to the first violation."""
    engine = Engine(rules or Rules(), scenario.processes, last(scenario.keep))
    jobs = [actor for actor in scenario.actors if isinstance(actor, Coordinator | Reader)]
    judge = Judge(engine, {actor.name: actor.tree for actor in jobs})
    none: frozenset[Object] = frozenset()
    start = World((), 0, none, none, (Local(),) * len(scenario.actors), frozenset(), (), scenario.losses)
    came: dict[World, tuple[World | None, str]] = {start: (None, "")}
    queue, tried = deque([start]), 0
    while queue:
        world = queue.popleft()
        moved = False
        for label, reached, effect in moves(engine, scenario, world):
            tried += 1
            moved = True
            after = normal(engine, reached)
            known = after in came
            problems = judge.effect(world, after, effect)
            if not known:
                came[after] = (world, label)
                problems += judge.world(after)
                queue.append(after)
            if problems:
                return Result(len(came), tried, len(judge.images), Found(problems, [*trace(came, world), label]))
        if not moved and (problems := stuck(scenario, world)):
            return Result(len(came), tried, len(judge.images), Found(problems, trace(came, world)))
        if len(came) > states_max:
            raise AssertionError(f"{scenario.name}: more than {states_max} states")
    return Result(len(came), tried, len(judge.images), None)


def trace(came: Mapping[State, tuple[State | None, str]], world: State) -> list[str]:
    """What was done to come to `world`, step by step; of any model's worlds."""
    labels = []
    at: State | None = world
    while at is not None:
        at, label = came[at]
        labels.append(label)
    return labels[-2::-1]
