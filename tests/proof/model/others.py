"""Who else acts in the model: `Collector`, the background collection or `gc`; `Tool`, a command that writes one journal
entry, and `Recover`; `Restore`, a restore that may find damage; `Reader`, an evaluator. `Copy` breaks off a copy of the
run, in which only actors that begin after it go on; `Rot` flips a bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.rules.evidence import Whole
from orchestrator.rules.journal import Stamp

from .rules import Engine, entry
from .world import NOTHING, Appender, Effect, Local, Move, World, as_found


@dataclass(frozen=True)
class Collector(Appender):
    """collect(): of an incarnation (`boss`: its coordinator) in the background, or of `gc`, which retires first."""

    boss: int = -1
    retires: bool = False

    def arguments(self, engine: Engine, local: Local) -> tuple[Any, ...]:
        return local.done if local.task == "collected" else ()

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc in ("read", "create", "unsure", "sync"):
            yield from self.append(engine, world, index)
        elif local.pc == "start" and self.retires and world.journal:
            if engine.rules.retires_first:
                yield f"{self.name}: starts", world.local(index, local._replace(pc="read", task="retire")), NOTHING
            else:
                kind, number = engine.ask("retire", (), world.top, self.name)
                gone = engine.heads[number].retired if kind == "head" else ()
                todo = tuple((one.step, one.attempt, False) for one in gone)
                yield (
                    f"{self.name}: deletes {todo}",
                    world.local(index, local._replace(pc="delete", todo=todo)),
                    NOTHING,
                )
        elif local.pc in ("start", "again"):
            boss = world.actors[self.boss] if self.boss >= 0 else None
            if world.journal and (not boss or boss.epoch):
                yield self._list(engine, world, index)
        elif local.pc == "head":
            yield self._head(engine, world, index, world.actors[self.boss] if self.boss >= 0 else None)
        elif local.pc == "delete":
            yield self._delete(engine, world, index)

    def _list(self, engine: Engine, world: World, index: int) -> Move:
        local = world.actors[index]
        found = tuple(as_found(world.objects).items())
        return f"{self.name}: lists", world.local(index, local._replace(pc="head", todo=found)), NOTHING

    def _head(self, engine: Engine, world: World, index: int, boss: Local | None) -> Move:
        """The head is read after the listing; then it is decided."""
        local, head = world.actors[index], engine.heads[world.top]
        found = dict(local.todo)
        clean = local._replace(want=-1, todo=())
        if boss and head.epoch > boss.epoch:
            return f"{self.name}: fenced", world.local(index, clean._replace(pc="fenced")), NOTHING
        if engine.rules.looks_first and engine.rules.lost(head, found):
            return (
                f"{self.name}: the journal has lost entries",
                world.local(index, clean._replace(pc="rejected")),
                NOTHING,
            )
        chosen = engine.rules.collectable(head, found)
        # Of an orphan that had no manifest when it was listed: it may have got one before the epoch above was opened.
        todo = tuple((gone.step, gone.attempt, gone.reason == "orphan" and not found[gone.id].whole) for gone in chosen)
        settled = world._replace(durable=len(world.journal)) if engine.rules.settles_before_delete else world
        here = f"{self.name}: reads v{head.version}, will delete {todo}"
        return here, settled.local(index, clean._replace(pc="delete", todo=todo)), NOTHING

    def _delete(self, engine: Engine, world: World, index: int) -> Move:
        """One object, the manifest first; then `collected`, if anything was deleted."""
        local = world.actors[index]
        if not local.todo:
            pc = "read" if local.done else "finished"
            return f"{self.name}: has deleted", world.local(index, local._replace(pc=pc, task="collected")), NOTHING
        step, attempt, unfinished = local.todo[0]
        if engine.rules.checks_again and unfinished and (step, attempt, "manifest") in world.objects:
            skipped = world.local(index, local._replace(todo=local.todo[1:]))
            return f"{self.name}: {step} {attempt} is whole by now", skipped, NOTHING
        there = sorted(
            (one for one in world.objects if one[:2] == (step, attempt)),
            key=lambda one: (not one[2].startswith("manifest"), one[2]),
        )
        gone = frozenset(there[:1])
        after = world._replace(objects=world.objects - gone, volatile=world.volatile - gone)
        if len(there) <= 1:
            local = local._replace(todo=local.todo[1:], done=(*local.done, (step, attempt)))
        effect = Effect("delete", step, attempt) if there else NOTHING
        return f"{self.name}: deletes {there[0] if there else 'nothing'}", after.local(index, local), effect

    def after(self, engine: Engine, world: World, index: int, outcome: str) -> World:
        local = world.actors[index]
        pc = "again" if local.task == "retire" and outcome in ("done", "none") else "finished"
        if not engine.rules.retires_first:
            pc = "finished"
        return world.local(index, Local(pc=pc, done=()))


@dataclass(frozen=True)
class Tool(Appender):
    """A command or a restore that journals one change. `pin` takes `step`; the others the newest step they find."""

    task: str
    step: int = 0

    def arguments(self, engine: Engine, local: Local) -> tuple[Any, ...]:
        return local.todo

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc == "start" and world.journal:
            head = engine.heads[world.top]
            newest = engine.rules.newest(head)
            todo = (self.step,) if self.task == "pin" else newest.id if newest else ()
            if self.task in ("release", "discard"):
                todo = next((live.id for live in head.quarantined), ())
            if todo:
                yield (
                    f"{self.name}: {todo}",
                    world.local(index, local._replace(pc="read", task=self.task, todo=todo)),
                    NOTHING,
                )
        elif local.pc in ("read", "create", "unsure", "sync"):
            yield from self.append(engine, world, index)


@dataclass(frozen=True)
class Recover(Tool):
    """`orchestrator recover --write`, once `after_actor` has finished."""

    after_actor: int = -1

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc == "start" and world.actors[self.after_actor].pc == "finished":
            made = self._recovered(engine, world)
            if made is not None:
                yield (
                    f"{self.name}: plans",
                    world.local(index, local._replace(pc="create", task="recover", want=made)),
                    NOTHING,
                )
        elif local.pc == "read":  # somebody has written meanwhile
            yield f"{self.name}: gives up", world.local(index, Local(pc="failed")), NOTHING
        elif local.pc in ("create", "unsure", "sync"):
            yield from self.append(engine, world, index)

    def _recovered(self, engine: Engine, world: World) -> int | None:
        head, found = engine.head(world.top), as_found(world.objects)
        if not engine.rules.lost(head, found):
            return None
        heads = [engine.heads[number] for number in world.journal if number >= 0]
        ended = {gone.id for one in heads for gone in one.retired}
        whole = [Whole(entry(*key), one.built_on) for key, one in found.items() if one.whole]
        choice = engine.rules.choose(head, whole, ended)
        version = max([len(world.journal) - 1, *(one.built_on for one in found.values())]) + 2
        epochs = [attempt.epoch for attempt in found]
        epoch = max([head.epoch if head else 0, *epochs]) + 1
        stamp = Stamp(self.name, 0.0, self.name)
        return engine.number(
            engine.rules.recovered(head, stamp, version=version, epoch=epoch, live=choice.live, reason="r")
        )


@dataclass(frozen=True)
class Restore(Appender):
    """restore: reads the newest step, and quarantines it if it is damaged. A read may fail, or be wrong once."""

    def arguments(self, engine: Engine, local: Local) -> tuple[Any, ...]:
        return local.todo

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        bad = local._replace(pc="read", task="quarantine")
        if local.pc == "start" and world.journal:
            newest = engine.rules.newest(engine.heads[world.top])
            if newest:
                chosen = local._replace(pc="first", todo=newest.id)
                yield f"{self.name}: chooses {newest.step}", world.local(index, chosen), NOTHING
        elif local.pc == "first":
            odd = local._replace(pc="second") if engine.rules.reads_twice else bad
            yield f"{self.name}: reads what is odd", world.local(index, odd), NOTHING
            if (*local.todo, "rot") not in world.objects:
                yield f"{self.name}: restored", world.local(index, Local(pc="finished")), NOTHING
            unread = bad if engine.rules.unread_is_damage else Local(pc="failed")
            yield f"{self.name}: no answer", world.local(index, unread), NOTHING
        elif local.pc == "second":
            again = bad if (*local.todo, "rot") in world.objects else Local(pc="finished")
            yield f"{self.name}: reads it again", world.local(index, again), NOTHING
        elif local.pc in ("read", "create", "unsure", "sync"):
            yield from self.append(engine, world, index)


@dataclass(frozen=True)
class Reader(Appender):
    """An evaluator: an agent that is made and only asked."""

    tree: None = None

    def arguments(self, engine: Engine, local: Local) -> tuple[Any, ...]:
        return ()

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc == "start":
            made = Local(pc="read", task="open") if engine.rules.opens_when_made else Local(pc="finished")
            yield f"{self.name}: makes an agent", world.local(index, made), NOTHING
        elif local.pc in ("read", "create", "unsure", "sync"):
            yield from self.append(engine, world, index)


@dataclass(frozen=True)
class Rot:
    """A bit of a live attempt flips."""

    name: str

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        head = engine.head(world.top)
        if world.actors[index].pc == "start" and head:
            for live in head.live:
                after = world.add((live.step, live.attempt, "rot")).local(index, Local(pc="finished"))
                yield f"{self.name}: step {live.step}", after, NOTHING


@dataclass(frozen=True)
class Copy:
    """The run is copied, and the copy breaks off: the journal lacks its newest entries. Whoever has begun works on in
    the original; here only the others go on."""

    name: str

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        if world.actors[index].pc != "start":
            return
        for kept in range(len(world.journal)):
            actors = tuple(one if one.pc == "start" else Local(pc="left behind") for one in world.actors)
            after = world._replace(
                journal=world.journal[:kept],
                durable=kept,
                volatile=frozenset(),
                acked=frozenset(),
                flying=(),
                actors=actors,
                cut=True,
            )
            yield f"{self.name}: without v{kept} and above", after.local(index, Local(pc="finished")), NOTHING
