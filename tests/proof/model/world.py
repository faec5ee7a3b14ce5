"""The state of the model, and what an incarnation's own processes can do next in it.

An actor mirrors one shell: `Coordinator` an incarnation's process 0 (store.append, coordinator, saving), `Worker`
its process 1; the others are in `others`. Each move is one effect on the store. A crash needs no move: an actor may
stop for ever in any state, as nothing is fair here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from msgspec.structs import replace

from orchestrator.rules.attempt import (
    Appended,
    DeadlinePassed,
    Event,
    FencedOff,
    FinalizeDone,
    FinalizeFailed,
    Phase,
    ReceiptsRead,
)
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import StoredAttempt, tree_of
from orchestrator.rules.records import Failure

from .rules import Engine, receipt

Object = tuple[int, str, str]  # step, attempt, name


UNREAD = -2


class Local(NamedTuple):
    """An actor's own memory."""

    pc: str = "start"
    task: str = ""  # the journal rule it is applying
    want: int = -1  # the head it wants to create
    epoch: int = 0
    save: int = 0  # index into its saves
    attempt: int = -1  # the number of its state machine's state
    todo: tuple[Any, ...] = ()
    done: tuple[Any, ...] = ()
    early: int = UNREAD  # the number of a head that it has read ahead
    known: int = -1  # the highest version that it knows to be durable: what its records build on


class World(NamedTuple):
    journal: tuple[int, ...]  # head numbers; index is the version; -1 where there is none, below a recovered entry
    durable: int  # how many entries a power cut leaves
    objects: frozenset[Object]
    volatile: frozenset[Object]  # which of them it takes
    actors: tuple[Local, ...]
    acked: frozenset[tuple[int, str]]  # saves that were reported as saved
    flying: tuple[int, ...]  # puts given up on that may still land
    losses: int  # how many more replies or requests may be lost
    cut: bool = False  # whether the journal has lost its tail, once

    @property
    def top(self) -> int:
        return top(self.journal)

    def local(self, index: int, local: Local) -> World:
        return self._replace(actors=(*self.actors[:index], local, *self.actors[index + 1 :]))

    def add(self, *objects: Object, volatile: bool = False) -> World:
        more = frozenset(objects)
        lost = self.volatile | more if volatile else self.volatile
        return self._replace(objects=self.objects | more, volatile=lost)


def top(journal: tuple[int, ...]) -> int:
    """The number of the highest entry, -1 without one."""
    return next((number for number in reversed(journal) if number >= 0), -1)


class Effect(NamedTuple):
    """Data below an attempt was written or deleted; the invariants judge it by the state before."""

    kind: str = ""
    step: int = 0
    attempt: str = ""


LATE = "manifest, when its epoch was fenced"  # finished too late to be a promise to anybody


def stored(objects: frozenset[Object]) -> dict[tuple[int, str], tuple[bool, int]]:
    """(whether it has a manifest, the version it builds on) of every attempt."""
    found: dict[tuple[int, str], tuple[bool, int]] = {}
    for step, attempt, name in objects:
        key = AttemptId(step, attempt)
        whole, built_on = found.get(key, (False, -1))
        _, _, version = name.partition("@")
        found[key] = (whole or name == "manifest", int(version) if version else built_on)
    return found


def as_found(objects: frozenset[Object]) -> dict[tuple[int, str], StoredAttempt]:
    """As a listing has it, which cannot tell a zombie's manifest."""
    late = {(step, attempt) for step, attempt, name in objects if name == LATE}
    found = sorted(stored(objects).items())
    return {key: StoredAttempt(whole=whole or key in late, built_on=built_on) for key, (whole, built_on) in found}


NOTHING = Effect()
Move = tuple[str, World, Effect]
ENDED = frozenset({"closed", "fenced", "failed", "finished", "rejected", "left behind"})


class Actor(Protocol):
    name: str

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]: ...


def needed(step: int, attempt: str, processes: int) -> frozenset[Object]:
    names = ["intent", "manifest", *(f"data-{process}" for process in range(processes))]
    return frozenset((step, attempt, name) for name in names)


