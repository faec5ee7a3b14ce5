"""Small runs in one process, and what is in them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from msgspec import structs

import orchestrator as oc
from orchestrator.arrays import PendingWrite
from orchestrator.policy import last
from orchestrator.rules import chunk_index, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from tests.support import builders

LIKE = {"w": jnp.zeros(512), "count": 0}  # large enough for a data file of its own


def state(step: int) -> dict[str, Any]:
    return {"w": jnp.full(512, float(step)), "count": step}


def store_of(root: Path) -> JournalStore:
    return JournalStore(PosixStorage(str(root)), "test")


def journal_of(root: Path) -> list[Head]:
    return list(store_of(root).entries())


def kinds(root: Path) -> list[str]:
    return [head.event.kind for head in journal_of(root)]


def now(**more: Any) -> oc.Options:
    return oc.Options(**{"async_save": False, "on_save_failure": "raise", **more})


def fill(root: Path, *steps: int, **arguments: Any) -> None:
    """A run with these steps."""
    with oc.Agent(root, options=now(), **arguments) as agent:
        for step in steps:
            assert agent.save(step, state(step), extra={"at": step}, process_state=f"reader at {step}".encode())


def merge_alone(pending: PendingWrite) -> None:
    """What the coordinator does of a write of one process, without a run around it."""
    files = tuple(structs.replace(entry, path=keys.STATE + entry.path) for entry in pending.files)
    receipt = builders.receipt(files=files, places=pending.places(files), small=pending.small)
    pending.merge(chunk_index.entries([receipt]))


def two_steps(root: Path) -> JournalStore:
    """Step 1 committed and retired, step 2 committed; step 1's data is there."""
    store = JournalStore(PosixStorage(str(root)), "test")
    store.append(journal.open_epoch)
    for step in (1, 2):
        store.storage.create(AttemptId(step, builders.FIRST).manifest_key, b"{}")
        entry = builders.live(step)
        store.append(partial(journal.commit, epoch=1, entry=entry, keep=last(1)))
    return store
