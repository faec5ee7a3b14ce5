"""Small runs in one process that hold steps in memory, in `tier` beside the run's root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orchestrator as oc
from orchestrator.run import tier_directory
from tests.support.runs import LIKE, state, store_of


def agent(root: Path, every: int = 2, save: int = 10, **tier: Any) -> oc.Agent:
    place = root.parent / "tier"
    place.mkdir(exist_ok=True)
    return oc.Agent(root, save=oc.every(save), tiers=[oc.memory(every=every, directory=place, **tier)])


def train(running: oc.Agent, *steps: int) -> None:
    for step in steps:
        running.save(step, state(step), process_state=f"at {step}".encode(), extra={"at": step})
        running._saves.settle()
        running._holding.settle()


def crash(running: oc.Agent) -> None:
    """As far as what is stored goes: a program that dies releases nothing."""
    running.finish()


def held_dir(root: Path) -> Path:
    run = tier_directory.identity(store_of(root))
    assert run
    return Path(tier_directory.of_process(str(root.parent / "tier"), run, 0))


def crashed_at_14(root: Path) -> Path:
    """A run that saved steps 0 and 10 and holds 12 and 14."""
    running = agent(root)
    assert running.restore(LIKE) is None
    train(running, *range(15))
    crash(running)
    return root