@dataclass(frozen=True)
class Appender:
    """store.append and the adapter's `create`, one effect at a time: read, create, (read back), make durable."""

    name: str

    def arguments(self, engine: Engine, local: Local) -> tuple[Any, ...]:
        raise NotImplementedError

    def after(self, engine: Engine, world: World, index: int, outcome: str) -> World:
        """outcome: done, none, fenced, rejected, or unknown."""
        return world.local(index, Local(pc="finished"))

    def append(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        who = f"{self.name} {local.task}"
        match local.pc:
            case "read":
                early = local.early != UNREAD
                head, local = local.early if early else world.top, local._replace(early=UNREAD)
                kind, want = engine.ask(local.task, self.arguments(engine, local), head, self.name)
                label = f"{who}: {'has read ahead' if early else f'reads v{len(world.journal) - 1}'}: {kind}"
                if early and kind != "head":  # nothing is told by it: read again
                    yield label, world.local(index, local), NOTHING
                elif kind == "head":
                    yield label, world.local(index, local._replace(pc="create", want=want)), NOTHING
                else:
                    yield label, self.after(engine, world, index, kind), NOTHING
            case "create":
                yield from self._create(engine, world, index)
            case "unsure":
                yield from self._unsure(engine, world, index)
            case "sync":
                settled = world._replace(durable=len(world.journal))
                yield f"{who}: the entry is durable", self.after(engine, settled, index, "done"), NOTHING

    def _create(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        version = engine.heads[local.want].version
        there = world.journal[version] if version < len(world.journal) else -1
        stored, ours = engine.stored(there, local.want)
        filled = (*world.journal, *[-1] * (version - len(world.journal)))
        landed = world._replace(journal=(*filled[:version], stored, *filled[version + 1 :]))
        who = f"{self.name} {local.task}"
        if ours:
            yield f"{who}: creates v{version}", self._landed(engine, landed, index), NOTHING
        else:
            yield f"{who}: v{version} is another's", self._lost(engine, landed, index), NOTHING
        if not world.losses:
            return
        unsure = local._replace(pc="unsure")
        lossy = landed._replace(losses=world.losses - 1)
        yield f"{who}: creates v{version}, the reply is lost", lossy.local(index, unsure), NOTHING
        if there < 0:
            late = world._replace(losses=world.losses - 1, flying=tuple(sorted((*world.flying, local.want))))
            yield f"{who}: the put of v{version} is under way, no reply", late.local(index, unsure), NOTHING

    def _unsure(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        version = engine.heads[local.want].version
        who = f"{self.name} {local.task}"
        if engine.rules.unknown_is != "compared":
            step = self._landed if engine.rules.unknown_is == "ours" else self._lost
            yield f"{who}: takes v{version} to be {engine.rules.unknown_is}", step(engine, world, index), NOTHING
            return
        if version >= len(world.journal):
            yield f"{who}: finds no v{version}, puts again", world.local(index, local._replace(pc="create")), NOTHING
        else:
            _, ours = engine.stored(world.journal[version], local.want)
            step = self._landed if ours else self._lost
            yield f"{who}: reads v{version} back, ours: {ours}", step(engine, world, index), NOTHING
        yield f"{who}: cannot read back, outcome unknown", self.after(engine, world, index, "unknown"), NOTHING

    def _landed(self, engine: Engine, world: World, index: int) -> World:
        if engine.rules.syncs_entries:
            return world.local(index, world.actors[index]._replace(pc="sync"))
        return self.after(engine, world, index, "done")

    def _lost(self, engine: Engine, world: World, index: int) -> World:
        local = world.actors[index]
        if engine.rules.decides_again:
            return world.local(index, local._replace(pc="read", want=-1))
        head = engine.heads[local.want]
        following = replace(head, version=head.version + 1)
        return world.local(index, local._replace(pc="create", want=engine.number(following)))


@dataclass(frozen=True)
class Coordinator(Appender):
    """An incarnation's process 0: looks at the run, opens an epoch, then saves `saves` one after another.
    `after_actor`: who must have finished before it begins. at_once: it lists and reads the head in one move. early: it
    builds on heads that it has read before its manifest, or while it compared, as all do; without, there are fewer
    states."""

    saves: tuple[int, ...]
    tree: str = ""
    after_actor: int = -1
    at_once: bool = False
    early: bool = False

    def current(self, engine: Engine, local: Local) -> tuple[int, str]:
        return named(engine, self.saves, local)

    def arguments(self, engine: Engine, local: Local) -> tuple[Any, ...]:
        if local.task == "open":
            return local.todo
        tree = (self.tree,) if self.tree else ()
        return (local.epoch, *self.current(engine, local), *tree)

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc == "start":
            if self.after_actor < 0 or world.actors[self.after_actor].pc == "finished":
                found = tuple(as_found(world.objects).items()) if engine.rules.looks_first else ()
                listed = world.local(index, local._replace(pc="compare", done=found))
                if self.at_once:
                    yield self._compare(engine, listed, index)
                else:
                    yield f"{self.name}: starts, lists", listed, NOTHING
        elif local.pc == "compare":
            yield self._compare(engine, world, index)
        elif local.pc in ("read", "create", "unsure", "sync"):
            yield from self.append(engine, world, index)
        elif local.pc not in ENDED:
            yield from self._save(engine, world, index)

    def _compare(self, engine: Engine, world: World, index: int) -> Move:
        """Opening._admit: the head is read after the listing; what speaks against opening is found before it."""
        local, head = world.actors[index], engine.head(world.top)
        clean = local._replace(done=())
        if engine.rules.lost(head, dict(local.done)):
            return (
                f"{self.name}: the journal has lost entries",
                world.local(index, clean._replace(pc="rejected")),
                NOTHING,
            )
        tree = tree_of(head)
        if engine.rules.compares_first and tree not in (None, self.tree):
            return f"{self.name}: another job's run", world.local(index, clean._replace(pc="rejected")), NOTHING
        compared = (tree,) if engine.rules.compares_first else ()
        early = world.top if self.early else UNREAD
        opening = clean._replace(pc="read", task="open", todo=compared, early=early)
        return f"{self.name}: nothing speaks against it", world.local(index, opening), NOTHING

    def _save(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        step, attempt = self.current(engine, local)
        here = f"{self.name}: {step} {attempt}"
        match local.pc:
            case "stage":
                following = world.add((step, attempt, "data-0"), volatile=True)
                moved = following.local(index, local._replace(pc="intent"))
                yield f"{here}: writes its data", moved, Effect("write", step, attempt)
            case "intent":
                there = any(one[:2] == (step, attempt) and one[2].startswith("intent") for one in world.objects)
                kind = "no" if there else "yes"
                known = local.known if engine.rules.builds_on_durable else len(world.journal) - 1
                following = world if there else world.add((step, attempt, f"intent@{known}"))
                moved = following.local(index, local._replace(pc="promise", todo=(kind,)))
                yield f"{here}: intent, {kind}", moved, NOTHING
            case "promise":
                kind = local.todo[0]
                sealed = world._replace(volatile=world.volatile - {(step, attempt, "data-0")})
                following = sealed.add((step, attempt, f"receipt-0-{kind}"))
                opened = local._replace(attempt=engine.opened(step, attempt), todo=())
                # Its own receipt is read with those of others that are there by then, or before them.
                own = (0, kind)
                for batch in dict.fromkeys([(own,), (own, *self._stored_receipts(engine, opened, following))]):
                    event = ReceiptsRead(tuple(receipt(step, attempt, *each) for each in batch))
                    moved = self._advance(engine, following.local(index, opened), index, event, batch)
                    yield f"{here}: seals, promises and reads receipts {batch}", moved, NOTHING
            case "receipts":
                yield from self._receipts(engine, world, index, here)
            case "finalize" if self.early and local.early == UNREAD:
                read = world.local(index, local._replace(early=world.top))
                yield f"{here}: reads v{len(world.journal) - 1} ahead", read, NOTHING
            case "finalize":
                event: Event = FinalizeDone()
                if (step, attempt, "manifest") in world.objects:
                    event = FinalizeFailed(Failure(process=0, host="h", phase="finalize", cause="exists"))
                head = engine.head(world.top)
                name = LATE if head and head.epoch > local.epoch else "manifest"
                following = world.add((step, attempt, name))
                moved = self._advance(engine, following, index, event, type(event))
                yield f"{here}: manifest", moved, NOTHING

    def _stored_receipts(self, engine: Engine, local: Local, world: World) -> list[tuple[int, str]]:
        """(process, kind) of the other processes' receipts that are there and not counted yet."""
        step, attempt = self.current(engine, local)
        return [
            (process, kind)
            for process in engine.attempts[local.attempt].missing
            for kind in ("yes", "short", "no")
            if process and (step, attempt, f"receipt-{process}-{kind}") in world.objects
        ]

    def _receipts(self, engine: Engine, world: World, index: int, here: str) -> Iterator[Move]:
        local = world.actors[index]
        step, attempt = self.current(engine, local)
        for process, kind in self._stored_receipts(engine, local, world):
            event = ReceiptsRead((receipt(step, attempt, process, kind),))
            moved = self._advance(engine, world, index, event, (process, kind))
            yield f"{here}: reads receipt {process}, {kind}", moved, NOTHING
        late = DeadlinePassed(1.0, {})
        yield f"{here}: deadline", self._advance(engine, world, index, late, "late"), NOTHING

    def _advance(self, engine: Engine, world: World, index: int, event: Event, key: object) -> World:
        local = world.actors[index]
        number, what = engine.advance(local.attempt, event, key)
        pc = {"": "receipts", "finalize": "finalize", "commit": "read", "abort": "read"}[what]
        early = local.early if what in ("", "commit") else UNREAD  # an abort reads the head when it is journalled
        return world.local(index, local._replace(attempt=number, pc=pc, task=what if pc == "read" else "", early=early))

    def after(self, engine: Engine, world: World, index: int, outcome: str) -> World:
        local = world.actors[index]
        known = max(local.known, engine.heads[local.want].version) if outcome == "done" else local.known
        clean = local._replace(task="", want=-1, known=known)
        if outcome == "fenced":
            if local.task in ("commit", "abort"):
                head = engine.heads[world.top]
                event = FencedOff(head.epoch, head.writer)
                number, _ = engine.advance(local.attempt, event, ("fenced", head.epoch, head.writer))
                assert engine.phase(number) is Phase.FENCED
            return world.local(index, clean._replace(pc="fenced"))
        if local.task == "open":
            clean = clean._replace(todo=())
            if outcome == "refused":  # another job has committed meanwhile: compared again
                return world.local(index, clean._replace(pc="compare"))
            if outcome != "done":
                return world.local(index, clean._replace(pc="failed"))
            return world.local(index, clean._replace(pc="stage", epoch=engine.heads[local.want].epoch))
        saved = False
        if outcome in ("done", "none"):
            number, _ = engine.advance(local.attempt, Appended(), "appended")
            saved = engine.phase(number) is Phase.COMMITTED
        if saved:
            world = world._replace(acked=world.acked | {self.current(engine, local)})
        return world.local(index, next_save(self.saves, clean, saved))


def named(engine: Engine, saves: tuple[int, ...], local: Local) -> tuple[int, str]:
    """(step, attempt) of an actor's current save: epoch and the step's counter, computed by each process alone."""
    step = saves[local.save]
    return step, engine.rules.attempt_name(local.epoch, saves[: local.save + 1].count(step))


def next_save(saves: tuple[int, ...], local: Local, saved: bool) -> Local:
    following = local.save + 1
    while saved and following < len(saves) and saves[following] == saves[local.save]:
        following += 1  # the second of two equal steps is a retry
    pc = "stage" if following < len(saves) else "closed"
    return local._replace(pc=pc, save=following, attempt=-1, todo=())


@dataclass(frozen=True)
class Worker:
    """`process` of the incarnation whose coordinator is actor `boss`. `kinds`: how its part of a save may go."""

    name: str
    boss: int
    saves: tuple[int, ...]
    kinds: tuple[str, ...]
    process: int = 1

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc == "start":
            epoch = world.actors[self.boss].epoch
            if epoch:  # told by process 0, on the main thread
                yield f"{self.name}: starts", world.local(index, local._replace(pc="stage", epoch=epoch)), NOTHING
            return
        if local.pc in ENDED:
            return
        step, attempt = named(engine, self.saves, local)
        here = f"{self.name}: {step} {attempt}"

        def moved(after: World, pc: str) -> World:
            return after.local(index, local._replace(pc=pc))

        kind = local.pc.rpartition("-")[2]
        match local.pc.partition("-")[0]:
            case "stage":
                for kind in self.kinds:
                    name = f"data-{self.process}" if kind == "yes" else f"part-{self.process}"
                    following = world.add((step, attempt, name), volatile=True)
                    pc = f"seal-{kind}" if engine.rules.seals_first and kind != "no" else f"receipt-{kind}"
                    yield f"{here}: writes, {kind}", moved(following, pc), Effect("write", step, attempt)
            case "seal":
                own = {(step, attempt, f"{name}-{self.process}") for name in ("data", "part")}
                sealed = world.volatile - own
                pc = f"receipt-{kind}" if engine.rules.seals_first else "await"
                yield f"{here}: seals", moved(world._replace(volatile=sealed), pc), NOTHING
            case "receipt":
                pc = "await" if engine.rules.seals_first or kind == "no" else f"seal-{kind}"
                signed = world.add((step, attempt, f"receipt-{self.process}-{kind}"))
                yield f"{here}: receipt, {kind}", moved(signed, pc), NOTHING
            case "await":
                yield from self._await(engine, world, index, step, attempt)
            case "report":
                after = world._replace(durable=len(world.journal), acked=world.acked | {(step, attempt)})
                yield f"{here}: settles and reports", after.local(index, next_save(self.saves, local, True)), NOTHING

    def _await(self, engine: Engine, world: World, index: int, step: int, attempt: str) -> Iterator[Move]:
        """DecisionReader: the decision as the journal tells it, or an abort by signal."""
        local = world.actors[index]
        here = f"{self.name}: {step} {attempt}"
        head = engine.head(world.top)
        again = next_save(self.saves, local, False)
        assert head is not None
        if any(live.id == (step, attempt) for live in head.live):
            if engine.rules.settles_before_report:
                yield f"{here}: finds it committed", world.local(index, local._replace(pc="report")), NOTHING
            else:
                after = world._replace(acked=world.acked | {(step, attempt)})
                yield f"{here}: reports what it found", after.local(index, next_save(self.saves, local, True)), NOTHING
        elif head.epoch > local.epoch:
            yield f"{here}: fenced", world.local(index, local._replace(pc="fenced")), NOTHING
        elif any(gone.id == (step, attempt) for gone in head.retired):
            yield f"{here}: finds it aborted", world.local(index, again), NOTHING
        boss = world.actors[self.boss]
        if boss.save > local.save or boss.pc in ENDED:
            yield f"{here}: is told it failed", world.local(index, again), NOTHING


def late_puts(engine: Engine, world: World) -> Iterator[Move]:
    """A put whose sender has given up lands after all."""
    for want in world.flying:
        if engine.heads[want].version == len(world.journal):
            left = list(world.flying)
            left.remove(want)
            landed = world._replace(journal=(*world.journal, want), flying=tuple(left))
            yield (
                f"a late put of v{engine.heads[want].version} lands",
                landed._replace(durable=len(landed.journal)),
                NOTHING,
            )


def normal(engine: Engine, world: World) -> World:
    """Puts that can never land any more are forgotten: their version is taken."""
    flying = tuple(want for want in world.flying if engine.heads[want].version >= len(world.journal))
    return world._replace(flying=flying) if flying != world.flying else world
