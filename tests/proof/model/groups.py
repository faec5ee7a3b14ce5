"""Processes that sign together: `Member` hands its receipt to `Leader`, which stores what it has as one object.

A message is no object: the leader may take it while its member waits, or never. So a message that is lost or late, a
leader that is dead, slow or a zombie, and a member that gives its leader up too early are all among the moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .rules import Engine
from .world import NOTHING, Local, Move, Object, Worker, World, named


@dataclass(frozen=True)
class Member(Worker):
    process: int = 2

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        state, _, kind = local.pc.partition("-")
        if state in ("receipt", "handed") and kind == "yes":
            step, attempt = named(engine, self.saves, local)
            here = f"{self.name}: {step} {attempt}"
            if state == "receipt":
                yield f"{here}: hands its receipt over", world.local(index, local._replace(pc="handed-yes")), NOTHING
                return
            alone = world.add((step, attempt, f"receipt-{self.process}-yes"))
            yield f"{here}: stores its receipt itself", alone.local(index, local._replace(pc="await")), NOTHING
            yield from self._await(engine, world, index, step, attempt)
            return
        if state == "seal" and kind == "yes" and not engine.rules.hands_what_is_durable:
            yield f"{self.name}: hands its receipt over", world.local(index, local._replace(pc="handed-yes")), NOTHING
        yield from super().moves(engine, world, index)


@dataclass(frozen=True)
class Leader(Worker):
    """member: which actor its member is."""

    member: int = 2

    def moves(self, engine: Engine, world: World, index: int) -> Iterator[Move]:
        local = world.actors[index]
        if local.pc not in ("receipt-yes", "await"):
            yield from super().moves(engine, world, index)
            return
        step, attempt = named(engine, self.saves, local)
        own = () if local.pc == "await" else ((step, attempt, f"receipt-{self.process}-yes"),)
        theirs = self._handed(engine, world, local, step, attempt)
        for signed in dict.fromkeys([own, (*own, *theirs)]):
            if signed:
                after = world.add(*signed).local(index, local._replace(pc="await"))
                yield f"{self.name}: {step} {attempt}: stores {len(signed)} receipts as one", after, NOTHING
        if local.pc == "await":
            yield from self._await(engine, world, index, step, attempt)

    def _handed(self, engine: Engine, world: World, local: Local, step: int, attempt: str) -> tuple[Object, ...]:
        """The receipt that its member has handed over in this save, and that is not stored yet."""
        member = world.actors[self.member]
        handed = member.pc == "handed-yes" or not engine.rules.signs_what_is_handed
        known: Object = (step, attempt, "receipt-2-yes")
        same = (member.epoch, member.save) == (local.epoch, local.save)
        return (known,) if same and handed and known not in world.objects else ()
