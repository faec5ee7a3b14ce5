"""What `orchestrator doctor` says of the memory tiers on this machine: what may be lost, whether the next step has
room, and what other runs have left. Reads only, and only where this machine has tiers of the run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.finding import ExaminedRun, Finding
from orchestrator.cli.held import HeldHere, HeldNow, placement
from orchestrator.rules.placement import Placement
from orchestrator.run import tier_directory
from orchestrator.run.tier_room import Room, Seen

_LEFT_S = 86400.0  # a run that has written nothing to its tier for so long is most likely over
_MORE_ROOM = (
    "give the tier more room (docker: --shm-size; Kubernetes: an emptyDir in memory), raise bytes_max of oc.memory, or "
    "hold fewer steps (keep)"
)


def tiers(run: ExaminedRun) -> Iterator[Finding]:
    """As far as this machine knows."""
    here = HeldHere(run.store)
    if not (paths := here.paths()):
        yield Finding("tiers", "ok", "this machine holds no steps of the run in memory")
        return
    if placed := placement(paths):
        yield from copies(placed, run.head.epoch)
    found = here.now(run.head)
    yield from steps(found)
    seen = Room(os.path.dirname(paths[0])).measure()
    if found:
        yield room(found[0], seen)
    yield from left(paths[0])


def copies(placed: Placement, epoch: int) -> Iterator[Finding]:
    """Whether they are where they were asked for."""
    if placed.epoch < epoch:
        text = f"what is held here is of start {placed.epoch} of the job; the run is at {epoch}, which holds none here"
        yield Finding("tiers", "ok", text)
        return
    survives = f"a held step survives the loss of {placed.survives}"
    for note in placed.notes:
        do = (
            f"start the job where hosts differ by {placed.asked}, say with ORCHESTRATOR_DOMAIN what each is in, or ask "
        )
        yield Finding("tiers", "warn", f"{note}; {survives}", f"{do}for what can be had: oc.memory(copies=, domain=)")
    if not placed.notes:
        yield Finding("tiers", "ok", survives)


def steps(found: tuple[HeldNow, ...]) -> Iterator[Finding]:
    """Those that a restart would want."""
    for one in found:
        if one.newer and one.is_lost:
            do = "nothing, while the job runs: it holds the next one; a start now goes on from an older step"
            yield Finding("tiers", "warn", f"step {one.step} cannot be restored from memory: {one.problem}", do)


def room(newest: HeldNow, seen: Seen) -> Finding:
    """Whether a step as large as the newest can be held beside it, once all older ones have made room."""
    kept = max((count for attempt, count in seen.attempts.items() if attempt.step == newest.step), default=0)
    older = sum(seen.attempts.values()) - kept
    free, need = seen.room + older, kept
    text = (
        f"the next step needs about {render.size(need)} here beside the newest; there are {render.size(max(0, free))}"
    )
    if seen.limit is not None:
        text += f" (bytes_max is {render.size(seen.limit)}, {render.size(seen.used)} of it used)"
    return Finding("tiers", "ok", text) if free >= need else Finding("tiers", "warn", text, _MORE_ROOM)


def left(path: str) -> Iterator[Finding]:
    """What other runs hold here and have not changed for a day."""
    now = time.time()
    for other in tier_directory.other_runs(path):
        changed = newest_change(other)
        if now - changed > _LEFT_S and (used := Room(other).measure().used):
            text = f"{other}: another run holds {render.size(used)} here, last changed {render.age(now - changed)}"
            yield Finding("tiers", "warn", text, f"if that job is over: rm -r {other}")


def newest_change(path: str) -> float:
    """When something was last made or removed below a directory, in seconds since the epoch."""
    return max((os.lstat(where).st_mtime for where, _, _ in os.walk(path)), default=time.time())
